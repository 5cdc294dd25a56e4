#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("npz"), |bytes: &[u8]| cm_fuzz::npz(bytes));
