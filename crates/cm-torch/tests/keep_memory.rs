//! Memory that a program keeps. It is a setting of the whole process, so no other test is in this binary.
#![cfg(target_os = "linux")]

use cm_torch::device::{keep_memory, memory, tensor_bytes};
use tch::{Device, Kind, Tensor};

fn full(size: i64) -> Tensor {
    Tensor::full([size], 7, (Kind::Uint8, Device::Cpu))
}

#[test]
fn memory_that_was_given_back_is_taken_again_counted_and_bounded() {
    let before_all = full(1_234_567);
    assert_eq!(tensor_bytes(), None);
    keep_memory();
    drop(before_all);
    assert_eq!(tensor_bytes(), Some(0));
    let place = full(1_234_567).data_ptr();
    assert_eq!(full(1_234_567).data_ptr(), place);

    let sizes = [1, 63, 64, 65, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, 40 << 20];
    let all: Vec<Tensor> = sizes.iter().map(|&size| full(size)).collect();
    let asked: i64 = sizes.iter().sum();
    let counted = tensor_bytes().unwrap() as i64;
    assert!(counted >= asked && counted < asked + asked / 30 + 64 * 64, "{counted} for {asked}");
    for (tensor, size) in all.iter().zip(sizes) {
        assert_eq!(tensor.data_ptr() as usize % 64, 0);
        assert_eq!(tensor.sum(Kind::Int64).int64_value(&[]), 7 * size);
    }
    std::thread::spawn(move || drop(all)).join().unwrap();
    assert_eq!(tensor_bytes(), Some(0));

    // What cannot be had is an error, and leaves no trace: neither in the count nor in what may lie idle.
    assert!(Tensor::f_empty([1 << 50], (Kind::Uint8, Device::Cpu)).is_err());
    assert_eq!(tensor_bytes(), Some(0));
    let resident = || memory(Device::Cpu).unwrap().current as i64;
    let before = resident();
    for i in 0..60 {
        drop(full((16 << 20) + (i << 20)));
    }
    // Three gigabytes in sizes that are all different; a hundred megabytes at once.
    let grown = resident() - before;
    assert!(grown < 500 << 20, "{grown} bytes more");
}
