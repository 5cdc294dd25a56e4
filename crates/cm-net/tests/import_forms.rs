//! Published forms: what is found in them, what is refused, and the way back.

mod common;
#[path = "common/fixtures.rs"]
mod fixtures;

use std::path::Path;

use cm_model::schedule::NoiseCond;
use cm_model::{Bundle, TensorMap};
use cm_net::import::{Architecture, Kind, describe, load_any, read_torch};
use cm_net::{
    AttnHeads, Decoder, Encoder, Error, NetSpec, NoiseEmbedding, OpenaiUnetSpec, PrecondSpec, Role, build,
    inspect, save_tensors,
};
use common::all;
use fixtures::{TINY, assert_same, kind, unpacked, weight};
use proptest::prelude::*;
use tch::{Device, Kind as Dtype, Tensor};

fn refused(path: &Path, kind: Option<Kind>) -> String {
    fixtures::one_line(load_any(path, kind).expect_err("it is loaded"))
}

#[test]
fn openais_state_dict_tells_its_network_and_not_its_kind() {
    let (_folder, path) = unpacked("openai_cond.pt");
    let file = load_any(&path, kind(TINY)).unwrap();
    let want = OpenaiUnetSpec {
        image_size: 8,
        image_channels: 3,
        num_classes: 10,
        model_channels: 32,
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![4],
        attn_heads: AttnHeads::HeadChannels(32),
        dropout: 0.0,
        scale_shift_norm: true,
        resblock_updown: true,
    };
    assert_eq!(file.spec.net, NetSpec::OpenaiUnet(want.clone()));
    assert_eq!(
        (file.spec.role, file.spec.precond.noise_cond),
        (Role::Consistency, NoiseCond::ThousandQuarterLog)
    );
    for (name, tensor) in &file.tensors {
        assert!(tensor.equal(&weight(name, &tensor.size(), Dtype::Float)), "{name}");
    }
    assert_eq!(file.spec.about["source"], "openai_cond.pt");
    assert_eq!(file.spec.about["kind"], TINY);

    let (_folder, path) = unpacked("openai_uncond_legacy.pt");
    let file = load_any(&path, kind("openai:image_size=16,num_heads=4,role=denoiser")).unwrap();
    let want = OpenaiUnetSpec {
        image_size: 16,
        num_classes: 0,
        channel_mult: vec![1, 1],
        attn_resolutions: vec![16],
        attn_heads: AttnHeads::NumHeads(4),
        scale_shift_norm: false,
        resblock_updown: false,
        ..want
    };
    assert_eq!(file.spec.net, NetSpec::OpenaiUnet(want));
    assert_eq!(file.spec.role, Role::Denoiser);
    assert!(file.tensors.values().all(|tensor| tensor.kind() == Dtype::Half), "dtypes stay");
    file.backbone(Device::Cpu).unwrap();

    let line = refused(&path, None);
    for words in
        ["image size, head size, and whether", "--as KIND", "none of openai-imagenet64-edm", "role=denoiser"]
    {
        assert!(line.contains(words), "{line}");
    }
    let description = describe(&path).unwrap();
    assert_eq!(description.form, "torch.save, form before 1.6, in 'state_dict'");
    assert_eq!(description.dtypes.iter().collect::<Vec<_>>(), ["F16"]);
    assert!(description.kinds.is_empty());
    let words = "OpenAI's U-Net (32 channels × [1, 1], 1 block a level, attention at 1/1 of the image, 0 classes, \
                 no scale-shift norm, resampling convolutions)";
    assert_eq!(description.architecture.unwrap().to_string(), words);
}

