//! `unet/config.json` and `scheduler/scheduler_config.json`.

use super::*;
use crate::AttnHeads;
use crate::import::pickle;
use crate::spec::{MAX_BLOCKS, MAX_SIDE};

/// The only scheduler that says what its network is.
const CM_SCHEDULER: &str = "CMStochasticIterativeScheduler";
/// Where it is described, beside the folder of the network.
pub(in crate::import) const SCHEDULER: &str = "scheduler/scheduler_config.json";
/// Longest config that is read.
const MAX_BYTES: u64 = 1 << 20;

/// A JSON object.
pub(super) type Config = serde_json::Map<String, Value>;

/// What the scheduler of a folder says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scheduler {
    /// The network is a consistency function.
    Consistency { precond: PrecondSpec, num_scales: u32 },
    /// Another class, which goes with more than one kind of network.
    Other(String),
    /// There is none.
    None,
}

pub(super) fn read(path: &Path) -> Result<Config> {
    let io = |source| cm_model::Error::Io { path: path.into(), action: "reading", source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > MAX_BYTES {
        return Err(problem(path, format!("{bytes} bytes are too many for a config")));
    }
    let text = std::fs::read(path).map_err(io)?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(config)) => Ok(config),
        Ok(_) => Err(problem(path, "expected a JSON object".to_owned())),
        Err(e) => Err(problem(path, format!("not JSON: {e}"))),
    }
}

/// The scheduler beside the folder of the network.
pub(super) fn scheduler(folder: &Path) -> Result<Scheduler> {
    let parent = folder.canonicalize().ok().and_then(|folder| Some(folder.parent()?.join(SCHEDULER)));
    let Some(path) = parent.filter(|path| path.is_file()) else { return Ok(Scheduler::None) };
    let config = read(&path)?;
    match config.get("_class_name").and_then(Value::as_str) {
        Some(CM_SCHEDULER) => {}
        class => return Ok(Scheduler::Other(class.map_or_else(|| "without a class".to_owned(), short))),
    }
    let number = |key: &str, default: f64| match config.get(key) {
        None => Ok(default),
        Some(value) => value.as_f64().ok_or_else(|| {
            problem(&path, format!("{key} = {}, expected a number", short(&value.to_string())))
        }),
    };
    let precond = PrecondSpec {
        sigma_data: number("sigma_data", 0.5)?,
        noise_cond: NoiseCond::ThousandQuarterLog,
        sigma_min: number("sigma_min", 0.002)?,
        sigma_max: number("sigma_max", 80.0)?,
        rho: number("rho", 7.0)?,
    };
    precond.grid().and(precond.boundary().map(drop)).map_err(|e| problem(&path, e.to_string()))?;
    let num_scales = number("num_train_timesteps", 40.0)?;
    if !(2.0..1e6).contains(&num_scales) || num_scales.fract() != 0.0 {
        return Err(problem(&path, format!("num_train_timesteps = {num_scales}, expected 2 or more")));
    }
    Ok(Scheduler::Consistency { precond, num_scales: num_scales as u32 })
}

