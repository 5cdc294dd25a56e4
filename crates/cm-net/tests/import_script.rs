//! scripts/convert_edm.py: what it makes of pickles, and what it refuses.

#[path = "common/fixtures.rs"]
mod fixtures;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use cm_model::schedule::NoiseCond;
use cm_net::import::Architecture;
use cm_net::{Encoder, ModelFile, NetSpec, NoiseEmbedding, Role, inspect};
use fixtures::{MARK, fixture, unpacked, weight};
use tch::{Device, Kind as Dtype};

/// What scripts/convert_edm.py made of the pickles, and what it makes of them now.
#[test]
fn converted_pickles_are_model_files() {
    for (name, role, sigma_min) in
        [("edm_ddpmpp", Role::Denoiser, 0.002), ("ect_ncsnpp", Role::Consistency, 0.003)]
    {
        let (_folder, path) = unpacked(&format!("{name}.safetensors"));
        let info = inspect(&path).unwrap();
        assert_eq!((info.spec.role, info.spec.precond.sigma_min), (role, sigma_min));
        assert_eq!((info.spec.precond.sigma_max, info.spec.precond.rho), (80.0, 7.0));
        assert_eq!(info.spec.precond.noise_cond, NoiseCond::QuarterLog);
        let file = ModelFile::read(&path).unwrap();
        file.backbone(Device::Cpu).unwrap();
        // The description of the arguments and that of the shapes are one.
        let found = Architecture::of(&file.tensors).unwrap();
        assert_eq!(found.differences(&file.spec.net), Vec::<String>::new());
        for (key, tensor) in file.tensors.iter().filter(|(key, _)| !key.ends_with("resample_filter")) {
            assert!(tensor.equal(&weight(key, &tensor.size(), Dtype::Float)), "{key}");
        }
        let NetSpec::SongUnet(net) = &file.spec.net else { panic!() };
        if role == Role::Denoiser {
            assert_eq!((net.num_classes, net.augment_dim, net.dropout), (10, 9, 0.13));
            assert_eq!(net.attn_resolutions, [4]);
        } else {
            assert_eq!(net.embedding, NoiseEmbedding::Fourier { scale: 0.02 });
            assert_eq!(
                (net.encoder, net.resample_filter.as_slice()),
                (Encoder::Residual, &[1.0, 3.0, 3.0, 1.0][..])
            );
            assert!(net.attn_resolutions.is_empty(), "16 is no resolution of this network");
        }
    }
}

/// Whether the script can be run; where everything must be tested, it must.
#[allow(clippy::print_stdout)] // why a test was skipped
fn python_is_here() -> bool {
    let here = Command::new("python3").arg("--version").output().is_ok();
    assert!(here || std::env::var_os("CI").is_none(), "python3 is needed to test scripts/convert_edm.py");
    if !here {
        println!("skipped: no python3 here");
    }
    here
}

fn convert_edm(folder: &Path, arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/convert_edm.py");
    Command::new("python3").arg(script).args(arguments).current_dir(folder).output().unwrap()
}

#[test]
fn the_script_converts_and_runs_nothing() {
    if !python_is_here() {
        return;
    }
    let run = convert_edm;
    for name in ["edm_ddpmpp", "ect_ncsnpp"] {
        let (folder, _) = unpacked(&format!("{name}.pkl"));
        let (_committed, want) = unpacked(&format!("{name}.safetensors"));
        let output = run(folder.path(), &[&format!("{name}.pkl"), "-o", "new/out.safetensors"]);
        assert!(output.status.success(), "{output:?}");
        let got = fs::read(folder.path().join("new/out.safetensors")).unwrap();
        assert_eq!(got, fs::read(want).unwrap(), "{name}: the script writes what is committed");
        assert!(!folder.path().join(MARK).exists(), "the embedded source was run");
        let output = run(folder.path(), &[&format!("{name}.pkl"), "-o", "x", "--key", "net"]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains("no 'net' in it, but 'ema', 'loss_fn'"), "{line}");
        let output = run(folder.path(), &[&format!("{name}.pkl"), "-o", "x", "--key", "loss_fn"]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains("its preconditioning is EDMLoss"), "{line}");
    }
    let folder = tempfile::tempdir().unwrap();
    let evil = fixture("evil_edm.pkl");
    let output = run(folder.path(), &[evil.to_str().unwrap(), "-o", "x"]);
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.contains("'posix.system': refused, and nothing of it was run"), "{line}");
    let (_packed, whole) = unpacked("edm_ddpmpp.pkl");
    let whole = fs::read(whole).unwrap();
    for cut in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(folder.path().join("cut.pkl"), &whole[..cut]).unwrap();
        let output = run(folder.path(), &["cut.pkl", "-o", "x"]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && line.starts_with("error: cut.pkl: ") && line.lines().count() == 1,
            "{line}"
        );
    }
    assert!(!folder.path().join(MARK).exists() && !folder.path().join("x").exists());
}

