//! A mesh whose every hop is in mutual TLS, and whose orchestrator wants tokens: a job goes through, others are refused, and no secret shows anywhere.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use dnd_testing::{pictures, sketch, write_pictures};
use dnd_tests::{Service, dnd, program};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// Certificates of one CA in a folder, and their private keys, line by line.
struct Certificates {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    secrets: Vec<String>,
}

impl Certificates {
    fn new(folder: &Path) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(folder.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder: folder.to_owned(), issuer: Issuer::new(params, key), secrets: Vec::new() }
    }

    /// The arguments of a service of that name.
    fn issue(&mut self, name: &str) -> Vec<String> {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec!["localhost".to_owned(), name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let file = |ending: &str| self.folder.join(format!("{name}.{ending}"));
        fs::write(file("pem"), cert.pem()).unwrap();
        fs::write(file("key"), key.serialize_pem()).unwrap();
        self.secrets.extend(key.serialize_pem().lines().filter(|line| !line.starts_with('-')).map(str::to_owned));
        let path = |ending: &str| file(ending).display().to_string();
        vec!["--tls-cert".into(), path("pem"), "--tls-key".into(), path("key"), "--tls-ca".into(), self.ca()]
    }

    fn ca(&self) -> String {
        self.folder.join("ca.pem").display().to_string()
    }
}

fn start(name: &str, args: &[&[String]]) -> (Service, String) {
    let args: Vec<&str> = args.iter().flat_map(|args| args.iter().map(String::as_str)).collect();
    let service = Service::start(name, &args);
    let url = format!("https://localhost:{}", service.url().rsplit_once(':').unwrap().1);
    (service, url)
}

/// A new token, and its line for the file of tokens.
fn token(name: &str, scope: &str) -> (String, String) {
    let output = Command::new(program("dnd")).args(["tokens", "new", name, "--scope", scope]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (token, line) = text.trim_end().split_once('\n').unwrap();
    (token.to_owned(), line.to_owned())
}

#[test]
fn a_job_goes_through_a_mesh_of_certificates_and_tokens_and_no_secret_shows() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    write_pictures(&folder.path().join("pictures"), &pictures(40, 4));
    let mut certificates = Certificates::new(folder.path());
    let ((runner, runs), (reader, reads)) = (token("runner", "run"), token("reader", "read"));
    fs::write(at("tokens.toml"), format!("{runs}\n{reads}\n")).unwrap();
    fs::write(at("allow.toml"), "\"*\" = [\"orchestrator\"]\n").unwrap();
    for (name, token) in [("runner", runner.as_str()), ("reader", &reader), ("nobody", "dnd_planted_secret")] {
        fs::write(at(name), format!("{token}\n")).unwrap();
    }

    let log = ["--log".to_owned(), "trace".to_owned()];
    let allow = ["--allow".to_owned(), at("allow.toml")];
    let mut services = Vec::new();
    let mut endpoints = Vec::new();
    for name in ["activation", "captioner", "summarizer", "diffusion", "clip"] {
        let model = if name == "activation" { vec![] } else { vec!["--model".to_owned(), sketch(name).display().to_string()] };
        let (service, url) = start(&format!("dnd-{name}"), &[&model, &log, &allow, &certificates.issue(name)]);
        services.push(service);
        endpoints.extend([format!("--{name}"), url]);
    }
    let tokens = ["--tokens".to_owned(), at("tokens.toml")];
    let (orchestrator, url) = start("dnd-orchestrator", &[&endpoints, &log, &tokens, &certificates.issue("orchestrator")]);

    let target = sketch("targets/planted/planted.onnx");
    let ca = certificates.ca();
    let job = |token: &[&str], ca: &str, out: &str| {
        let what = ["dissect", "--endpoint", &url, "--tls-ca", ca, "--target", target.to_str().unwrap(), "--images", "pictures", "--out", out];
        let short = ["--layer", "colour", "--units", "0", "--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "1"];
        dnd(folder.path(), &[&what[..], &short, token].concat())
    };
    let done = job(&["--token-file", "runner"], &ca, "out");
    assert_eq!(done.code, 0, "{}{}\n{}", done.out, done.err, orchestrator.log());
    let mut other = Certificates::new(&{
        let other = folder.path().join("other");
        fs::create_dir(&other).unwrap();
        other
    });
    let _ = other.issue("orchestrator");
    let refused = [
        (job(&[], &ca, "none"), "no token"),
        (job(&["--token-file", "nobody"], &ca, "nobody-out"), "not one of this service's"),
        (job(&["--token-file", "reader"], &ca, "reader-out"), "needs run"),
        (job(&["--token-file", "runner"], &other.ca(), "other-out"), "certificate is not trusted"),
    ];
    for (ran, said) in &refused {
        assert!(ran.code != 0 && ran.err.contains(said), "{said}: {} {}{}", ran.code, ran.out, ran.err);
    }

    // Everything that was written or said, for everything that nobody may see.
    let mut written: Vec<(String, Vec<u8>)> =
        services.iter().chain([&orchestrator]).enumerate().map(|(i, service)| (format!("log {i}"), service.log().into_bytes())).collect();
    assert!(written.iter().all(|(_, log)| String::from_utf8_lossy(log).contains("TRACE")), "the logs say all there is to say");
    for ran in refused.iter().map(|(ran, _)| ran).chain([&done]) {
        written.push(("what dnd printed".to_owned(), format!("{}{}", ran.out, ran.err).into_bytes()));
    }
    for file in ["results.jsonl", "results.csv", "report.html", "run.json"] {
        written.push((file.to_owned(), fs::read(folder.path().join("out").join(file)).unwrap()));
    }
    let mut secrets = certificates.secrets.clone();
    secrets.extend([runner.clone(), reader.clone(), "dnd_planted_secret".to_owned()]);
    for (name, bytes) in &written {
        let text = String::from_utf8_lossy(bytes);
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{name} shows {secret}");
        }
    }
}
