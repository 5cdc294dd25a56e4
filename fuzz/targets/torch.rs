#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("torch"), |bytes: &[u8]| cm_fuzz::torch(bytes));
