#![no_main]

libfuzzer_sys::fuzz_target!(
    // The library panics on files that it should refuse. Those panics are caught; any other still ends the fuzzer.
    init: std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))),
    |bytes: &[u8]| dnd_fuzz::tokenizers(bytes)
);