/// What a `UNet2DModel` must have to be OpenAI's network; the values are also the defaults of its constructor.
fn fixed() -> [(&'static str, Value); 15] {
    [
        ("_class_name", "UNet2DModel".into()),
        ("act_fn", "silu".into()),
        ("add_attention", true.into()),
        ("attention_legacy_order", false.into()),
        ("center_input_sample", false.into()),
        ("class_embed_type", Value::Null),
        ("downsample_padding", 1.into()),
        ("flip_sin_to_cos", true.into()),
        ("freq_shift", 0.into()),
        ("mid_block_scale_factor", 1.into()),
        ("mid_block_type", "UNetMidBlock2D".into()),
        ("norm_eps", 1e-5.into()),
        ("norm_num_groups", 32.into()),
        ("time_embedding_dim", Value::Null),
        ("time_embedding_type", "positional".into()),
    ]
}

/// Reads a config, and collects what contradicts OpenAI's network or itself.
struct Reader<'a> {
    config: &'a Config,
    known: BTreeSet<&'static str>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    fn get(&mut self, key: &'static str) -> &'a Value {
        self.known.insert(key);
        self.config.get(key).unwrap_or(&Value::Null)
    }

    fn expect(&mut self, key: &'static str, expected: &Value) {
        if !self.config.contains_key(key) {
            return;
        }
        let got = self.get(key);
        let same = match (got.as_f64(), expected.as_f64()) {
            (Some(got), Some(expected)) => got == expected,
            _ => got == expected,
        };
        if !same {
            self.problems.push(format!("{key} = {}, expected {expected}", short(&got.to_string())));
        }
    }

    fn bad<T>(&mut self, key: &str, got: impl std::fmt::Display, expected: &str) -> Option<T> {
        self.problems.push(format!("{key} = {}, expected {expected}", short(&got.to_string())));
        None
    }

    /// A whole number of at least 1; `default` where there is none.
    fn count(&mut self, key: &'static str, default: Option<i64>) -> Option<i64> {
        self.count_to(key, default, MAX_SIDE)
    }

    fn count_to(&mut self, key: &'static str, default: Option<i64>, most: i64) -> Option<i64> {
        let value = match self.get(key) {
            // The side of an image may be written as a pair.
            Value::Array(pair) if pair.len() == 2 && pair[0] == pair[1] => &pair[0],
            value => value,
        };
        match value {
            Value::Null if default.is_some() => default,
            value => match value.as_i64().filter(|n| (1..=most).contains(n)) {
                Some(n) => Some(n),
                None => self.bad(key, value, &format!("a whole number from 1 to {most}")),
            },
        }
    }

    fn word(&mut self, key: &'static str, default: &'static str, allowed: [&'static str; 2]) -> &'static str {
        let value = self.get(key);
        match value {
            Value::Null => default,
            value => match allowed.iter().find(|word| value == **word) {
                Some(word) => word,
                None => {
                    let _ = self.bad::<()>(key, value, &allowed.join(" or "));
                    default
                }
            },
        }
    }

    fn list<T>(&mut self, key: &'static str, item: impl Fn(&'a Value) -> Option<T>) -> Option<Vec<T>> {
        let value = self.get(key);
        let items = value.as_array().filter(|items| !items.is_empty() && items.len() <= 16);
        match items.and_then(|items| items.iter().map(item).collect()) {
            Some(items) => Some(items),
            None => self.bad(key, value, "a list with an item for each level"),
        }
    }
}

/// The network of a config; every contradiction in one text.
pub(super) fn network(config: &Config) -> pickle::Result<OpenaiUnetSpec> {
    let mut reader = Reader { config, known: BTreeSet::new(), problems: Vec::new() };
    for (key, expected) in &fixed() {
        reader.expect(key, expected);
    }
    let net = read_network(&mut reader);
    let Reader { known, mut problems, .. } = reader;
    let ignored = |key: &str| key.starts_with('_') || key == "num_train_timesteps" || known.contains(key);
    let unknown = config.iter().filter(|(key, value)| !ignored(key) && !value.is_null());
    problems.extend(
        unknown
            .map(|(key, value)| format!("{} = {} is not known here", short(key), short(&value.to_string()))),
    );
    match net {
        Some(net) if problems.is_empty() => {
            NetSpec::from(net.clone()).validate().map_err(|e| e.to_string())?;
            Ok(net)
        }
        _ => Err(problems.join("; ")),
    }
}

