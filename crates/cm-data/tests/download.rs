//! The download against a server on loopback that serves an archive of CIFAR-10's form and fails in chosen ways.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cm_data::download::{Checksum, Download, Progress};
use cm_data::{Dataset, Error, Split, cifar};
use md5::{Digest, Md5};

/// What the server does with one connection; after the list it behaves well.
#[derive(Clone, Copy)]
enum Act {
    /// Sends as many bytes of the body and closes.
    DropAfter(usize),
    /// Ignores Range and sends everything.
    NoRange,
    /// Answers with this status and no body.
    Status(u16),
    /// Says that it continues, but from the start.
    WrongRange,
}

struct Server {
    url: String,
    /// The Range header of each request, or an empty string.
    requests: Arc<Mutex<Vec<String>>>,
}

fn serve(body: Vec<u8>, acts: Vec<Act>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/cifar-10-binary.tar.gz", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = requests.clone();
    // Ends with the test's process.
    std::thread::spawn(move || {
        let mut acts = acts.into_iter();
        for stream in listener.incoming().flatten() {
            // A client that hangs up early is part of the game.
            let _ = answer(stream, &body, acts.next(), &seen);
        }
    });
    Server { url, requests }
}

fn answer(
    mut stream: TcpStream,
    body: &[u8],
    act: Option<Act>,
    seen: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut range = String::new();
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?.to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("range: ") {
            range = value.to_string();
        }
    }
    seen.lock().unwrap().push(range.clone());
    let start: Option<usize> =
        range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')).map(|n| n.parse().unwrap());
    if let Some(Act::Status(code)) = act {
        return write!(stream, "HTTP/1.1 {code} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let total = body.len();
    let start = match act {
        Some(Act::NoRange) => None,
        _ => start,
    };
    match start {
        Some(start) if start >= total => {
            return write!(
                stream,
                "HTTP/1.1 416 X\r\nContent-Range: bytes */{total}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        Some(start) => {
            let first = if matches!(act, Some(Act::WrongRange)) { 0 } else { start };
            write!(stream, "HTTP/1.1 206 X\r\nContent-Range: bytes {first}-{}/{total}\r\n", total - 1)?;
        }
        None => write!(stream, "HTTP/1.1 200 OK\r\n")?,
    }
    let rest = &body[start.unwrap_or(0)..];
    write!(stream, "Content-Length: {}\r\nConnection: close\r\n\r\n", rest.len())?;
    let send = match act {
        Some(Act::DropAfter(count)) => count.min(rest.len()),
        _ => rest.len(),
    };
    stream.write_all(&rest[..send])?;
    stream.flush()
}

/// A small set in the published layout, packed. Random pixels, so that compression leaves it long.
fn archive() -> Vec<u8> {
    let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gz);
    let names = (1..=5).map(|i| format!("data_batch_{i}.bin")).chain(["test_batch.bin".to_string()]);
    let mut state = 1_u32;
    for name in names {
        let mut bytes = Vec::new();
        for record in 0..8 {
            bytes.push(record);
            for _ in 0..3072 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                bytes.push((state >> 24) as u8);
            }
        }
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, format!("{}/{name}", cifar::FOLDER), bytes.as_slice()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn md5(bytes: &[u8]) -> String {
    Md5::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn download(server: &Server, folder: &Path, md5: String) -> Download {
    let pause = Duration::from_millis(1);
    let checksum = Checksum::Md5(md5);
    Download { url: server.url.clone(), checksum, attempts: 2, pause, ..Download::cifar10(folder) }
}

fn quiet(_: Progress) {}

#[test]
fn a_fetched_archive_has_its_name_and_is_a_set() {
    let body = archive();
    let server = serve(body.clone(), vec![]);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new/folder");
    let fetch = download(&server, &folder, md5(&body));
    let mut seen = Vec::new();
    let path = fetch.run(&mut |p| seen.push(p)).unwrap();
    assert_eq!(path, folder.join("cifar-10-binary.tar.gz"));
    assert_eq!(std::fs::read(&path).unwrap(), body);
    assert!(!fetch.partial().exists());
    assert!(seen.windows(2).all(|p| p[0].done < p[1].done));
    let total = body.len() as u64;
    assert_eq!(seen.last(), Some(&Progress { done: total, total: Some(total) }));
    let set = cifar::read(&folder, Split::Train, true).unwrap();
    assert_eq!((set.len(), set.labels().unwrap()[7]), (40, 7));
    // There already: no second request.
    fetch.run(&mut quiet).unwrap();
    assert_eq!(server.requests.lock().unwrap().len(), 1);
}

#[test]
fn a_line_that_drops_is_taken_up_where_it_tore() {
    let body = archive();
    let server = serve(body.clone(), vec![Act::DropAfter(5000), Act::DropAfter(70_000)]);
    let dir = tempfile::tempdir().unwrap();
    let path = download(&server, dir.path(), md5(&body)).run(&mut quiet).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), body);
    assert_eq!(*server.requests.lock().unwrap(), ["", "bytes=5000-", "bytes=75000-"]);
}

#[test]
fn a_later_run_resumes_what_an_earlier_one_left() {
    let body = archive();
    let server = serve(body.clone(), vec![]);
    let dir = tempfile::tempdir().unwrap();
    let fetch = download(&server, dir.path(), md5(&body));
    std::fs::write(fetch.partial(), &body[..12_345]).unwrap();
    let mut first = None;
    fetch.run(&mut |p| first = first.or(Some(p))).unwrap();
    assert!(first.unwrap().done > 12_345);
    assert_eq!(*server.requests.lock().unwrap(), ["bytes=12345-"]);
    assert_eq!(std::fs::read(&fetch.to).unwrap(), body);
}

#[test]
fn a_part_that_is_whole_already_is_only_checked() {
    let body = archive();
    let server = serve(body.clone(), vec![]);
    let dir = tempfile::tempdir().unwrap();
    let fetch = download(&server, dir.path(), md5(&body));
    std::fs::write(fetch.partial(), &body).unwrap();
    fetch.run(&mut quiet).unwrap();
    assert_eq!(std::fs::read(&fetch.to).unwrap(), body);
}

#[test]
fn a_server_without_ranges_or_with_wrong_ones_sends_it_anew() {
    let body = archive();
    for act in [Act::NoRange, Act::WrongRange] {
        let server = serve(body.clone(), vec![act]);
        let dir = tempfile::tempdir().unwrap();
        let fetch = download(&server, dir.path(), md5(&body));
        std::fs::write(fetch.partial(), &body[..999]).unwrap();
        fetch.run(&mut quiet).unwrap();
        assert_eq!(std::fs::read(&fetch.to).unwrap(), body);
    }
}

#[test]
fn a_part_of_another_file_is_thrown_away_after_one_try() {
    let body = archive();
    for stale in [vec![7; 999], vec![7; body.len() + 5]] {
        let server = serve(body.clone(), vec![]);
        let dir = tempfile::tempdir().unwrap();
        let fetch = download(&server, dir.path(), md5(&body));
        std::fs::write(fetch.partial(), stale).unwrap();
        fetch.run(&mut quiet).unwrap();
        assert_eq!(std::fs::read(&fetch.to).unwrap(), body);
    }
}

#[test]
fn a_wrong_md5_leaves_no_file_behind() {
    let body = archive();
    let server = serve(body.clone(), vec![]);
    let dir = tempfile::tempdir().unwrap();
    let fetch = download(&server, dir.path(), cifar::MD5.into());
    let error = fetch.run(&mut quiet).unwrap_err();
    assert!(matches!(&error, Error::Checksum { got, .. } if *got == md5(&body)), "{error}");
    assert!(!fetch.to.exists() && !fetch.partial().exists());
    // A wrong file that the user put there is named, not deleted.
    std::fs::write(&fetch.to, "mine").unwrap();
    assert!(matches!(fetch.run(&mut quiet), Err(Error::Checksum { .. })));
    assert_eq!(std::fs::read(&fetch.to).unwrap(), b"mine");
}

#[test]
fn another_file_is_checked_by_the_digits_in_its_name_and_has_its_own_way_out() {
    use sha2::{Digest, Sha256};
    let body = archive();
    let digits: String = Sha256::digest(&body).iter().take(4).map(|b| format!("{b:02x}")).collect();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join(format!("weights-{digits}.pth"));
    let fetch = |digits: &str, acts| {
        let server = serve(body.clone(), acts);
        let checksum = Checksum::Sha256Prefix(digits.into());
        Download::new(&server.url, to.clone(), checksum, "and convert it").run(&mut quiet)
    };
    let error = fetch(&digits, vec![Act::Status(404)]).unwrap_err().to_string();
    assert!(error.contains(&format!("put weights-{digits}.pth into")), "{error}");
    assert!(error.ends_with("and convert it"), "{error}");
    assert!(matches!(fetch("00000000", vec![]), Err(Error::Checksum { kind: "SHA-256", .. })));
    assert_eq!(std::fs::read(fetch(&digits, vec![]).unwrap()).unwrap(), body);
}

#[test]
fn a_server_that_fails_for_good_is_one_line_with_the_way_out() {
    let body = archive();
    let dir = tempfile::tempdir().unwrap();
    // 404: no second attempt. 503: as many as allowed.
    for (acts, requests) in [(vec![Act::Status(404)], 1), (vec![Act::Status(503); 9], 2)] {
        let server = serve(body.clone(), acts);
        let error = download(&server, dir.path(), md5(&body)).run(&mut quiet).unwrap_err().to_string();
        let place = dir.path().display().to_string();
        for part in
            ["the server says", &format!("put cifar-10-binary.tar.gz into {place}"), "cargo xtask demo"]
        {
            assert!(error.contains(part), "{error} lacks {part}");
        }
        assert!(!error.contains('\n'));
        assert_eq!(server.requests.lock().unwrap().len(), requests);
    }
}

#[test]
fn without_a_network_the_error_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    // A port that was free a moment ago: nobody listens there.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = Server { url: format!("http://127.0.0.1:{port}/x"), requests: Arc::default() };
    let error = download(&server, dir.path(), cifar::MD5.into()).run(&mut quiet).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot download http://127.0.0.1") && error.contains("cargo xtask demo"),
        "{error}"
    );
}

#[test]
fn two_downloads_of_one_file_do_not_mix() {
    let body = archive();
    let server = serve(body.clone(), vec![]);
    let dir = tempfile::tempdir().unwrap();
    let fetch = download(&server, dir.path(), md5(&body));
    let held = std::fs::File::create(fetch.partial()).unwrap();
    held.lock().unwrap();
    let error = fetch.run(&mut quiet).unwrap_err().to_string();
    assert!(error.contains("another process is downloading it"), "{error}");
}
