//! What can go wrong with data, in sentences for the person who has to mend it.

use std::io;
use std::path::{Path, PathBuf};

use crate::dataset::Shape;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that a reader, the loader or the download reports.
///
/// Each message is one line: what was expected, what came, where, and what to do. The underlying error sits in
/// `cause`; its text is already in the message, so it is not repeated as a `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key of the data section has a value that does not fit, alone or beside another key.
    #[error("data: {key} = {value}: {reason}")]
    Spec {
        /// The key as written in the config.
        key: &'static str,
        /// The value as given (`unset` where it is missing).
        value: String,
        /// The allowed values, or why the two keys exclude each other.
        reason: String,
    },
    /// A key of the section `[augment]` has a value that does not fit.
    #[error("augment.{key} = {value}: {reason}")]
    Augment {
        /// The key.
        key: &'static str,
        /// Its value.
        value: f64,
        /// What is allowed.
        reason: &'static str,
    },
    /// Nothing of the expected form lies at the place that was given.
    #[error("no {what} at {}: expected {expected}; found {found}; {remedy}", path.display())]
    Missing {
        /// The kind of data, for people.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// The expected layout.
        expected: String,
        /// What is there instead.
        found: String,
        /// What to do.
        remedy: String,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried: `read`, `write`, `list`, …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// A file holds fewer or more bytes than its form demands.
    #[error("{file}: expected {expected} bytes {what}, got {got}; the file is {}", if got < expected { "truncated: fetch or copy it again" } else { "longer than its form allows" })]
    Length {
        /// The file, and the member inside an archive.
        file: String,
        /// What the bytes are.
        what: String,
        /// Bytes demanded.
        expected: u64,
        /// Bytes there.
        got: u64,
    },
    /// A file is not of the form that it was read as.
    #[error("{file}: expected {expected}, found {found}")]
    Format {
        /// The file, and the member inside an archive.
        file: String,
        /// The form that was expected.
        expected: String,
        /// What stood there.
        found: String,
    },
    /// A header claims a size that this crate refuses to allocate.
    #[error(
        "{file}: claims {claimed} {what}, more than the {limit} that are accepted; the header is damaged or hostile"
    )]
    TooLarge {
        /// The file, and the member inside an archive.
        file: String,
        /// What is counted.
        what: &'static str,
        /// The claim.
        claimed: u64,
        /// The limit.
        limit: u64,
    },
    /// An image, or a member of an archive, does not decode.
    #[error("{file}: cannot decode: {cause}; replace or remove the file")]
    Corrupt {
        /// The image file, and the archive around it.
        file: String,
        /// The decoder's reason, in one line.
        cause: String,
    },
    /// More images do not decode than may be passed over.
    #[error("{last}; {count} images do not decode, and max_corrupt = {most} are passed over")]
    TooManyCorrupt {
        /// What is wrong with the last of them.
        last: String,
        /// How many there are so far.
        count: usize,
        /// How many may be passed over.
        most: usize,
    },
    /// A label lies outside the classes.
    #[error("{file}: image {index}: label {value} is outside 0..={}", u64::from(*classes).saturating_sub(1))]
    Label {
        /// The file that says so.
        file: String,
        /// The image, counted from 0 within that file.
        index: usize,
        /// The label.
        value: i64,
        /// The number of classes.
        classes: u32,
    },
    /// An image has no label although others of the set do.
    #[error("{labels_from}: no label for {file}; label every image or set labels = \"none\"")]
    Unlabelled {
        /// The image.
        file: String,
        /// Where labels come from.
        labels_from: String,
    },
    /// An image is not of the size that the config or the rest of the set demands.
    #[error(
        "{file}: expected {expected_width}x{expected_height} pixels, got {width}x{height}; set resolution with fit = \"center_crop\" or \"stretch\" to scale on loading"
    )]
    Resolution {
        /// The image.
        file: String,
        /// Width demanded, in pixels.
        expected_width: usize,
        /// Height demanded, in pixels.
        expected_height: usize,
        /// Width found.
        width: usize,
        /// Height found.
        height: usize,
    },
    /// A set without a single image.
    #[error("{place}: no images: {reason}")]
    Empty {
        /// The set.
        place: String,
        /// What was looked for.
        reason: String,
    },
    /// A member of an archive has a name that leads out of the archive.
    #[error(
        "{}: refusing member {name:?}: names must be relative, without `..` and without control characters",
        archive.display()
    )]
    UnsafeName {
        /// The archive.
        archive: PathBuf,
        /// The member.
        name: String,
    },
    /// A member of an archive is not a plain file: a link would name bytes elsewhere.
    #[error("{}: refusing member {name:?}: it is a {what}, expected a plain file", archive.display())]
    UnsafeMember {
        /// The archive.
        archive: PathBuf,
        /// The member.
        name: String,
        /// What it is.
        what: &'static str,
    },
    /// An index or a buffer that does not fit the set: a fault of the calling program.
    #[error("{what}: expected {expected}, got {got}")]
    Argument {
        /// The argument.
        what: &'static str,
        /// What fits.
        expected: String,
        /// What came.
        got: String,
    },
    /// Two sets or a set and a network do not have the same image shape.
    #[error("{what}: expected images of {expected}, got {got}")]
    Shape {
        /// What was compared.
        what: String,
        /// The shape demanded.
        expected: Shape,
        /// The shape found.
        got: Shape,
    },
    /// A download did not come to its end.
    #[error(
        "cannot download {url}: {reason}; put {file} into {} by hand (the part fetched so far is kept and resumed), {otherwise}",
        place.display()
    )]
    Download {
        /// The address.
        url: String,
        /// The client's or the server's reason, in one line.
        reason: String,
        /// The file's name.
        file: String,
        /// The folder that it belongs into.
        place: PathBuf,
        /// What else a person may do.
        otherwise: &'static str,
    },
    /// A file's checksum is not the published one.
    #[error("{}: expected {kind} {expected}, got {got}; the file is damaged or another version: delete it and fetch it again", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The kind of checksum.
        kind: &'static str,
        /// The published digest, or the beginning of it that is known.
        expected: String,
        /// The digest found.
        got: String,
    },
    /// libtorch refused a copy.
    #[error("{what}: {}", one_line(cause.to_string().lines().next().unwrap_or_default()))]
    Torch {
        /// What was tried.
        what: &'static str,
        /// The whole message, which goes on with a C++ backtrace.
        cause: tch::TchError,
    },
    /// A thread of the loader ended without a result: a fault of this program or of a decoder.
    #[error("the loader's thread stopped at step {step}: {message}")]
    Worker {
        /// The step whose batch was due.
        step: u64,
        /// The panic's text.
        message: String,
    },
}

