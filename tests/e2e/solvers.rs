//! Samplers of a denoiser: what they cost, what churn and guidance change, and what does not go together.

use cm_tests::Sandbox;

use crate::distill::EDM;
use crate::model::{TINY, fixture};
use crate::sample::{sample, sample_done};

/// A denoiser of ten classes after 30 steps, in `edm`, with classes hidden in `label_dropout` of the steps.
fn denoiser(label_dropout: f64) -> Sandbox {
    let sandbox = Sandbox::new();
    let train = sandbox.cm("train-teacher --config tiny.toml --device cpu --out edm").set(EDM);
    let hidden = format!("network.label_dropout={label_dropout}");
    let sets = ["precond.sigma_data=10", "network.num_classes=10", "data.labels='auto'", &hidden];
    train.set(&sets).run().ok();
    sandbox
}

#[test]
fn every_solver_makes_images_at_its_cost() {
    let sandbox = denoiser(0.0);
    let mut all = Vec::new();
    for (options, evaluations) in [
        ("--sampler heun", 35),
        ("--sampler heun --steps 5", 9),
        ("--sampler heun --steps 5 --s-churn 4", 9),
        ("--sampler heun --steps 5 --s-churn 4 --s-noise 1.2", 9),
        ("--sampler heun --steps 5 --s-churn 4 --s-min 0.5 --s-max 30", 9),
        ("--sampler dpm2 --steps 5", 10),
        ("--sampler dpm2 --steps 5 --s-churn 4", 10),
        ("--sampler euler --steps 5", 5),
        ("--sampler ancestral --steps 5", 5),
        ("--sampler dpmpp2m --steps 5", 5),
        ("--sampler progdist --steps 5", 5),
    ] {
        let (done, images) =
            sample_done(&sandbox, &format!("edm --seeds 0-3 {options}"), &format!("{}", all.len()));
        assert!(done.stderr.contains(&format!(" {evaluations} evaluation(s)")), "{options}: {}", done.stderr);
        assert!(!all.contains(&images), "{options} is another way");
        all.push(images);
    }
    assert!(sample(&sandbox, "edm --seeds 0-3", "default") == all[0], "heun is the default");
    let unclipped = sample(&sandbox, "edm --seeds 0-3 --no-clip", "unclipped");
    assert!(unclipped != all[0], "clipping changes the images");
}

#[test]
fn guidance_by_one_is_the_model_and_by_more_is_not() {
    let sandbox = denoiser(0.3);
    let line = "edm --seeds 0-3 --steps 4 --class 3";
    let plain = sample(&sandbox, line, "plain");
    assert!(plain == sample(&sandbox, &format!("{line} --cfg 1"), "one"), "1 is the model as it is");
    let (done, guided) = sample_done(&sandbox, &format!("{line} --cfg 4"), "four");
    assert!(done.stderr.contains(" 7 evaluation(s)"), "one call for both: {}", done.stderr);
    assert!(guided != plain);
    assert!(guided != sample(&sandbox, &format!("{line} --cfg 1.5"), "less"));
}

#[test]
fn what_does_not_go_together_is_one_line() {
    let sandbox = denoiser(0.0);
    let refused = |model: &str, options: &str, words: &[&str]| {
        sandbox.cm(&format!("sample {model} --device cpu {options}")).run().fails(2, words);
    };
    for (options, words) in [
        ("--sampler euler --s-churn 4", &["--s-churn 4", "--sampler euler", "heun and dpm2"][..]),
        ("--sampler dpmpp2m --s-churn 4", &["--s-churn 4", "--sampler dpmpp2m"]),
        ("--s-noise 1.01", &["--s-noise 1.01", "--s-churn"]),
        ("--s-max 50", &["--s-max 50", "--s-churn"]),
        ("--s-churn 4 --s-min 5 --s-max 1", &["s_max = 1", "s_min = 5"]),
        ("--s-churn=-4", &["s_churn = -4", "0 or more"]),
        ("--s-churn nan", &["s_churn = NaN"]),
        ("--sampler multistep --sigmas 80,1", &["edm", "denoiser", "consistency function"]),
        ("--sampler heun --sigmas 80,1", &["--sigmas", "multistep"]),
        ("--class 3 --cfg 2", &["--cfg 2", "label_dropout = 0"]),
        ("--as edm", &["leave --as out"]),
        ("--as nonsense", &["kind 'nonsense'"]),
    ] {
        refused("edm", options, words);
    }
    sandbox.cm("train --config tiny.toml --device cpu --out ct").set(&["train.total_steps=1"]).run().ok();
    refused("ct", "--cfg 2", &["--cfg 2", "consistency function"]);
    refused("ct", "--s-churn 4", &["--s-churn 4", "--sampler onestep"]);
    refused("ct", "--sampler dpmpp2m", &["ct", "consistency function", "denoiser"]);
    let classless = sandbox.cm("train-teacher --config tiny.toml --device cpu --out plain").set(EDM);
    classless.set(&["train.total_steps=1"]).run().ok();
    refused("plain", "--cfg 2", &["--cfg 2", "class"]);
    assert!(!sandbox.path("out").exists(), "nothing was written");

    let dropped = denoiser(0.3);
    let done = dropped.cm("sample edm --device cpu --cfg 2").run();
    done.fails(2, &["--cfg 2", "--class"]);
    let done = dropped.cm("sample edm --device cpu --class 1 --cfg nan").run();
    done.fails(2, &["guidance NaN"]);
}

#[test]
fn published_weights_are_sampled_as_they_are() {
    let sandbox = Sandbox::new();
    sandbox.write("cd.pt", fixture("openai_cond.pt.gz"));
    let line = "sample cd.pt --seeds 0-2 --class 3 --device cpu";
    sandbox.cm(&format!("{line} --out x")).run().fails(2, &["cd.pt", "--as KIND"]);
    sandbox.cm(&format!("{line} {TINY} --out direct")).run().ok();
    sandbox.cm(&format!("model import cd.pt {TINY} -o cd.safetensors")).run().ok();
    sandbox.cm("sample cd.safetensors --seeds 0-2 --class 3 --device cpu --out imported").run().ok();
    sandbox.cm("model export cd.safetensors --to diffusers -o folder").run().ok();
    sandbox.cm("sample folder --seeds 0-2 --class 3 --device cpu --out diffusers").run().ok();
    for name in sandbox.list("imported") {
        let file = |out: &str| std::fs::read(sandbox.path(out).join(&name)).unwrap();
        assert!(file("direct") == file("imported") && file("diffusers") == file("imported"), "{name}");
    }
    let done = sandbox.cm("sample folder --ema 0.9 --device cpu").run();
    done.fails(2, &["--ema 0.9", "diffusers"]);
    assert!(!sandbox.path("x").exists());
}

#[test]
fn the_help_shows_every_sampler_and_examples() {
    let help = Sandbox::new().cm("sample --help").run().ok().stdout;
    for word in ["onestep", "multistep", "heun", "euler", "dpm2", "ancestral", "dpmpp2m", "progdist"] {
        assert!(help.contains(&format!("- {word}:")), "{word}: {help}");
    }
    for word in
        ["Examples:", "--s-churn <S>", "--cfg <W>", "--as <KIND>", "cm sample runs/edm --sampler heun"]
    {
        assert!(help.contains(word), "{word}: {help}");
    }
}
