//! The committed golden files pass, and damaged copies of them do not.

use std::fs;
use std::path::{Path, PathBuf};

use cm_golden::report::{Outcome, Report};
use cm_golden::run;
use cm_model::Bundle;
use tch::{Kind, Tensor};
use tempfile::TempDir;

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn file(stem: &str) -> PathBuf {
    committed().join(format!("{stem}.safetensors"))
}

/// A folder with copies of some files.
fn folder(stems: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for stem in stems {
        fs::copy(file(stem), folder.path().join(format!("{stem}.safetensors"))).unwrap();
    }
    folder
}

fn check(folder: &Path) -> Report {
    run(&[folder.to_owned()], None).unwrap()
}

/// Writes a changed copy of a file over it and checks the folder.
fn check_changed(folder: &Path, stem: &str, change: impl FnOnce(&mut Bundle)) -> Report {
    let mut bundle = Bundle::read(&file(stem)).unwrap();
    change(&mut bundle);
    bundle.write(&folder.join(format!("{stem}.safetensors"))).unwrap();
    check(folder)
}

#[test]
fn the_committed_files_pass() {
    let report = check(&committed());
    assert_eq!(report.num_failed(), 0, "{report}");
    assert_eq!(report.num_checked(), report.rows.len(), "all of them are built: {report}");
    let bytes: u64 = fs::read_dir(committed()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 8_000_000, "{bytes} bytes");
}

#[test]
fn an_unknown_tensor_fails() {
    let dir = folder(&["03f_edm_ema_warmup"]);
    let extra = |bundle: &mut Bundle| drop(bundle.tensors.insert("case9.new".into(), Tensor::from(1.0)));
    let report = check_changed(dir.path(), "03f_edm_ema_warmup", extra);
    assert_eq!(report.num_failed(), 1, "{report}");
    assert!(report.to_string().contains("nothing uses 'case9.new'"), "{report}");
}

#[test]
fn an_unknown_file_fails() {
    let dir = folder(&["03f_edm_ema_warmup"]);
    fs::copy(file("03f_edm_ema_warmup"), dir.path().join("10a_new.safetensors")).unwrap();
    let report = check(dir.path());
    assert_eq!((report.num_checked(), report.num_failed()), (1, 1), "{report}");
    assert!(report.to_string().contains("10a_new: nothing checks such a file"), "{report}");
    // A kind within a group that is known, but not this one.
    let other_kind =
        |bundle: &mut Bundle| drop(bundle.metadata.insert("sampler".into(), "unheard_of".into()));
    let dir = folder(&[]);
    let report = check_changed(dir.path(), "05a_openai_6_onestep", other_kind);
    assert_eq!(report.num_failed(), 1, "{report}");
}

#[test]
fn a_missing_tensor_key_or_file_fails() {
    let dir = folder(&[]);
    let lose = |bundle: &mut Bundle| drop(bundle.tensors.remove("out"));
    assert_eq!(check_changed(dir.path(), "05a_openai_6_onestep", lose).num_failed(), 1);
    let lose = |bundle: &mut Bundle| drop(bundle.metadata.remove("tolerance"));
    assert_eq!(check_changed(dir.path(), "05a_openai_6_onestep", lose).num_failed(), 1);
    let dir = folder(&["05b_openai_net_onestep"]);
    let report = check(dir.path());
    assert!(report.to_string().contains("it needs '04a_openai_net_student.safetensors'"), "{report}");
    assert_eq!(report.num_failed(), 1);
    // The weights may lie in another folder.
    let weights = folder(&["04a_openai_net_student"]);
    let report = run(&[dir.path().to_owned(), weights.path().to_owned()], Some("05b")).unwrap();
    assert_eq!((report.num_checked(), report.num_failed()), (1, 0), "{report}");
}

