//! Fetching a published file: with progress, resumed where it tore, checked, and renamed into place.
//!
//! What has arrived lies in `NAME.partial` beside the final place and stays there on any failure, so that the next
//! attempt asks for the rest alone (HTTP Range). Only a file whose checksum is right gets its name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use md5::Md5;
use sha2::Sha256;
use ureq::Agent;
use ureq::http::StatusCode;
use ureq::http::header::{CONTENT_RANGE, RANGE};

use crate::digest;
use crate::error::{Error, Result, one_line};
use crate::formats::cifar;

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes on the disk.
    pub done: u64,
    /// Bytes in all, once the server has said so.
    pub total: Option<u64>,
}

/// What a published file is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checksum {
    /// Its MD5, 32 hexadecimal digits in lower case.
    Md5(String),
    /// The first hexadecimal digits of its SHA-256, in lower case: PyTorch's files carry eight of them in their names.
    Sha256Prefix(String),
}

impl Checksum {
    /// Compares a file with it.
    ///
    /// # Errors
    /// [`Error::Checksum`] with both digests; [`Error::Io`] if the file cannot be read.
    pub fn check(&self, path: &Path) -> Result<()> {
        let (kind, expected, digest) = match self {
            Self::Md5(expected) => ("MD5", expected, digest::file::<Md5>(path)?),
            Self::Sha256Prefix(expected) => ("SHA-256", expected, digest::file::<Sha256>(path)?),
        };
        let right = match self {
            Self::Md5(_) => digest == *expected,
            Self::Sha256Prefix(_) => digest.starts_with(expected.as_str()),
        };
        if right {
            return Ok(());
        }
        Err(Error::Checksum { path: path.into(), kind, expected: expected.clone(), got: digest })
    }
}

/// A file to fetch.
#[derive(Debug, Clone)]
pub struct Download {
    /// Its address.
    pub url: String,
    /// Where it goes.
    pub to: PathBuf,
    /// What it is known by.
    pub checksum: Checksum,
    /// What else a person may do who cannot fetch it, as the end of a sentence.
    pub otherwise: &'static str,
    /// Attempts in a row that may bring nothing; one that brings bytes starts the count anew.
    pub attempts: u32,
    /// The wait before the second of them; it doubles each time.
    pub pause: Duration,
}

/// What one request came to.
enum Outcome {
    /// The file is whole, as far as the server's length tells.
    Whole,
    /// The server or the line gave up, with the reason.
    Torn(String),
    /// Another attempt would end the same way.
    Refused(String),
}

impl Download {
    /// The file at `url`, into `to`.
    pub fn new(url: &str, to: PathBuf, checksum: Checksum, otherwise: &'static str) -> Self {
        Self { url: url.into(), to, checksum, otherwise, attempts: 4, pause: Duration::from_secs(1) }
    }

    /// CIFAR-10's binary archive, into `folder`.
    pub fn cifar10(folder: &Path) -> Self {
        let checksum = Checksum::Md5(cifar::MD5.into());
        let otherwise = "or run `cargo xtask demo`, which needs no download";
        Self::new(cifar::URL, folder.join(cifar::ARCHIVE), checksum, otherwise)
    }

    /// Where bytes gather until the file is whole.
    pub fn partial(&self) -> PathBuf {
        let mut name = self.to.clone().into_os_string();
        name.push(".partial");
        name.into()
    }

