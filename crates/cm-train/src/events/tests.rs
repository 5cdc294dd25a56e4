use super::*;

/// A field of a message: its number and its bytes. Numbers come as eight bytes, little-endian.
type Field = (u64, Vec<u8>);

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for place in 0.. {
        let (byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// Reads any message, in its order.
fn fields(mut bytes: &[u8]) -> Vec<Field> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                fields.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let (field, rest) = bytes.split_at(length);
        bytes = rest;
        fields.push((key >> 3, field.to_vec()));
    }
    fields
}

fn field(bytes: &[u8], number: u64) -> Vec<u8> {
    let mut found = fields(bytes).into_iter().filter(|(n, _)| *n == number);
    found.next().unwrap_or_else(|| panic!("no field {number}")).1
}

fn number(bytes: Vec<u8>) -> u64 {
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// The checksum bit by bit, as the polynomial defines it.
fn plain_masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    let crc = !crc;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The data of every record of the run's file, whose checksums must hold up to the last byte.
fn events(folder: &Path) -> Vec<Vec<u8>> {
    let file = fs::read(folder.join(EVENTS_FILE)).unwrap();
    let (mut rest, mut events) = (file.as_slice(), Vec::new());
    let check = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    while !rest.is_empty() {
        assert_eq!(check(&rest[8..12]), plain_masked_crc(&rest[..8]));
        let end = 12 + number(rest[..8].to_vec()) as usize;
        assert_eq!(check(&rest[end..end + 4]), plain_masked_crc(&rest[12..end]));
        events.push(rest[12..end].to_vec());
        rest = &rest[end + 4..];
    }
    events
}

/// Step, tag and value of all scalars.
fn scalars(folder: &Path) -> Vec<(u64, String, f32)> {
    let mut scalars = Vec::new();
    for event in &events(folder)[1..] {
        let step = number(field(event, 2));
        for (_, value) in fields(&field(event, 5)) {
            let float = f32::from_le_bytes(field(&value, 2).try_into().unwrap());
            scalars.push((step, String::from_utf8(field(&value, 1)).unwrap(), float));
        }
    }
    scalars
}

fn write(folder: &Path, from: u64, to: u64) {
    let mut file = EventFile::open(folder, from).unwrap();
    for step in from + 1..=to {
        file.scalars(step, &[("loss", step as f64 / 2.0)]).unwrap();
    }
}

fn steps(folder: &Path) -> Vec<u64> {
    scalars(folder).iter().map(|(step, tag, value)| (*step, tag.as_str(), *value)).map(check_value).collect()
}

fn check_value((step, tag, value): (u64, &str, f32)) -> u64 {
    assert_eq!((tag, value), ("loss", step as f32 / 2.0));
    step
}

#[test]
fn the_checksum_is_that_of_its_publication() {
    // RFC 3720, B.4, masked as TensorFlow's records are.
    let masked = |crc: u32| crc.rotate_right(15).wrapping_add(0xa282_ead8);
    assert_eq!(wire::masked_crc32c(&[0; 32]), masked(0x8a91_36aa));
    assert_eq!(wire::masked_crc32c(&[0xff; 32]), masked(0x62a8_ab43));
    assert_eq!(wire::masked_crc32c(b"123456789"), masked(0xe306_9283));
}

#[test]
fn an_entry_is_the_row_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let entry = LogEntry {
        step: 300,
        images: 2400,
        loss: 0.25,
        distance: 1.0,
        grad_norm: 3.0,
        grad_norm_max: 4.0,
        lr: 1e-3,
        num_scales: Some(11),
        stage: None,
        mu: None,
        by_sigma: Vec::new(),
        passed_over: 0,
        images_per_second: 512.5,
        seconds: 7.0,
    };
    EventFile::open(folder.path(), 0).unwrap().entry(&entry).unwrap();
    let first = &events(folder.path())[0];
    assert_eq!(field(first, 3), b"brain.Event:2");
    let time = f64::from_le_bytes(field(first, 1).try_into().unwrap());
    assert!(time > 1.6e9, "seconds since 1970: {time}");
    let expected = [
        ("images", 2400.0),
        ("loss", 0.25),
        ("grad_norm", 3.0),
        ("lr", 1e-3),
        ("images_per_second", 512.5),
        ("seconds", 7.0),
        ("num_scales", 11.0),
    ];
    let expected = expected.map(|(tag, value)| (300, tag.to_owned(), value));
    assert_eq!(scalars(folder.path()), expected, "and no μ, where there is none");
}

#[test]
fn images_are_png_files_with_their_size() {
    let folder = tempfile::tempdir().unwrap();
    let png: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let mut file = EventFile::of_run(folder.path()).unwrap();
    file.image(1 << 40, "samples/raw", [30, 20], &png).unwrap();
    let events = events(folder.path());
    assert_eq!((events.len(), number(field(&events[1], 2))), (2, 1 << 40));
    let value = field(&field(&events[1], 5), 1);
    assert_eq!(field(&value, 1), b"samples/raw");
    let image = field(&value, 4);
    assert_eq!([1, 2, 3].map(|n| number(field(&image, n))), [20, 30, 3]);
    assert_eq!(field(&image, 4), png);
}

#[test]
fn a_resumed_file_has_no_step_twice_and_no_torn_record() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 0, 200);
    write(folder.path(), 130, 150);
    assert!(steps(folder.path()).into_iter().eq(1..=150));
    let path = folder.path().join(EVENTS_FILE);
    let whole = fs::read(&path).unwrap();
    // Wherever the last record is cut, and whatever was written over its end.
    for cut in 1..30 {
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        write(folder.path(), 150, 151);
        assert!(steps(folder.path()).into_iter().eq((1..=149).chain([151])), "cut by {cut}");
    }
    for tail in [&[0xff; 40][..], &[0; 40], &u64::MAX.to_le_bytes()] {
        fs::write(&path, [&whole, tail].concat()).unwrap();
        write(folder.path(), 150, 151);
        assert!(steps(folder.path()).into_iter().eq(1..=151), "{tail:?}");
    }
}

#[test]
fn a_new_run_and_a_file_of_another_kind_start_anew() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 0, 5);
    write(folder.path(), 0, 2);
    assert_eq!(steps(folder.path()), [1, 2]);
    fs::write(folder.path().join(EVENTS_FILE), "no events at all, but text").unwrap();
    write(folder.path(), 2, 3);
    assert_eq!(steps(folder.path()), [3]);
}