impl Error {
    /// Whether it is the fault of one image, which can be passed over; what the system refuses is none.
    pub fn is_of_image(&self) -> bool {
        matches!(self, Error::Corrupt { .. } | Error::TooLarge { .. } | Error::Length { .. })
    }

    /// An [`Error::Io`] for `path`, for use in `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |cause| Error::Io { action, path, cause }
    }

    /// An [`Error::Corrupt`] whose cause is squeezed into one line.
    pub(crate) fn corrupt(file: impl Into<String>, cause: impl std::fmt::Display) -> Error {
        Error::Corrupt { file: file.into(), cause: one_line(&cause.to_string()) }
    }

    /// What a reader of packed bytes of the file `path` says: the system's error where that is what it comes of, else
    /// an [`Error::Corrupt`] of `file`.
    pub(crate) fn unpacking(
        path: &Path,
        file: impl Into<String>,
        error: &(dyn std::error::Error + 'static),
    ) -> Error {
        match of_system(error) {
            Some(cause) => Error::Io { action: "read", path: path.into(), cause },
            // An archive's own error shows one of reading as `i/o error` alone.
            None => match error.source() {
                Some(cause) => Error::corrupt(file, cause),
                None => Error::corrupt(file, error),
            },
        }
    }

    /// An [`Error::Format`].
    pub(crate) fn format(file: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Format { file: file.into(), expected: expected.into(), found: one_line(&found.into()) }
    }
}

/// The system's error at the bottom of `error`, which readers of archives wrap into their own: a fault of the disk, and
/// none of the bytes on it.
pub(crate) fn of_system(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    let mut at = Some(error);
    while let Some(error) = at {
        let io = error.downcast_ref::<io::Error>();
        if let Some(number) = io.and_then(io::Error::raw_os_error) {
            return Some(io::Error::from_raw_os_error(number));
        }
        at = match io.and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Joins the lines of a foreign message and cuts it to a length that a terminal shows.
pub(crate) fn one_line(text: &str) -> String {
    let joined = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let joined = if joined.contains(char::is_control) { joined.escape_debug().to_string() } else { joined };
    match joined.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &joined[..end]),
        None => joined,
    }
}

/// The first few names in a folder, for the `found` of [`Error::Missing`].
pub(crate) fn listing(path: &Path) -> String {
    if !path.exists() {
        return "nothing (the path does not exist)".into();
    }
    if path.is_file() {
        return format!("a file of {} bytes", path.metadata().map_or(0, |m| m.len()));
    }
    let Ok(entries) = std::fs::read_dir(path) else { return "a folder that cannot be listed".into() };
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok())
        .take(1000)
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    match names.len() {
        0 => "an empty folder".into(),
        n if n <= 6 => names.join(", "),
        n => format!(
            "{}, … ({} entries)",
            names[..6].join(", "),
            if n == 1000 { "1000 or more".into() } else { n.to_string() }
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// A disk with a bad block at its beginning.
    struct Bad;

    impl Read for Bad {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(5))
        }
    }

    #[test]
    fn what_the_system_refuses_is_found_below_the_errors_of_readers() {
        let number = |error: io::Error| of_system(&error).and_then(|error| error.raw_os_error());
        let of_tar = |reader: &mut dyn Read| match tar::Archive::new(reader).entries().unwrap().next() {
            Some(Err(error)) => error,
            _ => panic!("an archive without bytes"),
        };
        assert_eq!(number(of_tar(&mut Bad)), Some(5));
        assert_eq!(number(of_tar(&mut flate2::read::GzDecoder::new(Bad))), Some(5));
        let twice = io::Error::other(io::Error::other(io::Error::from_raw_os_error(5)));
        assert_eq!(number(twice), Some(5));
        // Bytes that are wrong, or that end.
        assert_eq!(number(of_tar(&mut [7u8; 600].as_slice())), None);
        assert_eq!(number(io::ErrorKind::UnexpectedEof.into()), None);
        assert_eq!(number(io::ErrorKind::InvalidData.into()), None);
        let zip = zip::result::ZipError::Io(io::Error::from_raw_os_error(5));
        let error = Error::unpacking("a.zip".as_ref(), "a.zip: 1.png", &zip).to_string();
        assert!(error.starts_with("cannot read a.zip: Input/output error"), "{error}");
        let zip = zip::result::ZipError::Io(io::ErrorKind::UnexpectedEof.into());
        let error = Error::unpacking("a.zip".as_ref(), "a.zip: 1.png", &zip);
        assert!(error.is_of_image() && error.to_string().contains("a.zip: 1.png"), "{error}");
        assert!(!error.to_string().contains("i/o error"), "{error}");
    }
}