    /// Fetches the file, or returns at once if it is there with the right checksum. Returns its path.
    ///
    /// `progress` is called after each piece that was written.
    ///
    /// # Errors
    /// [`Error::Download`] says which file goes where by hand; [`Error::Checksum`] if the file that lies there, or
    /// the one that came, is another; [`Error::Io`] if the disk refuses.
    pub fn run(&self, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
        if self.to.is_file() {
            self.checksum.check(&self.to)?;
            return Ok(self.to.clone());
        }
        let folder = self.to.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let path = self.partial();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(self.failed("another process is downloading it".into()));
            }
            Err(TryLockError::Error(cause)) => return Err(Error::io("lock", &path)(cause)),
        }
        let resumed = self.fetch(&mut file, &path, progress)?;
        let mut checked = self.checksum.check(&path);
        if resumed && matches!(checked, Err(Error::Checksum { .. })) {
            // The older part may be of another version; from the start it is the server's file or nobody's.
            file.set_len(0).map_err(Error::io("write", &path))?;
            self.fetch(&mut file, &path, progress)?;
            checked = self.checksum.check(&path);
        }
        if matches!(checked, Err(Error::Checksum { .. })) {
            // Kept, it would be resumed from and fail again for ever.
            let _ = std::fs::remove_file(&path);
        }
        checked?;
        file.sync_all().map_err(Error::io("write", &path))?;
        drop(file);
        std::fs::rename(&path, &self.to).map_err(Error::io("write", &self.to))?;
        Ok(self.to.clone())
    }

    /// Fills the partial file up. Returns whether it held something before.
    fn fetch(&self, file: &mut File, path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<bool> {
        let length = |file: &File| Ok(file.metadata().map_err(Error::io("read", path))?.len());
        let before = length(file)?;
        let agent = agent();
        let mut idle = 0;
        loop {
            let start = length(file)?;
            let reason = match self.request(&agent, file, path, start, progress)? {
                Outcome::Whole => return Ok(before > 0),
                Outcome::Refused(reason) => return Err(self.failed(reason)),
                Outcome::Torn(reason) => reason,
            };
            idle = if length(file)? > start { 0 } else { idle + 1 };
            if idle >= self.attempts {
                return Err(self.failed(format!("{reason} ({idle} attempts)")));
            }
            std::thread::sleep(self.pause * 2_u32.saturating_pow(idle.saturating_sub(1).min(6)));
        }
    }

    /// One request for what lies behind `start`.
    fn request(
        &self,
        agent: &Agent,
        file: &mut File,
        path: &Path,
        start: u64,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Outcome> {
        let mut request = agent.get(&self.url);
        if start > 0 {
            request = request.header(RANGE, format!("bytes={start}-"));
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(e) => return Ok(Outcome::Torn(one_line(&e.to_string()))),
        };
        let (parts, body) = response.into_parts();
        let range = parts.headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).and_then(content_range);
        let (at, total) = match (parts.status, range) {
            (StatusCode::PARTIAL_CONTENT, Some((Some(first), total))) if first == start => (start, total),
            // Without ranges the whole file comes again.
            (StatusCode::OK, _) => (0, body.content_length()),
            (StatusCode::RANGE_NOT_SATISFIABLE, Some((None, Some(total)))) if total == start => {
                return Ok(Outcome::Whole);
            }
            (StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT, _) if start > 0 => {
                file.set_len(0).map_err(Error::io("write", path))?;
                return Ok(Outcome::Torn("the server does not continue where the part ends".into()));
            }
            (status, _) if status.is_server_error() => {
                return Ok(Outcome::Torn(format!("the server says {status}")));
            }
            (status, _) => return Ok(Outcome::Refused(format!("the server says {status}"))),
        };
        file.set_len(at).map_err(Error::io("write", path))?;
        file.seek(SeekFrom::Start(at)).map_err(Error::io("write", path))?;
        let mut done = at;
        let mut reader = body.into_reader();
        let mut piece = vec![0; 1 << 16];
        loop {
            let got = match reader.read(&mut piece) {
                Ok(0) => break,
                Ok(got) => got,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Outcome::Torn(one_line(&e.to_string()))),
            };
            file.write_all(&piece[..got]).map_err(Error::io("write", path))?;
            done += got as u64;
            progress(Progress { done, total });
        }
        match total {
            Some(total) if done < total => {
                Ok(Outcome::Torn(format!("the line ended at {done} of {total} bytes")))
            }
            _ => Ok(Outcome::Whole),
        }
    }

    fn failed(&self, reason: String) -> Error {
        let file = self.to.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let place = self.to.parent().unwrap_or(Path::new(".")).to_path_buf();
        Error::Download { url: self.url.clone(), reason, file, place, otherwise: self.otherwise }
    }
}

fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        // The archive's own bytes: a client that undoes a transfer's gzip would count and append other ones.
        .accept_encoding("identity")
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .build()
        .into()
}

/// `bytes 5-9/10` → (5, 10) and `bytes */10` → (none, 10).
fn content_range(text: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-').and_then(|(first, _)| first.trim().parse().ok());
    Some((first, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_standard_writes_them() {
        assert_eq!(content_range("bytes 5-9/10"), Some((Some(5), Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((Some(5), None)));
        assert_eq!(content_range("bytes */10"), Some((None, Some(10))));
        assert_eq!(content_range("lines 5-9/10"), None);
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        // RFC 1321, A.5
        let md5 = |digits: &str| Checksum::Md5(digits.into()).check(&path);
        md5("900150983cd24fb0d6963f7d28e17f72").unwrap();
        assert!(md5("900150983cd24fb0").is_err(), "a part of an MD5 is not enough");
        let error = md5("00").unwrap_err().to_string();
        assert!(error.contains("expected MD5 00, got 900150983cd24fb0d6963f7d28e17f72"), "{error}");
        // FIPS 180-2, B.1
        let sha256 = |digits: &str| Checksum::Sha256Prefix(digits.into()).check(&path);
        sha256("ba7816bf").unwrap();
        let error = sha256("ba7816be").unwrap_err().to_string();
        assert!(error.contains("expected SHA-256 ba7816be, got ba7816bf8f01cfea4141"), "{error}");
    }
}
