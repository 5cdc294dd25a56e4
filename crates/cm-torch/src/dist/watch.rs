use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::shim::dist::Store;
use crate::{Error, Result};

/// Between two signs of life.
const PERIOD: Duration = Duration::from_millis(500);
/// Without a sign of life for so long, a rank whose connection broke is taken for dead.
const DEAD: Duration = Duration::from_millis(3500);
/// How long the cause of a broken connection is looked for: two ranks may take turns in being seen as silent.
const INQUEST: Duration = Duration::from_secs(8);

/// What the store holds in place of a fault.
pub(super) const NO_FAULT: &str = "none";

/// What went wrong, for all ranks: of which rank, and the cause on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub rank: usize,
    pub cause: String,
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        let (rank, cause) = text.split_once('\t')?;
        Some(Self { rank: rank.parse().ok()?, cause: cause.to_owned() })
    }

    fn text(&self) -> String {
        format!("{}\t{}", self.rank, self.cause.replace(['\n', '\r', '\0'], " "))
    }

    fn error(&self) -> Error {
        Error::Rank { rank: self.rank, cause: self.cause.clone() }
    }
}

/// A sign of life.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Beat {
    count: u64,
    /// Exchanges that the rank has entered.
    entered: u64,
    /// Whether it has read the fault.
    seen: bool,
    /// Whether it does something that the others wait for, longer than for an exchange.
    busy: bool,
}

impl Beat {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut number = || words.next()?.parse::<u64>().ok();
        Some(Self { count: number()?, entered: number()?, seen: number()? == 1, busy: number()? == 1 })
    }

    fn text(&self) -> String {
        let [seen, busy] = [self.seen, self.busy].map(u8::from);
        format!("{} {} {seen} {busy}", self.count, self.entered)
    }
}

#[derive(Debug)]
struct State {
    own: Beat,
    /// The others' and this rank's own, each with the time when it changed last.
    beats: Vec<(Beat, Instant)>,
    fault: Option<Fault>,
    /// A fault that the others are to be told of.
    to_tell: Option<Fault>,
    /// When the store answered last.
    answered: Instant,
    /// Why it cannot be asked any more.
    lost: Option<String>,
    closing: bool,
}

/// The names under which ranks meet in the store.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    pub prefix: String,
}

impl Keys {
    pub(super) fn fault(&self) -> String {
        format!("{}fault", self.prefix)
    }
    pub(super) fn beat(&self, rank: usize) -> String {
        format!("{}beat/{rank}", self.prefix)
    }
    pub(super) fn world(&self) -> String {
        format!("{}world", self.prefix)
    }
    pub(super) fn arrivals(&self, rank: usize) -> String {
        format!("{}arrivals/{rank}", self.prefix)
    }
    pub(super) fn first_beat() -> String {
        Beat::default().text()
    }
}

/// A thread that says that this rank lives, and listens to the others.
#[derive(Debug)]
pub(super) struct Watch {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
    rank: usize,
    /// The rank that keeps the store; none if the launcher does.
    keeper: Option<usize>,
    silence: Duration,
}

impl Watch {
    /// Begins to watch `size` ranks, which all have given a first sign of life, through a client of the store that
    /// is its own.
    pub(super) fn start(
        store: Store,
        keys: Keys,
        rank: usize,
        size: usize,
        keeper: Option<usize>,
        silence: Duration,
    ) -> Result<Self> {
        let now = Instant::now();
        let state = Arc::new(Mutex::new(State {
            own: Beat::default(),
            beats: vec![(Beat::default(), now); size],
            fault: None,
            to_tell: None,
            answered: now,
            lost: None,
            closing: false,
        }));
        let shared = state.clone();
        let rounds = move || {
            let names: Vec<String> =
                std::iter::once(keys.fault()).chain((0..size).map(|r| keys.beat(r))).collect();
            while !lock(&shared).closing {
                if let Err(error) = round(&store, &keys, &names, rank, &shared) {
                    lock(&shared).lost = Some(error.to_string());
                    return;
                }
                thread::park_timeout(PERIOD);
            }
        };
        let thread = thread::Builder::new().name("ranks".into()).spawn(rounds);
        let thread = thread
            .map_err(|source| Error::Io { what: "starting the thread that watches ranks".into(), source })?;
        Ok(Self { state, thread: Some(thread), rank, keeper, silence })
    }

    /// Notes that this rank enters an exchange.
    pub(super) fn enter(&self) {
        lock(&self.state).own.entered += 1;
    }

    /// Notes that the others are to wait for this rank, or not any more.
    pub(super) fn set_busy(&self, busy: bool) {
        lock(&self.state).own.busy = busy;
        self.hurry();
    }

