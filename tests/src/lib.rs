//! Runs the real programs, for whole-system tests.
#![allow(clippy::unwrap_used, clippy::panic)]

pub mod recorder;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
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
    name: String,
    args: Vec<String>,
    child: Child,
    address: String,
    folder: TempDir,
}

impl Service {
    /// Starts a program on a free port and waits until it listens.
    pub fn start(name: &str, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let (child, address) = launch(name, &args, "127.0.0.1:0", folder.path());
        Self { name: name.to_owned(), args, child, address, folder }
    }

    /// Kills it without warning, and starts it again where it was.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again where it was, after it was killed.
    pub fn restart(&mut self) {
        fs::remove_file(self.folder.path().join("port")).unwrap();
        (self.child, self.address) = launch(&self.name, &self.args, &self.address, self.folder.path());
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where its admin port is.
    pub fn admin(&self) -> String {
        fs::read_to_string(self.folder.path().join("port.admin")).unwrap()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Processor time that it has taken, in seconds.
    pub fn processor_time(&self) -> f64 {
        // The fields after the name, which may have spaces; the times are in ticks of 10 ms (proc(5)).
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    }

    /// Sends it a signal, by its name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Sends SIGTERM and waits for its end; gives the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        self.signal("TERM");
        self.child.wait().unwrap().code()
    }
}

/// Starts a program and waits until it listens; gives where.
fn launch(name: &str, args: &[String], listen: &str, folder: &Path) -> (Child, String) {
    let port_file = folder.join("port");
    let log = fs::File::create(folder.join("log")).unwrap();
    let mut child = Command::new(program(name))
        .args(args)
        .args(["--listen", listen, "--port-file", port_file.to_str().unwrap()])
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let since = Instant::now();
    loop {
        let log = || fs::read_to_string(folder.join("log")).unwrap();
        assert!(child.try_wait().unwrap().is_none() && since.elapsed() < PATIENCE, "{name} did not start: {}", log());
        thread::sleep(Duration::from_millis(20));
        match fs::read_to_string(&port_file) {
            Ok(address) if !address.is_empty() => return (child, address),
            _ => {}
        }
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
    /// Activation, captioner, summarizer, diffusion, CLIP.
    pub models: [Service; 5],
}

impl Mesh {
    /// Starts all, with the models of a suite.
    pub fn start(suite: &Path) -> Self {
        Self::start_with(suite, &[])
    }

    /// As [`Self::start`], with more arguments for each service.
    pub fn start_with(suite: &Path, more: &[&str]) -> Self {
        let models = models(suite, more);
        Self { orchestrator: orchestrator(&models.each_ref().map(Service::url), more), models }
    }

    /// Another orchestrator over the same models.
    pub fn another_orchestrator(&self, more: &[&str]) -> Service {
        orchestrator(&self.models.each_ref().map(Service::url), more)
    }
}

/// Activation, captioner, summarizer, diffusion and CLIP, with the models of a suite and more arguments for each.
pub fn models(suite: &Path, more: &[&str]) -> [Service; 5] {
    let model = |name: &str| Service::start(&format!("dnd-{name}"), &[&["--model", suite.join(name).to_str().unwrap()], more].concat());
    [Service::start("dnd-activation", more), model("captioner"), model("summarizer"), model("diffusion"), model("clip")]
}

/// An orchestrator over the models at these URLs, in the order of [`models`].
pub fn orchestrator(models: &[String], more: &[&str]) -> Service {
    let flags = ["--activation", "--captioner", "--summarizer", "--diffusion", "--clip"];
    let args: Vec<&str> = flags.iter().zip(models).flat_map(|(flag, url)| [*flag, url.as_str()]).chain(more.iter().copied()).collect();
    Service::start("dnd-orchestrator", &args)
}

/// A GET over plain HTTP: the status code and the body.
pub fn get(address: &str, path: &str) -> (u16, String) {
    let (code, _, body) = get_as(address, path, "*/*");
    (code, String::from_utf8(body).unwrap())
}

/// As [`get`], of anything, asked for as this type: the status code, the head, and the body.
pub fn get_as(address: &str, path: &str, accept: &str) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    // To a caller of that version a body comes as it is, not in chunks.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: localhost\r\naccept: {accept}\r\n\r\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = std::str::from_utf8(&answer[..end + 2]).unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), answer[end + 4..].to_vec())
}

/// An empty database on the PostgreSQL server that `DND_TEST_POSTGRES` is the URL of; none where that is not set (scripts/postgres.sh starts one).
pub fn postgres(name: &str) -> Option<String> {
    let server = std::env::var("DND_TEST_POSTGRES").ok()?;
    let name = format!("{name}_{}", std::process::id());
    let programs = fs::read_dir("/usr/lib/postgresql").unwrap().map(|version| version.unwrap().path().join("bin/psql"));
    let psql = programs.filter(|path| path.is_file()).max().unwrap();
    let made = Command::new(psql).args([&server, "-qc", &format!("CREATE DATABASE {name}")]).status().unwrap();
    assert!(made.success());
    Some(format!("{}/{name}", server.rsplit_once('/').unwrap().0))
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

/// `dnd` in a folder, about to run.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program("dnd"));
    command.args(args).current_dir(folder).env_remove("DND_MODELS").env_remove("DND_ENDPOINT").env_remove("DND_CONFIG");
    command
}

/// Runs `dnd` in a folder.
pub fn dnd(folder: &Path, args: &[&str]) -> Ran {
    let output = command(folder, args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}
