//! What weights cannot say about themselves, under names that can be typed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use cm_model::schedule::NoiseCond;
use cm_model::short;

use super::Architecture;
use crate::spec::{AttnHeads, OpenaiUnetSpec};
use crate::{Error, NetSpec, NoiseEmbedding, PrecondSpec, Result, Role, SongUnetSpec};

/// What a state dict does not say: what the function is (denoiser or consistency function), its noise levels, and,
/// for OpenAI's network, the image size and the size of the attention heads.
///
/// A kind is one of the names of [`Kind::named`], or is spelled out for a network of one's own:
///
/// ```
/// use cm_net::import::Kind;
/// let kind: Kind = "openai-imagenet64-cd".parse()?;
/// assert_eq!(kind.num_scales(), Some(40));
/// let kind: Kind = "openai:image_size=32,head_channels=64,role=denoiser".parse()?;
/// assert_eq!(kind.precond().sigma_max, 80.0);
/// assert!("openai-imagenet".parse::<Kind>().unwrap_err().to_string().contains("openai-imagenet64-ct"));
/// # Ok::<(), cm_net::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Kind {
    name: String,
    role: Role,
    precond: PrecondSpec,
    num_scales: Option<u32>,
    pub(super) unknowns: Unknowns,
    /// Whether `fourier_scale` was spelled out, which only a network with random frequencies has.
    pub(super) scale_given: bool,
    /// The network that the name stands for, down to the last channel.
    pub(super) net: Option<NetSpec>,
}

/// What the weights of a family of networks leave open.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unknowns {
    /// OpenAI's names.
    Openai { image_size: i64, heads: AttnHeads },
    /// EDM's names. The scale of the random frequencies, which are part of the weights, matters only to a network
    /// that starts anew.
    Edm { fourier_scale: f64 },
}

/// How kinds of one's own are spelled, for help texts and errors.
pub const OWN_KINDS: &str = "openai:image_size=N,head_channels=N,role=denoiser|consistency \
     (or num_heads=N), edm:role=denoiser|consistency (and fourier_scale where it is not 16); \
     with either sigma_min, sigma_max, sigma_data, rho where they are not 0.002, 80, 0.5, 7";

impl Kind {
    /// The published models: OpenAI's for ImageNet-64 and LSUN-256 (denoiser `edm`, consistency functions `cd` and
    /// `ct`; Song et al. 2023), EDM's (Karras et al. 2022) and ECT's (Geng et al. 2024; σ_min 0.003, frequencies of
    /// scale 0.02).
    #[must_use]
    pub fn named() -> Vec<Kind> {
        let nets =
            [("imagenet64", OpenaiUnetSpec::imagenet64(), 201), ("lsun256", OpenaiUnetSpec::lsun256(), 151)];
        let mut kinds = Vec::new();
        for (data, net, ct_scales) in nets {
            for (what, role, num_scales) in [
                ("edm", Role::Denoiser, None),
                ("cd", Role::Consistency, Some(40)),
                ("ct", Role::Consistency, Some(ct_scales)),
            ] {
                let precond = published(NoiseCond::ThousandQuarterLog);
                let kind = Self::of_net(&net.clone().into(), role, precond);
                kinds.push(Self { name: format!("openai-{data}-{what}"), num_scales, ..kind });
            }
        }
        let edm = published(NoiseCond::QuarterLog);
        let ect = PrecondSpec { sigma_min: 0.003, ..edm };
        kinds.push(Self::edm("edm", Role::Denoiser, edm, 16.0));
        kinds.push(Self::edm("ect", Role::Consistency, ect, 0.02));
        kinds
    }

    /// A kind for weights of exactly this network, such as the one in a training config. What weights do not hold
    /// (dropout, the size of heads) is taken from it.
    #[must_use]
    pub fn of_net(net: &NetSpec, role: Role, precond: PrecondSpec) -> Self {
        let unknowns = match net {
            NetSpec::OpenaiUnet(net) => {
                Unknowns::Openai { image_size: net.image_size, heads: net.attn_heads }
            }
            NetSpec::SongUnet(_) | NetSpec::DhariwalUnet(_) => Unknowns::Edm { fourier_scale: 16.0 },
        };
        let name = "the network of the config".to_owned();
        Self { name, role, precond, num_scales: None, unknowns, scale_given: false, net: Some(net.clone()) }
    }

    fn edm(name: &str, role: Role, precond: PrecondSpec, fourier_scale: f64) -> Self {
        let unknowns = Unknowns::Edm { fourier_scale };
        Self {
            name: name.to_owned(),
            role,
            precond,
            num_scales: None,
            unknowns,
            scale_given: false,
            net: None,
        }
    }

    /// Its name, as it is typed.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Denoiser or consistency function.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Preconditioning and noise levels.
    #[must_use]
    pub fn precond(&self) -> PrecondSpec {
        self.precond
    }

    /// Points of the grid that a consistency model was trained on, which times of multistep sampling count in.
    #[must_use]
    pub fn num_scales(&self) -> Option<u32> {
        self.num_scales
    }

    /// The names of [`Kind::named`], for help texts and errors.
    #[must_use]
    pub fn names() -> String {
        Self::named().iter().map(Kind::name).collect::<Vec<_>>().join(", ")
    }

