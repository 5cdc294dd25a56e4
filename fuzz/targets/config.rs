#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("config"), |bytes: &[u8]| cm_fuzz::config(bytes));