#[test]
fn a_network_that_its_weights_do_not_show_fails() {
    let dir = folder(&[]);
    let other = |bundle: &mut Bundle| {
        let config = bundle.metadata.get_mut("config").unwrap();
        let changed = config.replace("\"num_res_blocks\": 1", "\"num_res_blocks\": 2");
        assert_ne!(*config, changed);
        *config = changed;
    };
    let report = check_changed(dir.path(), "04a_openai_net_student", other);
    assert!(report.to_string().contains("the weights look otherwise: num_blocks 1, expected 2"), "{report}");
    assert_eq!(report.num_failed(), 1, "{report}");
}

#[test]
fn a_truncated_file_fails() {
    let dir = folder(&["04e_optim_ema"]);
    let path = dir.path().join("04e_optim_ema.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let report = check(dir.path());
    assert!(matches!(report.rows[0].outcome, Outcome::Unusable(_)), "{report}");
    assert_eq!(report.num_failed(), 1);
}

#[test]
fn nothing_to_check_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&[dir.path().to_owned()], None).is_err());
    assert!(run(&[dir.path().join("missing")], None).is_err());
    assert!(run(&[committed()], Some("99")).is_err());
}

#[test]
fn a_changed_block_is_named() {
    let dir = folder(&[]);
    let stem = "02b_openai_unet_uncond_convupdown";
    let report = check_changed(dir.path(), stem, |bundle| {
        let weight = bundle.tensors.get_mut("state.middle_block.2.out_layers.3.weight").unwrap();
        *weight = &*weight * 1.1;
    });
    assert_eq!(report.num_failed(), 1, "{report}");
    assert!(report.to_string().contains("the first block that differs is middle_block"), "{report}");
}

/// Values that are off by a hundredth, and integers that are twice as large.
fn damaged(tensor: &Tensor) -> Tensor {
    match tensor.kind() {
        Kind::Int64 => tensor * 2 + 1,
        _ => tensor * 1.01 + 0.01,
    }
}

/// Every tensor of every small file takes part in a check: damage to any one of them fails the file.
#[test]
fn damage_to_any_tensor_fails() {
    let stems = [
        "01h_unetblock_up_f1331",
        "03a_sigma_grids",
        "03b_scalings",
        "03c_ema_and_scales",
        "03d_ict",
        "03e_ect_schedule",
        "03f_edm_ema_warmup",
        "04d_ict_0",
        "04d_ict_1",
        "04e_optim_ema",
        "05a_openai_10_heun_lowchurn",
        "05a_openai_3_dpm",
        "05a_openai_4_ancestral",
        "05a_openai_5_euler",
        "05a_openai_6_onestep",
        "05a_openai_7_progdist",
        "05a_openai_8_multistep",
        "05b_openai_net_multistep",
        "05c_edit_colorization",
        "05d_edm_sampler_1",
        "05f_kinyugo_sampling",
        "05g_ect_generator",
        "05h_dpmpp_2m_f64",
        "09b_augment_cifar_p1",
    ];
    let mut survivors = Vec::new();
    for stem in stems {
        let dir = folder(if stem.starts_with("05b") { &["04a_openai_net_student"] } else { &[] });
        let names: Vec<String> = Bundle::read(&file(stem)).unwrap().tensors.into_keys().collect();
        for name in names {
            let report = check_changed(dir.path(), stem, |bundle| {
                let tensor = bundle.tensors.get_mut(&name).unwrap();
                *tensor = damaged(tensor);
            });
            if report.num_failed() == 0 {
                survivors.push(format!("{stem}: {name}"));
            }
        }
    }
    // N(k) and μ(k) of this case are the same at every step.
    survivors.retain(|name| name != "03c_ema_and_scales: case0.step");
    // So are the outcomes of uniform numbers that only have to be below 1 or ½; the next test is about those.
    let gates = [1, 3, 5, 7, 10, 11, 13].map(|i| format!("09b_augment_cifar_p1: draw.{i:02}.rand"));
    survivors.retain(|name| !gates.contains(name));
    // The ends of this interpolation lie under noise of 80, and a hundredth of them is forgotten; more is not.
    for end in ["a", "b"] {
        let name = format!("05f_kinyugo_sampling: {end}");
        assert!(survivors.contains(&name), "{name} can go back among the others");
        survivors.retain(|survivor| *survivor != name);
        let report = check_changed(folder(&[]).path(), "05f_kinyugo_sampling", |bundle| {
            let tensor = bundle.tensors.get_mut(end).unwrap();
            *tensor = tensor.full_like(1e3);
        });
        assert_eq!(report.num_failed(), 1, "{name}: {report}");
    }
    assert!(survivors.is_empty(), "damage goes unseen: {survivors:#?}");
}

