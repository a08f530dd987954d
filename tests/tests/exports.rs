//! What `dnd` writes of a job, and what the gateway sends of it, are the same files.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Service, dnd, get_as};

const FORMATS: [&str; 6] = ["csv", "parquet", "jsonl", "cosy", "neuronpedia", "html"];

fn done(folder: &Path, args: &[&str]) -> String {
    let ran = dnd(folder, args);
    assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.out, ran.err);
    ran.out
}

/// The pages' port opens for itself, a little after the mesh's or before.
fn the_pages_address(port_file: &Path) -> String {
    let since = Instant::now();
    loop {
        match fs::read_to_string(port_file) {
            Ok(address) if !address.is_empty() => return address,
            _ => assert!(since.elapsed() < Duration::from_secs(120), "the pages have no address"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_job_is_exported_by_the_command_line_as_by_the_gateway_in_every_format() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    write_pictures(&folder.join("pictures"), &pictures(40, 4));
    let (suite, target, port) = (sketch(""), sketch("targets/planted/planted.onnx"), folder.join("http"));
    let mesh = Service::start("dnd", &["up", "--models", suite.to_str().unwrap(), "--http", "127.0.0.1:0", "--http-port-file", port.to_str().unwrap()]);
    let gateway = the_pages_address(&port);
    let at = ["--endpoint", &mesh.url()];

    let fixed =
        ["jobs", "create", "--layer", "colour,mixture", "--units", "0,1", "--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "2"];
    let created = done(folder, &[&fixed[..], &["--target", target.to_str().unwrap(), "--images", "pictures"], &at].concat());
    let id = created.trim();
    done(folder, &[&["jobs", "watch", id][..], &at].concat());

    for format in FORMATS {
        done(folder, &[&["jobs", "export", id, "--format", format, "--out", format][..], &at].concat());
        let written = fs::read(folder.join(format)).unwrap();
        let (status, _, sent) = get_as(&gateway, &format!("/v1/jobs/{id}/export?format={format}"), "*/*");
        assert_eq!(status, 200, "{format}");
        assert!(written.len() > 60 && written == sent, "{format}: {} and {} bytes", written.len(), sent.len());
    }
    let of_a_layer = done(folder, &[&["jobs", "export", id, "--format", "csv", "--layer", "mixture"][..], &at].concat());
    assert_eq!(of_a_layer.as_bytes(), get_as(&gateway, &format!("/v1/jobs/{id}/export?format=csv&layer=mixture"), "*/*").2, "to standard output");
    assert!(of_a_layer.lines().count() == 3 && of_a_layer.lines().skip(1).all(|row| row.starts_with("mixture,")), "{of_a_layer}");

    done(folder, &[&["jobs", "export", id, "--out", "all"][..], &at].concat());
    for (file, format) in [("results.csv", "csv"), ("results.jsonl", "jsonl"), ("report.html", "html")] {
        assert!(fs::read(folder.join("all").join(file)).unwrap() == fs::read(folder.join(format)).unwrap(), "{file} is as the one file of its format");
    }

    let there = dnd(folder, &[&["jobs", "export", id, "--format", "cosy", "--out", "csv"][..], &at].concat());
    assert!(there.code == 2 && there.err.contains("csv: is there already"), "{}", there.err);
    done(folder, &[&["jobs", "export", id, "--format", "cosy", "--out", "csv", "--fresh"][..], &at].concat());
    assert_eq!(fs::read(folder.join("csv")).unwrap(), fs::read(folder.join("cosy")).unwrap());
    let left: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| name.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
    let nowhere = dnd(folder, &[&["jobs", "export", id][..], &at].concat());
    assert!(nowhere.code == 2 && nowhere.err.contains("--out"), "{}", nowhere.err);
}
