//! Models that share a card: `dnd up` refuses to start where it does not have the memory for them.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use dnd_testing::sketch;
use dnd_tests::{Ran, command};

/// Runs `dnd up` with 2 x 2048 MiB for targets and 9216 for the others, where nothing but the programs of a folder can be found.
fn up(folder: &Path, more: &[&str]) -> Ran {
    let models = sketch("");
    let fixed = ["up", "--models", models.to_str().unwrap(), "--listen", "127.0.0.1:0", "--targets", "2", "--gpu-memory", "2048"];
    let limits = ["--gpu-memory-for", "diffusion=4096,clip=1024"];
    let output = command(folder, &[&fixed[..], &limits, more].concat()).env("PATH", folder).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// Refused for the card's memory, with all that matters.
fn refused(ran: &Ran, card: &str) {
    assert_eq!(ran.code, 2, "{}", ran.err);
    for said in ["13312 MiB", "target 2 x 2048", "captioner 2048", "summarizer 2048", "diffusion 4096", "clip 1024", card] {
        assert!(ran.err.contains(said), "{said}: {}", ran.err);
    }
}

#[test]
fn limits_that_a_card_does_not_have_the_memory_for_are_refused_before_anything_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    refused(&up(folder, &["--provider", "cuda", "--card-memory", "13311"]), "13311 MiB");
    let ran = up(folder, &["--provider", "cuda", "--card-memory", "13312"]);
    assert!(ran.code != 0 && ran.err.contains("execution provider cuda"), "the limits fit, and there is no card: {}", ran.err);
    let ran = up(folder, &["--card-memory", "20000"]);
    assert!(ran.code == 2 && ran.err.contains("--provider cuda, and it is cpu"), "{}", ran.err);
}

#[test]
fn the_card_is_asked_for_its_memory_and_whoever_starts_it_where_it_does_not_tell() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ran = up(folder, &["--provider", "cuda"]);
    assert!(ran.code == 2 && ran.err.contains("nvidia-smi can't be asked") && ran.err.contains("--card-memory"), "{}", ran.err);
    let tool = folder.join("nvidia-smi");
    let says = |said: &str| {
        fs::write(&tool, format!("#!/bin/sh\necho '{said}'\n")).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        up(folder, &["--provider", "cuda"])
    };
    refused(&says("NVIDIA T4, 13000, [N/A]"), "13000 MiB (NVIDIA T4)");
    let ran = says("NVIDIA A100-SXM4-40GB, 40960, Enabled");
    assert!(ran.code == 2 && ran.err.contains("partitioned") && ran.err.contains("--card-memory"), "{}", ran.err);
}
