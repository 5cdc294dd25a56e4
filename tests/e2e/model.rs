//! Published forms, through the command.

use std::fs;
use std::io::Read;
use std::path::Path;

use cm_model::Bundle;
use cm_tests::{Sandbox, root};

/// The kind of the small networks in OpenAI's names among the fixtures.
pub const TINY: &str = "--as openai:image_size=8,head_channels=32,role=consistency";

pub fn fixture(name: &str) -> Vec<u8> {
    let path = root().join("crates/cm-net/tests/fixtures").join(name);
    let bytes = fs::read(&path).unwrap();
    match name.ends_with(".gz") {
        true => {
            let mut unpacked = Vec::new();
            flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut unpacked).unwrap();
            unpacked
        }
        false => bytes,
    }
}

fn assert_same_tensors(one: &Path, other: &Path) {
    let [one, other] = [one, other].map(|path| Bundle::read(path).unwrap().tensors);
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, tensor) in one {
        assert!(tensor.equal(&other[&name]), "{name}");
    }
}

#[test]
fn weights_go_through_every_form_and_back() {
    let sandbox = Sandbox::new();
    sandbox.write("cd.pt", fixture("openai_cond.pt.gz"));
    let info = sandbox.cm("model info cd.pt").run().ok().stdout;
    for words in
        ["torch.save, zip form", "32 channels × [1, 2]", "10 classes", "model import cd.pt --as KIND"]
    {
        assert!(info.contains(words), "{words}: {info}");
    }
    sandbox
        .cm("model import cd.pt -o model.safetensors")
        .run()
        .fails(2, &["cd.pt: OpenAI's U-Net", "--as KIND"]);
    assert!(!sandbox.path("model.safetensors").exists());
    let import = format!("model import cd.pt {TINY} -o model.safetensors");
    let said = sandbox.cm(&import).run().ok().stdout;
    assert!(said.contains("consistency function") && said.contains("3×8×8, 10 classes"), "{said}");
    assert_eq!(sandbox.cm("model info model.safetensors").run().ok().stdout, said);
    sandbox.cm("sample model.safetensors --device cpu --seeds 0-1 --class 3 --out out").run().ok();
    assert!(sandbox.path("out/000000.png").exists());

    sandbox.cm("model export model.safetensors --to openai -o back.pt").run().ok();
    sandbox.cm(&format!("model import back.pt {TINY} -o again.safetensors")).run().ok();
    assert_same_tensors(&sandbox.path("again.safetensors"), &sandbox.path("model.safetensors"));
    sandbox.cm("model export model.safetensors --to diffusers -o folder").run().ok();
    assert!(sandbox.cm("model info folder").run().ok().stdout.contains("a folder of diffusers"));
    sandbox.cm("model import folder -o third.safetensors").run().ok();
    assert_same_tensors(&sandbox.path("third.safetensors"), &sandbox.path("model.safetensors"));
}

#[test]
fn weights_can_be_kept_in_half_the_size() {
    let sandbox = Sandbox::new();
    sandbox.write("cd.pt", fixture("openai_cond.pt.gz"));
    sandbox.cm(&format!("model import cd.pt {TINY} -o model.safetensors")).run().ok();
    sandbox.cm("model export model.safetensors --to own --dtype bf16 -o half.safetensors").run().ok();
    let info = sandbox.cm("model info half.safetensors").run().ok().stdout;
    assert!(info.contains("BF16"), "{info}");
    let size = |name: &str| std::fs::metadata(sandbox.path(name)).unwrap().len();
    assert!(size("half.safetensors") < size("model.safetensors") * 6 / 10);
    sandbox.cm("sample half.safetensors --device cpu --seeds 0-1 --class 3 --out out").run().ok();
    // Rounded twice is rounded once.
    sandbox.cm("model export half.safetensors --to own --dtype bf16 -o again.safetensors").run().ok();
    assert_same_tensors(&sandbox.path("again.safetensors"), &sandbox.path("half.safetensors"));
    let export = "model export model.safetensors --to openai --dtype bf16 -o half.pt";
    sandbox.cm(export).run().fails(2, &["--dtype is for --to own"]);
}

#[test]
fn what_cannot_be_imported_or_exported_is_one_line() {
    let sandbox = Sandbox::new();
    for name in ["evil.pt", "truncated.pt", "claims_2gb.pt", "claims_2gb.safetensors", "dtypes.pt"] {
        sandbox.write(name, fixture(name));
    }
    sandbox.write("edm.pkl", fixture("edm_ddpmpp.pkl.gz"));
    sandbox.write("edm.safetensors", fixture("edm_ddpmpp.safetensors.gz"));
    let import = |file: &str| sandbox.cm(&format!("model import {file} --as edm -o made.safetensors"));
    for (file, words) in [
        ("evil.pt", &["evil.pt: its pickle names 'posix.system'", "nothing of it was run"][..]),
        ("truncated.pt", &["truncated.pt: ", "truncated"]),
        ("claims_2gb.pt", &["claims_2gb.pt: ", "2147483648 bytes"]),
        ("claims_2gb.safetensors", &["claims_2gb.safetensors: "]),
        ("dtypes.pt", &["dtypes.pt: its tensors ('bfloat16'", "not those of a network"]),
        ("edm.pkl", &["edm.pkl: ", "scripts/convert_edm.py"]),
        ("nowhere.pt", &["nowhere.pt: no such file or folder"]),
        (".", &["no checkpoint in this folder"]),
    ] {
        import(file).run().fails(2, words);
        if file != "nowhere.pt" && file != "." {
            sandbox.cm(&format!("model info {file}")).run().fails(2, words);
        }
    }
    sandbox.cm("sample evil.pt --device cpu").run().fails(2, &["evil.pt: its pickle names 'posix.system'"]);
    let words = ["kind 'imagenet'", "openai-imagenet64-cd"];
    sandbox.cm("model import edm.safetensors --as imagenet -o made.safetensors").run().fails(2, &words);
    let words = ["edm.safetensors: -o names the file that is read"];
    sandbox.cm("model import edm.safetensors -o ./edm.safetensors").run().fails(2, &words);
    sandbox.cm("model export edm.safetensors --to openai -o edm.pt").run().fails(2, &["one of EDM's"]);
    assert!(!sandbox.path("made.safetensors").exists() && !sandbox.path("edm.pt").exists());
    assert!(!sandbox.path("a-pickle-ran-code").exists());
}
