use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest time that anything which a test waits for may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The root of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

/// The path of `cm`, which the first caller builds in the profile that the tests were built in.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args([
            "build",
            // Not the package alone: its dependencies would be built once more, with fewer features.
            "--workspace",
            "--bin",
            "cm",
            "--message-format",
            "json-render-diagnostics",
        ]);
        // What cargo told this test about its own package would pass for a change where a build script looks at it, and
        // everything above that would be built again.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "OUT_DIR"]
                .iter()
                .any(|start| text.starts_with(start))
            {
                cargo.env_remove(&name);
            }
        }
        cargo.args(["--profile", profile()]).current_dir(root()).stderr(Stdio::inherit());
        let output = cargo.output().expect("cargo starts");
        assert!(output.status.success(), "building cm failed");
        let executable = |line: &str| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            message["executable"].as_str().map(PathBuf::from)
        };
        let lines = String::from_utf8(output.stdout).expect("cargo writes UTF-8");
        lines.lines().filter_map(executable).next_back().expect("cargo names the executable")
    })
}

/// The profile of the running test, which is the name of the folder above its own: `target/release/deps/e2e-…`.
fn profile() -> &'static str {
    static PROFILE: OnceLock<String> = OnceLock::new();
    PROFILE.get_or_init(|| {
        let test = std::env::current_exe().expect("a running program has a path");
        let folder = test.ancestors().nth(2).and_then(Path::file_name).and_then(OsStr::to_str);
        match folder.expect("tests lie in target/PROFILE/deps") {
            "debug" => "dev".to_owned(),
            other => other.to_owned(),
        }
    })
}

/// A folder of its own for one test, in which the command runs and an experiment `tiny.toml` lies; removed at the
/// end.
pub struct Sandbox(TempDir);

impl Sandbox {
    /// A folder with nothing but `tiny.toml`.
    #[allow(clippy::new_without_default)] // A folder on the disk is no default value.
    pub fn new() -> Self {
        let sandbox = Self(tempfile::tempdir().expect("a folder for the test"));
        sandbox.write("tiny.toml", include_str!("tiny.toml"));
        sandbox
    }

    /// The path of `name` in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and the folders above it.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("folders for the file");
        fs::write(&path, content).expect("writing the file");
        path
    }

    /// The text of a file.
    pub fn read(&self, name: &str) -> String {
        let path = self.path(name);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// The names in a folder, sorted; none if it is not there.
    pub fn list(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).into_iter().flatten();
        let mut names: Vec<_> =
            entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// The command with the words of `line` as arguments.
    pub fn cm(&self, line: &str) -> Cm {
        let mut command = Command::new(binary());
        command.args(line.split_whitespace()).current_dir(self.0.path()).stdin(Stdio::null());
        // Tests run beside each other. Threads of libtorch that spin while they wait take the cores from those that
        // work: on a loaded machine of two cores that made a run ten times slower.
        command.env("OMP_NUM_THREADS", "1").env("OMP_WAIT_POLICY", "PASSIVE").env("RAYON_NUM_THREADS", "1");
        Cm(command)
    }
}

/// The command `cm`, about to run in a [`Sandbox`].
pub struct Cm(Command);

impl Cm {
    /// Adds an argument, which may hold spaces.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    /// Adds `--set` with a change for each.
    pub fn set(mut self, changes: &[&str]) -> Self {
        for change in changes {
            self.0.args(["--set", change]);
        }
        self
    }

    /// Sets the number of libtorch's threads; 1 if it is not called.
    pub fn threads(mut self, threads: u32) -> Self {
        self.0.env("OMP_NUM_THREADS", threads.to_string());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    /// Lets no file grow beyond `kib` KiB: writing more fails, as it does on a full disk.
    pub fn with_files_up_to(self, kib: u32) -> Self {
        // Where the signal is ignored, the write returns an error.
        let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", kib * 2);
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(self.0.get_program()).args(self.0.get_args());
        command.envs(self.0.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(self.0.get_current_dir().unwrap_or(root())).stdin(Stdio::null());
        Self(command)
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Done {
        Done::new(&self.0.output().expect("cm starts"))
    }

    /// Starts it.
    pub fn start(mut self) -> Running {
        Running(self.0.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("cm starts"))
    }
}

/// A command that runs.
pub struct Running(Child);

impl Running {
    /// Waits until the log in `folder` has reached `step`.
    ///
    /// # Panics
    /// If the command ends first: a test that wants to interrupt a run has then interrupted nothing.
    pub fn wait_for_step(&mut self, folder: &Path, step: u64) {
        let (began, log) = (Instant::now(), folder.join("progress.csv"));
        loop {
            let reached = fs::File::open(&log).ok().and_then(|file| last_step(BufReader::new(file)));
            if reached.is_some_and(|reached| reached >= step) {
                return;
            }
            let ended = self.0.try_wait().expect("asking for the state of cm");
            assert!(ended.is_none(), "cm ended before step {step}: {ended:?}");
            assert!(began.elapsed() < PATIENCE, "no step {step} in {}", log.display());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends a signal, such as `KILL` or `INT`.
    pub fn signal(&self, name: &str) {
        self.signal_to(self.0.id(), name);
    }

    /// Sends a signal to another process, such as one of its children.
    pub fn signal_to(&self, process: u32, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), process.to_string()]).status();
        assert!(status.expect("kill starts").success(), "kill -{name} failed");
    }

    /// The processes that it started and that have not ended, in the order of their start.
    pub fn children(&self) -> Vec<u32> {
        let id = self.0.id();
        let list = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("a list of children");
        list.split_whitespace().map(|child| child.parse().expect("a number")).collect()
    }

    /// Waits for the end.
    pub fn wait(self) -> Done {
        Done::new(&self.0.wait_with_output().expect("cm ends"))
    }
}

/// The step of the last whole line of a `progress.csv`.
fn last_step(log: impl BufRead) -> Option<u64> {
    log.lines().map_while(Result::ok).filter_map(|line| line.split(',').next()?.parse().ok()).last()
}

/// What a command left behind.
#[derive(Debug)]
pub struct Done {
    /// The exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Done {
    fn new(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("cm writes UTF-8");
        let done =
            Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) };
        for word in ["panicked", "stack backtrace", "Exception raised from", "terminate called"] {
            assert!(!done.stderr.contains(word), "{done:#?}");
        }
        done
    }

    /// Asserts that it went well.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Asserts that it failed with `code` and one line that starts with `error: `, as the last one, and holds all of
    /// `words`. Returns the line.
    pub fn fails(self, code: i32, words: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{self:#?}");
        let last = self.stderr.lines().last().unwrap_or_default();
        let errors = self.stderr.lines().filter(|line| line.to_lowercase().starts_with("error")).count();
        assert!(errors == 1 && last.starts_with("error: "), "{self:#?}");
        for word in words {
            assert!(last.contains(word), "'{word}' is missing in: {last}");
        }
        last.to_owned()
    }
}
