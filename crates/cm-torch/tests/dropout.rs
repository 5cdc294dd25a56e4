//! The same seed gives the same dropout masks. In a process of its own, because libtorch has one generator per
//! process and tests of one process run at the same time.

use cm_torch::rng::seed_dropout;
use cm_torch::tch::{Device, Kind, Tensor};

fn two_layers() -> [Tensor; 2] {
    let mask = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu)).dropout(0.5, true);
    [mask(&[4, 8, 16, 16]), mask(&[4, 33])]
}

#[test]
fn the_seed_alone_decides_the_masks() {
    for seed in [0, 7, u64::MAX] {
        seed_dropout(seed);
        let student = two_layers();
        // Draws in between move the generator; seeding again must undo that.
        let _ = Tensor::rand([5], (Kind::Float, Device::Cpu));
        seed_dropout(seed);
        let target = two_layers();
        assert!(student.iter().zip(&target).all(|(a, b)| a.equal(b)), "seed {seed}");

        seed_dropout(seed ^ 1);
        assert!(!two_layers()[0].equal(&student[0]), "seed {seed}");

        let kept = student[0].gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        // 8192 coins: five standard deviations are 0.028.
        assert!((kept - 0.5).abs() < 0.028, "{kept}");
    }
}