#[test]
fn differences_to_a_kind_are_all_in_one_line() {
    let (folder, path) = unpacked("openai_cond.pt");
    let line = refused(&path, kind("openai-imagenet64-cd"));
    for words in [
        "openai_cond.pt: it is not openai-imagenet64-cd",
        "model_channels 32, expected 192",
        "channel_mult [1,2], expected [1,2,3,4]",
        "num_blocks 1, expected 3",
        "num_classes 10, expected 1000",
        "attn_resolutions [32], expected [32,16,8]",
    ] {
        assert!(line.contains(words), "{words}: {line}");
    }
    let line = refused(&path, kind("edm"));
    assert!(line.contains("it is OpenAI's U-Net") && line.contains("which edm is not"), "{line}");
    let line = refused(&path, kind("openai:image_size=8,head_channels=24,role=denoiser"));
    assert!(line.contains("heads that divide the channels"), "{line}");
    let line = refused(&path, kind("openai:image_size=7,head_channels=32,role=denoiser"));
    assert!(line.contains("image_size = 7"), "{line}");

    let mut tensors = read_torch(&path).unwrap();
    let bias = tensors.remove("middle_block.1.qkv.bias").unwrap();
    tensors.insert("middle_block.1.qkv.biass".into(), bias);
    tensors.insert("out.0.bias".into(), weight("x", &[5], Dtype::Float));
    tensors.insert("time_embed.0.bias".into(), weight("x", &[128], Dtype::Int64));
    let path = folder.path().join("changed.safetensors");
    Bundle { tensors, ..Bundle::default() }.write(&path).unwrap();
    let error = load_any(&path, kind(TINY)).unwrap_err();
    assert!(matches!(error, Error::Weights { .. }));
    let line = error.to_string();
    for words in [
        "changed.safetensors: weights do not fit",
        "'middle_block.1.qkv.bias' [192] is missing",
        "'middle_block.1.qkv.biass' is not a part",
        "'out.0.bias' has shape [5], expected [32]",
        "'time_embed.0.bias' has dtype Int64, expected Float",
    ] {
        assert!(line.contains(words), "{words}: {line}");
    }
    // What makes no network of its own is held against the network that it is said to be.
    let mut tensors = Bundle::read(&path).unwrap().tensors;
    tensors.remove("time_embed.0.weight");
    Bundle { tensors, ..Bundle::default() }.write(&path).unwrap();
    assert!(refused(&path, kind(TINY)).contains("'time_embed.0.weight' is missing"));
    let of_net = |net: &NetSpec| Some(Kind::of_net(net, Role::Denoiser, precond()));
    let openai = NetSpec::from(OpenaiUnetSpec { num_classes: 10, ..common::openai() });
    assert!(refused(&path, of_net(&openai)).contains("'time_embed.0.weight' [128, 32] is missing"));
    Bundle { tensors: [("w".to_owned(), weight("w", &[1], Dtype::Float))].into(), ..Bundle::default() }
        .write(&path)
        .unwrap();
    assert!(refused(&path, kind(TINY)).contains("('w', …) are not those of a network"));
}

fn precond() -> PrecondSpec {
    kind("edm").unwrap().precond()
}

#[test]
fn the_network_of_a_config_stands_in_for_a_kind() {
    let (_folder, path) = unpacked("openai_cond.pt");
    let mut net = OpenaiUnetSpec { num_classes: 10, ..common::openai() };
    let file = load_any(&path, Some(Kind::of_net(&net.clone().into(), Role::Denoiser, precond()))).unwrap();
    assert_eq!(file.spec.net, NetSpec::OpenaiUnet(net.clone()), "with its dropout and its heads");
    net.num_blocks = 2;
    let line = refused(&path, Some(Kind::of_net(&net.into(), Role::Denoiser, precond())));
    assert!(line.contains("num_blocks 1, expected 2") && !line.contains(';'), "{line}");
    let line = refused(&path, Some(Kind::of_net(&common::song().into(), Role::Denoiser, precond())));
    assert!(
        line.contains("the weights are of OpenAI's U-Net") && line.contains("expected EDM's SongUNet"),
        "{line}"
    );
}

#[test]
fn rank_3_weights_of_attention_are_widened() {
    let (folder, path) = unpacked("openai_cond.pt");
    let mut tensors = read_torch(&path).unwrap();
    for (name, tensor) in &mut tensors {
        if name.ends_with("qkv.weight") || name.ends_with("proj_out.weight") {
            *tensor = tensor.squeeze_dim(-1);
        }
    }
    let narrow = folder.path().join("narrow.safetensors");
    Bundle { tensors, ..Bundle::default() }.write(&narrow).unwrap();
    assert_same(
        &load_any(&narrow, kind(TINY)).unwrap().tensors,
        &load_any(&path, kind(TINY)).unwrap().tensors,
    );
}

