use std::net::TcpListener;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::{Keeper, Limits, ProcessGroup, Rendezvous, Row, share_of};
use crate::Error;

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn rendezvous(rank: usize, world_size: usize, port: u16) -> Rendezvous {
    let address = "127.0.0.1".to_owned();
    let keeper = Keeper::RankZero;
    Rendezvous { rank, local_rank: rank, world_size, address, port, keeper, interface: None }
}

fn limits(seconds: u64) -> Limits {
    let exchange = Duration::from_secs(seconds);
    Limits { exchange, ..Limits::default() }
}

/// Runs `work` on every rank of a group, each a thread with a store and a group of its own.
fn on_ranks<T: Send>(size: usize, seconds: u64, work: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
    on_ranks_within(limits(seconds), size, work)
}

fn on_ranks_within<T: Send>(limits: Limits, size: usize, work: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
    let port = free_port();
    let one = |rank| work(ProcessGroup::join(&rendezvous(rank, size, port), limits).unwrap());
    let one = &one;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.contiguous().view([-1])).unwrap()
}

#[test]
fn sums_are_those_of_all_ranks_and_equal_bit_by_bit() {
    for size in [2, 4] {
        let sums = on_ranks(size, 60, |group| {
            // Of very different sizes, so that the order of a sum shows in its bits.
            let values_of = |rank: usize| {
                (Tensor::arange(1001, (Kind::Double, tch::Device::Cpu)) * 0.7 + 1.3 * rank as f64).sin()
                    * 10f64.powi(3 * rank as i32)
            };
            let own = values_of(group.rank()).to_kind(Kind::Float);
            group.all_reduce("numbers", &own).unwrap();
            let want: Tensor = (0..group.size())
                .map(|rank| values_of(rank).to_kind(Kind::Float).to_kind(Kind::Double))
                .sum();
            let error = (own.to_kind(Kind::Double) - &want).abs().max() / want.abs().max();
            group.leave().unwrap();
            (values(&own), error.double_value(&[]))
        });
        assert!(sums.iter().all(|(sum, error)| *sum == sums[0].0 && *error < 1e-6), "{size} ranks");
    }
}

#[test]
fn tensors_are_handed_on_to_ranks_that_do_not_know_their_shapes() {
    let results = on_ranks(3, 60, |group| {
        let own = |rank: usize| {
            let numbers = Tensor::arange(12, (Kind::Float, tch::Device::Cpu)) * (rank as f64 + 1.0);
            // A view whose memory is in another order.
            [numbers.view([3, 4]).transpose(0, 1), Tensor::from_slice(&[7u8, rank as u8])]
        };
        let got: Vec<Vec<Tensor>> =
            (0..3).map(|root| group.hand_on("tensors", &own(group.rank()), root).unwrap()).collect();
        let none = group.hand_on("nothing", &[], 1).unwrap();
        group.leave().unwrap();
        let same = |root: usize| std::iter::zip(&got[root], own(root)).all(|(a, b)| a.equal(&b));
        ((0..3).all(same), got.iter().all(|got| got.len() == 2), none.len())
    });
    assert_eq!(results, [(true, true, 0); 3]);
}

#[test]
fn many_tensors_go_in_buckets_whatever_their_memory_order() {
    let results = on_ranks(2, 60, |group| {
        let fill = |value: f64, shape: &[i64]| Tensor::full(shape, value, (Kind::Float, tch::Device::Cpu));
        let rank = group.rank() as f64;
        let mixed = Tensor::arange(48, (Kind::Float, tch::Device::Cpu)).view([2, 2, 3, 4]) * (rank + 1.0);
        let mixed = crate::memory_format::channels_last(&mixed);
        let tensors = [fill(rank, &[3]), fill(1.0, &[]), mixed, fill(rank, &[1 << 23])];
        let handles: Vec<&Tensor> = tensors.iter().collect();
        group.all_reduce_many("tensors", &handles).unwrap();
        let sums: Vec<f64> =
            tensors.iter().map(|tensor| tensor.sum(Kind::Double).double_value(&[])).collect();
        let own = fill(5.0 + rank, &[2, 2]);
        group.broadcast_many("one tensor", &[&own], 1).unwrap();
        group.leave().unwrap();
        (sums, values(&own), tensors[2].is_contiguous())
    });
    for (sums, own, is_contiguous) in results {
        assert_eq!(sums, [3.0, 2.0, 3.0 * (47.0 * 48.0 / 2.0), f64::from(1 << 23)]);
        assert_eq!(own, [6.0; 4]);
        assert!(!is_contiguous, "a tensor keeps its memory order");
    }
}

#[test]
fn every_rank_hears_what_all_have_to_say() {
    let all = on_ranks(4, 60, |group| {
        let text = "x".repeat(group.rank());
        let all = group.all_gather("texts", text.as_bytes()).unwrap();
        let none = group.all_gather("nothing", b"").unwrap();
        group.leave().unwrap();
        (all, none)
    });
    for (texts, none) in all {
        assert_eq!(texts, [&b""[..], b"x", b"xx", b"xxx"]);
        assert_eq!(none, vec![Vec::<u8>::new(); 4]);
    }
}