    /// The first of the other ranks that is busy.
    pub(super) fn busy(&self) -> Option<usize> {
        let state = lock(&self.state);
        state.beats.iter().enumerate().position(|(rank, (beat, _))| rank != self.rank && beat.busy)
    }

    /// What is wrong with another rank, while nothing is wrong with the connections to it.
    pub(super) fn fault(&self) -> Option<Error> {
        let state = lock(&self.state);
        self.known(&state).or_else(|| {
            let (rank, silent) = self.most_silent(&state)?;
            let cause = format!(
                "no sign of life for {} s; it was stopped, or its machine or network is down",
                silent.as_secs()
            );
            (silent > self.silence).then_some(Error::Rank { rank, cause })
        })
    }

    /// Which rank is to blame for a connection that broke, if that comes out within a few seconds.
    pub(super) fn inquest(&self) -> Option<Error> {
        let began = Instant::now();
        while began.elapsed() < INQUEST {
            self.hurry();
            {
                let state = lock(&self.state);
                if let Some(error) = self.known(&state) {
                    return Some(error);
                }
                if let Some((rank, silent)) = self.most_silent(&state)
                    && silent > DEAD
                {
                    let cause = "it is gone without a word: killed, out of memory, or its machine went down";
                    return Some(Error::Rank { rank, cause: cause.to_owned() });
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
        None
    }

    /// The rank that has entered fewest exchanges, if it has entered fewer than this one.
    pub(super) fn behind(&self) -> Option<usize> {
        let state = lock(&self.state);
        let others = state.beats.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        let last = others.min_by_key(|(_, (beat, _))| beat.entered)?;
        (last.1.0.entered < state.own.entered).then_some(last.0)
    }

    /// Tells all ranks of a fault, unless they know one already.
    pub(super) fn tell(&self, fault: Fault) {
        lock(&self.state).to_tell.get_or_insert(fault);
        self.hurry();
    }

    /// Waits, a few seconds at most, until all ranks that live have read the fault: the store may end with this rank.
    pub(super) fn linger(&self) {
        let began = Instant::now();
        while began.elapsed() < DEAD {
            self.hurry();
            {
                let state = lock(&self.state);
                let others = state.beats.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
                let told = state.fault.is_some()
                    && others.clone().all(|(_, (beat, changed))| beat.seen || changed.elapsed() > 2 * PERIOD);
                if told || state.lost.is_some() {
                    return;
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the thread.
    pub(super) fn close(mut self) {
        lock(&self.state).closing = true;
        self.hurry();
        if let Some(thread) = self.thread.take() {
            // A panic in it has left the state as it was; there is nobody left to tell.
            let _ = thread.join();
        }
    }

    fn hurry(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// A fault that was told, or a store that does not answer.
    fn known(&self, state: &State) -> Option<Error> {
        if let Some(fault) = &state.fault {
            return Some(fault.error());
        }
        let silent = state.answered.elapsed();
        let (cause, is_lost) = match &state.lost {
            Some(text) => (format!("it is gone, and with it the store at which ranks meet ({text})"), true),
            None => (format!("the store that it keeps has not answered for {} s", silent.as_secs()), false),
        };
        if !is_lost && silent <= self.silence {
            return None;
        }
        Some(match self.keeper {
            Some(rank) => Error::Rank { rank, cause },
            None => Error::Exchange { during: "the launcher's store".to_owned(), cause },
        })
    }

    fn most_silent(&self, state: &State) -> Option<(usize, Duration)> {
        let others = state.beats.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        others.map(|(rank, (_, changed))| (rank, changed.elapsed())).max_by_key(|(_, silent)| *silent)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Every change of the state is one assignment: a panic leaves nothing half-done.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a sign of life, tells of a fault if there is one to tell, and reads what the others gave.
fn round(store: &Store, keys: &Keys, names: &[String], rank: usize, shared: &Mutex<State>) -> Result<()> {
    let (beat, to_tell, known) = {
        let mut state = lock(shared);
        state.own.count += 1;
        (state.own.clone(), state.to_tell.clone(), state.fault.is_some())
    };
    store.set(&keys.beat(rank), &beat.text())?;
    if let Some(fault) = to_tell.filter(|_| !known)
        && store.get(&names[..1])?.first().and_then(|text| Fault::parse(text)).is_none()
    {
        store.set(&keys.fault(), &fault.text())?;
    }
    let values = store.get(names)?;
    let mut state = lock(shared);
    state.answered = Instant::now();
    let mut values = values.iter();
    state.fault = values.next().and_then(|text| Fault::parse(text));
    state.own.seen = state.fault.is_some();
    for ((beat, changed), text) in state.beats.iter_mut().zip(values) {
        if let Some(new) = Beat::parse(text).filter(|new| new != beat) {
            (*beat, *changed) = (new, Instant::now());
        }
    }
    Ok(())
}
