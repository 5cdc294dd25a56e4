//! Just enough of Rust's lexical grammar to tell words of code from comments and strings.

/// The identifiers and keywords in `source`, with their line numbers from 1.
pub fn words(source: &str) -> Vec<(usize, &str)> {
    let bytes = source.as_bytes();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => line_end(bytes, at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'\'' => quote_end(bytes, at),
            byte if is_word(byte) => {
                let end = word_end(bytes, at);
                match raw_string_end(bytes, at, end) {
                    Some(end) => end,
                    None => {
                        found.push((line, &source[at..end]));
                        end
                    }
                }
            }
            _ => at + 1,
        };
        line += bytes[at..end].iter().filter(|&&b| b == b'\n').count();
        at = end;
    }
    found
}

/// Bytes of non-ASCII letters count as parts of words, so every cut lies between characters.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

fn word_end(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|&&b| is_word(b)).count()
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|&&b| b != b'\n').count()
}

/// Block comments nest.
fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start + 2, 1);
    while at < bytes.len() && depth > 0 {
        match &bytes[at..bytes.len().min(at + 2)] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// A character literal, or the quote of a lifetime or label alone.
fn quote_end(bytes: &[u8], start: usize) -> usize {
    let rest = &bytes[start + 1..];
    if rest.first() == Some(&b'\\') {
        // The escaped character may itself be a quote.
        let close = rest.iter().skip(2).position(|&b| b == b'\'').map(|n| n + 3);
        return start + 1 + close.unwrap_or(1);
    }
    let width = match rest.first() {
        Some(0xF0..) => 4,
        Some(0xE0..) => 3,
        Some(0xC0..) => 2,
        _ => 1,
    };
    if rest.get(width) == Some(&b'\'') { start + width + 2 } else { start + 1 }
}

/// The end of a raw string whose prefix (`r`, `br`, `cr`) lies in `at..end`.
fn raw_string_end(bytes: &[u8], at: usize, end: usize) -> Option<usize> {
    if ![b"r".as_slice(), b"br", b"cr"].contains(&&bytes[at..end]) {
        return None;
    }
    let hashes = bytes[end..].iter().take_while(|&&b| b == b'#').count();
    let open = end + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let found = bytes[open + 1..].windows(close.len()).position(|w| w == close);
    Some(found.map_or(bytes.len(), |n| open + 1 + n + close.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(source: &str) -> Vec<&str> {
        words(source).into_iter().map(|(_, word)| word).collect()
    }

    #[test]
    fn comments_and_strings_hold_no_words() {
        assert_eq!(texts("a // b\nc /* d /* e */ f */ g"), ["a", "c", "g"]);
        assert_eq!(texts(r#"a "b \" c" d b"e" f"#), ["a", "d", "b", "f"]);
        assert_eq!(texts("a r\"b\" c r##\"d \"# e\"## f br#\"g\"# h"), ["a", "c", "f", "h"]);
        assert_eq!(texts("r#match x"), ["r", "match", "x"]);
    }

    #[test]
    fn characters_and_lifetimes_are_told_apart() {
        assert_eq!(texts(r"a 'b' c '\'' d '\u{41}' e 'σ' f"), ["a", "c", "d", "e", "f"]);
        assert_eq!(texts("fn f<'a>(x: &'a T) 'out: loop"), ["fn", "f", "a", "x", "a", "T", "out", "loop"]);
        assert_eq!(texts("'\"' a \"b\" c"), ["a", "c"]);
    }

    #[test]
    fn lines_are_counted_through_what_is_skipped() {
        assert_eq!(words("a\n/* \n */ b \"\n\" σ_min\nc"), [(1, "a"), (3, "b"), (4, "σ_min"), (5, "c")]);
    }

    #[test]
    fn unfinished_literals_end_with_the_file() {
        for source in ["\"a", "r#\"a", "/* a", "'", "'\\", "\"\\"] {
            assert!(texts(source).len() <= 1, "{source}");
        }
    }
}
