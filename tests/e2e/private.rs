//! What a run leaves behind goes to other people: nothing in it tells of the machine or of its user.

use std::fs;
use std::path::Path;

use cm_tests::Sandbox;

/// Every file below `folder` with its bytes.
fn files(folder: &Path, into: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, into),
            false => into.push((path.display().to_string(), fs::read(&path).unwrap())),
        }
    }
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn runs_logs_checkpoints_and_samples_hold_no_path_and_no_secret() {
    const TOKEN: &str = "hf_tHiSiSaSeCrEt0123456789";
    let sandbox = Sandbox::new();
    for i in 0..8 {
        let path = sandbox.write(&format!("at-home/pictures/{i}.png"), "");
        image::GrayImage::from_fn(8, 8, |x, y| image::Luma([(x * y + i) as u8 * 3])).save(path).unwrap();
    }
    let home = sandbox.path("at-home").display().to_string();
    let data = format!("{home}/pictures");
    let command = |line: &str| {
        let command = sandbox.cm(line).env("HOME", &home).env("USER", "a-user-of-this-machine");
        command.env("HF_TOKEN", TOKEN).env("AWS_SECRET_ACCESS_KEY", TOKEN)
    };
    let train = command("train --config tiny.toml --device cpu --out run --data").arg(&data);
    train.set(&["data.kind='folder'", "train.total_steps=4", "run.checkpoint_every=2"]).run().ok();
    command("train --device cpu --out run --resume").set(&["train.total_steps=6"]).run().ok();
    command("sample run --device cpu --seeds 0-3 --out drawn").run().ok();

    let mut found = Vec::new();
    files(&sandbox.path("run"), &mut found);
    files(&sandbox.path("drawn"), &mut found);
    assert!(found.len() > 15, "{}", found.len());
    // The lock names the process and the host that hold a folder, for the one who finds it held. That is gone when the
    // run has ended; after `kill -9` it stays until the next one, and the lock is no part of what a run leaves.
    let lock = fs::read(sandbox.path("run/.lock")).unwrap();
    assert!(lock.is_empty(), "{}", String::from_utf8_lossy(&lock));
    let secrets = [home.as_str(), "at-home", TOKEN, "a-user-of-this-machine", env!("CARGO_MANIFEST_DIR")];
    for (name, bytes) in found {
        // A run that is to go on has to know where its data lies: as it was typed, and nowhere but here.
        let is_config = name.ends_with("run/config.toml");
        assert!(!is_config || holds(&bytes, &data));
        for secret in secrets.iter().filter(|secret| !(is_config && data.contains(**secret))) {
            assert!(!holds(&bytes, secret), "{name} holds {secret}");
        }
    }
}
