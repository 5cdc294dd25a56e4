//! Folders of diffusers, and the way from a model file to the published forms and back.

mod common;
#[path = "common/fixtures.rs"]
mod fixtures;

use std::fs;
use std::path::Path;

use cm_model::{Bundle, Cond};
use cm_net::import::{
    Kind, describe, export_diffusers, export_openai, is_diffusers_folder, load_any, read_torch,
};
use cm_net::{AttnHeads, ModelFile, ModelSpec, NetSpec, OpenaiUnetSpec, Role, build, save_tensors};
use common::rel;
use fixtures::{TINY, assert_same, kind, unpacked};
use tch::Device;

fn refused(path: &Path, kind: Option<Kind>) -> String {
    fixtures::one_line(load_any(path, kind).expect_err("it is loaded"))
}

#[test]
fn folders_of_diffusers_compute_what_they_computed_there() {
    for (name, classes, scale_shift, resnet) in
        [("diffusers_cd", 10, true, true), ("diffusers_conv", 0, false, false)]
    {
        let (_folder, path) = unpacked(name);
        let file = load_any(&path, None).unwrap();
        let NetSpec::OpenaiUnet(net) = &file.spec.net else { panic!() };
        assert_eq!((net.image_size, net.num_classes), (8, classes));
        assert_eq!((net.scale_shift_norm, net.resblock_updown), (scale_shift, resnet));
        assert_eq!(file.spec.role, Role::Consistency);
        assert_eq!((file.spec.precond.sigma_min, file.spec.precond.sigma_max), (0.002, 80.0));
        assert_eq!(file.spec.about["num_scales"], "40");
        assert_eq!(file.spec.about["source"], name);
        let recorded = read_torch(&path.join("output.pt")).unwrap();
        let labels = (classes > 0).then(|| tch::Tensor::from_slice(&[3i64, 7]));
        let cond = Cond { labels, augment: None };
        let net = file.backbone(Device::Cpu).unwrap();
        let output = net.forward(&recorded["x"], &recorded["t"], &cond, false).unwrap();
        let far = rel(&output, &recorded["output"]);
        assert!(far < 2e-5, "{name}: {far}");
        // The folder of the network alone, and the file in it, say the same.
        for inside in ["unet", "unet/diffusion_pytorch_model.safetensors"] {
            assert_same(&load_any(&path.join(inside), None).unwrap().tensors, &file.tensors);
        }
        assert!(is_diffusers_folder(&path) && is_diffusers_folder(&path.join("unet")));
        let description = describe(&path).unwrap();
        assert_eq!(description.form, "a folder of diffusers");
        assert!(description.architecture.is_ok() && !description.own);
        assert_eq!(description.spec.unwrap().role, Role::Consistency);
    }
}

