#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("lmdb"), |bytes: &[u8]| cm_fuzz::lmdb(bytes));
