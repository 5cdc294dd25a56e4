#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("idx"), |bytes: &[u8]| cm_fuzz::idx(bytes));
