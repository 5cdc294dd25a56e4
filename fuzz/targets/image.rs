#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("image"), |bytes: &[u8]| cm_fuzz::image(bytes));
