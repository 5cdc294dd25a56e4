//! Sampling of a network, whose kernels round differently at different batch sizes.
#![cfg(feature = "nets")]

use cm_sampler::model::Preconditioned;
use cm_sampler::nets::{ModelSpec, NetSpec, PrecondSpec, Role, build, save_model};
use cm_sampler::schedule::{Boundary, NoiseCond, SigmaRange};
use cm_sampler::tch::{self, Device, Kind, Tensor};
use cm_sampler::{Request, Times, load, multistep, one_step};

fn spec() -> NetSpec {
    NetSpec::SongUnet(cm_sampler::nets::SongUnetSpec {
        image_size: 8,
        image_channels: 3,
        num_classes: 4,
        augment_dim: 0,
        model_channels: 16,
        channel_mult: vec![1, 2],
        channel_mult_emb: 4,
        num_blocks: 1,
        attn_resolutions: vec![4],
        dropout: 0.1,
        label_dropout: 0.0,
        embedding: cm_sampler::nets::NoiseEmbedding::Positional {},
        channel_mult_noise: 1,
        encoder: cm_sampler::nets::Encoder::Standard,
        decoder: cm_sampler::nets::Decoder::Standard,
        resample_filter: vec![1.0, 1.0],
    })
}

/// A network whose residual branches are not near zero, as those of a fresh one are.
fn network() -> Box<dyn cm_sampler::model::Backbone + Send> {
    let net = build(&spec(), 1, Device::Cpu).unwrap();
    let _no_grad = tch::no_grad_guard();
    tch::manual_seed(2);
    for (_, weight) in net.params().trainable().filter(|(_, w)| w.dim() > 1) {
        let fan_in: i64 = weight.size()[1..].iter().product();
        let random = weight.randn_like() / (fan_in as f64).sqrt();
        weight.shallow_clone().copy_(&random);
    }
    net
}

fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

#[test]
fn the_image_of_a_seed_is_the_same_at_any_batch_size_up_to_rounding() {
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
    let f = Preconditioned::new(network(), precond, SigmaRange::EDM);
    let seeds: Vec<u64> = (100..113).collect();
    let labels: Vec<i64> = (0..13).map(|i| i % 4).collect();
    let request = Request { labels: Some(&labels), clip: false, ..Request::new(&seeds) };
    let times = Times::Sigmas(vec![80.0, 5.0, 0.8]);
    let together = multistep(&f, &times, &request).unwrap();
    assert!(largest(&together) > 0.1, "the network does something");
    for batch in [1, 4, 7] {
        let split = multistep(&f, &times, &Request { batch, ..request }).unwrap();
        let error = largest(&(split - &together)) / largest(&together);
        assert!(error < 1e-5, "batch {batch}: {error:e}");
    }
}

#[test]
fn a_model_file_samples_like_the_network_that_it_was_made_of() {
    let net = network();
    let precond = PrecondSpec {
        sigma_data: 0.5,
        noise_cond: NoiseCond::QuarterLog,
        sigma_min: 0.002,
        sigma_max: 80.0,
        rho: 7.0,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save_model(&path, net.params(), &ModelSpec::new(Role::Consistency, spec(), precond)).unwrap();
    let request = Request::new(&[7, 8, 9]);
    let f = load(&path, Device::Cpu).unwrap().into_consistency().unwrap();
    assert_eq!((f.num_classes(), f.sigma_range()), (4, SigmaRange::EDM));
    let loaded = one_step(f.as_ref(), &request).unwrap();
    let direct = Preconditioned::new(net, precond.boundary().unwrap(), SigmaRange::EDM);
    let wanted = one_step(&direct, &request).unwrap();
    assert_eq!(loaded.kind(), Kind::Float);
    assert!(loaded == wanted);
    // A denoiser in its place is one error that says what to do.
    save_model(&path, direct.net.params(), &ModelSpec::new(Role::Denoiser, spec(), precond)).unwrap();
    let error = load(&path, Device::Cpu).unwrap().into_consistency().map(drop).unwrap_err();
    assert!(error.to_string().contains("consistency"), "{error}");
}
