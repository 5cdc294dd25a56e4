//! Several processes that train one run: who this one is among them, and how they end together.

use std::rc::Rc;

use anyhow::{Result, bail};
use cm_data::{Dataset, digest};
use cm_torch::device::DeviceSpec;
use cm_torch::dist::{Limits, ProcessGroup, Rendezvous};
use cm_train::Metric;
use serde_json::{Value, json};
use tch::Device;

use crate::commands::session;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::ui;

/// The processes that train together; one alone is a group too.
#[derive(Clone)]
pub struct Ranks {
    /// How they talk to one another.
    pub group: Rc<ProcessGroup>,
}

/// Joins the other ranks, if the environment names some, does the work, and ends with them: a rank that fails ends
/// all, with its cause.
pub fn together(work: impl FnOnce(&Ranks) -> Outcome) -> Outcome {
    let var = |name: &str| std::env::var(name).ok();
    let group = match Rendezvous::from_vars(var).or_usage()? {
        None => ProcessGroup::alone(),
        Some(rendezvous) => {
            if rendezvous.rank > 0 {
                ui::be_quiet();
            }
            ProcessGroup::join(&rendezvous, Limits::from_vars(var).or_usage()?)?
        }
    };
    let ranks = Ranks { group: Rc::new(group) };
    if ranks.group.size() > 1 {
        ui::say(&format!("ranks: {} processes train together; this is rank 0", ranks.group.size()));
    }
    let outcome = work(&ranks);
    match &outcome {
        Ok(()) | Err(Failure::Interrupted(_)) => ranks.group.leave()?,
        Err(failure) => {
            let text = failure.to_string();
            ranks.group.fail(text.strip_prefix("error: ").unwrap_or(&text));
        }
    }
    outcome
}

/// Refuses to work beside other ranks, for what knows nothing of them.
pub fn refuse_several(what: &str) -> Result<()> {
    match Rendezvous::from_vars(|name| std::env::var(name).ok())? {
        Some(rendezvous) if rendezvous.world_size > 1 => {
            bail!(
                "{what} runs in one process, and WORLD_SIZE={}; start it without ranks",
                rendezvous.world_size
            )
        }
        _ => Ok(()),
    }
}

impl Ranks {
    /// One process.
    pub fn alone() -> Self {
        Self { group: Rc::new(ProcessGroup::alone()) }
    }

    /// Refuses what several processes cannot do together.
    pub fn refuse(&self, what: &str, instead: &str) -> Result<()> {
        match self.group.size() {
            1 => Ok(()),
            size => bail!("{what}: it runs in one process, and WORLD_SIZE={size}; {instead}"),
        }
    }

    /// The device that was asked for. Several ranks train on CPUs.
    pub fn device(&self, spec: &DeviceSpec) -> Result<Device> {
        match (self.group.size(), spec) {
            (1, _) => session::device(spec),
            (_, DeviceSpec::Cpu) => Ok(Device::Cpu),
            (_, DeviceSpec::Auto) => {
                ui::say("device: Cpu (several ranks train on CPUs)");
                Ok(Device::Cpu)
            }
            (size, spec) => bail!(
                "--device {spec}: several ranks train on CPUs, and WORLD_SIZE={size}; use --device cpu, or one process"
            ),
        }
    }

    /// Does on rank 0 first what finds its work done by the others: a download, for one.
    pub fn first_one_then_all<T>(&self, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        if !self.group.is_first() {
            self.group.barrier("what rank 0 prepares")?;
        }
        let done = {
            let _busy = self.group.busy();
            work()?
        };
        if self.group.is_first() {
            self.group.barrier("what rank 0 prepares")?;
        }
        Ok(done)
    }

    /// Checks that all ranks have one experiment, one set of images and one teacher. Where these lie may differ.
    pub fn agree(&self, experiment: &Experiment, data: &dyn Dataset) -> Result<()> {
        if self.group.size() == 1 {
            return Ok(());
        }
        let mut settings = serde_json::to_value(without_places(experiment))?;
        settings["data"]["images"] = seen(data)?;
        if let Some(teacher) = experiment.teacher.as_ref().filter(|teacher| teacher.path.is_file()) {
            settings["teacher"] = json!({ "sha256": digest::of_file(&teacher.path)? });
        }
        Ok(cm_train::agree(&self.group, &settings)?)
    }
}

/// An experiment without the places of data and of weights on this machine.
pub fn without_places(experiment: &Experiment) -> Experiment {
    let mut portable = experiment.clone();
    (portable.data.path, portable.teacher, portable.init) = (None, None, None);
    if let Metric::Lpips { weights, .. } = &mut portable.train.metric {
        *weights = None;
    }
    portable
}

/// Images of a set that are compared between ranks.
const COMPARED: usize = 64;

/// What a set holds, by its size and some of its images.
fn seen(data: &dyn Dataset) -> Result<Value> {
    let step = data.len().div_ceil(COMPARED).max(1);
    let indices = (0..data.len()).step_by(step).map(|index| index as u32);
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    for index in indices {
        pieces.push(match data.get(index as usize) {
            Ok(sample) => sample.pixels,
            // Whether it may be passed over is training's to say; that it is broken is all that can be compared.
            Err(error) if error.is_of_image() => b"does not decode".to_vec(),
            Err(other) => return Err(other.into()),
        });
        pieces.push(data.labels().map_or(Vec::new(), |all| all[index as usize].to_le_bytes().to_vec()));
    }
    let sha256 = digest::of_bytes(pieces.iter().map(Vec::as_slice));
    Ok(json!({ "count": data.len(), "shape": data.shape().to_string(), "sha256": sha256 }))
}
