//! The fuzzers' entries on a stable compiler, for a short while: their seeds, and bytes changed in them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

// There it is a library of its own.
#[allow(unreachable_pub)]
#[path = "../../fuzz/src/lib.rs"]
mod entries;

use std::{
    fs,
    panic::catch_unwind,
    path::Path,
    time::{Duration, Instant},
};

use entries::ENTRIES;
use fastrand::Rng;

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(name);
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// A seed with some of it changed, left out, or said twice.
fn changed(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[rng.usize(..seeds.len())].clone();
    for _ in 0..rng.usize(1..6) {
        if bytes.is_empty() {
            break;
        }
        let (at, to) = (rng.usize(..bytes.len()), rng.usize(..=bytes.len()));
        let (from, to) = (at.min(to), at.max(to).min(at.min(to) + 64));
        match rng.u8(..5) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes[at] ^= 1 << rng.u8(..8),
            2 => drop(bytes.drain(from..to)),
            3 => {
                let part = bytes[from..to].to_vec();
                bytes.splice(from..from, part);
            }
            _ => {
                let other = &seeds[rng.usize(..seeds.len())];
                let part = &other[..rng.usize(..=other.len())];
                bytes.truncate(at);
                bytes.extend(part);
            }
        }
    }
    bytes
}

fn run(count: usize) {
    let mut rng = Rng::with_seed(11);
    for (name, entry) in ENTRIES {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name}");
        let made: Vec<Vec<u8>> = (0..count).map(|_| changed(&mut rng, &seeds)).collect();
        let mut slowest = Duration::ZERO;
        for bytes in seeds.iter().chain(&made) {
            let since = Instant::now();
            if catch_unwind(|| entry(bytes)).is_err() {
                let file = std::env::temp_dir().join(format!("dnd-{name}"));
                fs::write(&file, bytes).unwrap();
                panic!("{name} panicked on what is now in {}", file.display());
            }
            slowest = slowest.max(since.elapsed());
        }
        println!("{name}: {} inputs, the slowest took {slowest:?}", seeds.len() + made.len());
        assert!(slowest < Duration::from_secs(5), "{name}: {slowest:?}");
    }
}

#[test]
fn the_entries_take_or_refuse_what_they_are_given() {
    run(150);
}

#[test]
#[ignore = "long"]
fn the_entries_take_or_refuse_a_lot_that_they_are_given() {
    run(5000);
}
