//! Edits: what each writes, what stays of the input, and what is refused.

use std::path::Path;

use cm_data::{Dataset, npz};
use cm_model::Backbone;
use cm_net::{ModelSpec, NetSpec, NoiseEmbedding, PrecondSpec, Role, SongUnetSpec};
use cm_schedule::NoiseCond;
use cm_tests::{Done, Sandbox};
use cm_torch::tch::{self, Device};
use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage, Rgba};

const SIDE: u32 = 16;

/// A folder with `model.safetensors`, a network with random weights, so that results differ from seed to seed; and with
/// `face.png`, a picture of its size.
fn sandbox(channels: i64, num_classes: i64, role: Role) -> Sandbox {
    let sandbox = sandbox_of(SIDE, channels, num_classes, role);
    face().save(sandbox.path("face.png")).unwrap();
    sandbox
}

/// The same with images of another size, and without a picture.
fn sandbox_of(side: u32, channels: i64, num_classes: i64, role: Role) -> Sandbox {
    let sandbox = Sandbox::new();
    let net = NetSpec::SongUnet(SongUnetSpec {
        image_size: side.into(),
        image_channels: channels,
        num_classes,
        augment_dim: 0,
        model_channels: 8,
        channel_mult: vec![1, 2],
        channel_mult_emb: 2,
        num_blocks: 1,
        attn_resolutions: vec![],
        dropout: 0.0,
        label_dropout: 0.0,
        embedding: NoiseEmbedding::Positional {},
        channel_mult_noise: 1,
        encoder: cm_net::Encoder::Standard,
        decoder: cm_net::Decoder::Standard,
        resample_filter: vec![1.0, 1.0],
    });
    let precond = PrecondSpec {
        sigma_data: 0.5,
        noise_cond: NoiseCond::QuarterLog,
        sigma_min: 0.002,
        sigma_max: 80.0,
        rho: 7.0,
    };
    let built = cm_net::build(&net, 1, Device::Cpu).unwrap();
    {
        let _no_grad = tch::no_grad_guard();
        tch::manual_seed(5);
        for (_, weight) in built.params().trainable().filter(|(_, weight)| weight.dim() > 1) {
            let fan_in: i64 = weight.size()[1..].iter().product();
            weight.shallow_clone().copy_(&(weight.randn_like() / (fan_in as f64).sqrt()));
        }
    }
    let spec = ModelSpec::new(role, net, precond);
    cm_net::save_model(&sandbox.path("model.safetensors"), built.params(), &spec).unwrap();
    sandbox
}

fn colour() -> Sandbox {
    sandbox(3, 0, Role::Consistency)
}

/// Colours of every brightness, black and white among them.
fn face() -> RgbImage {
    RgbImage::from_fn(SIDE, SIDE, |x, y| match (x, y) {
        (0..4, 0..4) => Rgb([255, 255, 255]),
        (12.., 12..) => Rgb([0, 0, 0]),
        _ => Rgb([(x * 16) as u8, (y * 16) as u8, (255 - x * y) as u8]),
    })
}

/// White on the right of a column.
fn mask(from: u32) -> GrayImage {
    GrayImage::from_fn(SIDE, SIDE, |x, _| Luma([if x >= from { 255 } else { 0 }]))
}

fn run(sandbox: &Sandbox, line: &str) -> Done {
    sandbox.cm(&format!("edit {line} --device cpu")).run()
}

/// The results of seeds 0 to n − 1, as pictures.
fn results(sandbox: &Sandbox, out: &str, n: usize) -> Vec<RgbImage> {
    let open = |seed| image::open(sandbox.path(out).join(format!("{seed:06}.png"))).unwrap().into_rgb8();
    (0..n).map(open).collect()
}

fn luma(p: &Rgb<u8>) -> f64 {
    p.0.iter().zip([0.2989, 0.5870, 0.1140]).map(|(&v, w)| f64::from(v) * w).sum()
}

fn mean(image: &RgbImage, x: u32, y: u32, side: u32, channel: usize) -> f64 {
    let at = |i: u32| f64::from(image.get_pixel(x * side + i % side, y * side + i / side).0[channel]);
    (0..side * side).map(at).sum::<f64>() / f64::from(side * side)
}