#[test]
fn rows_are_shared_out_and_put_together_again() {
    // More than one bucket, a share that ends early, and one rank with nothing at all.
    for (size, lengths) in [(2, vec![3, 1, (6 << 20) + 7]), (4, vec![5, 0, 4, 2]), (4, vec![1, 1, 1])] {
        let numbers: i64 = lengths.iter().sum();
        let results = on_ranks(size, 60, |group| {
            let zeros = || -> Vec<Tensor> {
                lengths.iter().map(|&n| Tensor::zeros([n], (Kind::Float, tch::Device::Cpu))).collect()
            };
            let whole = |tensors: &[Tensor]| Row::of(tensors).unwrap();
            let filled =
                Tensor::arange(numbers, (Kind::Float, tch::Device::Cpu)).split_with_sizes(&lengths, 0);
            let share = share_of(numbers as usize, group.rank(), size);
            let own = [Tensor::zeros([share.len() as i64], (Kind::Float, tch::Device::Cpu))];
            let on_last = |tensors: &[Tensor]| (group.rank() == size - 1).then(|| whole(tensors));
            let (first, last) = (whole(&own), size - 1);
            group.scatter_row("out", numbers as usize, &first, on_last(&filled).as_ref(), last).unwrap();
            let sum = own[0].sum(Kind::Double).double_value(&[]);
            let _ = own[0].shallow_clone().g_add_scalar_(1.0);
            let gathered = zeros();
            group.gather_row("back", numbers as usize, &first, on_last(&gathered).as_ref(), last).unwrap();
            let all = zeros();
            for piece in whole(&all).pieces(share.clone()).unwrap() {
                let before = lengths[..piece.tensor].iter().sum::<i64>() + piece.start - share.start as i64;
                let part = own[0].narrow(0, before, piece.numbers.size()[0]);
                piece.numbers.shallow_clone().copy_(&part);
            }
            group.all_gather_row("all", &whole(&all)).unwrap();
            let wrong = group.gather_row("wrong", numbers as usize + size, &first, None, 0).unwrap_err();
            group.leave().unwrap();
            let plus_one =
                |tensors: &[Tensor]| Tensor::cat(tensors, 0).equal(&(Tensor::cat(&filled, 0) + 1.0));
            let gathered = group.rank() != last || plus_one(&gathered);
            (sum, share, gathered && plus_one(&all), wrong.to_string())
        });
        for (sum, share, all, wrong) in results {
            assert_eq!(sum, share.sum::<usize>() as f64);
            assert!(all && wrong.contains("this rank's share"), "{wrong}");
        }
    }
}

#[test]
fn a_group_of_one_that_is_connected_exchanges_with_itself() {
    let rendezvous = rendezvous(0, 1, free_port());
    assert!(ProcessGroup::join(&rendezvous, limits(60)).unwrap().is_alone());
    let group = ProcessGroup::connect(&rendezvous, limits(60)).unwrap();
    assert_eq!((group.rank(), group.size(), group.is_alone()), (0, 1, false));
    let numbers = Tensor::arange(24, (Kind::Float, tch::Device::Cpu)).view([2, 3, 4]);
    let own = numbers.copy();
    group.all_reduce_many("numbers", &[&own, &own.get(0)]).unwrap();
    group.broadcast("numbers", &own, 0).unwrap();
    group.all_gather_row("numbers", &Row::of([&own]).unwrap()).unwrap();
    assert!(own.equal(&numbers));
    assert_eq!(group.all_gather("text", b"one").unwrap(), [b"one".to_vec()]);
    assert!(
        group.hand_on("numbers", &[numbers.transpose(0, 2)], 0).unwrap()[0].equal(&numbers.transpose(0, 2))
    );
    // It is exchanged, and so what cannot be is refused.
    assert!(group.all_reduce("columns", &numbers.transpose(0, 2)).is_err());
    group.leave().unwrap();
}