fn read_network(reader: &mut Reader<'_>) -> Option<OpenaiUnetSpec> {
    let image_size = reader.count("sample_size", None);
    let channels = reader.count("in_channels", Some(3));
    if let (Some(channels), Some(out)) = (channels, reader.count("out_channels", Some(3)))
        && channels != out
    {
        reader.bad::<()>("out_channels", out, &format!("{channels}, as many as in_channels"));
    }
    let widths =
        reader.list("block_out_channels", |value| value.as_i64().filter(|n| (1..=MAX_SIDE).contains(n)));
    let num_blocks = reader.count_to("layers_per_block", Some(2), MAX_BLOCKS);
    let attn_heads = match (reader.config.get("attention_head_dim"), reader.get("attention_head_dim")) {
        (Some(Value::Null), _) => Some(AttnHeads::NumHeads(1)),
        _ => reader.count("attention_head_dim", Some(8)).map(AttnHeads::HeadChannels),
    };
    let num_classes = match reader.get("num_class_embeds") {
        Value::Null => Some(0),
        _ => reader.count("num_class_embeds", None),
    };
    let scale_shift = reader.word("resnet_time_scale_shift", "default", ["default", "scale_shift"]);
    match reader.get("attn_norm_num_groups") {
        Value::Null if scale_shift == "default" => {}
        groups if groups.as_i64() == Some(32) => {}
        groups => {
            let expected = "32 (or nothing where resnet_time_scale_shift is default)";
            reader.bad::<()>("attn_norm_num_groups", groups, expected);
        }
    }
    let dropout = match reader.get("dropout") {
        Value::Null => Some(0.0),
        value => value.as_f64().or_else(|| reader.bad("dropout", value, "a number")),
    };
    let (attn_levels, resblock_updown) = levels(reader, widths.as_ref().map_or(0, Vec::len))?;
    let (widths, image_size) = (widths?, image_size?);
    let model_channels = widths[0];
    if let Some(width) = widths.iter().find(|width| **width % model_channels != 0) {
        let expected = format!("multiples of the first, {model_channels}");
        return reader.bad("block_out_channels", format!("[… {width} …]"), &expected);
    }
    Some(OpenaiUnetSpec {
        image_size,
        image_channels: channels?,
        num_classes: num_classes?,
        model_channels,
        channel_mult: widths.iter().map(|width| width / model_channels).collect(),
        num_blocks: num_blocks?,
        attn_resolutions: attn_levels.iter().map(|level| image_size >> level).collect(),
        attn_heads: attn_heads?,
        dropout: dropout?,
        scale_shift_norm: scale_shift == "scale_shift",
        resblock_updown,
    })
}

/// Levels with attention, and whether residual blocks change the resolution.
fn levels(reader: &mut Reader<'_>, levels: usize) -> Option<(Vec<usize>, bool)> {
    let down_type = reader.word("downsample_type", "conv", ["conv", "resnet"]);
    let up_type = reader.word("upsample_type", "conv", ["conv", "resnet"]);
    let down = reader.list("down_block_types", |value| block(value.as_str()?, DOWN, down_type));
    let up = reader.list("up_block_types", |value| block(value.as_str()?, UP, up_type));
    let (down, mut up) = (down?, up?);
    up.reverse();
    if down.len() != levels || up.len() != levels {
        let got = format!("{} and {} blocks", down.len(), up.len());
        return reader.bad("down_block_types, up_block_types", got, &format!("{levels}, as many as levels"));
    }
    if let Some(level) = (0..levels).find(|&level| down[level].attends != up[level].attends) {
        return reader.bad(
            "up_block_types",
            format!("[… level {level} …]"),
            "attention where down_block_types has it",
        );
    }
    // The coarsest level has nothing below it: neither of its blocks changes the resolution.
    let samplers: BTreeSet<bool> =
        (0..levels - 1).flat_map(|l| [down[l].by_block, up[l + 1].by_block]).collect();
    if samplers.len() > 1 {
        let expected = "residual blocks at all levels, or convolutions at all";
        return reader.bad("down_block_types, up_block_types", "a mixture of resamplers", expected);
    }
    let attending = (0..levels).filter(|&level| down[level].attends).collect();
    Some((attending, samplers.first().copied().unwrap_or(false)))
}

