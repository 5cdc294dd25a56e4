//! What a network holds: weights in another memory order once held those of the first one too. Alone in its process: it counts every tensor.
#![cfg(target_os = "linux")]

use cm_model::torch::device::{keep_memory, tensor_bytes};
use cm_model::torch::fused::Packing;
use cm_model::torch::memory_format::channels_last;
use cm_model::{Backbone, Cond};
use cm_net::{NetSpec, SongUnetSpec};
use tch::{Device, Kind, Tensor};

#[test]
fn a_network_holds_its_weights_and_what_it_may_need_again() {
    keep_memory();
    let held = || tensor_bytes().expect("memory is kept");
    let spec = SongUnetSpec { model_channels: 32, ..SongUnetSpec::ddpmpp_cifar10(0) };
    let net = cm_net::build(&NetSpec::SongUnet(spec), 1, Device::Cpu).unwrap();
    let weights = net.params().iter().map(|(_, tensor)| tensor.numel() as u64 * 4).sum::<u64>();
    let built = held();
    assert!(built as f64 <= 1.05 * weights as f64, "{built} bytes for {weights} of weights");
    net.params().to_channels_last();
    assert!(held() as f64 <= 1.05 * weights as f64, "{} bytes instead of {built}", held());

    let x = channels_last(&Tensor::zeros([1, 3, 32, 32], (Kind::Float, Device::Cpu)));
    let level = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    let after_a_pass = || {
        let _no_grad = tch::no_grad_guard();
        let _packing = Packing::enter(Kind::Float);
        drop(net.forward(&x, &level, &Cond::none(), false).unwrap());
        held()
    };
    let prepared = after_a_pass();
    assert!(prepared as f64 > 1.5 * weights as f64, "prepared weights are kept: {prepared} bytes");
    assert_eq!(after_a_pass(), prepared);
    // As in training: what will have changed by the next pass is not kept.
    tch::no_grad(|| net.params().iter().for_each(|(_, weight)| drop(weight.shallow_clone().neg_())));
    assert!((after_a_pass() as f64) < 1.1 * weights as f64, "{} bytes", held());
    assert_eq!(after_a_pass(), prepared, "they did not change again");
}
