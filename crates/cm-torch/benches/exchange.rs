//! What does it cost to add up gradients, and to gather weights that were moved in shares, beside a training step?
//!
//! Times are processor time of all ranks together: where the ranks share a machine's cores with one another, this is
//! what an exchange takes from the computing, and it hardly depends on what else the machine does.

#![allow(missing_docs)] // criterion's macro makes an undocumented function
#![allow(unsafe_code)] // libc's clock

use std::net::TcpListener;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};

use cm_torch::dist::{Keeper, Limits, ProcessGroup, Rendezvous, Row};
use cm_torch::tch::{Device, Kind, Tensor};

/// Networks by their number of weights, spread over tensors as convolutions are.
const NETWORKS: [(&str, i64); 2] = [("digits_0.7M", 700_000), ("cifar10_56M", 56_395_523)];
const TENSORS: i64 = 250;

/// An exchange of tensors with the other ranks.
type Way = fn(&ProcessGroup, &[Tensor]);

/// Processor time of this process so far.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the structure, which lives through it.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The time of `times` exchanges; each rank is a thread.
fn timed(ranks: usize, times: u64, numbers: i64, exchange: Way) -> Duration {
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let one = |rank: usize| {
        let rendezvous = Rendezvous {
            rank,
            local_rank: rank,
            world_size: ranks,
            address: "127.0.0.1".to_owned(),
            port,
            keeper: Keeper::RankZero,
            interface: None,
        };
        let group = ProcessGroup::join(&rendezvous, Limits::default()).expect("ranks meet");
        let tensors: Vec<Tensor> =
            (0..TENSORS).map(|_| Tensor::ones([numbers / TENSORS], (Kind::Float, Device::Cpu))).collect();
        exchange(&group, &tensors);
        group.barrier("the start").expect("ranks live");
        let began = processor_time();
        (0..times).for_each(|_| exchange(&group, &tensors));
        group.barrier("the end").expect("ranks live");
        let took = processor_time() - began;
        group.leave().expect("ranks live");
        took
    };
    let one = &one;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || one(rank))).collect();
        let times: Vec<Duration> = threads.into_iter().map(|rank| rank.join().expect("ranks live")).collect();
        times[0]
    })
}

fn exchange(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("exchange");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).warm_up_time(Duration::from_secs(1));
    let add_up = |group: &ProcessGroup, tensors: &[Tensor]| {
        let handles: Vec<&Tensor> = tensors.iter().collect();
        group.all_reduce_many("gradients", &handles).expect("ranks live");
    };
    let gather = |group: &ProcessGroup, tensors: &[Tensor]| {
        group.all_gather_row("weights", &Row::of(tensors).expect("no gaps")).expect("ranks live");
    };
    let ways: [(&str, Way); 2] = [("gradients", add_up), ("weights", gather)];
    for (name, numbers) in NETWORKS {
        group.throughput(Throughput::Bytes(4 * numbers as u64));
        for ranks in [2, 4] {
            for (what, way) in ways {
                group.bench_function(format!("{name}/{ranks}_ranks/{what}"), |bencher| {
                    bencher.iter_custom(|times| timed(ranks, times, numbers, way));
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, exchange);
criterion_main!(benches);
