//! Laws that hold for any weights, and agreement between ways of computing the same thing.

mod common;

use cm_model::schedule::{Boundary, NoiseCond, SigmaRange};
use cm_model::torch::autocast::Autocast;
use cm_model::torch::memory_format;
use cm_model::{Backbone, Cast, Cond, ConsistencyFn, ParamsBuilder, Preconditioned, Sigma, TensorMap};
use cm_net::{DhariwalUnet, DhariwalUnetSpec, NetSpec, OpenaiUnet, OpenaiUnetSpec, build};
use common::{adm, all, fill, ncsnpp, openai, rel, song, wave};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// A network with every weight filled, and an input for it.
fn filled(spec: &NetSpec) -> (Box<dyn Backbone + Send>, Tensor, Tensor, Cond) {
    let net = build(spec, 1, CPU).unwrap();
    fill(net.params());
    let cond = Cond::labels(&[0, 3, 4], net.num_classes(), CPU).unwrap();
    (net, wave(&[3, 3, 8, 8]), Tensor::from_slice(&[-0.5f32, 0.3, 1.1]), cond)
}

#[test]
fn a_consistency_function_is_the_identity_at_sigma_min() {
    for spec in all() {
        let (net, x, _, cond) = filled(&spec);
        let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
        let f = Preconditioned::new(net, precond, SigmaRange::new(0.002, 80.0).unwrap());
        assert!(f.jump(&x, Sigma::One(0.002), &cond).unwrap().equal(&x), "{spec:?}");
        assert!(rel(&f.jump(&x, Sigma::One(1.0), &cond).unwrap(), &x) > 0.1, "{spec:?}");
    }
}

#[test]
fn new_networks_start_at_zero() {
    for spec in all() {
        let net = build(&spec, 7, CPU).unwrap();
        let cond = Cond::labels(&[0, 3, 4], net.num_classes(), CPU).unwrap();
        let c_noise = Tensor::from_slice(&[-1.0f32, 0.0, 1.0]);
        let out = net.forward(&wave(&[3, 3, 8, 8]), &c_noise, &cond, false).unwrap();
        assert_eq!(out.size(), [3, 3, 8, 8]);
        let largest = out.abs().max().double_value(&[]);
        match spec {
            // Xavier times 1e-5, not 0: the first gradient reaches all layers.
            NetSpec::SongUnet(_) => assert!(largest > 0.0 && largest < 1e-3, "{largest}"),
            _ => assert_eq!(largest, 0.0),
        }
    }
}

#[test]
fn the_seed_alone_decides_the_start() {
    for spec in all() {
        let [a, b, c] = [5, 5, 6].map(|seed| build(&spec, seed, CPU).unwrap().params().snapshot());
        assert!(a.iter().all(|(name, tensor)| tensor.equal(&b[name])));
        assert!(a.iter().any(|(name, tensor)| !tensor.equal(&c[name])));
    }
}

#[test]
fn what_is_conditioned_on_shows_and_its_absence_is_defined() {
    for spec in [NetSpec::from(ncsnpp()), adm().into(), openai().into()] {
        let (net, x, c_noise, cond) = filled(&spec);
        let run = |cond: &Cond| net.forward(&x, &c_noise, cond, false);
        let labelled = run(&cond).unwrap();
        assert!(rel(&run(&Cond::labels(&[1, 3, 4], 5, CPU).unwrap()).unwrap(), &labelled) > 1e-3);
        let rows = cond.one_hot(3, 5, CPU).unwrap();
        assert!(rel(&run(&Cond { labels: Some(rows), augment: None }).unwrap(), &labelled) < 1e-6);
        let none = run(&Cond::none());
        if let NetSpec::OpenaiUnet(_) = spec {
            assert!(none.unwrap_err().to_string().contains("no unconditional answer"));
        } else {
            let zeros = Cond { labels: Some(Tensor::zeros([3, 5], (Kind::Float, CPU))), augment: None };
            assert!(none.unwrap().equal(&run(&zeros).unwrap()));
        }
        assert!(run(&Cond { labels: Some(Tensor::from_slice(&[0i64, 1, 5])), augment: None }).is_err());
    }
    let (net, x, c_noise, _) = filled(&ncsnpp().into());
    let with = |augment: Option<Tensor>| net.forward(&x, &c_noise, &Cond { labels: None, augment }, false);
    let without = with(None).unwrap();
    assert!(rel(&with(Some(wave(&[3, 9]))).unwrap(), &without) > 1e-3);
    assert!(rel(&with(Some(wave(&[3, 9]) * 0.0)).unwrap(), &without) < 1e-6);
    assert!(with(Some(wave(&[3, 8]))).unwrap_err().to_string().contains("[3, 9]"));
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let (net, x, c_noise, _) = filled(&song().into());
    let error = |x: &Tensor, c_noise: &Tensor, cond: &Cond| {
        net.forward(x, c_noise, cond, false).unwrap_err().to_string()
    };
    assert!(error(&wave(&[3, 3, 8, 4]), &c_noise, &Cond::none()).contains("[B, 3, 8, 8]"));
    assert!(error(&x, &wave(&[2]), &Cond::none()).contains("expected shape [3], got [2]"));
    let labels = Cond { labels: Some(Tensor::from_slice(&[0i64, 0, 0])), augment: None };
    assert!(error(&x, &c_noise, &labels).contains("the network is unconditional"));
    let augment = Cond { labels: None, augment: Some(wave(&[3, 9])) };
    assert!(error(&x, &c_noise, &augment).contains("does not take any"));
}

