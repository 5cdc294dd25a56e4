//! Text out of files, for errors.

/// Most characters of a text that a message shows.
const MOST: usize = 80;

/// A text out of a file as it may stand in a message of one line: control characters and the like escaped, and at
/// most about 80 characters.
///
/// ```
/// assert_eq!(cm_model::short("enc.0\n"), r"enc.0\n");
/// assert_eq!(cm_model::short(&"a".repeat(100)).chars().count(), 81);
/// ```
#[must_use]
pub fn short(text: &str) -> String {
    short_to(text, MOST)
}

/// [`short`] with at most about `most` characters, for a text of several words.
#[must_use]
pub fn short_to(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for (at, character) in text.chars().enumerate() {
        if at == most {
            shown.push('…');
            break;
        }
        match character {
            '\'' | '"' | '\\' => shown.push(character),
            // What moves the text of a line about is no control character to the standard library.
            '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                shown.extend(character.escape_unicode());
            }
            _ => shown.extend(character.escape_debug()),
        }
    }
    shown
}
