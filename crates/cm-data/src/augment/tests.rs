use tch::{Device, Kind, Tensor};

use super::*;

/// Every transform on, each with its own probability `p`.
fn all(p: f64) -> AugmentSpec {
    AugmentSpec { p, xflip: 1.0, ..AugmentSpec::edm_cifar10() }
}

/// Draws whose transforms all happen and all do nothing.
fn nothing() -> Draws {
    let open = Gated { value: 0.0, gate: 0.0 };
    Draws {
        xflip: Gated { value: false, gate: 0.0 },
        yflip: Gated { value: false, gate: 0.0 },
        scale: open,
        rotate: Gated { value: 0.5, gate: 0.0 },
        aniso: open,
        aniso_angle: 0.5,
        aniso_turned: 0.0,
        translate: Gated { value: [0.0; 2], gate: 0.0 },
    }
}

fn rotated(turns: f64) -> Draws {
    Draws { rotate: Gated { value: 0.5 + turns, gate: 0.0 }, ..nothing() }
}

fn moved(x: f64, y: f64) -> Draws {
    Draws { translate: Gated { value: [x / 0.125, y / 0.125], gate: 0.0 }, ..nothing() }
}

fn stretched(w: f64, turns: f64) -> Draws {
    Draws { aniso: Gated { value: w, gate: 0.0 }, aniso_angle: 0.5 + turns, ..nothing() }
}

fn scaled(w: f64) -> Draws {
    Draws { scale: Gated { value: w, gate: 0.0 }, ..nothing() }
}

/// Smooth images without a symmetry, in [-1, 1].
fn images(shape: [i64; 4]) -> Tensor {
    let [batch, channels, height, width] = shape;
    let range = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu));
    let (x, y) = (range(width).view([1, 1, 1, -1]), range(height).view([1, 1, -1, 1]));
    let plane = range(batch * channels).view([batch, channels, 1, 1]);
    (&x * 0.37 + &y * 0.23 + plane * 0.9).sin() * (x * 0.05 - y * 0.11 + 0.4).cos()
}

fn apply(images: &Tensor, draws: &[Draws]) -> Tensor {
    Augment::new(all(1.0)).unwrap().apply(images, draws).unwrap().0
}

fn worst(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((a.size(), a.kind()), (b.size(), b.kind()));
    (a - b).abs().max().double_value(&[])
}

fn rows(labels: &Tensor) -> Vec<Vec<f32>> {
    Vec::try_from(labels).unwrap()
}

#[test]
fn what_does_not_happen_leaves_bits_and_labels_alone() {
    let images = images([8, 3, 16, 16]);
    let draws: Vec<Draws> = (0..8).map(|sample| Draws::at(1, 0, sample)).collect();
    for (spec, draws) in [(all(0.0), draws), (all(1.0), vec![nothing(); 8])] {
        let (same, labels) = Augment::new(spec).unwrap().apply(&images, &draws).unwrap();
        assert!(same.equal(&images));
        assert_eq!(rows(&labels), vec![vec![0.0; 9]; 8]);
    }
}

#[test]
fn an_image_that_stays_keeps_its_bits_beside_others_that_change() {
    let images = images([3, 3, 16, 16]);
    let draws = [rotated(0.1), nothing(), scaled(-3.0)];
    let (changed, labels) = Augment::new(all(1.0)).unwrap().apply(&images, &draws).unwrap();
    assert!(changed.get(1).equal(&images.get(1)));
    assert_eq!(rows(&labels)[1], [0.0; 9]);
    for i in [0, 2] {
        assert!(worst(&changed.get(i), &images.get(i)) > 0.1);
        assert!(rows(&labels)[i as usize].iter().any(|&label| label != 0.0));
    }
}

#[test]
fn flipping_mirrors_and_flipping_twice_is_the_identity() {
    let images = images([2, 3, 8, 12]);
    let once = |x, y| Draws {
        xflip: Gated { value: x, gate: 0.0 },
        yflip: Gated { value: y, gate: 0.0 },
        ..nothing()
    };
    for (x, y, axes) in [(true, false, &[3][..]), (false, true, &[2]), (true, true, &[2, 3])] {
        let draws = [once(x, y), nothing()];
        let (flipped, labels) = Augment::new(all(1.0)).unwrap().apply(&images, &draws).unwrap();
        assert!(flipped.get(0).equal(&images.flip(axes).get(0)) && flipped.get(1).equal(&images.get(1)));
        assert!(apply(&flipped, &draws).equal(&images));
        let want = [f32::from(u8::from(x)), f32::from(u8::from(y))];
        assert_eq!((&rows(&labels)[0][..2], &rows(&labels)[1][..2]), (&want[..], &[0.0; 2][..]));
    }
}

