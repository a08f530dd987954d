//! The configuration of every program: where values come from, and the page that lists all options.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use dnd_tests::program;
use serde::Deserialize;

const SERVICES: [&str; 7] = ["dnd-activation", "dnd-captioner", "dnd-summarizer", "dnd-diffusion", "dnd-clip", "dnd-orchestrator", "dnd-gateway"];

/// Runs a program with these variables and no others of the project's.
fn run(name: &str, args: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = Command::new(program(name));
    for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("DND_") || variable.starts_with("OTEL_")) {
        command.env_remove(variable);
    }
    let output = command.args(args).envs(variables.iter().copied()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
struct Described {
    key: String,
    variable: Option<String>,
    default: Option<String>,
    values: Vec<String>,
    help: String,
    command: String,
}

#[derive(Deserialize)]
struct Listed {
    option: Vec<Described>,
}

fn listed(name: &str) -> Vec<Described> {
    let (code, out, err) = run(name, &["--print-config=options"], &[]);
    assert_eq!(code, Some(0), "{name}: {err}");
    toml::from_str::<Listed>(&out).unwrap().option
}

/// A row an option; those that many have in common are told once.
fn table(options: Vec<Described>) -> String {
    let mut rows: BTreeMap<Described, Vec<String>> = BTreeMap::new();
    for option in options {
        let own = option.command.trim_start_matches("dnd-").replace('-', " ");
        rows.entry(Described { command: String::new(), ..option }).or_default().push(own);
    }
    let mut table = "| key | variable | default | of | what it is |\n|---|---|---|---|---|\n".to_owned();
    for (Described { key, variable, default, values, help, .. }, of) in rows {
        let code = |text: Option<String>| text.map(|text| format!("`{text}`")).unwrap_or_default();
        let values = if values.is_empty() { String::new() } else { format!(": {}", values.join(", ")) };
        table += &format!("| `{key}` | {} | {} | {} | {}{values} |\n", code(variable), code(default), of.join(", "), help.replace('|', "\\|"));
    }
    table
}

fn page() -> String {
    let services = SERVICES.iter().flat_map(|name| listed(name)).collect();
    format!(
        "# Configuration\n\nEvery option of every program can be given in three ways. A flag (`--batch 16`) wins over a variable of the environment (`DND_BATCH=16`), and that over a \
         file, which `--config FILE.toml` or `DND_CONFIG` names:\n\n\
         ```toml\nbatch = 16\nprovider = \"cuda\"\n```\n\n\
         Its keys are the long names of the flags, with `-` or `_`; a list is a list, and a flag without a value is `true` or `false`. A key that the program does not have is refused, \
         with the nearest one that it has. The commands of `dnd` share a file: each takes what it knows. In a cluster mount a ConfigMap, and a Secret if there are \
         passwords in it.\n\n\
         `--print-config` prints what each option is set to and by what, and checks it all; what it prints is a file that says the same. Where something is missing it \
         prints what there is, names that, and ends with exit code 2. Values that may hold a password are not printed.\n\n\
         Not options: `DND_LLM_KEY` (the key of a language model over HTTP), `ORT_DYLIB_PATH` (ONNX Runtime's library), `RUST_LOG` (wins over `log`), `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and \
         `OTEL_TRACES_SAMPLER_ARG`, and the object store's `AWS_*` and `GOOGLE_*`, are read from the environment alone.\n\n\
         This page is made of the programs' own lists (`--print-config=options`).\n\n## The services\n\n{}\n## `dnd`\n\n{}",
        table(services),
        table(listed("dnd"))
    )
}

#[test]
fn the_page_of_the_configuration_lists_the_options_that_the_programs_have() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let page = page();
    if std::env::var_os("DND_WRITE_CONFIGURATION").is_some() {
        fs::write(&file, &page).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        written == page,
        "docs/configuration.md is not what the programs say: run `DND_WRITE_CONFIGURATION=1 cargo test -p dnd-tests --test configuration` after `cargo build --workspace --bins`"
    );
}

