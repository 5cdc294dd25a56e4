//! The zip archives that `torch.save` writes: entries one after the other, none compressed.
//!
//! A general reader of zips trusts counts and sizes in the directory, or unpacks more than it read. Here every
//! claim is held against the length of the file, and a compressed entry is refused.

use std::io::{Read, Seek, SeekFrom};

use cm_model::short;

use super::pickle::Result;

const END: &[u8; 4] = b"PK\x05\x06";
const END_64_LOCATOR: &[u8; 4] = b"PK\x06\x07";
const END_64: &[u8; 4] = b"PK\x06\x06";
const DIRECTORY_ENTRY: &[u8; 4] = b"PK\x01\x02";
const LOCAL_HEADER: &[u8; 4] = b"PK\x03\x04";
const END_BYTES: u64 = 22;
const LONGEST_COMMENT: u64 = u16::MAX as u64;
/// Longest directory that is read; one has about 120 bytes a storage.
const MAX_DIRECTORY: u64 = 64 << 20;
/// Stands in a field of 32 bits whose value is in the extra field of 64.
const ELSEWHERE: u64 = u32::MAX as u64;

/// A file in an archive.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) crc: u32,
    header: u64,
}

/// The files of an archive of `length` bytes.
pub(super) fn entries(file: &mut (impl Read + Seek), length: u64) -> Result<Vec<Entry>> {
    let directory = directory(file, length)?;
    let mut rest = directory.as_slice();
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, behind) = entry(rest).ok_or("the directory of the zip is damaged")??;
        entries.push(entry);
        rest = behind;
    }
    Ok(entries)
}

/// Where the bytes of an entry begin, all of which lie in the file.
pub(super) fn start(file: &mut (impl Read + Seek), length: u64, entry: &Entry) -> Result<u64> {
    let problem =
        || format!("'{}' does not lie whole in the zip; copy or download the file again", short(&entry.name));
    let header = read(file, length, entry.header, 30).map_err(|_| problem())?;
    let field = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let start = entry.header + 30 + field(26) + field(28);
    let end = start.checked_add(entry.size).filter(|end| *end <= length);
    if &header[..4] != LOCAL_HEADER || end.is_none() {
        return Err(problem());
    }
    Ok(start)
}

/// The directory's bytes, from the record at the end of the file.
fn directory(file: &mut (impl Read + Seek), length: u64) -> Result<Vec<u8>> {
    let truncated = || {
        format!("a zip without its end ({length} bytes): it is truncated; copy or download the file again")
    };
    let tail_at = length.saturating_sub(END_BYTES + LONGEST_COMMENT);
    let tail = read(file, length, tail_at, length - tail_at)?;
    let is_end = |at: &usize| {
        tail[*at..].starts_with(END)
            && u16_at(&tail, at + 20).is_some_and(|comment| at + 22 + usize::from(comment) == tail.len())
    };
    let last = tail.len().checked_sub(END_BYTES as usize).ok_or_else(truncated)?;
    let end = (0..=last).rev().find(is_end).ok_or_else(truncated)?;
    let mut size = u64::from(u32_at(&tail, end + 12).ok_or_else(truncated)?);
    let mut at = u64::from(u32_at(&tail, end + 16).ok_or_else(truncated)?);
    let mut limit = tail_at + end as u64;
    if size == ELSEWHERE || at == ELSEWHERE {
        let locator = read(file, length, limit.saturating_sub(20), 20)?;
        let end_64 = u64_at(&locator, 8).filter(|_| locator.starts_with(END_64_LOCATOR));
        limit = end_64.ok_or_else(truncated)?;
        let end_64 = read(file, length, limit, 56)?;
        let fields = u64_at(&end_64, 40).zip(u64_at(&end_64, 48)).filter(|_| end_64.starts_with(END_64));
        (size, at) = fields.ok_or_else(truncated)?;
    }
    if at.checked_add(size).is_none_or(|end| end > limit) || size > MAX_DIRECTORY {
        return Err(format!("the zip claims a directory of {size} bytes at {at}, the file has {length}"));
    }
    read(file, length, at, size)
}

/// The first entry of a directory and what is behind it; None if it is cut off.
fn entry(bytes: &[u8]) -> Option<Result<(Entry, &[u8])>> {
    let (head, rest) = bytes.split_at_checked(46)?;
    if !head.starts_with(DIRECTORY_ENTRY) {
        return None;
    }
    let [flags, method] = [u16_at(head, 8)?, u16_at(head, 10)?];
    let [name, extra, comment] = [28, 30, 32].map(|at| u16_at(head, at).map(usize::from));
    let (name, rest) = rest.split_at_checked(name?)?;
    let (extra, rest) = rest.split_at_checked(extra?)?;
    let (_, rest) = rest.split_at_checked(comment?)?;
    let name = String::from_utf8_lossy(name).into_owned();
    let mut fields = [24, 20, 42].map(|at| u32_at(head, at).map(u64::from));
    let mut wide = wide_fields(extra);
    for field in &mut fields {
        if *field == Some(ELSEWHERE) {
            let (value, rest) = wide.split_at_checked(8)?;
            (*field, wide) = (u64_at(value, 0), rest);
        }
    }
    let [size, stored, header] = fields;
    let entry = Entry { name, size: size?, crc: u32_at(head, 16)?, header: header? };
    if flags & 1 != 0 || method != 0 || stored? != entry.size {
        let name = short(&entry.name);
        return Some(Err(format!(
            "'{name}' in the zip is compressed or encrypted; torch.save stores what it writes as it is"
        )));
    }
    Some(Ok((entry, rest)))
}

/// The extra field that holds 64-bit values.
fn wide_fields(mut extra: &[u8]) -> &[u8] {
    while let (Some(id), Some(size)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some((field, rest)) = extra[4..].split_at_checked(size.into()) else { break };
        if id == 1 {
            return field;
        }
        extra = rest;
    }
    &[]
}

/// `count` bytes at `at`, if the file has them.
pub(super) fn read(file: &mut (impl Read + Seek), length: u64, at: u64, count: u64) -> Result<Vec<u8>> {
    if at.checked_add(count).is_none_or(|end| end > length) {
        return Err(format!(
            "{count} bytes are expected at {at}, and the file has {length}: it is truncated"
        ));
    }
    let mut bytes = Vec::with_capacity(count as usize);
    let read = file.seek(SeekFrom::Start(at)).and_then(|_| file.by_ref().take(count).read_to_end(&mut bytes));
    match read {
        Ok(n) if n as u64 == count => Ok(bytes),
        Ok(n) => Err(format!("{n} of {count} bytes could be read at {at}")),
        Err(e) => Err(format!("it cannot be read at {at} ({e})")),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