#[test]
fn whole_turns_are_the_identity_and_a_quarter_turns_the_axes() {
    for shape in [[1, 3, 16, 16], [1, 1, 9, 9], [2, 3, 32, 32]] {
        let images = images(shape);
        let turned = |turns: f64| apply(&images, &vec![rotated(turns); shape[0] as usize]);
        for k in [-3.0, -1.0, 1.0, 2.0] {
            assert!(worst(&turned(k), &images) < 1e-5, "{k} turns of {shape:?}");
        }
        // Against the clock for a positive angle. The centre of the filter lies 0.05 pixels off, which these images,
        // with slopes of 0.4 per pixel, show; the wrong way round is off by 1.
        assert!(worst(&turned(0.25), &images.rot90(1, [2, 3])) < 0.1, "{shape:?}");
        assert!(worst(&turned(-0.25), &images.rot90(-1, [2, 3])) < 0.1, "{shape:?}");
        assert!(worst(&turned(0.5), &images.flip([2, 3])) < 0.1, "{shape:?}");
    }
}

#[test]
fn moving_by_whole_pixels_is_a_shift_with_reflection() {
    for (height, width) in [(16, 16), (8, 20)] {
        let images = images([1, 3, height, width]);
        for (x, y) in [(1, 0), (0, 1), (-3, 0), (5, -1), (-1, -1)] {
            let draws = moved(x as f64 / width as f64, y as f64 / height as f64);
            let padded = images.reflection_pad2d([7, 7, 7, 7]);
            let shifted = padded.narrow(2, 7 - y, height).narrow(3, 7 - x, width);
            assert!(worst(&apply(&images, &[draws]), &shifted) < 1e-5, "({x}, {y}) of {height}x{width}");
        }
    }
}

#[test]
fn stretching_is_scaling_along_its_axis() {
    let images = images([1, 3, 16, 16]);
    // Along y of an image is along x of the transposed one.
    let along_x = apply(&images.transpose(2, 3).contiguous(), &[stretched(1.5, 0.0)]).transpose(2, 3);
    assert!(worst(&apply(&images, &[stretched(1.5, 0.25)]), &along_x) < 1e-5);
    assert!(worst(&along_x, &apply(&images, &[stretched(1.5, 0.0)])) > 0.1);
    // Shrinking along x is stretching along y.
    assert!(worst(&apply(&images, &[stretched(-1.5, 0.0)]), &along_x) < 1e-5);
    // Scaling and stretching by the same: x goes twice as far, y stays. A column of pixels that all are equal shows
    // no more than that y stayed, at any width.
    let columns = images.narrow(2, 0, 1).expand([1, 3, 16, 16], true).contiguous();
    let both = Draws { scale: Gated { value: 1.5, gate: 0.0 }, ..stretched(1.5, 0.0) };
    let wide = apply(&columns, &[both]);
    assert!(worst(&wide, &wide.narrow(2, 8, 1).expand([1, 3, 16, 16], true)) < 1e-5);
    // Not turned: the angle drawn does not count.
    let straight = Draws { aniso_turned: 0.5, ..stretched(1.5, 0.1) };
    assert!(apply(&images, &[straight]).equal(&apply(&images, &[stretched(1.5, 0.0)])));
}

/// Scaling by 2^(0.2·5) = 2 of a ramp: half the slope, fixed at the centre but for the 0.05 pixels that the filter's
/// own centre lies off.
#[test]
fn scaling_spreads_from_the_centre() {
    let x = Tensor::arange(32, (Kind::Float, Device::Cpu)) / 16 - 31.0 / 32.0;
    let ramp = x.view([1, 1, 1, 32]).expand([1, 1, 32, 32], true).contiguous();
    let scaled = apply(&ramp, &[scaled(5.0)]);
    let slope = scaled.narrow(3, 1, 31) - scaled.narrow(3, 0, 31);
    assert!(worst(&slope, &slope.full_like(1.0 / 32.0)) < 1e-5);
    assert!(worst(&scaled, &(&ramp * 0.5)) < 0.05 / 16.0);
}

/// Wherever the margin is wide enough, filters and interpolation keep the mean: a flat image stays flat.
#[test]
fn a_flat_image_stays_flat() {
    let flat = Tensor::full([1, 1, 32, 32], 0.5, (Kind::Float, Device::Cpu));
    for draws in [rotated(0.07), scaled(2.0), stretched(0.3, 0.1), moved(0.21, -0.13)] {
        assert!(worst(&apply(&flat, &[draws]), &flat) < 1e-3, "{draws:?}");
    }
}