#[test]
fn edms_names_tell_their_network() {
    let (folder, path) = unpacked("adm.safetensors");
    let file = load_any(&path, kind("edm")).unwrap();
    let NetSpec::DhariwalUnet(net) = &file.spec.net else { panic!("{:?}", file.spec.net) };
    assert_eq!((net.image_size, net.model_channels, net.num_classes, net.augment_dim), (8, 16, 5, 0));
    assert_eq!((net.channel_mult.as_slice(), net.num_blocks), (&[1, 2][..], 1));
    assert!(net.attn_resolutions.is_empty());
    for (name, tensor) in file.tensors.iter().filter(|(name, _)| !name.ends_with("resample_filter")) {
        assert!(tensor.equal(&weight(name, &tensor.size(), Dtype::Float)), "{name}");
    }
    let line = refused(&path, None);
    assert!(line.contains("these fit: edm, ect") && line.contains("whether it is a denoiser"), "{line}");
    let both: Vec<_> = describe(&path).unwrap().kinds.iter().map(|kind| kind.name().to_owned()).collect();
    assert_eq!(both, ["edm", "ect"]);
    let line = refused(&path, kind(TINY));
    assert!(line.contains("EDM's DhariwalUNet for 3×8×8 with 5 classes"), "{line}");

    // The names may also stand without the prefix, or be in a file of torch.save.
    let other = folder.path().join("other.safetensors");
    Bundle { tensors: copy(&file.tensors), ..Bundle::default() }.write(&other).unwrap();
    assert_same(&load_any(&other, kind("ect")).unwrap().tensors, &file.tensors);
    let (_folder, torch) = unpacked("edm_state.pt");
    assert_eq!(load_any(&torch, kind("edm")).unwrap().spec.net.num_classes(), 10);
    assert_eq!(describe(&torch).unwrap().kinds.len(), 2);
    let mut twice = Bundle::read(&path).unwrap().tensors;
    twice.extend(copy(&file.tensors));
    Bundle { tensors: twice, ..Bundle::default() }.write(&other).unwrap();
    assert!(refused(&other, kind("edm")).contains("twice, with and without 'model.'"));

    // Twice the outputs are the predicted variances of iDDPM.
    let mut tensors = copy(&file.tensors);
    tensors.insert("out_conv.weight".into(), weight("w", &[6, 16, 3, 3], Dtype::Float));
    Bundle { tensors, ..Bundle::default() }.write(&other).unwrap();
    assert!(refused(&other, kind("edm")).contains("predicts variances"));
}

