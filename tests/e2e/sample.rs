//! Sampling: what is written, and what may not change it.

use std::path::Path;

use cm_data::{Dataset, npz};
use cm_schedule::{KarrasGrid, SigmaRange};
use cm_tests::{Done, Sandbox};

/// A model after 30 steps, in `run`. For data as wide as it is told that its own is, its images differ between seeds
/// and reach beyond [-1, 1], however little it has learnt.
fn trained(sets: &[&str]) -> Sandbox {
    let sandbox = Sandbox::new();
    let train = sandbox.cm("train --config tiny.toml --device cpu --out run");
    train.set(&["precond.sigma_data=10"]).set(sets).run().ok();
    sandbox
}

/// Samples into `out` and returns the values of the npz, one list for each image.
pub fn sample(sandbox: &Sandbox, line: &str, out: &str) -> Vec<Vec<u8>> {
    sample_done(sandbox, line, out).1
}

/// [`sample`], with what the command said.
pub fn sample_done(sandbox: &Sandbox, line: &str, out: &str) -> (Done, Vec<Vec<u8>>) {
    let done = sandbox.cm(&format!("sample {line} --device cpu --out {out}")).run().ok();
    let (_, images) = archive(&sandbox.path(out));
    (done, images)
}

/// Labels and images of the npz in a folder of samples.
fn archive(folder: &Path) -> (Option<Vec<u32>>, Vec<Vec<u8>>) {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let archives: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == "npz")).collect();
    assert_eq!(archives.len(), 1, "{archives:?}");
    let set = npz::read(&archives[0], true, None).unwrap();
    let images: Vec<Vec<u8>> = (0..set.len()).map(|i| set.get(i).unwrap().pixels.to_vec()).collect();
    let name = format!("samples_{}x8x8x1.npz", images.len());
    assert!(archives[0].ends_with(&name), "{} holds {name}", archives[0].display());
    (set.labels().map(<[u32]>::to_vec), images)
}

