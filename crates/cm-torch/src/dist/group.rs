use std::cell::{Cell, OnceCell};
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use super::cuda::{Gpu, give_up};
use super::watch::{Fault, Keys, NO_FAULT, Watch};
use super::{Keeper, Limits, Rendezvous};
use crate::shim::dist::{Connect, Group, Store, Work};
use crate::{Error, Result};

/// How often a rank that waits looks for what may be wrong.
pub(super) const SLICE: Duration = Duration::from_millis(200);
/// Backends count the time of an exchange too, and know nothing of ranks that are busy.
pub(super) const NO_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Limit for the connections between ranks that have all come.
pub(super) const CONNECT: Duration = Duration::from_secs(60);

/// Ranks that exchange tensors.
///
/// All ranks make the same calls in the same order. A rank that fails says so with [`fail`](Self::fail), one that is
/// done takes its leave with [`leave`](Self::leave); one that is dropped without either is reported to the others.
/// After an error of an exchange there are no further ones.
///
/// ```
/// use cm_torch::dist::{Limits, ProcessGroup};
/// use cm_torch::tch::Tensor;
/// let alone = ProcessGroup::alone();
/// let ones = Tensor::from_slice(&[1.0f32, 1.0]);
/// alone.all_reduce("ones", &ones).unwrap();
/// assert_eq!((alone.rank(), alone.size(), f64::try_from(ones.sum(None)).unwrap()), (0, 1, 2.0));
/// ```
#[derive(Debug)]
pub struct ProcessGroup {
    rank: usize,
    size: usize,
    pub(super) connected: Option<Connected>,
}

#[derive(Debug)]
pub(super) struct Connected {
    group: Group,
    /// For tensors on this rank's GPU.
    pub(super) gpu: OnceCell<Gpu>,
    pub(super) watch: Watch,
    /// Kept until all is over: on rank 0 it is the store itself.
    pub(super) store: Store,
    /// What the names of these ranks begin with in the store.
    pub(super) prefix: String,
    limits: Limits,
    ending: Cell<Ending>,
}

/// A rank that the others wait for; see [`ProcessGroup::busy`].
#[derive(Debug)]
pub struct Busy<'a>(&'a ProcessGroup);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.set_busy(false);
    }
}

/// How this rank's part ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// It goes on.
    Open,
    /// All ranks took their leave.
    Left,
    /// An exchange failed, or this rank did.
    Failed,
}

impl ProcessGroup {
    /// A group of one.
    #[must_use]
    pub fn alone() -> Self {
        Self { rank: 0, size: 1, connected: None }
    }

    /// Meets the other ranks and connects to them. Returns when all have come.
    ///
    /// # Errors
    /// [`Error::Rank`] for ranks that do not come within [`Limits::exchange`], that are there twice or count another
    /// number of ranks; [`Error::Exchange`] if the store cannot be made or reached.
    pub fn join(rendezvous: &Rendezvous, limits: Limits) -> Result<Self> {
        match rendezvous.world_size {
            1 => Ok(Self::alone()),
            _ => Self::connect(rendezvous, limits),
        }
    }