#[test]
fn contradictions_in_a_folder_of_diffusers_are_errors() {
    let (_folder, path) = unpacked("diffusers_cd");
    let config = path.join("unet/config.json");
    let original = fs::read_to_string(&config).unwrap();
    for (from, to, words) in [
        ("\"scale_shift\"", "\"default\"", "emb_layers"),
        ("\"layers_per_block\": 1", "\"layers_per_block\": 2", "is missing"),
        ("\"num_class_embeds\": 10", "\"num_class_embeds\": null", "'class_embedding.weight' is not a part"),
        ("\"out_channels\": 3", "\"out_channels\": 6", "as many as in_channels"),
        ("\"norm_eps\": 1e-05", "\"norm_eps\": 1e-06", "norm_eps = 1e-6, expected 0.00001"),
        ("\"flip_sin_to_cos\": true", "\"flip_sin_to_cos\": false", "flip_sin_to_cos = false"),
        ("\"attn_norm_num_groups\": 32", "\"attn_norm_num_groups\": null", "attn_norm_num_groups = null"),
        ("\"AttnUpBlock2D\"", "\"ResnetUpsampleBlock2D\"", "attention where down_block_types has it"),
        ("\"AttnDownBlock2D\"", "\"CrossAttnDownBlock2D\"", "down_block_types"),
        ("\"upsample_type\": \"resnet\"", "\"upsample_type\": \"conv\"", "a mixture of resamplers"),
        ("\"act_fn\": \"silu\"", "\"act_fn\": \"silu\", \"new_option\": 3", "new_option = 3 is not known"),
        ("    64\n", "    48\n", "multiples of the first, 32"),
        ("\"sample_size\": 8", "\"sample_size\": 7", "image_size = 7"),
        (
            "\"layers_per_block\": 1",
            "\"layers_per_block\": 1048576",
            "layers_per_block = 1048576, expected a whole number from 1 to 256",
        ),
        ("\"act_fn\": \"silu\"", "\"act_fn\": \"silu\", \"a\\nb\": 3", "a\\nb = 3 is not known"),
        ("{", "[", "not JSON"),
    ] {
        assert!(original.contains(from), "{from}");
        fs::write(&config, original.replacen(from, to, 1)).unwrap();
        let line = refused(&path, None);
        let line = line.replace("time_emb_proj", "emb_layers");
        assert!(line.contains(words) && line.contains("unet/"), "{from}: {line}");
    }
    let mut odd: serde_json::Value = serde_json::from_str(&original).unwrap();
    odd["dropout"] = "0.1".into();
    fs::write(&config, odd.to_string()).unwrap();
    let line = refused(&path, None);
    assert!(line.contains("dropout = \"0.1\", expected a number"), "{line}");
    fs::write(&config, &original).unwrap();

    for error in [describe(&config).unwrap_err(), load_any(&config, None).unwrap_err()] {
        let line = error.to_string();
        assert!(line.contains("config.json: a description, not weights; give the folder"), "{line}");
    }
    let scheduler = path.join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler).unwrap();
    let denoiser = kind("openai:image_size=8,head_channels=32,role=denoiser");
    let other_heads = kind("openai:image_size=8,head_channels=64,role=consistency");
    let other_sigma = kind("openai:image_size=8,head_channels=32,role=consistency,sigma_max=100");
    for (kind, words) in [
        (denoiser.clone(), "expected a denoiser"),
        (other_heads, "HeadChannels(64)"),
        (other_sigma, ": sigma_max 80, expected 100"),
        (kind("openai-imagenet64-cd"), "model_channels 32, expected 192"),
        (kind("edm"), "expected EDM's network"),
    ] {
        let line = refused(&path, kind);
        assert!(line.contains(words), "{line}");
    }
    assert!(load_any(&path, kind(TINY)).is_ok());
    fs::write(&scheduler, text.replace("CMStochasticIterativeScheduler", "HeunDiscreteScheduler")).unwrap();
    let line = refused(&path, None);
    assert!(
        line.contains("its scheduler, HeunDiscreteScheduler, does not say") && line.contains("--as"),
        "{line}"
    );
    assert_eq!(load_any(&path, denoiser.clone()).unwrap().spec.role, Role::Denoiser);
    fs::remove_file(&scheduler).unwrap();
    assert!(refused(&path, None).contains("--as KIND"));
    assert_eq!(load_any(&path, denoiser).unwrap().spec.role, Role::Denoiser);
    fs::remove_file(&config).unwrap();
    assert!(refused(&path, None).contains("no unet/config.json"));
    let weights = path.join("unet/diffusion_pytorch_model.safetensors");
    assert!(refused(&weights, kind(TINY)).contains("without their config.json"));
    assert!(!is_diffusers_folder(&path));
}

