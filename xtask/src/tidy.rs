//! `cargo xtask tidy`: rules about the crates and the sources that the compiler does not know.

mod graph;
mod lexer;
mod licences;
mod sources;

use anyhow::Result;

use crate::tools;

/// The command: prints every breach, exit code 1 if there is one.
pub fn run() -> Result<u8> {
    let breaches = breaches()?;
    for breach in &breaches {
        eprintln!("tidy: {breach}");
    }
    if breaches.is_empty() {
        println!("tidy: the crate graph and the sources keep the rules");
    }
    Ok(u8::from(!breaches.is_empty()))
}

fn breaches() -> Result<Vec<String>> {
    let root = tools::workspace_root();
    let metadata = graph::metadata(&root)?;
    let mut breaches = graph::check(&metadata)?;
    breaches.extend(licences::check(&root, &metadata)?);
    breaches.extend(licences::check_fuzzer(&root)?);
    breaches.extend(sources::check(&root)?);
    Ok(breaches)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_workspace_is_tidy() {
        let breaches = super::breaches().unwrap();
        assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
    }
}
