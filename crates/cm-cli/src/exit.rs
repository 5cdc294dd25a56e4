//! How the command ends: exit codes and the one line that says why.

use std::any::Any;
use std::fmt;
use std::panic::PanicHookInfo;
use std::process::ExitCode;

/// Why a command failed, with the exit code that goes with it.
pub enum Failure {
    /// Wrong usage, config, data or file: nothing was computed. Exit code 2.
    Usage(anyhow::Error),
    /// Something failed while running. Exit code 1.
    Run(anyhow::Error),
    /// The loss or a gradient was not finite. Exit code 3.
    Diverged(anyhow::Error),
    /// One of several processes that were started together failed. Its exit code.
    Rank {
        /// The exit code.
        code: u8,
        /// What happened to which rank.
        what: String,
    },
    /// Ctrl-C, after what was computed had been saved. Exit code 130.
    Interrupted(String),
}

/// Result of a command.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// The exit code.
    pub fn code(&self) -> ExitCode {
        match self {
            Failure::Usage(_) => 2,
            Failure::Run(_) => 1,
            Failure::Diverged(_) => 3,
            Failure::Interrupted(_) => 130,
            Failure::Rank { code, .. } => *code,
        }
        .into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(error) | Failure::Run(error) | Failure::Diverged(error) => {
                write!(f, "error: {}", one_line(error))
            }
            Failure::Rank { what, .. } => write!(f, "error: {what}"),
            Failure::Interrupted(what) => write!(f, "interrupted: {what}"),
        }
    }
}

/// The chain of causes on one line. A cause whose text the line already ends with is not said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if line.contains(text.as_str()) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    visible(line)
}

/// Names out of files and arguments must not move the cursor of the terminal that shows them.
fn visible(line: String) -> String {
    if !line.contains(char::is_control) {
        return line;
    }
    let shown = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    line.chars().map(shown).collect()
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        match error.downcast_ref::<cm_train::Error>() {
            Some(
                cm_train::Error::Diverged { .. }
                | cm_train::Error::NonFinite { .. }
                | cm_train::Error::Spoilt { .. },
            ) => Failure::Diverged(error),
            _ => Failure::Run(error),
        }
    }
}

/// Says a panic on one line.
pub fn say_panic(panic: &PanicHookInfo<'_>) {
    let place = panic.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
    eprintln!("error: {}", panic_line(panic.payload_as_str(), &place));
}

/// What a caught panic said, on one line.
pub fn caught_panic(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    panic_line(text.or_else(|| payload.downcast_ref::<&str>().copied()), "")
}

/// A panic as one line. libtorch has no way but this to report that memory ran out inside an operation.
fn panic_line(text: Option<&str>, place: &str) -> String {
    let text = text.unwrap_or("an error without a text");
    let start = text.find("Torch(\"").map_or(0, |at| at + "Torch(\"".len());
    let line = text[start..].split(['\n']).next().unwrap_or_default().split("\\n").next().unwrap_or_default();
    if line.contains("memory") {
        return format!("{line}; lower train.micro_batch (or --batch), or the size of the network");
    }
    format!("{line}{place}; this is a fault of the program, please report it")
}

/// Marks an error as the user's to mend before anything runs.
pub trait OrUsage<T> {
    /// Turns the error into [`Failure::Usage`].
    fn or_usage(self) -> Outcome<T>;
}

impl<T, E: Into<anyhow::Error>> OrUsage<T> for Result<T, E> {
    fn or_usage(self) -> Outcome<T> {
        self.map_err(|error| Failure::Usage(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_is_said_once_and_on_one_line() {
        let inner: anyhow::Result<()> = Err(anyhow::anyhow!("b\nc"));
        let error = inner.context("a: b c").context("top").unwrap_err();
        assert_eq!(one_line(&error), "top: a: b c");
        assert_eq!(one_line(&anyhow::anyhow!("it's \x1b[2J\r")), "it's \\u{1b}[2J\\r");
    }
}