#[test]
fn inpainting_keeps_every_byte_outside_the_mask() {
    let sandbox = colour();
    mask(8).save(sandbox.path("mask.png")).unwrap();
    let done = run(
        &sandbox,
        "inpaint model.safetensors --image face.png --mask mask.png --variations 3 --npz --out a",
    )
    .ok();
    assert!(done.stderr.contains("17 evaluation(s)"), "{done:#?}");
    let names = ["000000.png", "000001.png", "000002.png", "samples_3x16x16x3.npz", "sheet.png"];
    assert_eq!(sandbox.list("a"), names);
    let images = results(&sandbox, "a", 3);
    for image in &images {
        for (x, y, pixel) in image.enumerate_pixels().filter(|(x, ..)| *x < 8) {
            assert_eq!(pixel, face().get_pixel(x, y), "{x},{y}");
        }
    }
    let differs = |a: &RgbImage, b: &RgbImage| a.pixels().zip(b.pixels()).filter(|(a, b)| a != b).count();
    assert!(differs(&images[0], &images[1]) > 50 && differs(&images[0], &face()) > 50);
    let set = npz::read(&sandbox.path("a/samples_3x16x16x3.npz"), true, None).unwrap();
    assert_eq!((set.len(), set.get(1).unwrap().pixels[0]), (3, images[1].get_pixel(0, 0).0[0]));
    // Turned round and in another order of words, the other half is kept; a feather takes two more columns.
    let line =
        "inpaint --image face.png --mask mask.png --invert --feather 2 model.safetensors --seeds 0 --out b";
    run(&sandbox, line).ok();
    let image = &results(&sandbox, "b", 1)[0];
    let kept = |x: u32| (0..SIDE).all(|y| image.get_pixel(x, y) == face().get_pixel(x, y));
    assert_eq!((0..SIDE).map(kept).collect::<Vec<_>>(), [[false; 10].as_slice(), &[true; 6]].concat());
}

#[test]
fn seeds_and_batches_and_time_points() {
    let sandbox = colour();
    mask(8).save(sandbox.path("mask.png")).unwrap();
    let line = "inpaint model.safetensors --image face.png --mask mask.png";
    let images = |rest: &str, out: &str| {
        run(&sandbox, &format!("{line} {rest} --out {out}")).ok();
        results(&sandbox, out, 2)
    };
    let usual = images("--seeds 0-1", "usual");
    assert!(usual == images("--variations 2", "two"));
    let close = |a: &[RgbImage], b: &[RgbImage]| {
        a.iter().zip(b).all(|(a, b)| a.as_raw().iter().zip(b.as_raw()).all(|(a, b)| a.abs_diff(*b) <= 1))
    };
    assert!(close(&usual, &images("--variations 2 --batch 1", "single")));
    assert!(close(&usual, &images("--variations 2 --steps 18", "steps")), "18 points are the default here");
    assert!(!close(&usual, &images("--variations 2 --steps 5", "five")));
    let by_index = images("--variations 2 --ts 0,20,39", "ts");
    assert!(!close(&usual, &by_index));
    let grid = cm_schedule::KarrasGrid::EDM;
    let sigmas = format!("--variations 2 --sigmas 80,{}", grid.at(20, 40));
    assert!(close(&by_index, &images(&sigmas, "sigmas")));
    run(&sandbox, &format!("{line} --ts 0,20 --steps 40")).fails(2, &["--ts ends with 20", "39"]);
    run(&sandbox, &format!("{line} --sigmas 90,1")).fails(2, &["90", "80"]);
    run(&sandbox, &format!("{line} --ts 20,0")).fails(2, &["ts"]);
}