#[test]
fn images_of_a_batch_do_not_see_each_other() {
    for spec in all() {
        let (net, x, c_noise, cond) = filled(&spec);
        let whole = net.forward(&x, &c_noise, &cond, false).unwrap();
        let alone = net.forward(&x.narrow(0, 1, 1), &c_noise.narrow(0, 1, 1), &cond.narrow(1, 1), false);
        assert!(rel(&alone.unwrap(), &whole.narrow(0, 1, 1)) < 1e-5, "{spec:?}");
    }
}

#[test]
fn channels_last_and_bfloat16_change_the_rounding_alone() {
    for spec in all() {
        let (net, x, c_noise, cond) = filled(&spec);
        let plain = net.forward(&x, &c_noise, &cond, false).unwrap();
        let bf16 = |x: &Tensor| {
            let _region = Autocast::enter(CPU, Some(Kind::BFloat16));
            net.forward(x, &c_noise, &cond, false).unwrap()
        };
        let half = bf16(&x);
        assert_eq!(half.kind(), Kind::BFloat16);
        assert!(rel(&half.to_kind(Kind::Float), &plain) < 0.05, "{spec:?}");
        net.params().to_channels_last();
        let last = memory_format::channels_last(&x);
        assert!(rel(&net.forward(&last, &c_noise, &cond, false).unwrap(), &plain) < 1e-5, "{spec:?}");
        assert!(rel(&bf16(&last).to_kind(Kind::Float), &plain) < 0.05, "{spec:?}");
    }
}

/// The noise level sets scale and shift of everything: in bfloat16 neighbouring levels would be the same.
#[test]
fn embeddings_stay_float32_under_autocast() {
    let net = cm_net::SongUnet::new(&ncsnpp(), ParamsBuilder::new(3, CPU)).unwrap();
    let c_noise = Tensor::from_slice(&[-0.5f32, 0.3, 1.1]);
    let cond = Cond { labels: None, augment: Some(wave(&[3, 9])) };
    let plain = net.embed(&c_noise, &cond, false).unwrap();
    let _region = Autocast::enter(CPU, Some(Kind::BFloat16));
    assert!(net.embed(&c_noise, &cond, false).unwrap().equal(&plain));
}

#[test]
fn every_weight_gets_a_gradient() {
    for spec in all() {
        let (net, x, c_noise, cond) = filled(&spec);
        let augment = matches!(spec, NetSpec::SongUnet(ref song) if song.augment_dim > 0);
        let cond = Cond { augment: augment.then(|| wave(&[3, 9])), ..cond };
        let out = net.forward(&x, &c_noise, &cond, true).unwrap();
        (out * wave(&[3, 3, 8, 8])).sum(Kind::Float).backward();
        for (name, tensor) in net.params().trainable() {
            assert!(tensor.grad().defined(), "{name}");
            assert!(tensor.grad().abs().max().double_value(&[]) > 0.0, "{name} of {spec:?}");
        }
    }
}