/// The largest difference between two lists of images, in grey levels.
fn largest_step(one: &[Vec<u8>], other: &[Vec<u8>]) -> u8 {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().flatten().zip(other.iter().flatten());
    pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn one_image_a_seed_a_grid_and_an_archive_of_the_same_pixels() {
    let sandbox = trained(&[]);
    let images = sample(&sandbox, "run --seeds 3,5,10-12", "a");
    let pictures = ["000003", "000005", "000010", "000011", "000012"].map(|seed| format!("{seed}.png"));
    let mut names = pictures.to_vec();
    names.extend(["grid.png", "samples_5x8x8x1.npz"].map(str::to_owned));
    assert_eq!(sandbox.list("a"), names);
    for (name, pixels) in pictures.iter().zip(&images) {
        let picture = image::open(sandbox.path("a").join(name)).unwrap();
        assert_eq!((picture.width(), picture.height()), (8, 8));
        assert_eq!(picture.color(), image::ColorType::L8);
        assert_eq!(picture.as_bytes(), pixels, "{name}");
    }
    let grid = image::open(sandbox.path("a/grid.png")).unwrap();
    assert!(grid.width() >= 5 * 8 && grid.height() >= 8, "{}x{}", grid.width(), grid.height());
    assert!(largest_step(&images[..1], &images[1..2]) > 50, "seeds differ");

    sandbox.cm("sample run --seeds 1000-1001 --subdirs --device cpu --out b").run().ok();
    assert_eq!(sandbox.list("b/001000"), ["001000.png", "001001.png"]);
}

#[test]
fn run_checkpoint_and_file_give_the_same_bytes() {
    let sandbox = trained(&[]);
    let checkpoint = "run/checkpoints/step-00000030";
    sample(&sandbox, "run --seeds 0-4", "a");
    sample(&sandbox, &format!("{checkpoint} --seeds 0-4"), "b");
    // A model file loads by itself, wherever it is.
    std::fs::copy(sandbox.path(checkpoint).join("ema-0.9.safetensors"), sandbox.path("alone.safetensors"))
        .unwrap();
    sample(&sandbox, "alone.safetensors --seeds 0-4", "c");
    let names = sandbox.list("a");
    assert_eq!(names.len(), 5 + 2);
    for other in ["b", "c"] {
        assert_eq!(sandbox.list(other), names);
        for name in &names {
            let [one, other] = ["a", other].map(|out| std::fs::read(sandbox.path(out).join(name)).unwrap());
            assert!(one == other, "{name}");
        }
    }
    let earlier = sample(&sandbox, "run/checkpoints/step-00000010 --seeds 0-4", "d");
    assert!(largest_step(&earlier, &archive(&sandbox.path("a")).1) > 1, "an earlier checkpoint differs");
}

#[test]
fn the_image_of_a_seed_depends_on_nothing_but_the_seed() {
    let sandbox = trained(&[]);
    for (method, which) in [("", "one"), ("--sampler multistep --sigmas 80,5,0.5", "many")] {
        let images = |seeds: &str, batch: usize| {
            let line = format!("run {method} --seeds {seeds} --batch {batch}");
            sample(&sandbox, &line, &format!("{which}-{seeds}-{batch}"))
        };
        let singly = images("0-6", 1);
        let together = images("0-6", 7);
        assert!(largest_step(&singly, &together) <= 1, "{which}: batch 1 and 7");
        assert!(largest_step(&singly[5..], &images("5-6", 2)) <= 1, "{which}: other seeds beside it");
        let mut backwards = images("6,5,4,3,2,1,0", 3);
        backwards.reverse();
        assert!(largest_step(&singly, &backwards) <= 1, "{which}: another order");
        let again = images("0-6", 7);
        assert!(together == again, "{which}: the same command gives the same bytes");
    }
}

#[test]
fn ema_chooses_the_average() {
    let sandbox = trained(&[]);
    let first = sample(&sandbox, "run --seeds 0-3", "first");
    let named = sample(&sandbox, "run --seeds 0-3 --ema 0.9", "named");
    assert!(first == named, "the run's first average is the default");
    let raw = sample(&sandbox, "run --seeds 0-3 --ema raw", "raw");
    let half = sample(&sandbox, "run --seeds 0-3 --ema halflife-100-rampup-0.05", "half");
    assert!(first != raw && raw != half && half != first, "averages differ");
    let done = sandbox.cm("sample run --ema 0.5 --device cpu").run();
    done.fails(2, &["--ema 0.5", "0.9, halflife-100-rampup-0.05, raw"]);
    let file = "run/checkpoints/step-00000030/raw.safetensors";
    let done = sandbox.cm(&format!("sample {file} --ema raw --device cpu")).run();
    done.fails(2, &["--ema raw", "this is one file"]);
}

#[test]
fn multistep_goes_through_its_levels() {
    let sandbox = trained(&[]);
    let one = sample(&sandbox, "run --seeds 0-7", "one");
    let line = "run --seeds 0-7 --sampler multistep";
    assert!(one == sample(&sandbox, &format!("{line} --sigmas 80"), "first"), "one level is one step");
    let (done, by_index) = sample_done(&sandbox, &format!("{line} --ts 0,22,39 --steps 40"), "ts");
    assert!(done.stderr.contains("2 evaluation(s)"), "{done:#?}");
    // Index 39 of 40 is σ_min, behind which no noise is added: the levels are σ_0 and σ_22.
    let grid = KarrasGrid::new(SigmaRange::new(0.002, 80.0).unwrap(), 7.0).unwrap().descending(40);
    let levels = format!("--sigmas {},{}", grid[0], grid[22]);
    let by_level = sample(&sandbox, &format!("{line} {levels}"), "sigmas");
    assert!(largest_step(&by_index, &by_level) <= 1, "indices and levels mean the same");
    assert!(by_level != one, "a second step changes the images");
    let clipped = sample(&sandbox, &format!("{line} {levels} --no-clip"), "unclipped");
    assert!(clipped != by_level, "clipping between the steps changes the images");
}

#[test]
fn a_class_is_followed_and_recorded() {
    let sets = ["network.num_classes=10", "data.labels='auto'"];
    let sandbox = trained(&sets);
    let of_class = |class: u32| {
        let out = format!("class-{class}");
        let images = sample(&sandbox, &format!("run --seeds 0-7 --class {class}"), &out);
        assert_eq!(archive(&sandbox.path(&out)).0, Some(vec![class; 8]));
        images
    };
    assert!(of_class(3) != of_class(5), "the class changes the images");
    sample(&sandbox, "run --seeds 8-19", "turns");
    let labels: Vec<u32> = (8..20).map(|seed| seed % 10).collect();
    assert_eq!(archive(&sandbox.path("turns")).0, Some(labels), "without --class, classes in turn");
    sandbox.cm("sample run --class 10 --device cpu").run().fails(2, &["--class 10", "0 to 9"]);
}