fn copy(tensors: &TensorMap) -> TensorMap {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

#[test]
fn every_network_is_found_in_its_own_weights() {
    let reference = cm_net::SongUnetSpec {
        encoder: Encoder::Skip,
        decoder: Decoder::Skip,
        resample_filter: vec![1.0, 2.0, 2.0, 1.0],
        ..common::song()
    };
    let single = OpenaiUnetSpec { channel_mult: vec![2], attn_resolutions: vec![], ..common::openai() };
    let lsun = OpenaiUnetSpec {
        channel_mult: vec![1, 1, 2],
        num_blocks: 2,
        attn_resolutions: vec![2, 4],
        scale_shift_norm: false,
        num_classes: 0,
        ..common::openai()
    };
    let convolutions = OpenaiUnetSpec { resblock_updown: false, ..lsun.clone() };
    let others: [NetSpec; 5] =
        [reference.into(), single.into(), lsun.clone().into(), convolutions.into(), NetSpec::from(lsun)];
    for net in all().into_iter().chain(others) {
        let tensors = build(&net, 3, Device::Cpu).unwrap().params().snapshot();
        let found = Architecture::of(&tensors).unwrap();
        assert_eq!(found.differences(&net), Vec::<String>::new(), "{net:?}");
        let fits = |kind: Kind| found.fits(&kind);
        assert!(fits(Kind::of_net(&net, Role::Denoiser, precond())));
        let (song, openai) = (kind("edm").unwrap(), kind(TINY).unwrap());
        assert_ne!(fits(song), fits(openai), "{found}");
        for other in all().into_iter().filter(|other| *other != net) {
            assert!(!found.differences(&other).is_empty(), "{net:?} is not {other:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// State dicts with tensors lost, renamed and reshaped, up to shapes that no memory could hold.
    #[test]
    fn odd_state_dicts_are_loaded_or_refused(
        which in 0usize..4,
        changes in prop::collection::vec(
            (any::<prop::sample::Index>(), 0u8..4, prop::collection::vec(0i64..1 << 15, 1..5)),
            1..6,
        ),
    ) {
        let net = &all()[which];
        let mut tensors = build(net, 3, Device::Cpu).unwrap().params().snapshot();
        for (at, what, mut shape) in changes {
            let name = tensors.keys().nth(at.index(tensors.len())).unwrap().clone();
            let tensor = tensors.remove(&name).unwrap();
            match what {
                0 => {}
                1 => drop(tensors.insert(name.replace(['0', '1'], "2"), tensor)),
                2 => {
                    // Nothing inside, whatever the other sides.
                    shape[0] = 0;
                    drop(tensors.insert(name, Tensor::zeros(&shape, (Dtype::Float, Device::Cpu))));
                }
                _ => {
                    let shape: Vec<_> = shape.iter().map(|side| 1 + side % 7).collect();
                    drop(tensors.insert(name, Tensor::zeros(&shape, (Dtype::Float, Device::Cpu))));
                }
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("odd.safetensors");
        Bundle { tensors, ..Bundle::default() }.write(&path).unwrap();
        for kind in [None, kind("edm"), kind(TINY), Some(Kind::of_net(net, Role::Denoiser, precond()))] {
            if let Err(error) = load_any(&path, kind) {
                prop_assert!(error.to_string().contains("odd.safetensors"), "{}", error);
            }
        }
        let _ = describe(&path);
    }
}

#[test]
fn published_networks_are_their_kinds() {
    let cm = [("imagenet64", OpenaiUnetSpec::imagenet64()), ("lsun256", OpenaiUnetSpec::lsun256())];
    for (data, net) in cm {
        let found = Architecture::Openai(cm_net::import::OpenaiParts {
            image_channels: 3,
            num_classes: net.num_classes,
            model_channels: net.model_channels,
            channel_mult: net.channel_mult.clone(),
            num_blocks: net.num_blocks,
            attn_levels: net.attn_resolutions.iter().map(|r| (net.image_size / r).ilog2() as usize).collect(),
            scale_shift_norm: net.scale_shift_norm,
            resblock_updown: true,
        });
        let fitting: Vec<_> = Kind::named().into_iter().filter(|kind| found.fits(kind)).collect();
        let names: Vec<_> = fitting.iter().map(Kind::name).collect();
        assert_eq!(names, ["edm", "cd", "ct"].map(|what| format!("openai-{data}-{what}")));
        let roles: Vec<_> = fitting.iter().map(Kind::role).collect();
        assert_eq!(roles, [Role::Denoiser, Role::Consistency, Role::Consistency]);
        assert!(fitting.iter().all(|kind| kind.precond().noise_cond == NoiseCond::ThousandQuarterLog));
    }
    let scales = |text: &str| kind(text).unwrap().num_scales();
    assert_eq!(scales("openai-imagenet64-ct"), Some(201));
    assert_eq!(scales("openai-lsun256-ct"), Some(151));
    let ect = kind("ect").unwrap();
    assert_eq!((ect.role(), ect.precond().sigma_min), (Role::Consistency, 0.003));
}

#[test]
fn kinds_are_spelled_or_refused_with_the_list() {
    let own = kind("edm:role=consistency,sigma_min=0.01,sigma_max=50,fourier_scale=0.02").unwrap();
    assert_eq!((own.precond().sigma_min, own.precond().sigma_max), (0.01, 50.0));
    for (text, words) in [
        ("imagenet64", "one of openai-imagenet64-edm, openai-imagenet64-cd"),
        ("", "edm, ect"),
        ("openai:", "key=value"),
        ("openai:image_size=8,head_channels=32", "role=denoiser"),
        ("openai:image_size=8,head_channels=32,role=teacher", "role=consistency"),
        ("openai:image_size=8,role=denoiser", "head_channels=N"),
        ("openai:image_size=8,head_channels=8,num_heads=2,role=denoiser", "one of head_channels=N"),
        ("openai:head_channels=8,role=denoiser", "image_size=N"),
        ("openai:image_size=big,head_channels=8,role=denoiser", "a number behind image_size="),
        ("openai:image_size=8,image_size=8,head_channels=8,role=denoiser", "image_size once"),
        ("openai:image_size=8,head_channels=8,role=denoiser,dropout=1", "no key 'dropout'"),
        ("edm:role=denoiser,sigma_min=-1", "sigma_min"),
        ("edm:role=denoiser,sigma_data=0", "sigma_data"),
    ] {
        let line = text.parse::<Kind>().unwrap_err().to_string();
        assert!(line.contains(words), "{text}: {line}");
    }
}

#[test]
fn our_own_files_pass_through() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let net = NetSpec::from(common::openai());
    let spec = cm_net::ModelSpec::new(Role::Denoiser, net.clone(), precond());
    save_tensors(&path, build(&net, 1, Device::Cpu).unwrap().params().snapshot(), &spec).unwrap();
    let file = load_any(&path, None).unwrap();
    assert_eq!(file.spec, spec);
    let description = describe(&path).unwrap();
    assert!(description.own && description.spec == Some(spec));
    assert!(load_any(&path, Some(Kind::of_net(&net, Role::Denoiser, precond()))).is_ok());
    let line = refused(&path, kind("openai-imagenet64-cd"));
    for words in
        ["it is a denoiser, expected a consistency function", "noise_cond", "model_channels 32, expected 192"]
    {
        assert!(line.contains(words), "{line}");
    }
    assert!(refused(&path, kind("openai-imagenet64-edm")).contains("expected 192"));

    // Everything that a kind says must be so.
    let other = PrecondSpec { sigma_max: 50.0, ..precond() };
    let line = refused(&path, Some(Kind::of_net(&net, Role::Denoiser, other)));
    assert!(line.contains("not the network of the config: sigma_max 80, expected 50; leave"), "{line}");
    let line = refused(&path, kind("edm"));
    assert!(line.contains("OpenAI's U-Net, expected EDM's network"), "{line}");
    let line = refused(&path, kind("openai:image_size=16,head_channels=16,role=denoiser"));
    assert!(line.contains("image size 8, expected 16; heads"), "{line}");
    let NetSpec::OpenaiUnet(bigger) = net else { panic!() };
    let bigger = OpenaiUnetSpec { image_size: 16, attn_resolutions: vec![8], ..bigger };
    let line = refused(&path, Some(Kind::of_net(&bigger.into(), Role::Denoiser, precond())));
    assert!(line.contains("image size 8, expected 16"), "{line}");
}

#[test]
fn our_own_files_must_fit_what_they_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let spec = cm_net::ModelSpec::new(Role::Denoiser, common::openai().into(), precond());
    let mut tensors = build(&spec.net, 1, Device::Cpu).unwrap().params().snapshot();
    assert!(tensors.remove("out.2.bias").is_some());
    tensors.insert(format!("a\u{1b}[2J{}", "b".repeat(500)), weight("w", &[1], Dtype::Float));
    save_tensors(&path, tensors, &spec).unwrap();
    for line in [refused(&path, None), fixtures::one_line(inspect(&path).unwrap_err())] {
        assert!(line.contains("model.safetensors") && line.contains("'out.2.bias' [3] is missing"), "{line}");
        assert!(line.contains("'a\\u{1b}[2Jbb") && !line.contains('\u{1b}') && line.len() < 500, "{line}");
    }
}

#[test]
fn the_scale_of_random_frequencies_is_for_networks_that_have_some() {
    for scale in ["0", "-1", "inf", "nan"] {
        let line =
            format!("edm:role=denoiser,fourier_scale={scale}").parse::<Kind>().unwrap_err().to_string();
        assert!(line.contains("fourier_scale=a finite number above 0"), "{line}");
    }
    let (_folder, path) = unpacked("adm.safetensors");
    let line = refused(&path, kind("edm:role=denoiser,fourier_scale=16"));
    assert!(line.contains("EDM's DhariwalUNet") && line.contains("no random frequencies"), "{line}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let write = |net: NetSpec| {
        let spec = cm_net::ModelSpec::new(Role::Denoiser, net.clone(), precond());
        save_tensors(&path, build(&net, 1, Device::Cpu).unwrap().params().snapshot(), &spec).unwrap();
    };
    write(common::song().into());
    let line = refused(&path, kind("edm:role=denoiser,fourier_scale=16"));
    assert!(line.contains("no random frequencies"), "{line}");
    assert!(load_any(&path, kind("edm")).is_ok());
    let embedding = NoiseEmbedding::Fourier { scale: 16.0 };
    write(cm_net::SongUnetSpec { embedding, ..common::song() }.into());
    assert!(load_any(&path, kind("edm:role=denoiser,fourier_scale=16")).is_ok());
    let line = refused(&path, kind("edm:role=denoiser,fourier_scale=2"));
    assert!(line.contains("fourier_scale 16, expected 2"), "{line}");
}