#[test]
fn colouring_keeps_the_luma_and_enlarging_the_means() {
    let sandbox = colour();
    run(&sandbox, "colorize model.safetensors --image face.png --variations 2 --out c").ok();
    for image in results(&sandbox, "c", 2) {
        for (got, want) in image.pixels().zip(face().pixels()) {
            assert!((luma(got) - luma(want)).abs() <= 0.75, "{got:?} {want:?}: half a step for each channel");
        }
    }
    // A grey file with 16 bits, and the same as JPEG-like RGB, mean the same.
    let grey =
        image::ImageBuffer::<Luma<u16>, Vec<u16>>::from_fn(SIDE, SIDE, |x, y| Luma([(x * y * 257) as u16]));
    DynamicImage::ImageLuma16(grey).save(sandbox.path("grey16.png")).unwrap();
    let same = RgbImage::from_fn(SIDE, SIDE, |x, y| Rgb([(x * y) as u8; 3]));
    same.save(sandbox.path("grey.png")).unwrap();
    for (image, out) in [("grey16.png", "g16"), ("grey.png", "g8")] {
        run(&sandbox, &format!("colorize model.safetensors --image {image} --seeds 0 --out {out}")).ok();
    }
    assert!(results(&sandbox, "g16", 1) == results(&sandbox, "g8", 1));

    run(&sandbox, "superres model.safetensors --image face.png --factor 4 --demonstrate --seeds 0-1 --out s")
        .ok();
    for image in results(&sandbox, "s", 2) {
        for i in 0..16 {
            for channel in 0..3 {
                let [got, want] = [&image, &face()].map(|image| mean(image, i % 4, i / 4, 4, channel));
                assert!((got - want).abs() <= 0.75, "patch {i}, channel {channel}: {got} and {want}");
            }
        }
    }
    // A small picture, which the results have as means.
    let small = RgbImage::from_fn(4, 4, |x, y| Rgb([(x * 60) as u8, (y * 60) as u8, 255]));
    small.save(sandbox.path("small.png")).unwrap();
    run(&sandbox, "superres model.safetensors --image small.png --factor 4 --seeds 0 --out l").ok();
    let image = &results(&sandbox, "l", 1)[0];
    assert!(
        (mean(image, 3, 1, 4, 0) - 180.0).abs() <= 0.75 && (mean(image, 3, 1, 4, 2) - 255.0).abs() <= 0.75
    );
    let words = ["face.png: 16x16", "expected 4x4", "--demonstrate"];
    run(&sandbox, "superres model.safetensors --image face.png --factor 4").fails(2, &words);
    run(&sandbox, "superres model.safetensors --image face.png --factor 3")
        .fails(2, &["--factor 3", "16x16"]);
}

#[test]
fn composing_keeps_all_of_it() {
    let sandbox = colour();
    mask(6).save(sandbox.path("mask.png")).unwrap();
    let line = "compose model.safetensors --image face.png --seeds 0-1 --steps 6";
    run(&sandbox, &format!("{line} --mask mask.png --grey --factor 4 --out all")).ok();
    run(&sandbox, &format!("{line} --grey --out grey")).ok();
    let images = results(&sandbox, "all", 2);
    for image in &images {
        for (x, y, pixel) in image.enumerate_pixels() {
            let want = face();
            let want = want.get_pixel(x, y);
            assert!((luma(pixel) - luma(want)).abs() <= 0.75, "{x},{y}");
            assert!(x >= 6 || pixel == want, "{x},{y}: {pixel:?} {want:?}");
        }
        assert!((mean(image, 2, 1, 4, 2) - mean(&face(), 2, 1, 4, 2)).abs() <= 0.75);
    }
    assert!(images != results(&sandbox, "grey", 2));
    run(&sandbox, "compose model.safetensors --image face.png").fails(2, &["--mask", "--grey", "--factor"]);
}

#[test]
fn strokes_noise_and_outpainting() {
    let sandbox = colour();
    let off = |images: &[RgbImage]| {
        let pairs = images[0].as_raw().iter().zip(face().into_raw());
        pairs.map(|(a, b)| u64::from(a.abs_diff(b))).sum::<u64>()
    };
    let stroke = |sigma: &str, out: &str| {
        run(&sandbox, &format!("stroke model.safetensors --image face.png --seeds 0 {sigma} --out {out}"))
            .ok();
        off(&results(&sandbox, out, 1))
    };
    let (little, much) = (stroke("--sigma 0.02", "little"), stroke("--sigma 20", "much"));
    assert!(little < much / 4, "{little} {much}");
    assert_eq!(stroke("", "usual"), stroke("--sigma 0.33625", "named"), "5.38 * 16 / 256");

    let done =
        run(&sandbox, "denoise model.safetensors --image face.png --add-noise 0.5 --sigma 0.45 --out d").ok();
    assert!(!done.stderr.contains("estimated"), "{done:#?}");
    assert_eq!(sandbox.list("d"), ["000000.png", "sheet.png"]);
    let done = run(&sandbox, "denoise model.safetensors --image face.png --add-noise 0.5 --out e").ok();
    let line = done.stderr.lines().find_map(|line| line.strip_prefix("sigma: ")).unwrap().to_owned();
    let sigma: f64 = line.split(',').next().unwrap().parse().unwrap();
    assert!((0.4..0.7).contains(&sigma), "{line}");
    RgbImage::from_pixel(16, 16, Rgb([9, 9, 9])).save(sandbox.path("flat.png")).unwrap();
    run(&sandbox, "denoise model.safetensors --image flat.png").fails(2, &["no noise", "--sigma"]);
    run(&sandbox, "denoise model.safetensors --image face.png --sigma 99").fails(2, &["--sigma 99", "80"]);

    let line = "outpaint model.safetensors --image face.png --left 4 --right 4 --top 8 --seeds 0 --out o";
    run(&sandbox, line).ok();
    let image = &results(&sandbox, "o", 1)[0];
    // The white corner of the picture, scaled to 8×8, lies 4 from the left and 8 from the top.
    assert_eq!(image.get_pixel(4, 8).0, [255; 3]);
    for (line, words) in [
        ("outpaint model.safetensors --image face.png", &["--left", "--bottom"][..]),
        ("outpaint model.safetensors --image face.png --left 9 --right 7", &["nothing", "16"]),
        ("outpaint model.safetensors --image face.png --left 4 --feather 17", &["--feather 17"]),
    ] {
        run(&sandbox, line).fails(2, words);
    }
}