#[test]
fn flags_win_over_variables_and_these_over_the_file_in_every_service() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("some.toml");
    for name in SERVICES {
        let needed: &[&str] = match name {
            "dnd-activation" | "dnd-gateway" => &[],
            "dnd-orchestrator" => &["activation", "captioner", "summarizer", "diffusion", "clip"],
            _ => &["model"],
        };
        let needed: String = needed.iter().map(|key| format!("{key} = \"http://localhost:1\"\n")).collect();
        fs::write(&file, format!("{needed}grace = 1\nlog = \"debug\"\nadmin = \"127.0.0.1:1\"\n")).unwrap();
        let variables = [("DND_CONFIG", file.to_str().unwrap()), ("DND_LOG", "warn"), ("DND_ADMIN", "127.0.0.1:2")];
        let (code, out, err) = run(name, &["--print-config", "--admin", "127.0.0.1:3"], &variables);
        assert_eq!(code, Some(0), "{name}: {err}");
        let by_file = format!("file {}", file.display());
        for (said, by) in [("grace = 1", by_file.as_str()), ("log = \"warn\"", "env DND_LOG"), ("admin = \"127.0.0.1:3\"", "flag"), ("listen = ", "default")] {
            assert!(out.lines().any(|line| line.starts_with(said) && line.ends_with(&format!("# {by}"))), "{name}: {said}: {out}");
        }
        fs::write(&file, format!("{needed}garce = 1\n")).unwrap();
        let (code, _, err) = run(name, &[], &variables);
        assert!(code == Some(2) && err.contains("some.toml: garce") && err.contains("is grace meant?"), "{name}: {err}");
    }
}

#[test]
fn what_is_missing_is_named_beside_all_that_is_there() {
    for (program, args, missing) in [
        ("dnd-captioner", &["--batch", "3"][..], "model"),
        ("dnd-orchestrator", &["--clip", "http://c:1", "--summarizer", "http://s:1", "--captioner", "http://c:1"], "activation, diffusion"),
        ("dnd", &["dissect", "--layer", "l", "--images", "i", "--out", "o"], "target"),
    ] {
        let (code, out, err) = run(program, &[args, &["--print-config"]].concat(), &[("DND_LOG", "debug")]);
        assert_eq!(code, Some(2), "{err}{out}");
        assert!(
            out.contains(&format!("# Missing: {missing}\n")) && out.lines().any(|line| line.starts_with("log = \"debug\"") && line.ends_with("# env DND_LOG")),
            "{out}"
        );
        assert!(missing.split(", ").all(|name| err.contains(&format!("--{name} "))), "{err}");
    }
}

#[test]
fn the_commands_of_dnd_share_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("some.toml");
    // Of `dnd up`, of `dnd dissect`, and of both; a switch of the first that the flag of a command is against.
    fs::write(&file, "http = \"127.0.0.1:8080\"\nimages = [\"a\", \"b\"]\nnum_inference_steps = 5\nlayer = [\"l\"]\nmodels = \"m\"\ndata = \"d\"\n").unwrap();
    let of = |command: &[&str]| run("dnd", &[command, &["--config", file.to_str().unwrap(), "--print-config"]].concat(), &[]);
    let (code, out, err) = of(&["dissect", "--target", "t.onnx", "--out", "o"]);
    assert_eq!(code, Some(0), "{err}");
    for said in ["images = [\"a\", \"b\"]", "num-inference-steps = 5", "models = \"m\"", "target = \"t.onnx\""] {
        assert!(out.lines().any(|line| line.starts_with(said)), "{said}: {out}");
    }
    assert!(!out.contains("http"), "{out}");
    let (code, out, err) = of(&["up"]);
    assert!(code == Some(0) && out.contains("http = \"127.0.0.1:8080\"") && !out.contains("images"), "{err}{out}");
    let (code, out, err) = of(&["jobs", "list"]);
    assert!(code == Some(0) && out.lines().any(|line| line.starts_with("data = \"d\"")), "{err}{out}");
    fs::write(&file, "imagse = \"a\"\n").unwrap();
    let (code, _, err) = of(&["up"]);
    assert!(code == Some(2) && err.contains("is images meant?"), "{err}");
}

#[test]
fn a_password_is_not_printed_wherever_it_comes_from() {
    let url = "postgres://dnd:secret@localhost/dnd";
    for (args, variables) in [(&["--store", url][..], &[][..]), (&[], &[("DND_STORE", url)])] {
        let endpoints =
            ["--activation", "http://a:1", "--captioner", "http://a:1", "--summarizer", "http://a:1", "--diffusion", "http://a:1", "--clip", "http://a:1"];
        let (code, out, err) = run("dnd-orchestrator", &[&endpoints[..], args, &["--print-config"]].concat(), variables);
        assert!(code == Some(0) && out.contains("# store is set, and not shown") && !out.contains("secret"), "{err}{out}");
    }
}
