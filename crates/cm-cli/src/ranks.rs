//! Several processes that do one work: who this one is among them, what its share is, and how they end together.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use cm_data::{Dataset, digest};
use cm_torch::device::{self, DeviceSpec, Resolved};
use cm_torch::dist::{Busy, Limits, ProcessGroup, Rendezvous};
use cm_train::Metric;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::commands::session;
use crate::exit::{Failure, OrUsage, Outcome, caught_panic};
use crate::experiment::Experiment;
use crate::ui;

/// The processes that work together; one alone is a group too.
#[derive(Clone)]
pub struct Ranks {
    /// How they talk to one another.
    pub group: Rc<ProcessGroup>,
    /// Which of the processes of its machine this is.
    local_rank: usize,
}

/// Set to 1, a process that is the only rank exchanges with itself what several would exchange, so that a backend can be
/// tried on one GPU.
const CONNECT_ONE: &str = "CM_DIST_ALONE";

/// Joins the other ranks, if the environment names some, does the work, and ends with them: a rank that fails ends
/// all, with its cause.
pub fn together(work: impl FnOnce(&Ranks) -> Outcome) -> Outcome {
    let var = |name: &str| std::env::var(name).ok();
    let ranks = match Rendezvous::from_vars(var).or_usage()? {
        None => Ranks::alone(),
        Some(rendezvous) => {
            if rendezvous.rank > 0 {
                ui::be_quiet();
            }
            let limits = Limits::from_vars(var).or_usage()?;
            let group = match var(CONNECT_ONE).filter(|value| value == "1") {
                Some(_) => ProcessGroup::connect(&rendezvous, limits)?,
                None => ProcessGroup::join(&rendezvous, limits)?,
            };
            Ranks { group: Rc::new(group), local_rank: rendezvous.local_rank }
        }
    };
    if ranks.group.size() > 1 {
        ui::say(&format!("ranks: {} processes work together; this is rank 0", ranks.group.size()));
    }
    end_together(&ranks, work)
}

fn end_together(ranks: &Ranks, work: impl FnOnce(&Ranks) -> Outcome) -> Outcome {
    // The others are to hear of memory that ran out, too.
    let outcome = catch_unwind(AssertUnwindSafe(|| work(ranks))).unwrap_or_else(|panic| {
        ranks.group.fail(&caught_panic(&*panic));
        resume_unwind(panic)
    });
    match &outcome {
        Ok(()) | Err(Failure::Interrupted(_)) => ranks.group.leave()?,
        Err(failure) => {
            let text = failure.to_string();
            ranks.group.fail(text.strip_prefix("error: ").unwrap_or(&text));
        }
    }
    outcome
}

