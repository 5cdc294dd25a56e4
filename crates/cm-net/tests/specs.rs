//! What a network's description allows, and how many parameters the published networks have.

mod common;

use cm_net::{
    AttnHeads, DhariwalUnetSpec, Encoder, Error, NetSpec, NoiseEmbedding, OpenaiUnetSpec, SongUnetSpec,
};
use common::{adm, all, openai, song};

#[test]
fn published_networks_have_the_published_number_of_parameters() {
    let published: [(&str, NetSpec, i64); 8] = [
        ("EDM CIFAR-10 DDPM++", SongUnetSpec::ddpmpp_cifar10(0).into(), 55_733_891),
        ("the same, conditional", SongUnetSpec::ddpmpp_cifar10(10).into(), 55_735_299),
        ("EDM CIFAR-10 NCSN++", SongUnetSpec::ncsnpp_cifar10(0).into(), 56_397_827),
        ("CIFAR-10 CT", SongUnetSpec::consistency_cifar10().into(), 56_395_523),
        ("EDM FFHQ", SongUnetSpec::ddpmpp_64(0.05).into(), 61_805_571),
        ("EDM ImageNet-64", DhariwalUnetSpec::adm_imagenet64().into(), 295_899_267),
        ("CM ImageNet-64", OpenaiUnetSpec::imagenet64().into(), 295_899_267),
        ("CM LSUN-256", OpenaiUnetSpec::lsun256().into(), 526_304_771),
    ];
    for (name, spec, want) in published {
        assert_eq!(spec.num_parameters().unwrap(), want, "{name}");
    }
}

#[test]
fn descriptions_survive_json_and_refuse_unknown_keys() {
    for spec in all() {
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<NetSpec>(&json).unwrap(), spec);
        let extra = json.replacen('{', "{\"chanel_mult\":[1],", 1);
        let error = serde_json::from_str::<NetSpec>(&extra).unwrap_err().to_string();
        assert!(error.contains("chanel_mult"), "{error}");
    }
    let nested = serde_json::to_string(&NetSpec::from(song())).unwrap();
    for kind in [r#"{"kind":"positional","scale":1.0}"#, r#"{"kind":"fourier"}"#, r#"{"kind":"sine"}"#] {
        let bad = nested.replace(r#"{"kind":"positional"}"#, kind);
        assert!(bad != nested && serde_json::from_str::<NetSpec>(&bad).is_err(), "{kind}");
    }
}

/// Each change must be refused with an error that names `key` and says `expected`.
fn refused(spec: impl Into<NetSpec>, key: &str, expected: &str) {
    let error = spec.into().validate().unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Option { key: got, .. } if got == key), "{key}: {text}");
    assert!(text.contains(expected), "{text}");
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    refused(SongUnetSpec { attn_resolutions: vec![4, 16], ..song() }, "attn_resolutions", "[8, 4]");
    refused(SongUnetSpec { image_size: 9, ..song() }, "image_size", "a multiple of 2^1, for 2 levels");
    refused(SongUnetSpec { channel_mult: vec![1; 16], ..song() }, "image_size", "a multiple of 2^15");
    refused(SongUnetSpec { channel_mult: vec![], ..song() }, "channel_mult", "for each level");
    refused(SongUnetSpec { channel_mult: vec![1, 0], ..song() }, "channel_mult", "for each level");
    refused(SongUnetSpec { model_channels: 50, ..song() }, "model_channels", "divide into 12 groups");
    refused(SongUnetSpec { model_channels: 2, ..song() }, "model_channels", "at least 4");
    refused(SongUnetSpec { model_channels: 0, ..song() }, "model_channels", "at least 1");
    refused(SongUnetSpec { dropout: 1.0, ..song() }, "dropout", "below 1");
    refused(SongUnetSpec { dropout: f64::NAN, ..song() }, "dropout", "below 1");
    refused(SongUnetSpec { label_dropout: 0.1, ..song() }, "label_dropout", "without classes");
    refused(SongUnetSpec { num_blocks: 0, ..song() }, "num_blocks", "at least 1");
    refused(SongUnetSpec { num_classes: -1, ..song() }, "num_classes", "at least 0");
    refused(
        SongUnetSpec { resample_filter: vec![1.0, 2.0, 1.0], ..song() },
        "resample_filter",
        "even number",
    );
    refused(SongUnetSpec { resample_filter: vec![1.0, -1.0], ..song() }, "resample_filter", "not 0");
    let embedding = NoiseEmbedding::Fourier { scale: 0.0 };
    refused(SongUnetSpec { embedding, ..song() }, "embedding.scale", "above 0");
    refused(DhariwalUnetSpec { model_channels: 33, ..adm() }, "model_channels", "even");
    refused(DhariwalUnetSpec { attn_resolutions: vec![2], ..adm() }, "attn_resolutions", "[8, 4]");
    refused(OpenaiUnetSpec { model_channels: 48, ..openai() }, "model_channels", "32 groups");
    let attn_heads = AttnHeads::HeadChannels(48);
    refused(OpenaiUnetSpec { attn_heads, ..openai() }, "attn_heads", "divide the channels");
    let attn_heads = AttnHeads::NumHeads(0);
    refused(OpenaiUnetSpec { attn_heads, ..openai() }, "attn_heads.num_heads", "at least 1");
}

#[test]
fn no_network_is_described_beyond_all_bounds() {
    let huge = 1i64 << 40;
    refused(SongUnetSpec { num_blocks: 1_000_000_000, ..song() }, "num_blocks", "at most 256");
    refused(DhariwalUnetSpec { num_blocks: 257, ..adm() }, "num_blocks", "at most 256");
    refused(OpenaiUnetSpec { num_blocks: i64::MAX, ..openai() }, "num_blocks", "at most 256");
    refused(SongUnetSpec { channel_mult: vec![1; 17], ..song() }, "channel_mult", "at most 16 levels");
    refused(SongUnetSpec { resample_filter: vec![1.0; 66], ..song() }, "resample_filter", "at most 64 taps");
    refused(SongUnetSpec { image_size: huge, ..song() }, "image_size", "at most 1048576");
    refused(SongUnetSpec { image_channels: huge, ..song() }, "image_channels", "at most 1048576");
    refused(SongUnetSpec { num_classes: huge, ..song() }, "num_classes", "at most 1048576");
    refused(SongUnetSpec { augment_dim: huge, ..song() }, "augment_dim", "at most 1048576");
    refused(OpenaiUnetSpec { model_channels: huge, ..openai() }, "model_channels", "at most 1048576");
    for factor in [huge, i64::MAX, 1 << 20] {
        let channel_mult = vec![1, factor];
        refused(OpenaiUnetSpec { channel_mult, ..openai() }, "channel_mult", "at most 1048576");
        refused(SongUnetSpec { channel_mult_emb: factor, ..song() }, "channel_mult_emb", "at most 1048576");
        refused(
            SongUnetSpec { channel_mult_noise: factor, ..song() },
            "channel_mult_noise",
            "at most 1048576",
        );
        refused(
            DhariwalUnetSpec { channel_mult_emb: factor, ..adm() },
            "channel_mult_emb",
            "at most 1048576",
        );
    }
}

#[test]
fn no_preset_holds_a_variant_that_only_golden_files_need() {
    for spec in
        [SongUnetSpec::ddpmpp_cifar10(0), SongUnetSpec::ncsnpp_cifar10(0), SongUnetSpec::ddpmpp_64(0.05)]
    {
        assert!(spec.encoder != Encoder::Skip && spec.decoder == cm_net::Decoder::Standard);
    }
}
