//! Progress on a terminal, and plain lines where there is none.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tch::Device;

static QUIET: AtomicBool = AtomicBool::new(false);

/// Makes this process one that says nothing but errors: another one speaks for it.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Whether this process says nothing but errors.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Prints a line for the user, unless another process does.
pub fn say(line: &str) {
    if !is_quiet() {
        eprintln!("{line}");
    }
}

/// A progress bar with rate and time left; where stderr is no terminal, a line every ten seconds instead.
pub struct Bar {
    bar: ProgressBar,
    what: String,
    total: u64,
    started: Instant,
    first: u64,
    last_line: Option<Instant>,
}

const LINE_EVERY: Duration = Duration::from_secs(10);

impl Bar {
    /// A bar from `first` to `total`, whose `unit` stands behind the counts.
    pub fn new(what: &str, unit: &str, first: u64, total: u64) -> Self {
        let bar = ProgressBar::new(total).with_position(first);
        let template = format!(
            "{{prefix}} {{elapsed_precise}} {{wide_bar:.cyan/blue}} {{pos}}/{{len}} {unit}  {{msg}}  ETA {{eta}}"
        );
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(what.to_owned());
        bar.reset_eta();
        let last_line = (!std::io::stderr().is_terminal()).then(Instant::now);
        Self { bar, what: what.to_owned(), total, started: Instant::now(), first, last_line }
    }

    /// Sets the position and the text beside it.
    pub fn set(&mut self, position: u64, message: String) {
        self.bar.set_position(position);
        if let Some(last) = &mut self.last_line
            && (last.elapsed() >= LINE_EVERY || position == self.total)
        {
            *last = Instant::now();
            eprintln!("{}: {position}/{}  {message}  ETA {}", self.what, self.total, self.eta(position));
        }
        self.bar.set_message(message);
    }

    fn eta(&self, position: u64) -> String {
        let done = position.saturating_sub(self.first).max(1) as f64;
        let left = self.total.saturating_sub(position) as f64;
        clock(self.started.elapsed().as_secs_f64() * left / done)
    }

    /// Images a second since the bar began, for steps of `batch` images.
    pub fn images_per_second(&self, batch: u64, step: u64) -> f64 {
        step.saturating_sub(self.first) as f64 * batch as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }

    /// Prints a line above the bar.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }

    /// Ends the bar and leaves nothing of it behind.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// The device in words, with the processor's name where the system tells it.
pub fn device_name(device: Device) -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    match (device, model) {
        (Device::Cpu, Some((_, name))) => format!("CPU ({})", name.trim()),
        _ => format!("{device:?}"),
    }
}

/// The day, as `2026-11-25`: a figure without one says little. Nothing that is computed depends on it.
pub fn today() -> String {
    time::OffsetDateTime::now_utc().date().to_string()
}

/// Seconds as `1:02:03` or `2:03`.
pub fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_read_as_clocks() {
        assert_eq!([0.0, 59.6, 125.0, 3723.0].map(clock), ["0:00", "1:00", "2:05", "1:02:03"]);
    }
}
