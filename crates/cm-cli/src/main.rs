//! The command `cm`.

fn main() -> std::process::ExitCode {
    cm_cli::main()
}
