//! Models come out of every published form in one call, can be sent to other threads, and say what they are not.
#![cfg(feature = "nets")]

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use cm_sampler::model::{Backbone, ConsistencyFn, Denoiser, GaussianOracle, Params, Preconditioned};
use cm_sampler::schedule::{Boundary, Edm, solver::Churn};
use cm_sampler::tch::{Device, Tensor};
use cm_sampler::{Error, Hooks, Method, Model, Request, Role, Solver, load, load_as, nets, one_step, sample};
use flate2::read::GzDecoder;
use tempfile::TempDir;

/// A copy of a committed file or folder of a published form, unpacked where it is packed.
fn published(name: &str) -> (TempDir, PathBuf) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cm-net/tests/fixtures");
    let folder = tempfile::tempdir().unwrap();
    unpack(&fixtures, name, folder.path());
    let path = folder.path().join(name);
    (folder, path)
}

fn unpack(from: &Path, name: &str, to: &Path) {
    let (plain, packed) = (from.join(name), from.join(format!("{name}.gz")));
    if plain.is_dir() {
        fs::create_dir_all(to.join(name)).unwrap();
        for entry in fs::read_dir(&plain).unwrap() {
            let entry = entry.unwrap().file_name().into_string().unwrap();
            unpack(&plain, entry.strip_suffix(".gz").unwrap_or(&entry), &to.join(name));
        }
    } else if packed.is_file() {
        let mut file = fs::File::create(to.join(name)).unwrap();
        std::io::copy(&mut GzDecoder::new(fs::File::open(packed).unwrap()), &mut file).unwrap();
    } else {
        fs::copy(plain, to.join(name)).unwrap();
    }
}

const OPENAI: &str = "openai:image_size=8,head_channels=32,role=consistency";

#[test]
fn every_published_form_is_one_call() {
    for (name, kind, role) in [
        ("diffusers_cd", None, Role::Consistency),
        ("diffusers_conv", None, Role::Consistency),
        ("openai_cond.pt", Some(OPENAI), Role::Consistency),
        ("edm_state.pt", Some("edm"), Role::Denoiser),
        ("edm_ddpmpp.safetensors", None, Role::Denoiser),
        ("ect_ncsnpp.safetensors", None, Role::Consistency),
    ] {
        let (folder, path) = published(name);
        let model = match kind {
            None => load(&path, Device::Cpu).unwrap(),
            Some(kind) => {
                let missing = load(&path, Device::Cpu).unwrap_err();
                assert!(matches!(missing, Error::Nets(nets::Error::Import { .. })), "{missing}");
                assert!(missing.to_string().contains("load_as"), "{missing}");
                load_as(&path, kind.parse().unwrap(), Device::Cpu).unwrap()
            }
        };
        assert_eq!(model.role(), role, "{name}");
        let images = drawn(&model);
        assert!(images.isfinite().all().int64_value(&[]) == 1, "{name}");
        // Written in this project's own form, it is opened without a kind and is the same model.
        let own = folder.path().join("own.safetensors");
        let file = nets::import::load_any(&path, kind.map(|kind| kind.parse().unwrap())).unwrap();
        nets::save_tensors(&own, file.tensors, &file.spec).unwrap();
        assert!(drawn(&load(&own, Device::Cpu).unwrap()).equal(&images), "{name}");
    }
}

fn drawn(model: &Model) -> Tensor {
    let seeds = [1, 2];
    let of = |classes: i64| (classes > 0).then_some([0, 1].as_slice());
    match model {
        Model::Consistency(f) => {
            one_step(f.as_ref(), &Request { labels: of(f.num_classes()), ..Request::new(&seeds) })
        }
        Model::Denoiser(d) => {
            let request = Request { labels: of(d.num_classes()), ..Request::new(&seeds) };
            let heun = Solver::Heun { churn: Churn::NONE };
            let method = Method::solver(d.as_ref(), heun, &[80.0, 1.0, 0.0]);
            method.and_then(|method| sample(&method, &request, Hooks::default()))
        }
    }
    .unwrap()
}

/// A program that uses this crate alone meets one type of error.
#[test]
fn a_model_of_the_other_kind_is_one_typed_error() {
    fn heun(path: &Path) -> cm_sampler::Result<Tensor> {
        let model = load(path, Device::Cpu)?;
        let method = Method::solver(model.denoiser()?, Solver::Euler, &[80.0, 0.0])?;
        sample(&method, &Request::new(&[1]), Hooks::default())
    }
    let (_folder, path) = published("diffusers_cd");
    let error = heun(&path).unwrap_err();
    assert!(matches!(error, Error::NeedsDenoiser), "{error}");
    assert!(!error.to_string().contains('\n'));
    let absent = heun(&path.join("none.safetensors")).unwrap_err();
    assert!(matches!(absent, Error::Model(_)) && absent.to_string().contains("none.safetensors"), "{absent}");
}

const fn is_send<T: Send>() {}

/// Checked by the compiler.
const _: () = {
    is_send::<Model>();
    is_send::<Params>();
    is_send::<Box<dyn Denoiser + Send>>();
    is_send::<Box<dyn ConsistencyFn + Send>>();
    is_send::<Preconditioned<Box<dyn Backbone + Send>, Boundary>>();
    is_send::<Preconditioned<Box<dyn Backbone + Send>, Edm>>();
    is_send::<nets::ModelFile>();
    is_send::<nets::OpenaiUnet>();
    is_send::<nets::SongUnet>();
    is_send::<nets::DhariwalUnet>();
    is_send::<GaussianOracle>();
    is_send::<Error>();
};

#[test]
fn a_model_samples_on_another_thread_what_it_samples_here() {
    let (_folder, path) = published("diffusers_cd");
    let model = load(&path, Device::Cpu).unwrap();
    let here = drawn(&model);
    // A worker that owns the model and answers requests, as a service would have it.
    let (requests, inbox) = std::sync::mpsc::channel::<u64>();
    let (outbox, answers) = std::sync::mpsc::channel();
    let worker = thread::spawn(move || -> cm_sampler::Result<()> {
        let f = model.into_consistency()?;
        for seed in inbox {
            let labels = (f.num_classes() > 0).then_some([seed as i64 - 1]);
            let labels = labels.as_ref().map(<[i64; 1]>::as_slice);
            let images = one_step(f.as_ref(), &Request { labels, ..Request::new(&[seed]) })?;
            outbox.send(images).expect("the answer is waited for");
        }
        Ok(())
    });
    for seed in [1, 2] {
        requests.send(seed).unwrap();
        let there = answers.recv().unwrap();
        let error = (there - here.narrow(0, seed as i64 - 1, 1)).abs().max().double_value(&[]);
        assert!(error < 1e-5 * here.abs().max().double_value(&[]), "seed {seed}: {error:e}");
    }
    drop(requests);
    worker.join().unwrap().unwrap();
}