#[test]
fn labels_are_those_of_the_transforms_that_are_on() {
    let draws = Draws {
        xflip: Gated { value: true, gate: 0.0 },
        scale: Gated { value: 0.7, gate: 0.0 },
        rotate: Gated { value: 0.75, gate: 0.0 },
        aniso: Gated { value: -2.0, gate: 0.0 },
        aniso_angle: 1.0,
        translate: Gated { value: [0.3, -0.4], gate: 0.0 },
        ..nothing()
    };
    let labels = |spec: AugmentSpec| {
        let (_, labels) = Augment::new(spec).unwrap().apply(&images([1, 3, 8, 8]), &[draws]).unwrap();
        assert_eq!(labels.size(), [1, spec.label_dim()]);
        rows(&labels).remove(0)
    };
    let close = |got: Vec<f32>, want: &[f32]| {
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?}, {want:?}");
    };
    // cos(π/2) − 1 and sin(π/2); −2·cos π and −2·sin π.
    close(labels(all(1.0)), &[1.0, 0.0, 0.7, -1.0, 1.0, 2.0, 0.0, 0.3, -0.4]);
    close(labels(AugmentSpec { xflip: 0.0, rotate: 0.0, ..all(1.0) }), &[0.0, 0.7, 2.0, 0.0, 0.3, -0.4]);
    let off = AugmentSpec { yflip: 0.0, scale: 0.0, aniso: 0.0, translate: 0.0, ..all(1.0) };
    close(labels(off), &[1.0, -1.0, 1.0]);
}

#[test]
fn a_transform_that_is_off_never_happens() {
    let only_flips = AugmentSpec { scale: 0.0, rotate: 0.0, aniso: 0.0, translate: 0.0, ..all(1.0) };
    let augment = Augment::new(only_flips).unwrap();
    let images = images([4, 3, 8, 8]);
    let draws = vec![Draws { rotate: Gated { value: 0.9, gate: 0.0 }, ..scaled(2.0) }; 4];
    assert!(augment.apply(&images, &draws).unwrap().0.equal(&images));
}

/// Five standard deviations of a binomial count.
#[test]
fn transforms_happen_as_often_as_the_spec_says() {
    let spec = AugmentSpec { scale: 2.0, aniso: 0.5, ..AugmentSpec::edm_cifar10() };
    let transforms: Vec<Transform> =
        (0..4000).map(|i| Draws::at(9, i / 100, u64::from(i % 100)).transform(&spec)).collect();
    let check = |what: &str, p: f64, happens: &dyn Fn(&Transform) -> bool| {
        let count = transforms.iter().filter(|t| happens(t)).count() as f64;
        assert!((count - 4000.0 * p).abs() < 5.0 * (4000.0 * p * (1.0 - p)).sqrt(), "{what}: {count}");
    };
    check("xflip", 0.5, &|t| t.xflip);
    check("yflip", 0.06, &|t| t.yflip);
    check("scale", 0.24, &|t| t.scale != 0.0);
    check("rotate", 0.12, &|t| t.rotate != 0.0);
    check("aniso", 0.06, &|t| t.aniso != 0.0);
    check("aniso turned", 0.03, &|t| t.aniso != 0.0 && t.aniso_angle != 0.0);
    check("translate", 0.12, &|t| t.translate != [0.0; 2]);
    // One does not bring another about.
    check("scale and rotate", 0.24 * 0.12, &|t| t.scale != 0.0 && t.rotate != 0.0);
    check("both flips", 0.03, &|t| t.xflip && t.yflip);
    let quarter = |t: &Transform| t.rotate.abs() > std::f64::consts::FRAC_PI_2;
    check("more than a quarter turn", 0.06, &quarter);
    check("scaled by more than one deviation", 0.24 * 0.3173, &|t| t.scale.abs() > 1.0);
}

#[test]
fn draws_depend_on_seed_step_and_sample_alone() {
    let at = Draws::at(3, 5, 7);
    assert_eq!(at, Draws::at(3, 5, 7));
    for other in [Draws::at(4, 5, 7), Draws::at(3, 6, 7), Draws::at(3, 5, 8)] {
        assert!(other.rotate.gate != at.rotate.gate && other.translate.value != at.translate.value);
    }
}

