use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use crate::{Error, Result};

/// Who this process is among those that train together, and where they meet: what a launcher such as `torchrun`
/// writes into the environment.
///
/// ```
/// use cm_torch::dist::Rendezvous;
/// let here = |name: &str| match name {
///     "RANK" => Some("1".to_owned()),
///     "WORLD_SIZE" => Some("4".to_owned()),
///     "MASTER_ADDR" => Some("10.0.0.1".to_owned()),
///     "MASTER_PORT" => Some("29500".to_owned()),
///     _ => None,
/// };
/// let rendezvous = Rendezvous::from_vars(here).unwrap().unwrap();
/// assert_eq!((rendezvous.rank, rendezvous.world_size, rendezvous.port), (1, 4, 29500));
/// assert!(Rendezvous::from_vars(|_| None).unwrap().is_none());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// Which of the processes this is, from 0: `RANK`.
    pub rank: usize,
    /// Which of the processes of this machine, from 0: `LOCAL_RANK`; the rank if it is not set.
    pub local_rank: usize,
    /// How many processes there are: `WORLD_SIZE`.
    pub world_size: usize,
    /// Name or address of the machine with the store at which they meet: `MASTER_ADDR`.
    pub address: String,
    /// The store's port: `MASTER_PORT`.
    pub port: u16,
    /// Who keeps the store.
    pub keeper: Keeper,
    /// The network interface that ranks talk through, where one is named: `GLOO_SOCKET_IFNAME`.
    pub interface: Option<String>,
}

/// Who keeps the store at which ranks meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// Rank 0.
    RankZero,
    /// The launcher: torchrun says so in `TORCHELASTIC_USE_AGENT_STORE`.
    Launcher {
        /// How often it has started the ranks anew: `TORCHELASTIC_RESTART_COUNT`. Each time they begin with a store
        /// in which nothing of theirs is.
        attempt: u32,
    },
}

/// More ranks than this are a slip of the pen.
const MOST_RANKS: usize = 4096;

