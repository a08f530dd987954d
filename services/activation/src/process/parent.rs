//! The processes of targets, from the service's side.

use std::{
    collections::HashMap,
    fs,
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::{
            net::UnixStream,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use dnd_mesh::{Fault, batch::Stop, metrics::TARGET_DEATHS};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde::{Serialize, de::DeserializeOwned};
use tonic::Code;
use tracing::warn;

use super::{Answer, NAME, meant, read, write};
use crate::ActivationArgs;

/// Deaths of one target's processes before it is refused,
const MOST_DEATHS: u32 = 3;
/// and for how long after the last one.
const REFUSED: Duration = Duration::from_secs(60);
/// After so long deaths are forgotten.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// Targets whose deaths are remembered.
const MOST_TARGETS: usize = 1000;
/// How often is looked whether anybody waits for an answer.
const LOOK: Duration = Duration::from_millis(100);
/// How long a batch goes on that nobody waits for any more: killing a process costs the next caller its start.
const UNWANTED: Duration = Duration::from_secs(10);
/// How long the end of a process takes after its socket has closed.
const ENDING: Duration = Duration::from_secs(1);

/// Why processes are lost, as the metric says it.
const TIMEOUT: &str = "timeout";
const MEMORY: &str = "memory";
const DIED: &str = "died";

/// Starts the processes of targets, and knows how they end.
pub(crate) struct Host {
    program: PathBuf,
    /// Bytes that the processes of a loaded target may take together.
    memory: u64,
    /// How long an answer may take.
    timeout: Duration,
    /// By target: how often its processes have died, and when last.
    deaths: Mutex<HashMap<String, (u32, Instant)>>,
}

/// A process of a target. It ends with this value.
pub(crate) struct Process {
    host: Arc<Host>,
    target: String,
    /// Bytes that it may take.
    memory: u64,
    child: Child,
    socket: UnixStream,
    /// Closes with the service, however that ends: see `end_with` of the child.
    _life: UnixStream,
}

impl Host {
    pub(crate) fn new(args: &ActivationArgs) -> Self {
        // So that the first one is seen as a rise.
        for reason in [TIMEOUT, MEMORY, DIED] {
            TARGET_DEATHS.of([reason]).inc_by(0);
        }
        // The program may have been replaced by another since; this is the one that runs.
        let program = args.program.clone().unwrap_or_else(|| "/proc/self/exe".into());
        let memory = args.target_memory.map_or_else(|| machine_memory() / 2, |mebibytes| mebibytes.saturating_mul(1 << 20));
        Self { program, memory, timeout: Duration::from_secs(args.target_timeout), deaths: Mutex::default() }
    }

    /// Starts one of so many processes for the target of that digest, unless too many have died.
    pub(crate) fn start(self: &Arc<Self>, target: &str, of: usize) -> Result<Process, Fault> {
        self.check(target)?;
        let memory = self.memory / of.max(1) as u64;
        let start = || {
            let (socket, asked) = UnixStream::pair()?;
            let (life, watched) = UnixStream::pair()?;
            // What a library may print there is not read.
            life.shutdown(Shutdown::Read)?;
            socket.set_read_timeout(Some(LOOK))?;
            socket.set_write_timeout(Some(LOOK))?;
            let mut command = Command::new(&self.program);
            // In a group of its own: what is typed to stop the service is the service's to hear.
            command.arg0(NAME).process_group(0).stdin(OwnedFd::from(asked)).stdout(OwnedFd::from(watched));
            let child = command.spawn()?;
            let process = Process { host: Arc::clone(self), target: target.to_owned(), memory, child, socket, _life: life };
            // It reads what it is to do only afterwards. What a process maps counts, not the address space that drivers of cards reserve.
            let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
            let pid = Some(Pid::from_child(&process.child));
            prlimit(pid, Resource::Data, limit(memory))?;
            prlimit(pid, Resource::Core, limit(0))?;
            // Where the machine runs out of memory it goes first. A system that does not take that has an order of its own.
            let _ = fs::write(format!("/proc/{}/oom_score_adj", process.child.id()), "1000");
            Ok(process)
        };
        start().map_err(|error: io::Error| Fault::internal(format!("no process can be started for a target: {}: {error}", self.program.display())))
    }

    /// Changed in single steps, so it is whole even after a panic.
    fn deaths(&self) -> MutexGuard<'_, HashMap<String, (u32, Instant)>> {
        self.deaths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, target: &str) -> Result<(), Fault> {
        match self.deaths().get(target) {
            Some((count, last)) if *count >= MOST_DEATHS && last.elapsed() < REFUSED => {
                let after = REFUSED - last.elapsed();
                let message = format!("{count} processes of this target have died lately; it is tried again in {:.0} s", after.as_secs_f64().max(1.0));
                Err(Fault::new(Code::FailedPrecondition, "TARGET_REFUSED", message).retry_after(after))
            }
            _ => Ok(()),
        }
    }

    fn died(&self, target: &str, reason: &'static str) {
        TARGET_DEATHS.of([reason]).inc();
        let mut deaths = self.deaths();
        if deaths.len() >= MOST_TARGETS {
            deaths.retain(|_, (_, last)| last.elapsed() < REFUSED);
        }
        let (count, last) = deaths.entry(target.to_owned()).or_insert((0, Instant::now()));
        *count = if last.elapsed() < FORGOTTEN { *count + 1 } else { 1 };
        *last = Instant::now();
    }
}

/// Bytes that the container, or the machine, has.
fn machine_memory() -> u64 {
    let container = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let container = container.iter().filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok()));
    container.chain(machine.map(|kibibytes| kibibytes << 10)).min().unwrap_or(8 << 30)
}