/// The two forms of ADM are one function under other names, down to the rounding.
#[test]
fn both_forms_of_adm_compute_the_same() {
    // From 128 channels on, both have 32 groups; 64 channels make a head in both.
    let shared = OpenaiUnetSpec {
        model_channels: 128,
        channel_mult: vec![1, 2],
        attn_heads: cm_net::AttnHeads::HeadChannels(64),
        ..openai()
    };
    let theirs = OpenaiUnet::new(&shared, ParamsBuilder::new(0, CPU)).unwrap();
    fill(theirs.params());
    let spec = DhariwalUnetSpec { model_channels: 128, ..adm() };
    let ours = DhariwalUnet::new(&spec, ParamsBuilder::unset(CPU)).unwrap();
    let renamed: TensorMap = theirs.params().iter().map(|(name, t)| edm_name(name, t)).collect();
    ours.params().load(&with_filters(renamed), Cast::Never).unwrap();
    let (x, c_noise) = (wave(&[2, 3, 8, 8]), Tensor::from_slice(&[3.5f32, 40.0]));
    let cond = Cond::labels(&[1, 4], 5, CPU).unwrap();
    let want = theirs.forward(&x, &c_noise, &cond, false).unwrap();
    assert!(rel(&ours.forward(&x, &c_noise, &cond, false).unwrap(), &want) < 1e-5);
}

/// A parameter of the small OpenAI network of the test above, as EDM's form has it.
fn edm_name(name: &str, tensor: &Tensor) -> (String, Tensor) {
    let blocks = [
        ("time_embed.0", "map_layer0"),
        ("time_embed.2", "map_layer1"),
        ("label_emb", "map_label"),
        ("input_blocks.0.0", "enc.8x8_conv"),
        ("input_blocks.1", "enc.8x8_block0"),
        ("input_blocks.2", "enc.4x4_down"),
        ("input_blocks.3", "enc.4x4_block0"),
        ("middle_block.2.", "dec.4x4_in1.0."),
        ("middle_block", "dec.4x4_in0"),
        ("output_blocks.0", "dec.4x4_block0"),
        ("output_blocks.1.2.", "dec.8x8_up.0."),
        ("output_blocks.1", "dec.4x4_block1"),
        ("output_blocks.2", "dec.8x8_block0"),
        ("output_blocks.3", "dec.8x8_block1"),
        ("out.0", "out_norm"),
        ("out.2", "out_conv"),
    ];
    let layers = [
        (".0.in_layers.0", ".norm0"),
        (".0.in_layers.2", ".conv0"),
        (".0.emb_layers.1", ".affine"),
        (".0.out_layers.0", ".norm1"),
        (".0.out_layers.3", ".conv1"),
        (".0.skip_connection", ".skip"),
        (".1.norm", ".norm2"),
        (".1.qkv", ".qkv"),
        (".1.proj_out", ".proj"),
    ];
    let (from, to) = blocks.iter().find(|(from, _)| name.starts_with(from)).expect("a known block");
    let mut renamed = name.replacen(from, to, 1);
    if let Some((from, to)) = layers.iter().find(|(from, _)| renamed.contains(from)) {
        renamed = renamed.replace(from, to);
    }
    let tensor = if name.starts_with("label_emb") {
        tensor.tr().contiguous()
    } else if name.contains(".qkv.") {
        // (3, heads, 64) to (heads, 64, 3).
        let rest: Vec<i64> = tensor.size()[1..].to_vec();
        let split = tensor.view([&[3, -1, 64], &rest[..]].concat().as_slice());
        let order: Vec<i64> = [1, 2, 0].into_iter().chain(3..3 + rest.len() as i64).collect();
        split.permute(order).reshape(tensor.size())
    } else {
        tensor.shallow_clone()
    };
    (renamed, tensor)
}

fn with_filters(mut tensors: TensorMap) -> TensorMap {
    for layer in ["enc.4x4_down.conv0", "enc.4x4_down.skip", "dec.8x8_up.conv0", "dec.8x8_up.skip"] {
        tensors
            .insert(format!("{layer}.resample_filter"), Tensor::full([1, 1, 2, 2], 0.25, (Kind::Float, CPU)));
    }
    tensors
}

#[test]
fn published_names_and_flat_attention_weights_load() {
    let song = NetSpec::from(song());
    let net = build(&song, 1, CPU).unwrap();
    let published = net.params().iter().map(|(name, t)| (format!("model.{name}"), t.copy())).collect();
    build(&song, 2, CPU).unwrap().params().load(&song.names_from_published(published), Cast::Never).unwrap();

    let spec = NetSpec::from(openai());
    let net = build(&spec, 1, CPU).unwrap();
    let flat = |(name, t): (&str, &Tensor)| {
        let attention = name.contains("qkv.weight") || name.contains("proj_out.weight");
        (name.to_owned(), if attention { t.squeeze_dim(3) } else { t.copy() })
    };
    let published: TensorMap = net.params().iter().map(flat).collect();
    assert!(net.params().load(&published, Cast::Never).is_err());
    net.params().load(&spec.names_from_published(published), Cast::Never).unwrap();
}
