#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("arguments"), |bytes: &[u8]| cm_fuzz::arguments(bytes));
