//! The same seed gives the same dropout masks. In a process of its own, because libtorch has one generator per
//! process and tests of one process run at the same time.

use std::sync::{Mutex, PoisonError};

use cm_torch::memory_format;
use cm_torch::rng::{Rows, dropout, seed_dropout, uniform_rows};
use cm_torch::tch::{Device, Kind, Tensor};

/// Held by the test that uses the generator.
static GENERATOR: Mutex<()> = Mutex::new(());

fn two_layers() -> [Tensor; 2] {
    let mask = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu)).dropout(0.5, true);
    [mask(&[4, 8, 16, 16]), mask(&[4, 33])]
}

#[test]
fn the_seed_alone_decides_the_masks() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Three draws on rows `start..start + rows` of a batch of 7: the last shows whether the generator stands where it
/// stands after the whole batch.
fn draws(start: i64, rows: i64, kind: Kind, channels_last: bool) -> [Tensor; 3] {
    let x =
        |shape: &[i64]| Tensor::full([&[7], shape].concat(), 3.0, (kind, Device::Cpu)).narrow(0, start, rows);
    let images = match channels_last {
        true => memory_format::channels_last(&x(&[5, 9, 11])),
        false => x(&[5, 9, 11]),
    };
    seed_dropout(3);
    [dropout(&images, 0.3, true), uniform_rows(rows, Device::Cpu), dropout(&x(&[33]), 0.1, true)]
}

#[test]
fn rows_of_a_batch_get_the_masks_that_they_get_in_the_whole_batch() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    for (kind, channels_last) in [(Kind::Float, false), (Kind::Float, true), (Kind::BFloat16, true)] {
        let whole = draws(0, 7, kind, channels_last);
        for (start, rows) in [(0, 2), (2, 1), (3, 4)] {
            let _rows = Rows::enter(7, start);
            for (part, whole) in draws(start, rows, kind, channels_last).iter().zip(&whole) {
                assert!(part.equal(&whole.narrow(0, start, rows)), "{kind:?} {channels_last} {start} {rows}");
            }
        }
        // What is whole is drawn as if nobody had spoken of rows.
        let all = Rows::enter(7, 0);
        let same = draws(0, 7, kind, channels_last);
        drop(all);
        assert!(same.iter().zip(&whole).all(|(a, b)| a.equal(b)));
        assert!(
            !draws(3, 4, kind, channels_last)[0].equal(&whole[0].narrow(0, 3, 4)),
            "rows end with their value"
        );
    }
}

#[test]
fn nothing_is_dropped_outside_of_training_and_gradients_pass_the_mask() {
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let _rows = Rows::enter(6, 2);
    let x = Tensor::ones([2, 50], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    assert!(dropout(&x, 0.5, false).equal(&x) && dropout(&x, 0.0, true).equal(&x));
    assert_eq!(dropout(&x, 1.0, true).abs().max().double_value(&[]), 0.0);
    let kept = dropout(&x, 0.5, true);
    kept.sum(Kind::Float).backward();
    assert!(x.grad().equal(&kept.detach()), "2 where it was kept, 0 elsewhere");
}