    /// What of a whole network contradicts this kind.
    pub(super) fn contradictions(&self, net: &NetSpec) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(wanted) = &self.net {
            found = Architecture::of_net(net).differences(wanted);
        }
        match (net, self.unknowns) {
            (NetSpec::OpenaiUnet(net), Unknowns::Openai { image_size, heads }) => {
                if image_size != net.image_size {
                    found.push(format!("image size {}, expected {image_size}", net.image_size));
                }
                if heads != net.attn_heads {
                    found.push(format!("heads {:?}, expected {heads:?}", net.attn_heads));
                }
            }
            (NetSpec::SongUnet(_) | NetSpec::DhariwalUnet(_), Unknowns::Edm { fourier_scale })
                if self.net.is_none() =>
            {
                let drawn = match net {
                    NetSpec::SongUnet(SongUnetSpec {
                        embedding: NoiseEmbedding::Fourier { scale }, ..
                    }) => Some(*scale),
                    _ => None,
                };
                match drawn {
                    Some(scale) if scale != fourier_scale => {
                        found.push(format!("fourier_scale {scale}, expected {fourier_scale}"));
                    }
                    None if self.scale_given => {
                        found.push("no random frequencies, expected some of a fourier_scale".to_owned());
                    }
                    _ => {}
                }
            }
            (NetSpec::OpenaiUnet(_), Unknowns::Edm { .. }) if self.net.is_none() => {
                found.push("OpenAI's U-Net, expected EDM's network".to_owned());
            }
            (NetSpec::SongUnet(_) | NetSpec::DhariwalUnet(_), Unknowns::Openai { .. })
                if self.net.is_none() =>
            {
                found.push("EDM's network, expected OpenAI's U-Net".to_owned());
            }
            _ => {}
        }
        found
    }

    /// `openai:…` or `edm:…`.
    fn spelled(text: &str, family: &str, options: &str) -> Result<Self> {
        let mut options = Options::parse(text, options)?;
        let noise_cond =
            if family == "openai" { NoiseCond::ThousandQuarterLog } else { NoiseCond::QuarterLog };
        let mut precond = published(noise_cond);
        for (key, value) in [
            ("sigma_min", &mut precond.sigma_min),
            ("sigma_max", &mut precond.sigma_max),
            ("sigma_data", &mut precond.sigma_data),
            ("rho", &mut precond.rho),
        ] {
            *value = options.take(key)?.unwrap_or(*value);
        }
        precond.grid()?;
        precond.edm()?;
        let role = match options.take::<String>("role")?.as_deref() {
            Some("denoiser") => Role::Denoiser,
            Some("consistency") => Role::Consistency,
            _ => return Err(options.bad("role=denoiser or role=consistency")),
        };
        let mut scale_given = false;
        let unknowns = if family == "openai" {
            let heads = (options.take("head_channels")?, options.take("num_heads")?);
            let heads = match heads {
                (Some(channels), None) => AttnHeads::HeadChannels(channels),
                (None, Some(heads)) => AttnHeads::NumHeads(heads),
                _ => return Err(options.bad("one of head_channels=N and num_heads=N")),
            };
            let image_size = options.take("image_size")?.filter(|size| (1..=1 << 16).contains(size));
            let image_size = image_size.ok_or_else(|| options.bad("image_size=N, the side in pixels"))?;
            Unknowns::Openai { image_size, heads }
        } else {
            let given = options.take::<f64>("fourier_scale")?;
            if given.is_some_and(|scale| !(scale.is_finite() && scale > 0.0)) {
                return Err(options.bad("fourier_scale=a finite number above 0"));
            }
            scale_given = given.is_some();
            Unknowns::Edm { fourier_scale: given.unwrap_or(16.0) }
        };
        options.finish()?;
        Ok(Self { name: text.to_owned(), role, precond, num_scales: None, unknowns, scale_given, net: None })
    }
}

/// σ_data 0.5, σ from 0.002 to 80, ρ = 7: all published models but ECT's.
fn published(noise_cond: NoiseCond) -> PrecondSpec {
    PrecondSpec { sigma_data: 0.5, noise_cond, sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            Some((family @ ("openai" | "edm"), options)) => Self::spelled(text, family, options),
            _ => Self::named().into_iter().find(|kind| kind.name == text).ok_or_else(|| Error::Kind {
                got: text.to_owned(),
                expected: format!("one of {}, or {OWN_KINDS}", Self::names()),
            }),
        }
    }
}

/// `key=value,…`.
struct Options<'a> {
    text: &'a str,
    left: BTreeMap<&'a str, &'a str>,
}

impl<'a> Options<'a> {
    fn parse(text: &'a str, options: &'a str) -> Result<Self> {
        let mut parsed = Self { text, left: BTreeMap::new() };
        for option in options.split(',') {
            let pair = option.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
            let (key, value) = pair.ok_or_else(|| parsed.bad("key=value, separated by commas"))?;
            if parsed.left.insert(key, value).is_some() {
                return Err(parsed.bad(&format!("{} once", short(key))));
            }
        }
        Ok(parsed)
    }

    fn take<T: FromStr>(&mut self, key: &str) -> Result<Option<T>> {
        let value = self.left.remove(key).map(str::parse);
        value.transpose().map_err(|_| self.bad(&format!("a number behind {key}=")))
    }

    fn finish(self) -> Result<()> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(key) => Err(self.bad(&format!("no key '{}' but those of {OWN_KINDS}", short(key)))),
        }
    }

    fn bad(&self, expected: &str) -> Error {
        Error::Kind { got: self.text.to_owned(), expected: expected.to_owned() }
    }
}