/// [`refuse_several`], and else does the work.
pub fn alone(what: &str, work: impl FnOnce() -> Outcome) -> Outcome {
    refuse_several(what).or_usage()?;
    work()
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
        Self { group: Rc::new(ProcessGroup::alone()), local_rank: 0 }
    }

    /// Refuses what several processes cannot do together.
    pub fn refuse(&self, what: &str, instead: &str) -> Result<()> {
        match self.group.size() {
            1 => Ok(()),
            size => bail!("{what}: it runs in one process, and WORLD_SIZE={size}; {instead}"),
        }
    }

    /// The device that was asked for; a GPU of its own for each of several ranks.
    pub fn device(&self, spec: &DeviceSpec) -> Result<Device> {
        session::said(&self.resolve(spec)?)
    }

    /// [`device`](Self::device) where it has been said already.
    pub fn device_again(&self, spec: &DeviceSpec) -> Result<Device> {
        Ok(self.resolve(spec)?.device)
    }

    fn resolve(&self, spec: &DeviceSpec) -> Result<Resolved> {
        Ok(match self.group.size() {
            1 => device::resolve_with_note(spec)?,
            _ => device::resolve_for_rank(spec, self.local_rank)?,
        })
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

    /// A file that rank 0 finds or makes; the others get its bytes and put them into `place`.
    pub fn file_of_first(&self, place: PathBuf, find: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
        const WHAT: &str = "a file of rank 0";
        if self.group.size() == 1 {
            return find();
        }
        if self.group.is_first() {
            let _busy = self.group.busy();
            let file = find()?;
            let bytes = std::fs::read(&file).with_context(|| file.display().to_string())?;
            self.group.hand_on(WHAT, &[Tensor::f_from_slice(&bytes)?], 0)?;
            return Ok(file);
        }
        let bytes = self.group.hand_on(WHAT, &[], 0)?;
        let bytes = bytes.first().map(Vec::<u8>::try_from).transpose()?.unwrap_or_default();
        std::fs::write(&place, bytes).with_context(|| place.display().to_string())?;
        Ok(place)
    }

    /// Those of `items` that are this rank's work: in batches as those of one process, every so many of them.
    pub fn share<T: Copy>(&self, items: &[T], batch: usize) -> Vec<T> {
        let own = items.chunks(batch.max(1)).skip(self.group.rank()).step_by(self.group.size());
        own.flatten().copied().collect()
    }

    /// The turns in which `total` images, in such batches, come to rank 0. What [`share`](Self::share) gives must be
    /// handed on in its order.
    pub fn turns(&self, total: usize, batch: usize) -> Turns<'_> {
        let (batches, ranks) = (total.div_ceil(batch.max(1)), self.group.size());
        if batches < ranks {
            ui::say(&format!(
                "WARNING: {} of {ranks} processes have nothing to do: {total} images are {batches} of --batch {batch}, and \
                 only whole batches are shared",
                ranks - batches
            ));
        }
        let busy = Some(self.group.busy());
        Turns { group: &self.group, batches, next: 0, busy }
    }

    /// Checks that `settings` are those of all ranks.
    pub fn agree_on(&self, settings: impl FnOnce() -> Result<Value>) -> Result<()> {
        match self.group.size() {
            1 => Ok(()),
            _ => Ok(cm_train::agree(&self.group, &settings()?)?),
        }
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

/// Batches that are dealt to the ranks in turn, so that each is one that a process alone would make, to the bit.
pub struct Turns<'a> {
    group: &'a ProcessGroup,
    batches: usize,
    /// The first batch that has not been handed on.
    next: usize,
    /// Batches may take any time, and ranks that have none left wait for them.
    busy: Option<Busy<'a>>,
}

/// Takes in what was made of a batch.
pub type Take<'t> = dyn FnMut(Vec<Tensor>) -> Result<()> + 't;

impl Turns<'_> {
    /// Hands on what was `made` of this rank's next batch. On rank 0, `take` gets what all ranks made in this round, in
    /// the order of one process.
    pub fn hand_on(&mut self, made: &[Tensor], take: &mut Take<'_>) -> Result<()> {
        self.busy = None;
        let round = self.group.size().min(self.batches - self.next);
        for owner in 0..round {
            let batch = self.group.hand_on("a batch", made, owner)?;
            if self.group.is_first() {
                take(batch)?;
            }
        }
        self.next += round;
        self.busy = Some(self.group.busy());
        Ok(())
    }

    /// Ends when all batches are handed on; the last round may have none of this rank.
    pub fn finish(mut self, take: &mut Take<'_>) -> Result<()> {
        if self.next < self.batches {
            self.hand_on(&[], take)?;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use cm_torch::dist::Keeper;

    use super::*;

    #[test]
    fn a_rank_without_memory_ends_all_with_what_to_lower() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ended = |rank: usize| {
            let address = "127.0.0.1".to_owned();
            let keeper = Keeper::RankZero;
            let rendezvous =
                Rendezvous { rank, local_rank: rank, world_size: 2, address, port, keeper, interface: None };
            let group = Rc::new(ProcessGroup::join(&rendezvous, Limits::default()).unwrap());
            let ranks = Ranks { group, local_rank: rank };
            let outcome = end_together(&ranks, |ranks| {
                if ranks.group.rank() == 1 {
                    panic!("Torch(\"not enough memory: you tried to allocate 8 bytes\\nframes");
                }
                Ok(ranks.group.barrier("step 1")?)
            });
            outcome.unwrap_err().to_string()
        };
        std::thread::scope(|scope| {
            let [zero, one] = [0, 1].map(|rank| scope.spawn(move || ended(rank)));
            assert!(one.join().is_err(), "the panic goes on");
            let text = zero.join().unwrap();
            let want = "rank 1: not enough memory: you tried to allocate 8 bytes; lower train.micro_batch";
            assert!(text.contains(want), "{text}");
        });
    }
}