#[test]
fn a_group_is_not_given_a_gpu_that_is_none_or_cannot_be_used() {
    let group = ProcessGroup::connect(&rendezvous(0, 1, free_port()), limits(60)).unwrap();
    let error = group.use_cuda(tch::Device::Cpu).unwrap_err().to_string();
    assert_eq!(error, "connecting the GPUs: expected a CUDA device, got Cpu");
    // No machine has this one; without the object, that is said first.
    let error = group.use_cuda(tch::Device::Cuda(100)).unwrap_err();
    let is_said =
        matches!(error, Error::CudaObject { .. } | Error::DeviceMissing { .. } | Error::Exchange { .. });
    assert!(is_said, "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    group.leave().unwrap();
    ProcessGroup::alone().use_cuda(tch::Device::Cuda(0)).unwrap();
}

#[test]
fn a_rank_that_fails_ends_the_exchange_of_the_others_with_its_cause() {
    let began = Instant::now();
    let errors = on_ranks(3, 60, |group| {
        if group.rank() == 1 {
            group.fail("5.png: cannot decode");
            return None;
        }
        Some(group.barrier("step 3").unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        assert_eq!(error.to_string(), "rank 1: 5.png: cannot decode");
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_rank_that_is_dropped_is_named() {
    let errors = on_ranks(2, 60, |group| match group.rank() {
        0 => None,
        _ => Some(group.barrier("step 3").unwrap_err().to_string()),
    });
    assert_eq!(errors[1].as_deref(), Some("rank 0: it ended by a fault of the program"));
}

#[test]
fn a_rank_that_does_not_take_part_is_named_after_the_limit() {
    let errors = on_ranks(2, 3, |group| {
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(5));
        }
        let first = group.barrier("step 3").unwrap_err().to_string();
        (first, group.barrier("step 4").unwrap_err().to_string())
    });
    let want = "rank 1: it lives, but did not come to exchange step 3 within 3 s";
    assert!(errors[0].0.starts_with(want), "{errors:?}");
    assert_eq!(errors[0].1, "step 4: the ranks have parted");
    assert!(errors[1].0.starts_with("rank 1: "), "{errors:?}");
}

#[test]
fn the_others_wait_for_a_rank_that_is_busy() {
    on_ranks(2, 2, |group| {
        if group.rank() == 1 {
            let _busy = group.busy();
            std::thread::sleep(Duration::from_secs(5));
        }
        group.barrier("step 3").unwrap();
        group.leave().unwrap();
    });
}

#[test]
fn a_rank_that_stays_busy_is_named_after_the_limit_for_these() {
    let limits = Limits { busy: Duration::from_secs(3), ..limits(1) };
    let errors = on_ranks_within(limits, 2, |group| {
        let _busy = (group.rank() == 1).then(|| {
            let busy = group.busy();
            std::thread::sleep(Duration::from_secs(6));
            busy
        });
        group.barrier("step 3").unwrap_err().to_string()
    });
    let want =
        "rank 1: it lives and is busy, but exchange step 3 has waited for it for 3 s; CM_DIST_BUSY sets";
    assert!(errors[0].starts_with(want), "{errors:?}");
    assert!(errors[1].starts_with("rank 1: "), "{errors:?}");
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let port = free_port();
    let error = ProcessGroup::join(&rendezvous(0, 3, port), limits(1)).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Rank { rank: 1, .. }), "{text}");
    assert!(text.contains("within 1 s; of 3 ranks these are missing: 1, 2"), "{text}");
    let nobody = ProcessGroup::join(&rendezvous(1, 2, free_port()), limits(1)).unwrap_err().to_string();
    assert!(nobody.starts_with("meeting the other ranks at 127.0.0.1:"), "{nobody}");
    assert!(nobody.contains("nobody answers there; is rank 0 running?"), "{nobody}");
}

#[test]
fn ranks_that_are_there_twice_or_count_another_number_are_refused() {
    let port = free_port();
    let join =
        |rank, size, seconds| move || ProcessGroup::join(&rendezvous(rank, size, port), limits(seconds));
    let (refused, other, rest) = std::thread::scope(|scope| {
        let zero = scope.spawn(join(0, 3, 8));
        let ones = [scope.spawn(join(1, 3, 8)), scope.spawn(join(1, 3, 8))];
        let other = scope.spawn(join(3, 4, 8)).join().unwrap().unwrap_err().to_string();
        // Whichever of the two comes second.
        let is_twice = |error: &Error| error.to_string().contains("twice");
        let errors = ones.map(|one| one.join().unwrap().unwrap_err());
        let (refused, mut rest): (Vec<_>, Vec<_>) = errors.into_iter().partition(is_twice);
        rest.push(zero.join().unwrap().unwrap_err());
        (refused, other, rest)
    });
    assert_eq!(refused.len(), 1, "{rest:?}");
    assert_eq!(
        refused[0].to_string(),
        "rank 1: RANK=1 is there twice; each process needs a number of its own"
    );
    assert_eq!(other, "rank 3: WORLD_SIZE=4, and on rank 0 it is 3");
    for error in rest {
        assert!(
            error.to_string().starts_with("rank 2: it did not come within 8 s")
                || matches!(error, Error::Exchange { .. }),
            "{error}"
        );
    }
}

#[test]
fn tensors_that_cannot_be_exchanged_are_refused() {
    let errors = on_ranks(2, 60, |group| {
        let rows = Tensor::zeros([4, 4], (Kind::Float, tch::Device::Cpu));
        let error = group.all_reduce("columns", &rows.transpose(0, 1)).unwrap_err().to_string();
        let root = group.broadcast("rows", &rows, 2).unwrap_err().to_string();
        group.fail("done");
        (error, root)
    });
    for (error, root) in errors {
        assert!(error.starts_with("columns: expected a contiguous tensor on the CPU"), "{error}");
        assert_eq!(root, "rows: expected a rank below 2, got 2");
    }
}