#[derive(Clone, Copy)]
struct Block {
    attends: bool,
    /// A residual block changes the resolution, where something does.
    by_block: bool,
}

/// Without attention and with a convolution; with attention; without attention and with a residual block.
const DOWN: [&str; 3] = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"];
const UP: [&str; 3] = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"];

fn block(name: &str, names: [&str; 3], sampler: &str) -> Option<Block> {
    Some(match names.iter().position(|known| *known == name)? {
        0 => Block { attends: false, by_block: false },
        1 => Block { attends: true, by_block: sampler == "resnet" },
        _ => Block { attends: false, by_block: true },
    })
}

/// The config of a network; `Err` says what diffusers cannot express.
pub(in crate::import) fn write_config(net: &OpenaiUnetSpec) -> pickle::Result<Value> {
    let widths = net.widths();
    if net.channel_mult.first() != Some(&1) {
        return Err(format!(
            "channel_mult {:?} does not begin with 1, as UNet2DModel's does",
            net.channel_mult
        ));
    }
    let bottom = widths.last().copied();
    let attending = (0..widths.len()).filter(|level| net.attends(*level)).map(|level| widths[level]);
    let head_dims: BTreeSet<i64> =
        attending.chain(bottom).map(|width| width / net.heads(width).max(1)).collect();
    let head_dim = match (net.attn_heads, head_dims.first()) {
        (AttnHeads::NumHeads(1), _) => Value::Null,
        (_, Some(channels)) if head_dims.len() == 1 => (*channels).into(),
        _ => return Err(format!("its heads have {head_dims:?} channels, UNet2DModel's all have one number")),
    };
    let sampler = if net.resblock_updown { "resnet" } else { "conv" };
    let name = |names: [&'static str; 3], level: usize| match (net.attends(level), net.resblock_updown) {
        (true, _) => names[1],
        (false, true) => names[2],
        (false, false) => names[0],
    };
    let down: Vec<_> = (0..widths.len()).map(|level| name(DOWN, level)).collect();
    let up: Vec<_> = (0..widths.len()).rev().map(|level| name(UP, level)).collect();
    let mut config: Config = fixed().map(|(key, value)| (key.to_owned(), value)).into_iter().collect();
    let scale_shift = if net.scale_shift_norm { "scale_shift" } else { "default" };
    for (key, value) in [
        ("attention_head_dim", head_dim),
        ("attn_norm_num_groups", 32.into()),
        ("block_out_channels", widths.into()),
        ("down_block_types", down.into()),
        ("downsample_type", sampler.into()),
        ("dropout", net.dropout.into()),
        ("in_channels", net.image_channels.into()),
        ("layers_per_block", net.num_blocks.into()),
        ("num_class_embeds", if net.num_classes > 0 { net.num_classes.into() } else { Value::Null }),
        ("out_channels", net.image_channels.into()),
        ("resnet_time_scale_shift", scale_shift.into()),
        ("sample_size", net.image_size.into()),
        ("up_block_types", up.into()),
        ("upsample_type", sampler.into()),
    ] {
        config.insert(key.to_owned(), value);
    }
    // Versions of diffusers from before these keys would warn of them.
    for key in ["attention_legacy_order", "time_embedding_dim", "mid_block_type"] {
        config.remove(key);
    }
    Ok(config.into())
}

/// The scheduler of a consistency model.
pub(in crate::import) fn write_scheduler(precond: &PrecondSpec, num_scales: u32) -> Value {
    serde_json::json!({
        "_class_name": CM_SCHEDULER,
        "clip_denoised": true,
        "num_train_timesteps": num_scales,
        "rho": precond.rho,
        "s_noise": 1.0,
        "sigma_data": precond.sigma_data,
        "sigma_max": precond.sigma_max,
        "sigma_min": precond.sigma_min,
    })
}