impl Process {
    /// Sends a request, and gives the answer with its bytes, of which there are at most so many. An error is the end of the process.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &impl Serialize, bytes: &[u8], most: u64, stop: &Stop) -> Result<(Answer<T>, Vec<u8>), Fault> {
        self.send(request, bytes, stop)?;
        self.answer(most, stop)
    }

    /// The first half of [`Self::ask`].
    pub(crate) fn send(&mut self, request: &impl Serialize, bytes: &[u8], stop: &Stop) -> Result<(), Fault> {
        self.talk(stop, |socket| write(socket, request, bytes))
    }

    /// The other half.
    pub(crate) fn answer<T: DeserializeOwned>(&mut self, most: u64, stop: &Stop) -> Result<(Answer<T>, Vec<u8>), Fault> {
        self.talk(stop, |socket| read(socket, most))
    }

    /// What it answered, or the fault of the target's own, told apart where it is of memory: ONNX Runtime may come through that.
    pub(crate) fn meant<T>(&self, answer: Answer<T>) -> Result<T, Fault> {
        meant(answer).map_err(|fault| {
            let message = fault.to_string();
            let memory = ["bad_alloc", "Failed to allocate memory", "Available memory"].iter().any(|words| message.contains(words));
            if memory { self.too_large(&message) } else { fault }
        })
    }

    fn too_large(&self, why: &str) -> Fault {
        let message = format!("a session of the target takes more than its {} MiB (--target-memory): {why}", self.memory >> 20);
        Fault::new(Code::FailedPrecondition, "TARGET_MEMORY", message)
    }

    fn talk<T>(&mut self, stop: &Stop, talk: impl FnOnce(&mut Patient<'_>) -> io::Result<T>) -> Result<T, Fault> {
        let timeout = self.host.timeout;
        let mut patient = Patient { socket: &self.socket, until: Instant::now() + timeout, stop, unwanted: None };
        let error = match talk(&mut patient) {
            Ok(told) => return Ok(told),
            Err(error) => error,
        };
        let late = error.kind() == ErrorKind::TimedOut;
        if late && let Some(fault) = patient.unwanted {
            return Err(fault);
        }
        let fault = if late {
            let message = format!("the target did not answer within {} s (--target-timeout)", timeout.as_secs());
            Fault::new(Code::FailedPrecondition, "TARGET_TIMEOUT", message)
        } else {
            match self.ended() {
                // What C++ and Rust do that are given no more memory.
                Some(status) if status.signal() == Some(ABORTED) => self.too_large(&format!("its process ended with {status}")),
                Some(status) => Fault::new(Code::Aborted, "TARGET_DIED", format!("the target's process ended with {status}")),
                None => Fault::new(Code::Aborted, "TARGET_DIED", format!("the target's process no longer answered: {error}")),
            }
        };
        warn!(target = self.target, %fault, "a target's process is lost");
        self.host.died(
            &self.target,
            match fault.reason() {
                "TARGET_TIMEOUT" => TIMEOUT,
                "TARGET_MEMORY" => MEMORY,
                _ => DIED,
            },
        );
        Err(fault)
    }

    /// How it ended, if it did.
    fn ended(&mut self) -> Option<ExitStatus> {
        let since = Instant::now();
        while since.elapsed() < ENDING {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                ended => return ended.ok().flatten(),
            }
        }
        None
    }
}

/// SIGABRT.
const ABORTED: i32 = 6;

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The socket of a process, for as long as an answer may take.
struct Patient<'p> {
    socket: &'p UnixStream,
    until: Instant,
    stop: &'p Stop,
    /// Why nobody waits for the answer any more.
    unwanted: Option<Fault>,
}

impl Patient<'_> {
    /// Tries until it works, or the time is over.
    fn keep_trying<T>(&mut self, mut act: impl FnMut(&UnixStream) -> io::Result<T>) -> io::Result<T> {
        // Looked at each time: a process that says a little now and then is late, too.
        while Instant::now() < self.until {
            match act(self.socket) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                done => return done,
            }
            if self.unwanted.is_none()
                && let Err(fault) = self.stop.check()
            {
                self.unwanted = Some(fault);
                self.until = self.until.min(Instant::now() + UNWANTED);
            }
        }
        Err(ErrorKind::TimedOut.into())
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.keep_trying(|mut socket| socket.read(bytes))
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.keep_trying(|mut socket| socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