/// A resumed run must see the images that it would have seen. (Numbers of a Python program written from the
/// documentation of `cm_schedule::rng`.)
#[test]
fn the_layout_of_the_draws_is_pinned() {
    let at = Draws::at(3, 5, 7);
    assert_eq!((at.xflip.value, at.yflip.value), (false, false));
    let got = [
        (at.xflip.gate, 0.427_285_398_987_560_46),
        (at.yflip.gate, 0.275_388_509_202_147_3),
        (at.scale.gate, 0.699_969_474_775_164_5),
        (at.rotate.value, 0.944_558_372_654_596_7),
        (at.rotate.gate, 0.547_983_766_006_077_5),
        (at.aniso.gate, 0.688_070_369_540_120_1),
        (at.aniso_angle, 0.465_180_091_401_726_67),
        (at.aniso_turned, 0.555_127_968_399_108_4),
        (at.translate.gate, 0.696_288_822_925_081_5),
        (at.scale.value, -1.748_227_289_434_497_2),
        (at.aniso.value, 1.397_998_653_095_739_6),
        (at.translate.value[0], -1.545_266_902_728_196_4),
        (at.translate.value[1], -0.569_479_655_620_868_3),
    ];
    for (i, (got, want)) in got.into_iter().enumerate() {
        assert!((got - want).abs() < 1e-14, "{i}: {got}");
    }
    let coins = |flip: fn(Draws) -> bool| (0..8).map(|i| flip(Draws::at(0, 0, i))).collect::<Vec<_>>();
    assert_ne!(coins(|d| d.xflip.value), coins(|d| d.yflip.value));
}

/// What of an image depends on the others is the margin, which does not show.
#[test]
fn a_batch_may_be_split() {
    let (images, augment) = (images([32, 3, 16, 16]), Augment::new(all(1.0)).unwrap());
    let draws: Vec<Draws> = (0..32).map(|sample| Draws::at(0, 0, sample)).collect();
    let (whole, labels) = augment.apply(&images, &draws).unwrap();
    for (start, length) in (0..32).map(|i| (i, 1)).chain([(0, 20), (20, 12)]) {
        let part = &draws[start as usize..(start + length) as usize];
        let (got, got_labels) = augment.apply(&images.narrow(0, start, length), part).unwrap();
        assert!(got_labels.equal(&labels.narrow(0, start, length)));
        assert!(worst(&got, &whole.narrow(0, start, length)) < 1e-4);
    }
}

#[test]
fn any_size_and_colour_works() {
    for shape in [[3, 1, 8, 8], [2, 1, 7, 12], [2, 4, 12, 5], [1, 3, 1, 1], [2, 3, 2, 3]] {
        let images = images(shape);
        let draws: Vec<Draws> = (0..shape[0] as u64).map(|sample| Draws::at(0, 0, sample)).collect();
        let (out, labels) = Augment::new(all(1.0)).unwrap().apply(&images, &draws).unwrap();
        assert_eq!((out.size(), labels.size()), (images.size(), vec![shape[0], 9]));
        assert!(out.isfinite().all().int64_value(&[]) == 1, "{shape:?}");
    }
    // Channels do not mix.
    let rgb = images([2, 3, 16, 16]);
    let draws = [Draws::at(0, 0, 1), Draws::at(0, 0, 2)];
    let (out, green) = (apply(&rgb, &draws), apply(&rgb.narrow(1, 1, 1), &draws));
    assert!(worst(&out.narrow(1, 1, 1), &green) < 1e-6);
}

#[test]
fn what_does_not_fit_is_refused_in_one_line() {
    let fault = |spec: AugmentSpec| Augment::new(spec).unwrap_err().to_string();
    let off =
        AugmentSpec { p: 0.1, xflip: 0.0, yflip: 0.0, scale: 0.0, rotate: 0.0, aniso: 0.0, translate: 0.0 };
    for (error, words) in [
        (fault(all(1.5)), "augment.p = 1.5: expected a probability"),
        (fault(all(f64::NAN)), "augment.p = NaN"),
        (fault(AugmentSpec { aniso: -1.0, ..all(1.0) }), "augment.aniso = -1: expected a finite multiplier"),
        (fault(AugmentSpec { yflip: f64::INFINITY, ..all(1.0) }), "augment.yflip = inf"),
        (fault(off), "every transform is off"),
    ] {
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    }
    let augment = Augment::new(all(1.0)).unwrap();
    let fault = |images: &Tensor, draws: &[Draws]| augment.apply(images, draws).unwrap_err().to_string();
    let two = images([2, 3, 8, 8]);
    for (error, words) in [
        (fault(&two, &[nothing()]), "expected one for each of 2 images, got 1"),
        (fault(&two.get(0), &[nothing()]), "expected Float [B, C, H, W], got Float [3, 8, 8]"),
        (fault(&two.to_kind(Kind::Double), &[nothing(); 2]), "got Double [2, 3, 8, 8]"),
        (fault(&two.narrow(0, 0, 0), &[]), "at least one image"),
    ] {
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    }
    assert!(toml::from_str::<AugmentSpec>("p = 0.1\nhue = 1").unwrap_err().to_string().contains("hue"));
}

#[test]
fn the_spec_survives_its_own_toml() {
    let spec = AugmentSpec::edm_cifar10();
    assert_eq!(toml::from_str::<AugmentSpec>(&toml::to_string(&spec).unwrap()).unwrap(), spec);
}