    /// [`join`](Self::join) that connects a group of one too: what such a group exchanges goes the way of what many do,
    /// so that a backend can be tried where there is but one GPU.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn connect(rendezvous: &Rendezvous, limits: Limits) -> Result<Self> {
        let &Rendezvous { rank, world_size: size, .. } = rendezvous;
        let keys = match rendezvous.keeper {
            Keeper::RankZero => Keys { prefix: "cm/".to_owned() },
            Keeper::Launcher { attempt } => Keys { prefix: format!("cm/{attempt}/") },
        };
        let keeper = (rendezvous.keeper == Keeper::RankZero).then_some(0);
        let store = open_store(rendezvous, keeper == Some(rank), limits.exchange)?;
        arrive(&store, &keys, rendezvous, limits.exchange).map_err(|error| match error {
            Error::Cpp { text } => Error::Exchange {
                during: "meeting the other ranks".to_owned(),
                cause: format!("the store is gone ({})", text.lines().next().unwrap_or_default()),
            },
            other => other,
        })?;
        let own = open_store(rendezvous, false, limits.silence)?;
        let watch = Watch::start(own, keys.clone(), rank, size, keeper, limits.silence)?;
        let prefix = format!("{}gloo", keys.prefix);
        let connect = Connect {
            prefix: &prefix,
            rank,
            size,
            address: rendezvous.is_local().then_some("127.0.0.1"),
            interface: rendezvous.interface.as_deref(),
            within: limits.exchange.min(CONNECT),
            // This rank keeps to limits of its own, whose errors name a rank.
            timeout: NO_LIMIT,
        };
        let group = Group::open(&store, &connect).map_err(|error| {
            let during = "connecting the ranks".to_owned();
            watch.fault().unwrap_or_else(|| Error::Exchange { during, cause: error.to_string() })
        })?;
        let (gpu, ending) = (OnceCell::new(), Cell::new(Ending::Open));
        let connected = Connected { group, gpu, watch, store, prefix: keys.prefix, limits, ending };
        Ok(Self { rank, size, connected: Some(connected) })
    }

    /// This process' number, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of processes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether there is nobody to exchange anything with, and exchanges do nothing.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.connected.is_none()
    }

    /// Whether this is the rank that writes what there is to be one of.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Adds up `tensor` over all ranks, in place. The sum has the same bits on every rank.
    ///
    /// # Errors
    /// [`Error::Value`] unless the tensor is contiguous and on the CPU, or on the GPU of
    /// [`use_cuda`](Self::use_cuda); [`Error::Rank`] and [`Error::Exchange`] if
    /// another rank is to blame, or the connection.
    pub fn all_reduce(&self, what: &str, tensor: &Tensor) -> Result<()> {
        self.exchange(what, tensor, |group| group.all_reduce(tensor))
    }

    /// Copies `tensor` of rank `root` into that of all others.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::Value`] if there is no such rank.
    pub fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<()> {
        if root >= self.size {
            return Err(Error::value(what, format!("a rank below {}", self.size), root));
        }
        self.exchange(what, tensor, |group| group.broadcast(tensor, root))
    }

    /// Waits until all ranks have come here.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn barrier(&self, what: &str) -> Result<()> {
        self.all_reduce(what, &Tensor::from_slice(&[0i64]))
    }

    /// What every rank has to say, by rank; for texts and lists, which may differ in length.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_gather(&self, what: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0i64; self.size];
        lengths[self.rank] = bytes.len() as i64;
        let sum = Tensor::f_from_slice(&lengths)?;
        self.all_reduce(what, &sum)?;
        let lengths = Vec::<i64>::try_from(&sum)?;
        let before: i64 = lengths.iter().take(self.rank).sum();
        // Each rank writes into a place of its own, among zeros.
        let mut all = vec![0u8; lengths.iter().sum::<i64>().max(1) as usize];
        all.iter_mut().skip(before as usize).zip(bytes).for_each(|(place, byte)| *place = *byte);
        let sum = Tensor::f_from_slice(&all)?;
        self.all_reduce(what, &sum)?;
        let mut rest = Vec::<u8>::try_from(&sum)?.into_iter();
        Ok(lengths.iter().map(|&length| rest.by_ref().take(length as usize).collect()).collect())
    }

    /// Until the result is dropped, the others wait for this rank longer than [`Limits::exchange`], up to
    /// [`Limits::busy`]: it saves what all have trained, or fetches what all need.
    #[must_use = "the rank is busy as long as this value lives"]
    pub fn busy(&self) -> Busy<'_> {
        self.set_busy(true);
        Busy(self)
    }

    fn set_busy(&self, busy: bool) {
        if let Some(connected) = &self.connected {
            connected.watch.set_busy(busy);
        }
    }

    /// Tells the other ranks that this one ends, and why: what they are exchanging, or will, returns
    /// [`Error::Rank`] with this cause. Returns when they know it, after a few seconds at most.
    pub fn fail(&self, cause: &str) {
        let Some(connected) = &self.connected else { return };
        if connected.ending.get() != Ending::Left {
            connected.ending.set(Ending::Failed);
            connected.watch.tell(Fault { rank: self.rank, cause: cause.to_owned() });
            connected.watch.linger();
        }
    }

    /// Waits until all ranks are done; there are no further exchanges.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce): another rank may fail in what it does at the end.
    pub fn leave(&self) -> Result<()> {
        self.barrier("the end")?;
        if let Some(connected) = &self.connected {
            connected.ending.set(Ending::Left);
        }
        Ok(())
    }

    pub(super) fn exchange(
        &self,
        what: &str,
        tensor: &Tensor,
        start: impl FnOnce(&Group) -> Result<Work>,
    ) -> Result<()> {
        let Some(connected) = &self.connected else { return Ok(()) };
        let group = connected.group_of(tensor.device()).filter(|_| tensor.is_contiguous());
        let Some(group) = group else {
            let got = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
            let expected =
                "a contiguous tensor on the CPU, or on a GPU that was connected to those of the others";
            return Err(Error::value(what, expected, got));
        };
        let result = connected.exchange(what, || start(group));
        if let Err(error) = &result {
            connected.ending.set(Ending::Failed);
            if let Error::Rank { rank, cause } = error {
                // Rank 0 may be the only one to know, and the store ends with it.
                connected.watch.tell(Fault { rank: *rank, cause: cause.clone() });
            }
        }
        result
    }
}

