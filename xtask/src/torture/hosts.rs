//! Two network namespaces as two hosts: ranks that reach each other through a cable alone, and what happens when it is
//! cut.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::faults::in_shell;
use super::report::Outcome;
use super::runs::{Done, Running, Runs, STEPS, checkpoints};

/// How long ranks wait for a sign of life once the cable is cut, and what is allowed beyond that.
const SILENCE: u64 = 8;
const SLACK: Duration = Duration::from_secs(12);

/// Lays a cable between this namespace and another one. `$host` runs a command on the other side.
const CABLE: &str = "\
unshare -n sleep 300 & other=$!
trap 'kill $other' EXIT
until [ \"$(readlink /proc/$other/ns/net)\" != \"$(readlink /proc/self/ns/net)\" ]; do sleep 0.01; done
host=\"nsenter -t $other -n\"
ip link add cm0 type veth peer name cm1 netns $other && ip addr add 10.93.0.1/24 dev cm0 || exit 99
$host ip addr add 10.93.0.2/24 dev cm1 && $host ip link set cm1 up && ip link set cm0 up || exit 99
ip link set lo up && $host ip link set lo up || exit 99
";

/// Rank 0 here and rank 1 there; `errors-0`, `code-1` and their like are left. A file `cut` cuts the cable.
const RANKS: &str = "\
export WORLD_SIZE=2 MASTER_ADDR=10.93.0.1 MASTER_PORT=29571
(RANK=0 GLOO_SOCKET_IFNAME=cm0 \"$@\" 2>errors-0 >out-0; echo $? >code-0) & first=$!
(RANK=1 GLOO_SOCKET_IFNAME=cm1 $host \"$@\" 2>errors-1 >out-1; echo $? >code-1) & second=$!
while kill -0 $first 2>/dev/null || kill -0 $second 2>/dev/null; do
    if [ -e cut ]; then ip link set cm0 down; rm cut; fi
    sleep 0.02
done
";

/// Two ranks on two hosts train what one process trains; a cable that is cut ends both in time.
pub fn hosts(runs: &Runs) -> Result<Outcome> {
    if let Some(left_out) = no_hosts(runs) {
        return Ok(left_out);
    }
    let done = runs.finish(&mut on_hosts(CABLE, RANKS, &runs.train("afar")))?;
    ensure!(done.code == Some(0), "code {:?}: {}", done.code, done.last_line());
    let ranks = [rank(runs, 0)?, rank(runs, 1)?];
    for (number, rank) in ranks.iter().enumerate() {
        ensure!(rank.code == Some(0), "rank {number}: code {:?}: {}", rank.code, rank.stderr);
    }
    let difference = difference(runs, "whole", "afar")?;
    ensure!(difference < 1e-4, "the weights differ from those of one process by {difference:e}");
    runs.check_whole("afar")?;
    if runs.quick {
        return Ok(Outcome::Held(format!("weights of one process within {difference:.0e}")));
    }
    let seconds = cut(runs)?;
    Ok(Outcome::Held(format!(
        "weights of one process within {difference:.0e}; {seconds:.1} s after the cable is cut both have ended"
    )))
}

/// Cuts the cable in the middle of a run; returns the seconds until both ranks have ended.
fn cut(runs: &Runs) -> Result<f64> {
    const NAME: &str = "severed";
    let mut command = runs.train(NAME);
    command.args(["--set", "train.total_steps=100000"]).env("CM_DIST_TIMEOUT", SILENCE.to_string());
    let mut running = Running::start(&mut on_hosts(CABLE, RANKS, &command))?;
    while super::runs::newest_step(&runs.folder(NAME)).is_none_or(|step| step < 5) {
        ensure!(running.ended()?.is_none(), "the run ended early: {}", rank(runs, 0)?.stderr);
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::write(runs.folder("cut"), "")?;
    let began = Instant::now();
    let most = Duration::from_secs(SILENCE) + SLACK;
    while running.ended()?.is_none() {
        if began.elapsed() > most {
            running.kill()?;
            bail!("a rank still lived {most:?} after the cable was cut; stated are {SILENCE} s of silence");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let seconds = began.elapsed();
    for number in [0, 1] {
        let other = format!("rank {}: ", 1 - number);
        rank(runs, number)?.fails(1, &[&other]).with_context(|| format!("rank {number}"))?;
    }
    runs.check_whole(NAME)?;
    runs.nothing_half_written(NAME)?;
    Ok(seconds.as_secs_f64())
}

/// What a rank left behind.
fn rank(runs: &Runs, number: usize) -> Result<Done> {
    let read = |name: &str| {
        let path = runs.folder(&format!("{name}-{number}"));
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    Ok(Done { code: read("code")?.trim().parse().ok(), stderr: read("errors")? })
}

/// A shell in namespaces of its own for users and networks, which any user may have where the system allows it.
fn on_hosts(cable: &str, script: &str, command: &Command) -> Command {
    in_shell("unshare", &["-Urn"], &format!("{cable}{script}"), command)
}

/// Why there can be no second host; none if there can.
fn no_hosts(runs: &Runs) -> Option<Outcome> {
    match on_hosts(CABLE, "$host ip addr show cm1", &runs.cm("doctor")).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let why = text.lines().next().unwrap_or("refused");
            Some(Outcome::LeftOut(format!("no network namespaces joined by a cable: {why}")))
        }
        Err(error) => Some(Outcome::LeftOut(format!("no unshare: {error}"))),
    }
}

/// The relative difference between the last weights of two runs.
fn difference(runs: &Runs, one: &str, other: &str) -> Result<f64> {
    let [one, other] = [one, other].map(|name| {
        let step = checkpoints(&runs.folder(name)).join(format!("step-{STEPS:08}"));
        weights(&step.join("raw.safetensors"))
    });
    let (one, other) = (one?, other?);
    ensure!(one.keys().eq(other.keys()), "other weights");
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let pairs = || one.iter().flat_map(|(name, values)| values.iter().zip(&other[name]));
    let gap = norm(&mut pairs().map(|(a, b)| f64::from(*a) - f64::from(*b)));
    Ok(gap / norm(&mut pairs().map(|(a, _)| f64::from(*a))))
}

/// The float32 tensors of a safetensors file.
fn weights(path: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let (length, rest) = bytes.split_first_chunk::<8>().context("no header")?;
    let (head, data) =
        rest.split_at_checked(u64::from_le_bytes(*length) as usize).context("half of a header")?;
    let head: BTreeMap<String, Value> = serde_json::from_slice(head)?;
    let mut tensors = BTreeMap::new();
    for (name, about) in head.into_iter().filter(|(name, _)| name != "__metadata__") {
        let end = |i: usize| about["data_offsets"][i].as_u64().map(|at| at as usize);
        let place = end(0).zip(end(1)).context("a tensor without a place")?;
        let values = data.get(place.0..place.1).context("a tensor outside of the file")?;
        ensure!(about["dtype"] == "F32", "{name} is of {}", about["dtype"]);
        let values = values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        tensors.insert(name, values.collect());
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_read_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let head = r#"{"__metadata__":{"x":"y"},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let mut bytes = (head.len() as u64).to_le_bytes().to_vec();
        bytes.extend(head.bytes());
        bytes.extend([1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()));
        fs::write(&path, &bytes).unwrap();
        let want = BTreeMap::from([("a".to_owned(), vec![1.5]), ("b".to_owned(), vec![-2.0])]);
        assert_eq!(weights(&path).unwrap(), want);
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(weights(&path).is_err());
    }
}
