//! A line that says how far an install has come, measured by the bytes on disk.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Shows the growth of some folders until it is dropped: one line rewritten in a terminal, a line every 10 s in a log.
pub struct Progress {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Watches `folders`, whose summed size ends near `expected_mb`.
    pub fn watch(what: &str, folders: Vec<PathBuf>, expected_mb: u64) -> Self {
        let (stop, stopped) = mpsc::channel();
        let what = what.to_owned();
        let thread = thread::spawn(move || {
            let start = Instant::now();
            let terminal = std::io::stderr().is_terminal();
            let period = Duration::from_millis(if terminal { 500 } else { 10_000 });
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(period) {
                let mb = folders.iter().map(|f| folder_bytes(f)).sum::<u64>() / 1_000_000;
                let line = line(&what, mb, expected_mb, start.elapsed());
                let mut err = std::io::stderr().lock();
                // A progress line that cannot be written must not end the install.
                let _ = if terminal { write!(err, "\r\x1b[2K{line}") } else { writeln!(err, "{line}") };
                let _ = err.flush();
            }
            if terminal {
                eprint!("\r\x1b[2K");
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn line(what: &str, mb: u64, expected_mb: u64, elapsed: Duration) -> String {
    // The expected size is a measured one of today's wheels; past it the share says nothing and is left out.
    let share =
        if mb <= expected_mb { format!(" ({} %)", mb * 100 / expected_mb.max(1)) } else { String::new() };
    format!("{what}: {mb} of about {expected_mb} MB fetched and unpacked{share}, {} s", elapsed.as_secs())
}

/// Summed length of all files below `folder`; what disappears meanwhile counts as nothing.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => folder_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_gives_a_share_only_while_it_means_something() {
        let s = Duration::from_secs(7);
        assert_eq!(line("lean", 50, 200, s), "lean: 50 of about 200 MB fetched and unpacked (25 %), 7 s");
        assert_eq!(line("lean", 201, 200, s), "lean: 201 of about 200 MB fetched and unpacked, 7 s");
    }

    #[test]
    fn folders_are_summed_whole() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("x"), [0; 10]).unwrap();
        fs::write(dir.path().join("a/b/y"), [0; 32]).unwrap();
        assert_eq!(folder_bytes(dir.path()), 42);
        assert_eq!(folder_bytes(&dir.path().join("absent")), 0);
    }
}