impl Connected {
    fn group_of(&self, device: Device) -> Option<&Group> {
        match device {
            Device::Cpu => Some(&self.group),
            device => self.gpu.get().filter(|gpu| gpu.device == device).map(|gpu| &gpu.group),
        }
    }

    fn exchange(&self, what: &str, start: impl FnOnce() -> Result<Work>) -> Result<()> {
        let failed = |cause: String| Error::Exchange { during: what.to_owned(), cause };
        if self.ending.get() != Ending::Open {
            return Err(failed("the ranks have parted".to_owned()));
        }
        if let Some(error) = self.watch.fault() {
            return Err(error);
        }
        self.watch.enter();
        let entered = Instant::now();
        let mut began = entered;
        let broken = |error: Error| self.watch.inquest().unwrap_or_else(|| failed(error.to_string()));
        let work = start().map_err(broken)?;
        while !work.wait(SLICE).map_err(broken)? {
            if let Some(error) = self.watch.fault() {
                return Err(error);
            }
            if let Some(rank) = self.watch.busy() {
                began = Instant::now();
                if entered.elapsed() > self.limits.busy {
                    let cause = format!(
                        "it lives and is busy, but exchange {what} has waited for it for {} s; CM_DIST_BUSY sets \
                         another limit",
                        self.limits.busy.as_secs()
                    );
                    return Err(Error::Rank { rank, cause });
                }
            }
            if began.elapsed() > self.limits.exchange {
                let seconds = self.limits.exchange.as_secs();
                return Err(match self.watch.behind() {
                    Some(rank) => Error::Rank {
                        rank,
                        cause: format!(
                            "it lives, but did not come to exchange {what} within {seconds} s; CM_DIST_TIMEOUT sets \
                             another limit"
                        ),
                    },
                    None => failed(format!("not done within {seconds} s, though all ranks have come")),
                });
            }
        }
        Ok(())
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        let ending = self.connected.as_ref().map(|connected| connected.ending.get());
        if ending == Some(Ending::Open) {
            self.fail("it ended by a fault of the program");
        }
        let Some(Connected { group, gpu, watch, store, .. }) = self.connected.take() else { return };
        let gpu = gpu.into_inner();
        if ending == Some(Ending::Left) {
            drop((gpu, group));
            watch.close();
            drop(store);
        } else {
            watch.linger();
            if let Some(gpu) = gpu {
                give_up(gpu);
            }
            // Closing would wait for exchanges that do not come to an end. The process is about to.
            std::mem::forget((group, watch, store));
        }
    }
}

fn open_store(rendezvous: &Rendezvous, is_keeper: bool, timeout: Duration) -> Result<Store> {
    let Rendezvous { address, port, .. } = rendezvous;
    Store::open(address, *port, is_keeper, timeout).map_err(|error| {
        let cause = match is_keeper {
            true => format!("rank 0 cannot listen there, choose another MASTER_PORT ({error})"),
            false => format!("nobody answers there; is rank 0 running? ({error})"),
        };
        Error::Exchange { during: format!("meeting the other ranks at {address}:{port}"), cause }
    })
}

/// Registers this rank and waits for all others.
fn arrive(store: &Store, keys: &Keys, rendezvous: &Rendezvous, within: Duration) -> Result<()> {
    let &Rendezvous { rank, world_size: size, .. } = rendezvous;
    let wrong = |cause: String| Error::Rank { rank, cause };
    if rank == 0 {
        store.set(&keys.fault(), NO_FAULT)?;
        store.set(&keys.world(), &size.to_string())?;
    }
    if store.count(&keys.arrivals(rank))? > 1 {
        return Err(wrong(format!("RANK={rank} is there twice; each process needs a number of its own")));
    }
    store.set(&keys.beat(rank), &Keys::first_beat())?;
    let began = Instant::now();
    let mut missing: Vec<usize> = (0..size).collect();
    let mut pause = Duration::from_millis(5);
    loop {
        let mut still = Vec::new();
        for other in missing {
            if !store.has(&keys.beat(other))? {
                still.push(other);
            }
        }
        missing = still;
        if missing.iter().all(|&other| other != 0) {
            let told = store.get(&[keys.world()])?;
            if told.first().is_some_and(|told| *told != size.to_string()) {
                return Err(wrong(format!("WORLD_SIZE={size}, and on rank 0 it is {}", told.join(""))));
            }
        }
        let Some(&first) = missing.first() else { return Ok(()) };
        if began.elapsed() > within {
            let list: Vec<String> = missing.iter().map(ToString::to_string).collect();
            let cause = format!(
                "it did not come within {} s; of {size} ranks these are missing: {}",
                within.as_secs(),
                list.join(", ")
            );
            return Err(Error::Rank { rank: first, cause });
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(SLICE);
    }
}
