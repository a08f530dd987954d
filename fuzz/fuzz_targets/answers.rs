#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dnd_fuzz::answers(bytes));
