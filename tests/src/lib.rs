//! Runs the real programs, for whole-system tests.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long a program may take to open its port.
const PATIENCE: Duration = Duration::from_secs(120);

/// A program of the workspace, as `cargo build` made it.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.is_file(), "{} is not built: run `cargo build --workspace --bins`", path.display());
    path
}

/// A running service, in a folder of its own; it is killed with this value.
pub struct Service {
    child: Child,
    address: String,
    folder: TempDir,
}

impl Service {
    /// Starts a program on a free port and waits until it listens.
    pub fn start(name: &str, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port_file = folder.path().join("port");
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new(program(name))
            .args(args)
            .args(["--listen", "127.0.0.1:0", "--port-file", port_file.to_str().unwrap()])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut service = Self { child, address: String::new(), folder };
        let since = Instant::now();
        while service.address.is_empty() {
            assert!(service.child.try_wait().unwrap().is_none() && since.elapsed() < PATIENCE, "{name} did not start: {}", service.log());
            thread::sleep(Duration::from_millis(20));
            service.address = fs::read_to_string(&port_file).unwrap_or_default();
        }
        service
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Sends SIGTERM and waits for its end; gives the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Five model services and an orchestrator, each a process of its own with a folder of its own.
pub struct Mesh {
    /// The orchestrator.
    pub orchestrator: Service,
    _models: Vec<Service>,
}

impl Mesh {
    /// Starts all, with the models of a suite.
    pub fn start(suite: &Path) -> Self {
        let model = |name: &str| Service::start(&format!("dnd-{name}"), &["--model", suite.join(name).to_str().unwrap()]);
        let models = [Service::start("dnd-activation", &[]), model("captioner"), model("summarizer"), model("diffusion"), model("clip")];
        let urls: Vec<String> = models.iter().map(Service::url).collect();
        let flags = ["--activation", "--captioner", "--summarizer", "--diffusion", "--clip"];
        let args: Vec<&str> = flags.iter().zip(&urls).flat_map(|(flag, url)| [*flag, url.as_str()]).collect();
        Self { orchestrator: Service::start("dnd-orchestrator", &args), _models: models.into() }
    }
}

/// What a run of `dnd` left.
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs `dnd` in a folder.
pub fn dnd(folder: &Path, args: &[&str]) -> Ran {
    let output = Command::new(program("dnd")).args(args).current_dir(folder).env_remove("DND_MODELS").env_remove("DND_ENDPOINT").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}