#[test]
fn recorded_draws_are_taken_in_their_order_and_to_the_last() {
    let stem = "09b_augment_cifar_p1";
    let fault = |change: &dyn Fn(&mut Bundle)| {
        let report = check_changed(folder(&[]).path(), stem, change);
        assert_eq!(report.num_failed(), 1, "{report}");
        report.to_string()
    };
    // Each uniform number, above whatever it is compared with.
    for i in [1, 3, 5, 7, 10, 11, 13] {
        let gate = format!("draw.{i:02}.rand");
        fault(&|bundle| {
            let tensor = bundle.tensors.get_mut(&gate).unwrap();
            *tensor = tensor.full_like(1e9);
        });
    }
    let rename = |bundle: &mut Bundle, from: &str, to: &str| {
        let tensor = bundle.tensors.remove(from).unwrap();
        bundle.tensors.insert(to.into(), tensor);
    };
    let kind = fault(&|bundle| rename(bundle, "draw.04.randn", "draw.04.rand"));
    assert!(kind.contains("expected 'draw.04.randn', recorded is 'draw.04.rand'"), "{kind}");
    let missing = fault(&|bundle| drop(bundle.tensors.remove("draw.13.rand")));
    assert!(missing.contains("expected 'draw.13.rand', recorded is nothing"), "{missing}");
    let left_over = fault(&|bundle| drop(bundle.tensors.insert("draw.14.rand".into(), Tensor::from(0.5f32))));
    assert!(left_over.contains("nothing uses 'draw.14.rand'"), "{left_over}");
    let unknown =
        fault(&|bundle| drop(bundle.metadata.insert("args".into(), "{\"p\": 1, \"hue\": 1}".into())));
    assert!(unknown.contains("hue"), "{unknown}");
}

/// The large files, by some of their tensors.
#[test]
fn damage_to_networks_and_their_results_fails() {
    let cases = [
        ("01d_ve_ncsnpp", ["x", "sigma", "D", "F", "emb", "c_noise", "state.model.map_noise.freqs"]),
        (
            "02b_openai_unet_uncond_convupdown",
            [
                "output",
                "denoise_x_t",
                "plain.denoised",
                "distill.c_out",
                "rescaled_t",
                "emb",
                "act.middle_block",
            ],
        ),
        (
            "04c_ecmloss_6",
            ["images", "noise", "class_labels", "rnd_normal", "loss", "grad_global_norm", "net_out1"],
        ),
    ];
    for (stem, names) in cases {
        let dir = folder(&[]);
        for name in names {
            let report = check_changed(dir.path(), stem, |bundle| {
                let tensor = bundle.tensors.get_mut(name).unwrap();
                *tensor = damaged(tensor);
            });
            assert_eq!(report.num_failed(), 1, "{stem}: {name}: {report}");
        }
    }
}

/// The weights of LPIPS' network are a function of names and a seed; images, heads and results are in the file.
#[test]
fn damage_to_lpips_fails() {
    let stem = "07_openai_lpips";
    let damage_tensor = |name: &'static str| {
        move |bundle: &mut Bundle| {
            let tensor = bundle.tensors.get_mut(name).unwrap();
            *tensor = damaged(tensor);
        }
    };
    let dir = folder(&[]);
    for name in ["y", "lin3"] {
        let report = check_changed(dir.path(), stem, damage_tensor(name));
        assert_eq!(report.num_failed(), 1, "{name}: {report}");
    }
    let other_seed = |bundle: &mut Bundle| drop(bundle.metadata.insert("hash_seed".into(), "2".into()));
    let report = check_changed(dir.path(), stem, other_seed);
    assert!(report.to_string().contains("'openai_lpips' is off"), "{report}");
}
