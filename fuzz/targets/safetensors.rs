#![no_main]
libfuzzer_sys::fuzz_target!(init: cm_fuzz::seeds::write("safetensors"), |bytes: &[u8]| cm_fuzz::safetensors(bytes));