impl Rendezvous {
    /// Reads the variables through `get`; `None` if neither `RANK` nor `WORLD_SIZE` is set, and there is one process.
    ///
    /// # Errors
    /// [`Error::Variable`] with the variable, its value and what to do.
    pub fn from_vars(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let vars = Vars(&|name| get(name).filter(|value| !value.is_empty()));
        if vars.text("RANK").is_none() && vars.text("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let world_size = vars.number("WORLD_SIZE", 1, MOST_RANKS, None)?;
        let rank = vars.number("RANK", 0, world_size - 1, None)?;
        let local_rank = vars.number("LOCAL_RANK", 0, world_size - 1, Some(rank))?;
        let alone = world_size == 1;
        let address = match vars.text("MASTER_ADDR") {
            None if alone => "localhost".to_owned(),
            None => {
                return Err(vars.wrong("MASTER_ADDR", "the name or address of the machine of rank 0"));
            }
            Some(address) => address,
        };
        let port = vars.number("MASTER_PORT", 1, u16::MAX, alone.then_some(1))?;
        let keeper = match vars.text("TORCHELASTIC_USE_AGENT_STORE").as_deref() {
            Some("True") => {
                Keeper::Launcher { attempt: vars.number("TORCHELASTIC_RESTART_COUNT", 0, u32::MAX, Some(0))? }
            }
            _ => Keeper::RankZero,
        };
        let interface = vars.text("GLOO_SOCKET_IFNAME");
        Ok(Some(Self { rank, local_rank, world_size, address, port, keeper, interface }))
    }

    /// Whether all ranks are on this machine, as far as the address tells.
    pub(crate) fn is_local(&self) -> bool {
        self.address == "localhost"
            || self.address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

/// How long ranks wait for one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For all to come, and for all to take part in one exchange.
    pub exchange: Duration,
    /// For a rank that lives and says that it is [busy](super::ProcessGroup::busy).
    pub busy: Duration,
    /// For a sign of life, which every rank gives once a second whatever else it does.
    pub silence: Duration,
}

impl Default for Limits {
    /// Ten minutes for an exchange, two hours for one that is busy, half a minute of silence.
    fn default() -> Self {
        let [exchange, busy, silence] = [600, 7200, 30].map(Duration::from_secs);
        Self { exchange, busy, silence }
    }
}

impl Limits {
    /// The limits with `CM_DIST_TIMEOUT` seconds for an exchange and `CM_DIST_BUSY` for a rank that is busy, where these
    /// are set. The limit of silence is lowered to that of an exchange if it is longer.
    ///
    /// # Errors
    /// [`Error::Variable`] if one is no number of seconds.
    pub fn from_vars(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let vars = Vars(&|name| get(name).filter(|value| !value.is_empty()));
        let default = Self::default();
        let seconds = |name, default: Duration| {
            vars.number(name, 1, 1_000_000, Some(default.as_secs())).map(Duration::from_secs)
        };
        let exchange = seconds("CM_DIST_TIMEOUT", default.exchange)?;
        let busy = seconds("CM_DIST_BUSY", default.busy)?;
        Ok(Self { exchange, busy, silence: default.silence.min(exchange) })
    }
}

/// Variables of the environment.
struct Vars<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Vars<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn number<T>(&self, name: &'static str, least: T, most: T, default: Option<T>) -> Result<T>
    where
        T: FromStr + PartialOrd + Display,
    {
        let number = match (self.text(name), default) {
            (None, Some(default)) => return Ok(default),
            (text, _) => text.and_then(|text| text.trim().parse::<T>().ok()),
        };
        match number {
            Some(number) if number >= least && number <= most => Ok(number),
            _ => Err(self.wrong(name, &format!("a whole number from {least} to {most}"))),
        }
    }

    fn wrong(&self, name: &'static str, expected: &str) -> Error {
        let advice = "torchrun, or cargo xtask launch, sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every \
                      process; one process alone needs none of them";
        let is_limit = matches!(name, "CM_DIST_TIMEOUT" | "CM_DIST_BUSY");
        let advice = if is_limit { "it is in seconds" } else { advice };
        Error::Variable {
            name,
            got: self.text(name),
            expected: expected.to_owned(),
            advice: advice.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Option<Rendezvous>> {
        Rendezvous::from_vars(|name| {
            vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const TWO: [(&str, &str); 4] =
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")];

    #[test]
    fn what_a_launcher_sets_is_read() {
        let two = read(&TWO).unwrap().unwrap();
        assert_eq!((two.rank, two.local_rank, two.world_size), (1, 1, 2));
        assert_eq!((two.address.as_str(), two.port, two.is_local()), ("localhost", 29500, true));
        assert_eq!((two.keeper, two.interface), (Keeper::RankZero, None));
        let more =
            [("LOCAL_RANK", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("GLOO_SOCKET_IFNAME", "eth1")];
        let more =
            read(&[&TWO[..], &more, &[("TORCHELASTIC_RESTART_COUNT", "3")]].concat()).unwrap().unwrap();
        assert_eq!((more.local_rank, more.keeper), (0, Keeper::Launcher { attempt: 3 }));
        assert_eq!(more.interface.as_deref(), Some("eth1"));
        let one = read(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().unwrap();
        assert_eq!((one.rank, one.world_size), (0, 1));
        assert!(read(&[("RANK", ""), ("MASTER_PORT", "1")]).unwrap().is_none());
    }

    #[test]
    fn what_is_missing_or_wrong_is_named_with_what_to_do() {
        for (change, words) in [
            (("RANK", ""), "RANK is not set: expected a whole number from 0 to 1; torchrun"),
            (("RANK", "2"), "RANK=2: expected a whole number from 0 to 1"),
            (("RANK", "-1"), "RANK=-1"),
            (("WORLD_SIZE", ""), "WORLD_SIZE is not set"),
            (("WORLD_SIZE", "0"), "WORLD_SIZE=0: expected a whole number from 1 to 4096"),
            (
                ("MASTER_ADDR", ""),
                "MASTER_ADDR is not set: expected the name or address of the machine of rank 0",
            ),
            (("MASTER_PORT", "70000"), "MASTER_PORT=70000: expected a whole number from 1 to 65535"),
            (("MASTER_PORT", "0"), "MASTER_PORT=0"),
        ] {
            let vars: Vec<_> = TWO
                .iter()
                .map(|(key, value)| (*key, if *key == change.0 { change.1 } else { value }))
                .collect();
            let error = read(&vars).unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[test]
    fn limits_are_read_and_silence_is_never_the_longer_one() {
        let limits =
            |value: &str| Limits::from_vars(|name| (name == "CM_DIST_TIMEOUT").then(|| value.to_owned()));
        assert_eq!(Limits::from_vars(|_| None).unwrap(), Limits::default());
        let short = limits("5").unwrap();
        assert_eq!((short.exchange, short.silence), (Duration::from_secs(5), Duration::from_secs(5)));
        assert_eq!(limits("900").unwrap().silence, Duration::from_secs(30));
        let busy = Limits::from_vars(|name| (name == "CM_DIST_BUSY").then(|| "60".to_owned())).unwrap();
        assert_eq!(busy, Limits { busy: Duration::from_secs(60), ..Limits::default() });
        let error = limits("soon").unwrap_err().to_string();
        assert_eq!(
            error,
            "CM_DIST_TIMEOUT=soon: expected a whole number from 1 to 1000000; it is in seconds"
        );
    }
}
