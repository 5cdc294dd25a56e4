//! `cargo xtask env`: lines for a shell.

use std::path::Path;

use anyhow::{Result, bail};

use crate::install::Home;
use crate::libtorch::{self, Source};
use crate::wheels::{Depth, State, inspect};

/// Prints the exports, or fails with nothing on standard output.
pub fn run() -> Result<u8> {
    let home = Home::of_workspace();
    let source = libtorch::source(&home)?;
    let torch = match libtorch::check_theirs(&source)? {
        Some(theirs) => theirs.torch,
        None => match inspect(&home.site(), Depth::Quick) {
            State::Ready(_) => home.torch(),
            State::Absent => bail!("libtorch is not installed yet: run `cargo xtask setup`"),
            State::Faulty(why) => bail!("{}: {why}: run `cargo xtask setup`", home.site().display()),
        },
    };
    if source == Source::Pytorch {
        println!("export LIBTORCH_USE_PYTORCH=1");
    } else {
        println!("{}", libtorch_line(&torch));
    }
    println!("{}", library_path_line(&torch.join("lib")));
    Ok(0)
}

/// `export LIBTORCH=...`.
pub fn libtorch_line(torch: &Path) -> String {
    format!("export LIBTORCH={}", quote(&torch.display().to_string()))
}

/// Puts the folder before what the variable holds already.
fn library_path_line(lib: &Path) -> String {
    let name = if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };
    format!("export {name}={}\"${{{name}:+:${name}}}\"", quote(&lib.display().to_string()))
}

/// Quotes for a POSIX shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::process::Command;

    /// What a shell makes of the lines.
    fn shell(lines: &str, print: &str, before: &str) -> String {
        let script = format!("{before}\n{lines}\nprintf %s \"${print}\"");
        let output = Command::new("sh").arg("-c").arg(script).env_remove("LD_LIBRARY_PATH").output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn awkward_paths_survive_the_shell() {
        for path in ["/opt/torch", "/a b/it's $HOME `x` \"q\"/t", "/ends with '"] {
            assert_eq!(shell(&libtorch_line(Path::new(path)), "LIBTORCH", ""), path);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_library_path_keeps_what_was_there() {
        let line = library_path_line(Path::new("/it's/lib"));
        assert_eq!(shell(&line, "LD_LIBRARY_PATH", ""), "/it's/lib");
        assert_eq!(shell(&line, "LD_LIBRARY_PATH", "LD_LIBRARY_PATH=/x:/y"), "/it's/lib:/x:/y");
    }
}