#[test]
fn interpolation_goes_from_seed_to_seed() {
    let sandbox = colour();
    let done = run(&sandbox, "interpolate model.safetensors --seeds 3,8 --frames 5 --npz --out i").ok();
    assert!(done.stdout.contains("interpolation.gif"), "{done:#?}");
    assert_eq!(sandbox.list("i"), ["frames", "interpolation.gif", "samples_5x16x16x3.npz", "strip.png"]);
    let frames = results(&sandbox, "i/frames", 5);
    sandbox.cm("sample model.safetensors --seeds 3,8 --device cpu --out ends").run().ok();
    for (frame, seed) in [(0, 3), (4, 8)] {
        let sample = image::open(sandbox.path(format!("ends/00000{seed}.png"))).unwrap().into_rgb8();
        let step = frames[frame].as_raw().iter().zip(sample.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(step <= Some(1), "frame {frame}: {step:?}");
    }
    let gif = std::fs::File::open(sandbox.path("i/interpolation.gif")).unwrap();
    let decoder = image::codecs::gif::GifDecoder::new(std::io::BufReader::new(gif)).unwrap();
    let count = image::AnimationDecoder::into_frames(decoder).count();
    assert_eq!(count, 8, "there and back, each end once");
    run(&sandbox, "interpolate model.safetensors --seeds 3").fails(2, &["--seeds", "two", "got 1"]);
}

#[test]
fn pictures_of_other_sizes_are_fitted_or_refused() {
    let sandbox = colour();
    let big = |path: &Path| RgbImage::from_fn(64, 32, |x, _| Rgb([(x * 4) as u8, 0, 0])).save(path).unwrap();
    big(&sandbox.path("big.png"));
    let wide = GrayImage::from_fn(64, 32, |x, _| Luma([if x >= 32 { 255 } else { 0 }]));
    wide.save(sandbox.path("wide.png")).unwrap();
    let line = "inpaint model.safetensors --image big.png --seeds 0 --steps 3";
    let done = run(&sandbox, &format!("{line} --mask wide.png --out crop")).ok();
    assert!(done.stderr.contains("big.png: 64x32 pixels, middle, scaled to 16x16"), "{done:#?}");
    // The middle half: columns 16 to 48, so that the kept left edge is as red as column 17.
    let edge = results(&sandbox, "crop", 1)[0].get_pixel(0, 5).0[0];
    assert!(edge.abs_diff(66) <= 3, "{edge}");
    run(&sandbox, &format!("{line} --mask wide.png --fit stretch --out stretch")).ok();
    let edge = results(&sandbox, "stretch", 1)[0].get_pixel(0, 5).0[0];
    assert!(edge < 12, "{edge}");
    let words = ["big.png: 64x32 pixels, expected 16x16"];
    run(&sandbox, &format!("{line} --mask wide.png --fit exact")).fails(2, &words);
    // A mask in the size of the model's images goes with any picture; others do not.
    mask(8).save(sandbox.path("mask.png")).unwrap();
    run(&sandbox, &format!("{line} --mask mask.png --out small")).ok();
    GrayImage::new(5, 4).save(sandbox.path("odd.png")).unwrap();
    run(&sandbox, &format!("{line} --mask odd.png")).fails(2, &["odd.png: 5x4", "64x32", "16x16"]);
    mask(99).save(sandbox.path("black.png")).unwrap();
    run(&sandbox, &format!("{line} --mask black.png")).fails(2, &["nothing is white", "--invert"]);
    image::RgbaImage::from_pixel(64, 32, Rgba([0, 0, 0, 0])).save(sandbox.path("clear.png")).unwrap();
    run(&sandbox, &format!("{line} --mask clear.png")).fails(2, &["all of it is white", "alpha"]);
    sandbox.write("text.png", "no picture");
    run(&sandbox, "colorize model.safetensors --image text.png").fails(2, &["text.png"]);
    run(&sandbox, "colorize model.safetensors --image none.png").fails(2, &["none.png"]);
    run(&sandbox, &format!("{line} --mask mask.png --feather 17")).fails(2, &["--feather", "0 to 16"]);
}

#[test]
fn models_that_cannot_are_refused_and_classes_are_followed() {
    let denoiser = sandbox(3, 0, Role::Denoiser);
    let line = "colorize model.safetensors --image face.png";
    denoiser.cm(&format!("edit {line} --device cpu")).run().fails(2, &["model.safetensors", "consistency"]);
    let grey = sandbox(1, 0, Role::Consistency);
    run(&grey, line).fails(2, &["grey", "three channels"]);
    run(&grey, "stroke model.safetensors --image face.png --seeds 0 --out s").ok();
    assert_eq!(image::open(grey.path("s/000000.png")).unwrap().color(), image::ColorType::L8);
    run(&grey, "stroke model.safetensors --image face.png --class 1")
        .fails(2, &["--class 1", "unconditional"]);
    let classes = sandbox(3, 4, Role::Consistency);
    run(&classes, "stroke model.safetensors --image face.png --class 4").fails(2, &["--class 4", "0 to 3"]);
    run(&classes, "interpolate model.safetensors --seeds 1,2").fails(2, &["--class", "0 to 3"]);
    run(&classes, "denoise model.safetensors --image face.png").fails(2, &["--class", "0 to 3"]);
    run(&classes, "interpolate model.safetensors --seeds 1,2 --class 3 --frames 2 --npz --out i").ok();
    let set = npz::read(&classes.path("i/samples_2x16x16x3.npz"), true, None).unwrap();
    assert_eq!(set.labels(), Some(&[3, 3][..]));
    run(&classes, "stroke model.safetensors --image face.png --variations 5 --npz --out s").ok();
    let set = npz::read(&classes.path("s/samples_5x16x16x3.npz"), true, None).unwrap();
    assert_eq!(set.labels(), Some(&[0, 1, 2, 3, 0][..]));
}

/// The gallery is of emoji, with any model of their size.
#[test]
fn the_gallery_draws_every_edit() {
    let sandbox = sandbox_of(32, 3, 0, Role::Consistency);
    sandbox.cm("gallery --model model.safetensors --device cpu --out gallery").run().ok();
    for name in ["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate", "outpaint", "compose"]
    {
        let picture = image::open(sandbox.path(format!("gallery/{name}.png"))).unwrap();
        assert!(picture.width() > 400 && picture.height() > 400, "{name}");
    }
    sandbox.cm("gallery --model nowhere").run().fails(2, &["nowhere: no such file or folder"]);
    let words = ["model.safetensors: it makes images of 3×16×16", "3×32×32"];
    let other = colour();
    other.cm("gallery --model model.safetensors --device cpu --out gallery").run().fails(2, &words);
    let denoiser = sandbox_of(32, 3, 0, Role::Denoiser);
    denoiser.cm("gallery --model model.safetensors").run().fails(2, &["edits need a consistency model"]);
}

#[test]
fn options_that_would_keep_nothing_are_refused() {
    let sandbox = colour();
    GrayImage::from_fn(SIDE, SIDE, |x, _| Luma([if x < 8 { 255 } else { 0 }]))
        .save(sandbox.path("mask.png"))
        .unwrap();
    let edit = |words: &str| {
        sandbox.cm(&format!("edit {words} model.safetensors --image face.png --device cpu --out none")).run()
    };
    edit("inpaint --mask mask.png --feather 16")
        .fails(2, &["--feather 16", "every pixel that is to be kept"]);
    edit("outpaint --left 4 --right 4 --feather 8").fails(2, &["--feather 8"]);
    edit("outpaint --left 4 --feather 18446744073709551615").fails(2, &["--feather"]);
    edit("stroke --steps 5").fails(2, &["--steps 5", "nothing of the drawing is left"]);
    assert!(!sandbox.path("none").exists(), "a refused edit leaves no folder");
}
