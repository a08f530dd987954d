//! Pictures and networks that were made to hurt, from a generator with a seed: each is refused with a reason, in little time and memory, and nothing panics.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use dnd_mesh::Fault;
use dnd_onnx::{
    Error,
    graph::{Given, Network, Wanted},
    pictures::{PictureLimits, decode},
    runtime::{self, EngineArgs},
};
use dnd_testing::hostile;
use fastrand::Rng;
use prost::Message as _;

const SEED: u64 = 7;
/// What one input may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Kibibytes that all of them may add to the process: a picture's limit and some.
const MEMORY: u64 = 900 << 10;

/// The most memory that the process has had, in kibibytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")).and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap()
}

fn pictures(count: usize) {
    let mut rng = Rng::with_seed(SEED);
    let (mut refused, mut taken) = (0, 0);
    let before = peak();
    for number in 0..count {
        let (what, bytes) = hostile::picture(&mut rng);
        let since = Instant::now();
        match decode(&bytes, PictureLimits::default()) {
            Ok(picture) => {
                taken += 1;
                assert!(u64::from(picture.width()) * u64::from(picture.height()) <= PictureLimits::default().pixels, "{number} ({what})");
            }
            Err(error) => {
                refused += 1;
                let broke = error.to_string().contains("its decoder broke");
                let fault = Fault::from(error);
                assert_eq!(fault.reason(), "UNUSABLE_PICTURE", "{number} ({what}): {fault}");
                // A decoder's panic is caught; it is still told of here, for it to be reported where it is made.
                if broke {
                    println!("{number} ({what}): a decoder panicked");
                }
            }
        }
        assert!(since.elapsed() < PATIENCE, "{number} ({what}) took {:?}", since.elapsed());
    }
    let more = peak() - before;
    println!("pictures: {refused} refused, {taken} taken, {} MiB", more >> 10);
    assert!(more < MEMORY, "{more} KiB");
    assert!(refused > count / 2);
}

#[test]
fn pictures_made_to_hurt_are_refused() {
    pictures(200);
}

#[test]
#[ignore = "long"]
fn many_pictures_made_to_hurt_are_refused() {
    pictures(1000);
}

fn write(folder: &Path, bytes: &[u8]) -> Result<Network, Error> {
    let file = folder.join("net.onnx");
    fs::write(&file, bytes).unwrap();
    Network::read(&file)
}

/// What the activation service does with a network before it is run.
fn load(folder: &Path, bytes: &[u8]) -> Result<(), Error> {
    let network = write(folder, bytes)?;
    let wanted: Vec<Wanted> = network.layers()?.iter().map(|layer| Wanted::as_is(&layer.value)).collect();
    network.external_files()?;
    let input = network.input(&Given::default())?;
    let cut = network.cut(&input, &wanted)?;
    runtime::session_of(&cut, network.folder(), &EngineArgs::one_session()).map(drop)
}

fn networks(count: usize) {
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("outside"), [0; 64]).unwrap();
    let folder = outer.path().join("nets");
    fs::create_dir(&folder).unwrap();
    load(&folder, &hostile::good_network().encode_to_vec()).unwrap();
    let before = peak();
    let mut rng = Rng::with_seed(SEED);
    let mut refused = 0;
    for number in 0..count {
        let (what, bytes) = hostile::network(&mut rng);
        let since = Instant::now();
        if what == "chain" {
            // As deep as a recursion over it would be.
            let network = write(&folder, &bytes).unwrap();
            let last = network.layers().unwrap().pop().unwrap();
            assert!(!network.is_quantized(&last.value).unwrap());
            refused += 1;
            continue;
        }
        match load(&folder, &bytes) {
            // A changed byte may be in a name, and a side of no length is one of any length.
            Ok(()) => assert!(matches!(what, "bytes changed" | "truncated" | "absurd input"), "{number} ({what}) was taken"),
            Err(error) => {
                refused += 1;
                let fault = Fault::from(error);
                assert!(["MODEL_FILE", "UNUSABLE_NETWORK"].contains(&fault.reason()), "{number} ({what}): {} {fault}", fault.reason());
            }
        }
        assert!(since.elapsed() < PATIENCE, "{number} ({what}) took {:?}", since.elapsed());
    }
    let more = peak() - before;
    println!("networks: {refused} of {count} refused, {} MiB", more >> 10);
    assert!(more < MEMORY && refused > count * 3 / 4, "{refused} refused, {more} KiB");
    load(&folder, &hostile::good_network().encode_to_vec()).unwrap();
}

#[test]
fn networks_made_to_hurt_are_refused() {
    networks(150);
}

#[test]
#[ignore = "long"]
fn many_networks_made_to_hurt_are_refused() {
    networks(1000);
}
