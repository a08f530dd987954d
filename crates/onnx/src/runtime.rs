//! ONNX Runtime: finding its library, and sessions on it.

use std::{
    env, fmt,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use clap::{Args, ValueEnum};
use dnd_mesh::batch::Limits;
use ort::{
    environment::Environment,
    ep,
    session::{Session, builder::SessionBuilder},
};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Name of ONNX Runtime's library.
const LIBRARY: &str = "libonnxruntime.so";
/// The variable that names the library's file.
const VARIABLE: &str = "ORT_DYLIB_PATH";

/// What runs the models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Provider {
    /// The processor
    Cpu,
    /// An NVIDIA GPU through CUDA
    Cuda,
    /// An NVIDIA GPU through TensorRT
    Tensorrt,
}

impl Provider {
    /// Its name, as the flag has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Tensorrt => "tensorrt",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a service runs its model.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct EngineArgs {
    /// What runs the model
    #[arg(long, env = "DND_PROVIDER", default_value_t = Provider::Cpu)]
    pub provider: Provider,
    /// Processor threads for the model; by default what the container or the machine has
    #[arg(long, env = "DND_THREADS")]
    pub threads: Option<NonZeroUsize>,
    /// Sessions of the model, each with its own copy of it and its share of the threads; by default as many as threads for a small model on the processor, up to a gibibyte in all, else one
    #[arg(long, env = "DND_SESSIONS")]
    pub sessions: Option<NonZeroUsize>,
    /// Items that the model runs together at most
    #[arg(long, env = "DND_BATCH", default_value_t = DEFAULT_BATCH)]
    pub batch: NonZeroUsize,
    /// Calls that may wait for the model, each with an item of usual size; further ones are refused, and told when to come again
    #[arg(long, env = "DND_QUEUE", default_value_t = DEFAULT_QUEUE)]
    pub queue: NonZeroUsize,
}

const DEFAULT_QUEUE: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not 0");
const DEFAULT_BATCH: NonZeroUsize = match NonZeroUsize::new(8) {
    Some(batch) => batch,
    None => NonZeroUsize::MIN,
};
/// Bytes that the copies of a model take together, unless it is said how many there are.
const COPIES: u64 = 1 << 30;

impl Default for EngineArgs {
    fn default() -> Self {
        Self { provider: Provider::Cpu, threads: None, sessions: None, batch: DEFAULT_BATCH, queue: DEFAULT_QUEUE }
    }
}

impl EngineArgs {
    /// Arguments for one session, as for a look at a model.
    pub fn one_session() -> Self {
        Self { sessions: Some(NonZeroUsize::MIN), ..Self::default() }
    }

    /// Arguments for so many sessions of one thread each, and so many items together (both at least 1).
    pub fn sized(batch: usize, sessions: usize) -> Self {
        let at_least_one = |n| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
        Self { threads: Some(at_least_one(sessions)), sessions: Some(at_least_one(sessions)), batch: at_least_one(batch), ..Self::default() }
    }

    /// The processor threads in all; available_parallelism heeds the cgroup's quota.
    pub fn thread_budget(&self) -> usize {
        self.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, usize::from)
    }

    /// These arguments with the number of sessions spelt out, for a model of so many bytes.
    #[must_use]
    pub fn for_model(&self, bytes: u64) -> Self {
        let fitting = if self.provider == Provider::Cpu { COPIES / bytes.max(1) } else { 1 };
        let default = usize::try_from(fitting).map_or(usize::MAX, |fitting| fitting).clamp(1, self.thread_budget().max(1));
        Self { sessions: self.sessions.or(NonZeroUsize::new(default)), ..self.clone() }
    }

    /// Arguments for one of the sessions by itself, with its share of the threads.
    #[must_use]
    pub fn for_one_of_them(&self) -> Self {
        Self { threads: NonZeroUsize::new(self.threads_per_session()), sessions: Some(NonZeroUsize::MIN), ..self.clone() }
    }

    /// Sessions of the model.
    pub fn session_count(&self) -> usize {
        self.sessions.map_or(1, usize::from)
    }

    /// Items that are run together at most.
    pub fn batch(&self) -> usize {
        self.batch.into()
    }

    /// Bounds of the queue of a model whose usual item costs so much.
    pub fn limits(&self, cost: usize) -> Limits {
        Limits { queue: self.queue.get().saturating_mul(cost), batch: self.batch() }
    }

    fn threads_per_session(&self) -> usize {
        (self.thread_budget() / self.session_count()).max(1)
    }

    /// How results come about, for provenance: library, version, provider, instruction set. (The precision is the model's, and its file's name says it.)
    pub fn engine(&self) -> String {
        let version = library_version().unwrap_or_else(|| "?".to_owned());
        format!("onnxruntime {version} {} {}", self.provider, instruction_set())
    }
}

fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if is_x86_feature_detected!("avx2") {
            return "avx2";
        }
    }
    env::consts::ARCH
}

static ENVIRONMENT: OnceLock<Result<(Environment, PathBuf), String>> = OnceLock::new();

/// The process's ONNX Runtime; the first call loads the library.
fn environment() -> Result<&'static Environment, Error> {
    loaded().map(|(environment, _)| environment)
}

fn loaded() -> Result<&'static (Environment, PathBuf), Error> {
    ENVIRONMENT.get_or_init(load_library).as_ref().map_err(|problem| Error::Library(problem.clone()))
}

/// Where the library was found.
pub fn library_path() -> Result<&'static Path, Error> {
    loaded().map(|(_, path)| path.as_path())
}

/// What the library says it was built from, once it is loaded: a release (`1.31.1`), or a commit (`commit 6af1a93`).
pub fn library_version() -> Option<String> {
    loaded().ok()?;
    let said = |key: &str| ort::info().split([',', ' ']).find_map(|word| word.strip_prefix(key)).map(str::to_owned);
    said("git-branch=rel-").or_else(|| said("git-commit-id=").map(|commit| format!("commit {commit}")))
}

fn load_library() -> Result<(Environment, PathBuf), String> {
    let path = find_library()?;
    let builder = ort::init_from(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let environment = builder.with_name("dnd").with_telemetry(false).build().map_err(|e| format!("{}: {e}", path.display()))?;
    Ok((environment, path))
}

/// The file named by the variable, else the one beside the program.
fn find_library() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os(VARIABLE).filter(|p| !p.is_empty()).map(PathBuf::from) {
        return if path.is_file() { Ok(path) } else { Err(format!("{VARIABLE} is {}, and no such file is there", path.display())) };
    }
    let beside = env::current_exe().ok().and_then(|exe| exe.parent().map(|folder| folder.join(LIBRARY)));
    match beside {
        Some(path) if path.is_file() => Ok(path),
        _ => Err(format!(
            "{LIBRARY} is not beside the program; put it there, or say where it is with {VARIABLE} (`make setup` puts it at third_party/onnxruntime/lib in the project)"
        )),
    }
}

/// A session of the model in a file.
pub fn session(file: &Path, args: &EngineArgs) -> Result<Session, Error> {
    builder(args)?.commit_from_file(file).map_err(|e| Error::file(file, e.to_string()))
}

/// A session of a model in memory, whose external data, if any, lies in `folder`.
pub fn session_of(model: &[u8], folder: &Path, args: &EngineArgs) -> Result<Session, Error> {
    // Where a relative path of external data starts, for a model that comes from no file.
    const EXTERNAL_DATA: &str = "session.model_external_initializers_file_folder_path";
    let builder = builder(args)?.with_config_entry(EXTERNAL_DATA, folder.to_string_lossy());
    builder.map_err(ort::Error::from)?.commit_from_memory(model).map_err(|e| Error::Graph(format!("ONNX Runtime does not take the network: {e}")))
}

/// Whether a provider can be used here; the error says what is missing.
pub fn check_provider(provider: Provider) -> Result<(), Error> {
    builder(&EngineArgs { provider, ..EngineArgs::default() }).map(drop)
}

fn builder(args: &EngineArgs) -> Result<SessionBuilder, Error> {
    let environment = environment()?;
    let set_up = || -> Result<SessionBuilder, ort::Error> {
        let builder = Session::builder(environment)?;
        // Sessions share the processor with one another: a thread that spins takes its core from them.
        let builder = builder.with_intra_threads(args.threads_per_session())?.with_inter_threads(1)?.with_intra_op_spinning(false)?;
        Ok(builder)
    };
    let builder = set_up()?;
    let provider = match args.provider {
        Provider::Cpu => return Ok(builder),
        Provider::Cuda => ep::CUDA::default().build(),
        Provider::Tensorrt => ep::TensorRT::default().build(),
    };
    builder.with_execution_providers([provider.error_on_failure()]).map_err(|e| Error::Provider {
        provider: args.provider.name(),
        problem: format!(
            "{e} The GPU's providers come with the library of the onnxruntime-gpu package: name it with {VARIABLE}, its provider libraries beside it"
        ),
    })
}
