//! `cm launch`: several processes of one training on this machine, which end together.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::args::LaunchArgs;
use crate::exit::{Failure, OrUsage, Outcome};

/// How often the processes are looked at.
const GLANCE: Duration = Duration::from_millis(30);
/// What the others get, once one has ended, to say why and to end by themselves.
const GRACE: Duration = Duration::from_secs(15);

/// Runs `cm launch`.
pub fn launch(args: &LaunchArgs) -> Outcome {
    let port = args.port.map_or_else(free_port, Ok).or_usage()?;
    let signals = count_signals()?;
    let mut ranks = Vec::new();
    for rank in 0..args.nproc {
        match Rank::start(rank, port, args) {
            Ok(started) => ranks.push(started),
            Err(error) => {
                ranks.iter_mut().for_each(Rank::kill);
                return Err(error.into());
            }
        }
    }
    let first = wait(&mut ranks, &signals)?;
    ranks.into_iter().for_each(Rank::finish);
    match first {
        None => Ok(()),
        Some((_, status)) if status.code() == Some(130) => {
            Err(Failure::Interrupted("all ranks have saved and ended".to_owned()))
        }
        Some((rank, status)) => Err(Failure::Rank { code: code_of(status), what: described(rank, status) }),
    }
}

/// Waits for the end of all, and returns which rank was the first to fail.
fn wait(ranks: &mut [Rank], signals: &AtomicU32) -> Result<Option<(u16, ExitStatus)>> {
    let (mut passed_on, mut first, mut deadline) = (0, None, None);
    loop {
        let due = signals.load(Ordering::Relaxed);
        if due > passed_on {
            ranks.iter_mut().for_each(Rank::terminate);
            passed_on = due;
        }
        for rank in ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
            rank.ended = rank.child.try_wait().context("asking for the state of a rank")?;
            if let Some(status) = rank.ended.filter(|status| !status.success())
                && first.is_none()
            {
                first = Some((rank.number, status));
                deadline = Some(Instant::now() + GRACE);
            }
        }
        if ranks.iter().all(|rank| rank.ended.is_some()) {
            return Ok(first);
        }
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            ranks.iter_mut().for_each(Rank::kill);
        }
        std::thread::sleep(GLANCE);
    }
}

/// One process.
struct Rank {
    number: u16,
    child: Child,
    ended: Option<ExitStatus>,
    /// Threads that pass on what it says.
    speakers: Vec<JoinHandle<()>>,
}

impl Rank {
    fn start(number: u16, port: u16, args: &LaunchArgs) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.args(&args.command).stdin(Stdio::null());
        for (name, value) in [("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", args.nproc)] {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        // A launcher above this one has nothing to say to these ranks.
        command.env_remove("TORCHELASTIC_USE_AGENT_STORE");
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            command.env("OMP_NUM_THREADS", (cores / usize::from(args.nproc)).max(1).to_string());
        }
        // Ctrl-C reaches a whole process group at once; ranks get it from here, and once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        if number > 0 {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command.spawn().with_context(|| format!("cannot start rank {number}"))?;
        let speakers = [
            child.stdout.take().map(|pipe| pass_on(number, pipe, std::io::stdout())),
            child.stderr.take().map(|pipe| pass_on(number, pipe, std::io::stderr())),
        ];
        Ok(Self { number, child, ended: None, speakers: speakers.into_iter().flatten().collect() })
    }

    /// Asks it to save and to end.
    fn terminate(&mut self) {
        if self.ended.is_some() {
            return;
        }
        #[cfg(unix)]
        {
            let id = nix::unistd::Pid::from_raw(self.child.id() as i32);
            // It may have ended by itself since it was looked at.
            let _ = nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM);
        }
        #[cfg(not(unix))]
        self.kill();
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            // As above.
            let _ = self.child.kill();
        }
    }

    fn finish(self) {
        for speaker in self.speakers {
            // Whatever it could not write had nowhere to go.
            let _ = speaker.join();
        }
    }
}

/// Writes each line that a rank says with its number before it.
fn pass_on(
    rank: u16,
    pipe: impl Read + Send + 'static,
    mut out: impl Write + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut lines = BufReader::new(pipe);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let mut whole = format!("[rank {rank}] ").into_bytes();
            whole.append(&mut line);
            if whole.last() != Some(&b'\n') {
                whole.push(b'\n');
            }
            // One write for one line: the lines of ranks do not mix.
            if out.write_all(&whole).and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    })
}

/// Counts requests to end.
fn count_signals() -> Result<Arc<AtomicU32>> {
    let count = Arc::new(AtomicU32::new(0));
    let counted = count.clone();
    ctrlc::set_handler(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    })
    .context("setting up Ctrl-C")?;
    Ok(count)
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.port())
}

fn described(rank: u16, status: ExitStatus) -> String {
    match (status.code(), signal_of(status)) {
        (Some(code), _) => {
            format!("rank {rank} was the first to fail, with exit code {code}; all have ended")
        }
        (None, signal) => {
            format!("rank {rank} was ended by signal {}, and with it the others", signal.unwrap_or_default())
        }
    }
}

/// The exit code to pass on; a process killed by a signal gives the shell's 128 + signal.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + signal_of(status)?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

fn signal_of(status: ExitStatus) -> Option<i32> {
    #[cfg(unix)]
    return std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    None
}
