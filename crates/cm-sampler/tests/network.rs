//! Sampling of a network, whose kernels round differently at different batch sizes.
#![cfg(feature = "nets")]

use cm_sampler::model::Preconditioned;
use cm_sampler::nets::{ModelSpec, NetSpec, PrecondSpec, Role, build, save_model};
use cm_sampler::schedule::solver::Churn;
use cm_sampler::schedule::{Boundary, Edm, KarrasGrid, NoiseCond, SigmaRange};
use cm_sampler::tch::{self, Device, Kind, Tensor};
use cm_sampler::{
    Hooks, Job, Method, ModelRef, Request, Sampler, SamplerOptions, Solver, Steps, Times, load, multistep,
    one_step, sample,
};

fn spec(num_classes: i64) -> NetSpec {
    NetSpec::SongUnet(cm_sampler::nets::SongUnetSpec {
        image_size: 8,
        image_channels: 3,
        num_classes,
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
fn network(num_classes: i64) -> Box<dyn cm_sampler::model::Backbone + Send> {
    let net = build(&spec(num_classes), 1, Device::Cpu).unwrap();
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
    let f = Preconditioned::new(network(4), precond, SigmaRange::EDM);
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
    let net = network(4);
    let precond = PrecondSpec {
        sigma_data: 0.5,
        noise_cond: NoiseCond::QuarterLog,
        sigma_min: 0.002,
        sigma_max: 80.0,
        rho: 7.0,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save_model(&path, net.params(), &ModelSpec::new(Role::Consistency, spec(4), precond)).unwrap();
    let request = Request::new(&[7, 8, 9]);
    let f = load(&path, Device::Cpu).unwrap().into_consistency().unwrap();
    assert_eq!((f.num_classes(), f.sigma_range()), (4, SigmaRange::EDM));
    let loaded = one_step(f.as_ref(), &request).unwrap();
    let direct = Preconditioned::new(net, precond.boundary().unwrap(), SigmaRange::EDM);
    let wanted = one_step(&direct, &request).unwrap();
    assert_eq!(loaded.kind(), Kind::Float);
    assert!(loaded == wanted);
    // A denoiser in its place is one error that says what to do.
    save_model(&path, direct.net.params(), &ModelSpec::new(Role::Denoiser, spec(4), precond)).unwrap();
    let error = load(&path, Device::Cpu).unwrap().into_consistency().map(drop).unwrap_err();
    assert!(error.to_string().contains("consistency"), "{error}");
}

#[test]
fn jobs_in_one_batch_get_what_they_get_alone_up_to_rounding() {
    for num_classes in [0, 4] {
        let noise = NoiseCond::QuarterLog;
        let f = Preconditioned::new(
            network(num_classes),
            Boundary::new(0.5, 0.002, noise).unwrap(),
            SigmaRange::EDM,
        );
        let d = Preconditioned::new(network(num_classes), Edm::new(0.5, noise).unwrap(), SigmaRange::EDM);
        let solver = |solver, n| Steps::Solver { solver, levels: KarrasGrid::EDM.with_zero(n) };
        let jumps = [
            Steps::One,
            Steps::Multistep(Times::Sigmas(vec![80.0, 5.0, 0.8])),
            Steps::Multistep(Times::Indices { ts: vec![0, 22, 39], steps: 40, rho: 7.0 }),
        ];
        let churn = Churn { s_churn: 3.0, s_min: 0.1, s_max: 30.0, s_noise: 1.0 };
        let solvers =
            [solver(Solver::Heun { churn }, 6), solver(Solver::DpmPp2m, 8), solver(Solver::Ancestral, 5)];
        for (model, steps) in [(ModelRef::Consistency(&f), jumps), (ModelRef::Denoiser(&d), solvers)] {
            let job = |i: usize| Job {
                seed: 40 + i as u64,
                label: (num_classes > 0 && !i.is_multiple_of(4)).then_some(i as i64 % num_classes.max(1)),
                steps: steps[i % 3].clone(),
            };
            let jobs: Vec<Job> = (0..9).map(job).collect();
            let options = SamplerOptions { batch: 6, clip: false, ..SamplerOptions::default() };
            let together = Sampler::new(model, options).unwrap().batch(&jobs).unwrap();
            for (image, job) in together.iter().zip(&jobs) {
                let (seeds, labels) = ([job.seed], job.label.map(|label| [label]));
                let labels = labels.as_ref().map(|labels| labels.as_slice());
                let request = Request { labels, clip: false, ..Request::new(&seeds) };
                let method = Method::new(model, &job.steps).unwrap();
                let alone = sample(&method, &request, Hooks::default()).unwrap().squeeze_dim(0);
                let error = largest(&(image - &alone)) / largest(&alone);
                assert!(error < 1e-5, "{error:e}: {job:?}");
            }
            let same = |a: usize, b: usize| together[a].equal(&together[b]);
            assert!(!same(0, 3), "seeds differ");
        }
    }
}
