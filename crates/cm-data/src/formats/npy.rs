//! NumPy's `.npy` arrays: a small strict reader of integers and a writer.
//!
//! The header of an npy file is a Python literal. Parsers that accept any literal recurse on its brackets, so that a
//! file of a few kilobytes exhausts the stack; this one knows the three keys that the format defines and no nesting.
//! Format: NumPy Enhancement Proposal 1, versions 1.0 to 3.0.

use std::io::{Read, Write};

use crate::error::{Error, Result};
use crate::limits::{Bounded, claimed_bytes};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// The header of an array of a few dimensions takes 128 bytes; NumPy itself refuses more than 10,000.
const MAX_HEADER: u64 = 10_000;

/// Kind and width of an integer element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntType {
    /// `i` or `u` of NumPy's type code.
    pub signed: bool,
    /// 1, 2, 4 or 8.
    pub bytes: u8,
    /// Whether the first byte is the most significant.
    pub big_endian: bool,
}

impl IntType {
    /// NumPy's `uint8`.
    pub const U8: IntType = IntType { signed: false, bytes: 1, big_endian: false };
    /// NumPy's `int64`, little-endian.
    pub const I64: IntType = IntType { signed: true, bytes: 8, big_endian: false };

    pub(crate) fn parse(descr: &str) -> Option<Self> {
        let mut chars = descr.chars();
        let order = chars.next()?;
        let signed = match chars.next()? {
            'i' => true,
            'u' => false,
            _ => return None,
        };
        let bytes = match chars.as_str() {
            "1" => 1,
            "2" => 2,
            "4" => 4,
            "8" => 8,
            _ => return None,
        };
        match order {
            '<' | '|' | '=' => Some(Self { signed, bytes, big_endian: false }),
            '>' => Some(Self { signed, bytes, big_endian: bytes > 1 }),
            _ => None,
        }
    }

    fn descr(self) -> String {
        let order = match (self.bytes, self.big_endian) {
            (1, _) => '|',
            (_, false) => '<',
            (_, true) => '>',
        };
        format!("{order}{}{}", if self.signed { 'i' } else { 'u' }, self.bytes)
    }
}

/// What the header of an npy file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// NumPy's type code, for example `|u1`.
    pub descr: String,
    /// Whether the first index runs fastest.
    pub fortran_order: bool,
    /// The array's dimensions.
    pub shape: Vec<u64>,
}

impl Header {
    /// Parses the literal `{'descr': …, 'fortran_order': …, 'shape': …}`; `None` if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        while !rest.is_empty() {
            let (key, after) = quoted(rest)?;
            rest = after.trim_start().strip_prefix(':')?.trim_start();
            match key {
                "descr" => {
                    let (value, after) = quoted(rest)?;
                    descr = Some(value.to_string());
                    rest = after;
                }
                "fortran_order" => {
                    let value = rest.starts_with("True");
                    rest = rest.strip_prefix(if value { "True" } else { "False" })?;
                    fortran_order = Some(value);
                }
                "shape" => {
                    let (inside, after) = rest.strip_prefix('(')?.split_once(')')?;
                    shape = Some(dimensions(inside)?);
                    rest = after;
                }
                _ => return None,
            }
            rest = rest.trim_start();
            rest = match rest.strip_prefix(',') {
                Some(next) => next.trim_start(),
                None if rest.is_empty() => rest,
                None => return None,
            };
        }
        Some(Self { descr: descr?, fortran_order: fortran_order?, shape: shape? })
    }
}

/// A quoted word without escapes, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote)
}

/// `10, 32, 32, 3`, `7,` or nothing; at most eight numbers.
fn dimensions(text: &str) -> Option<Vec<u64>> {
    let text = text.trim();
    if text.is_empty() {
        return Some(Vec::new());
    }
    let parts: Vec<&str> = text.strip_suffix(',').unwrap_or(text).split(',').collect();
    if parts.len() > 8 {
        return None;
    }
    // NumPy 1 under Python 2 wrote longs as `3L`.
    parts.iter().map(|p| p.trim().trim_end_matches('L').parse().ok()).collect()
}

/// An array of integers, C order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntArray {
    /// The array's dimensions.
    pub shape: Vec<u64>,
    /// The type of an element.
    pub kind: IntType,
    /// The elements as they lie in the file.
    pub bytes: Vec<u8>,
}

impl IntArray {
    /// Reads a whole npy stream.
    ///
    /// # Errors
    /// [`Error::Format`] on a header that is damaged or describes anything but integers in C order,
    /// [`Error::TooLarge`] or [`Error::Length`] on a size that the file cannot hold.
    pub(crate) fn read<R: Read>(input: &mut Bounded<R>) -> Result<Self> {
        let header = read_header(input)?;
        Self::read_body(input, header)
    }

    /// Reads what follows the header.
    pub(crate) fn read_body<R: Read>(input: &mut Bounded<R>, header: Header) -> Result<Self> {
        let file = input.file.clone();
        let Some(kind) = IntType::parse(&header.descr) else {
            let expected = "an array of integers (save images as uint8 and labels as int64)";
            return Err(Error::format(&file, expected, format!("dtype {}", header.descr)));
        };
        if header.fortran_order {
            let expected = "C order (save numpy.ascontiguousarray(a))";
            return Err(Error::format(&file, expected, "Fortran order"));
        }
        let dims: Vec<u64> = header.shape.iter().copied().chain([u64::from(kind.bytes)]).collect();
        let size = claimed_bytes(&file, &dims)?;
        let what = format!("of {} array {:?}", header.descr, header.shape);
        let bytes = input.take(size, &what)?;
        input.finish(&what, size)?;
        Ok(Self { shape: header.shape, kind, bytes })
    }