/// A pickle of an EDM network with this state.
fn edm_pickle(state: &[u8]) -> Vec<u8> {
    [
        &b"\x80\x02}U\x03emactorch_utils.persistence\n_reconstruct_persistent_obj\n"[..],
        b"}(U\x04typeU\x05classU\x0aclass_nameU\x0aEDMPrecondU\x05state",
        state,
        b"u\x85Rs.",
    ]
    .concat()
}

/// A network whose `count` parameters of 1000 numbers share one storage.
fn shared_storage(count: u8) -> Vec<u8> {
    let storage = [
        &b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}U\x0dlittle_endian\x88s."[..],
        b"\x80\x02(U\x07storagectorch\nFloatStorage\nU\x01kU\x03cpuM\xe8\x03tQ.\x80\x02]U\x01ka.",
        &1000u64.to_le_bytes(),
        &[0; 4000],
    ]
    .concat();
    let length = u32::try_from(storage.len()).unwrap().to_le_bytes();
    let load = [&b"ctorch.storage\n_load_from_bytes\nB"[..], &length, &storage, b"\x85Rq\x000"].concat();
    let tensor = |name| {
        let rest = b"ctorch._utils\n_rebuild_tensor\n(h\x00K\x00M\xe8\x03\x85K\x01\x85tR";
        [&b"U\x01"[..], &[name], rest].concat()
    };
    let tensors: Vec<u8> = (b'a'..b'a' + count).flat_map(tensor).collect();
    edm_pickle(&[&load[..], b"}U\x0b_parameters}(", &tensors, b"us"].concat())
}

#[test]
fn the_script_stays_as_it_is_and_writes_no_more_than_it_reads() {
    if !python_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made.pkl");
    let twice = b"}U\x08_modules}(U\x01actorch.nn.modules.container\nModuleList\n)\x81}bq\x00U\x01bh\x00us";
    for (what, pickle, words) in [
        (
            "a function's attributes",
            b"\x80\x02ctorch._utils\n_rebuild_parameter\n}U\x01aK\x01sb.".to_vec(),
            "changes a function",
        ),
        (
            "a class's attributes",
            b"\x80\x02cdnnlib.util\nEasyDict\nN}U\x01aK\x01s\x86b.".to_vec(),
            "changes the class EasyDict",
        ),
        ("a module twice", edm_pickle(twice), "the module 'b' is in the network twice"),
        ("numbers again and again", shared_storage(20), "its tensors have 80000 bytes, and the file has"),
    ] {
        fs::write(&path, pickle).unwrap();
        let output = convert_edm(folder.path(), &["made.pkl", "-o", "x"]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains(words) && line.lines().count() == 1, "{what}: {line}");
        assert!(!output.status.success() && !folder.path().join("x").exists(), "{what}");
    }
    // So the numbers are refused for what they are, not for how they are written.
    fs::write(&path, shared_storage(1)).unwrap();
    let output = convert_edm(folder.path(), &["made.pkl", "-o", "x"]);
    assert!(output.status.success() && folder.path().join("x").exists(), "{output:?}");
    for name in ["openai_cond.pt", "openai_uncond_legacy.pt"] {
        let (_folder, path) = unpacked(name);
        let output = convert_edm(folder.path(), &[path.to_str().unwrap(), "-o", "y"]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains("use cm model import") && line.lines().count() == 1, "{line}");
    }
}