#[test]
fn the_way_there_and_back_changes_no_bit() {
    for (fixture, text) in
        [("openai_cond.pt", TINY), ("openai_bf16.pt", TINY), ("openai_uncond_legacy.pt", TINY)]
    {
        let (folder, path) = unpacked(fixture);
        let first = load_any(&path, kind(text)).unwrap();
        for name in ["back.pt", "back.safetensors"] {
            let back = folder.path().join(name);
            export_openai(&first, &back).unwrap();
            let second = load_any(&back, kind(text)).unwrap();
            assert_eq!((second.spec.role, &second.spec.net), (first.spec.role, &first.spec.net));
            assert_same(&second.tensors, &first.tensors);
        }
        let back = folder.path().join("diffusers");
        export_diffusers(&first, &back).unwrap();
        let second = load_any(&back, None).unwrap();
        assert_eq!((second.spec.role, second.spec.precond), (first.spec.role, first.spec.precond));
        assert_eq!(second.spec.net, first.spec.net);
        assert_same(&second.tensors, &first.tensors);
        let line = export_diffusers(&first, &back).unwrap_err().to_string();
        assert!(line.contains("not empty"), "{line}");
        let line = export_openai(&first, &folder.path().join("back.bin")).unwrap_err().to_string();
        assert!(line.contains(".pt or .safetensors"), "{line}");
    }
    // From diffusers, by OpenAI's names, to diffusers: byte for byte what the library wrote, but for its version.
    for name in ["diffusers_cd", "diffusers_conv"] {
        let (folder, path) = unpacked(name);
        let first = load_any(&path, None).unwrap();
        let back = folder.path().join("back");
        export_diffusers(&first, &back).unwrap();
        let weights = "unet/diffusion_pytorch_model.safetensors";
        assert_same(
            &Bundle::read(&back.join(weights)).unwrap().tensors,
            &Bundle::read(&path.join(weights)).unwrap().tensors,
        );
        for file in ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"] {
            let json = |root: &Path| -> serde_json::Map<String, serde_json::Value> {
                serde_json::from_slice(&fs::read(root.join(file)).unwrap()).unwrap()
            };
            let (ours, theirs) = (json(&back), json(&path));
            for (key, value) in &ours {
                // Where the network has no scale and shift, no number and 32 are the same.
                let same = theirs.get(key) == Some(value) || (key == "attn_norm_num_groups" && *value == 32);
                assert!(same, "{file}: {key} = {value}");
            }
        }
    }
}

#[test]
fn what_has_no_place_in_a_form_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let write = |net: &NetSpec| {
        let spec = ModelSpec::new(Role::Denoiser, net.clone(), kind("edm").unwrap().precond());
        save_tensors(&path, build(net, 1, Device::Cpu).unwrap().params().snapshot(), &spec).unwrap();
        ModelFile::read(&path).unwrap()
    };
    for net in [NetSpec::from(common::song()), common::adm().into()] {
        let file = write(&net);
        let line = export_openai(&file, &folder.path().join("a.pt")).unwrap_err().to_string();
        assert!(line.contains("one of EDM's"), "{line}");
        assert!(export_diffusers(&file, &folder.path().join("d")).is_err());
    }
    let wide = OpenaiUnetSpec { channel_mult: vec![2, 2], ..common::openai() };
    let line = export_diffusers(&write(&wide.into()), &folder.path().join("d")).unwrap_err().to_string();
    assert!(line.contains("channel_mult [2, 2] does not begin with 1"), "{line}");
    let heads = OpenaiUnetSpec {
        attn_heads: AttnHeads::NumHeads(2),
        attn_resolutions: vec![8, 4],
        ..common::openai()
    };
    let line = export_diffusers(&write(&heads.into()), &folder.path().join("d")).unwrap_err().to_string();
    assert!(line.contains("{16, 32} channels"), "{line}");
    assert!(!folder.path().join("d").exists() && !folder.path().join("a.pt").exists());
    // A denoiser has no pipeline there: the network alone is written, and its role is asked for again.
    let file = write(&common::openai().into());
    let back = folder.path().join("denoiser");
    export_diffusers(&file, &back).unwrap();
    assert!(!back.join("model_index.json").exists() && !back.join("scheduler").exists());
    assert!(refused(&back, None).contains("--as KIND"));
    let denoiser = kind("openai:image_size=8,head_channels=32,role=denoiser");
    assert_same(&load_any(&back, denoiser).unwrap().tensors, &file.tensors);
}