    /// The elements as i64; a u64 beyond its range becomes −1, which no label check lets pass.
    pub fn to_i64(&self) -> Vec<i64> {
        self.bytes
            .chunks_exact(self.kind.bytes.into())
            .map(|element| {
                let mut wide = [0_u8; 8];
                for (i, &byte) in element.iter().enumerate() {
                    let place = if self.kind.big_endian { element.len() - 1 - i } else { i };
                    wide[place] = byte;
                }
                let value = u64::from_le_bytes(wide);
                let unused = 64 - 8 * u32::from(self.kind.bytes);
                match self.kind.signed {
                    true => ((value << unused) as i64) >> unused,
                    false => i64::try_from(value).unwrap_or(-1),
                }
            })
            .collect()
    }
}

pub(crate) fn read_header<R: Read>(input: &mut Bounded<R>) -> Result<Header> {
    let file = input.file.clone();
    let start = input.take(8, "of npy header")?;
    if &start[..6] != MAGIC {
        return Err(Error::format(
            &file,
            "an npy array",
            format!("a file that starts with {:02x?}", &start[..6]),
        ));
    }
    let length = match start[6] {
        1 => input.take(2, "of npy header")?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)),
        2 | 3 => input.take(4, "of npy header")?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)),
        other => return Err(Error::format(&file, "npy version 1, 2 or 3", format!("version {other}"))),
    };
    if length > MAX_HEADER {
        return Err(Error::TooLarge {
            file,
            what: "bytes of npy header",
            claimed: length,
            limit: MAX_HEADER,
        });
    }
    let text = String::from_utf8_lossy(&input.take(length, "of npy header")?).into_owned();
    Header::parse(&text)
        .ok_or_else(|| Error::format(&file, "{'descr': …, 'fortran_order': …, 'shape': (…)}", text))
}

/// Writes an npy array of `shape` whose elements are already little-endian bytes in C order.
///
/// # Errors
/// The writer's own.
pub fn write(out: &mut impl Write, kind: IntType, shape: &[usize], bytes: &[u8]) -> std::io::Result<()> {
    write_as(out, &kind.descr(), shape, bytes)
}

/// [`write()`] for elements of the type that NumPy calls `descr`.
pub(crate) fn write_as(
    out: &mut impl Write,
    descr: &str,
    shape: &[usize],
    bytes: &[u8],
) -> std::io::Result<()> {
    let dims: String = match shape {
        [one] => format!("{one},"),
        many => many.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    // Magic, version and length take 10 bytes; NumPy aligns the elements to 64.
    let padded = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text.extend(std::iter::repeat_n(' ', padded - text.len() - 1));
    text.push('\n');
    out.write_all(MAGIC)?;
    out.write_all(&[1, 0])?;
    out.write_all(&(text.len() as u16).to_le_bytes())?;
    out.write_all(text.as_bytes())?;
    out.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<IntArray> {
        IntArray::read(&mut Bounded { reader: bytes, capacity: bytes.len() as u64, file: "a.npy".into() })
    }

    fn with_header(text: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn written_arrays_are_read_back_and_aligned() {
        for shape in [vec![], vec![3], vec![2, 3, 4, 1]] {
            let count = shape.iter().product::<usize>();
            let data: Vec<u8> = (0..count as u8).collect();
            let mut bytes = Vec::new();
            write(&mut bytes, IntType::U8, &shape, &data).unwrap();
            assert_eq!((bytes.len() - count) % 64, 0);
            let array = read(&bytes).unwrap();
            assert_eq!(array.shape, shape.iter().map(|&d| d as u64).collect::<Vec<_>>());
            assert_eq!((array.kind, array.bytes), (IntType::U8, data));
        }
    }

    #[test]
    fn every_integer_type_gives_its_values() {
        for (descr, data, want) in [
            ("|u1", &[255][..], 255),
            ("|i1", &[255], -1),
            ("<i2", &[0xfe, 0xff], -2),
            (">i2", &[0xff, 0xfe], -2),
            (">u4", &[0, 0, 1, 0], 256),
            ("<i8", &[7, 0, 0, 0, 0, 0, 0, 0], 7),
            ("<u8", &[255; 8], -1),
        ] {
            let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}\n");
            assert_eq!(read(&with_header(&header, data)).unwrap().to_i64(), [want], "{descr}");
        }
    }

    #[test]
    fn what_is_not_an_integer_array_is_refused_by_name() {
        for (header, says) in [
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", "dtype <f4"),
            ("{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1), }", "Fortran order"),
            ("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1,), }", "descr"),
            ("((((((((((", "(((("),
        ] {
            let error = read(&with_header(header, &[0; 4])).unwrap_err().to_string();
            assert!(error.starts_with("a.npy") && error.contains(says), "{error}");
        }
        assert!(read(b"PK\x03\x04 not npy").unwrap_err().to_string().contains("an npy array"));
    }

    #[test]
    fn claims_are_held_against_what_is_there() {
        let header =
            |shape: &str| format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({shape}), }}");
        let huge = read(&with_header(&header("18446744073709551615, 4"), &[]));
        assert!(matches!(huge, Err(Error::TooLarge { .. })));
        assert!(matches!(read(&with_header(&header("1000000000, 8"), &[0])), Err(Error::Length { .. })));
        assert!(matches!(read(&with_header(&header("4,"), &[0; 3])), Err(Error::Length { got: 3, .. })));
        assert!(matches!(read(&with_header(&header("4,"), &[0; 5])), Err(Error::Length { got: 5, .. })));
    }
}
