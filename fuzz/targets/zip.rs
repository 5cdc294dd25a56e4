#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("zip"), |bytes: &[u8]| cm_fuzz::zip(bytes));
