#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("cifar"), |bytes: &[u8]| cm_fuzz::cifar(bytes));
