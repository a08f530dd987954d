//! ONNX Runtime: finding its library, and sessions on it.

use std::{
    env, fmt, fs,
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use clap::{Args, ValueEnum};
use dnd_mesh::batch::Limits;
use ort::{
    environment::Environment,
    ep::{self, ArenaExtendStrategy},
    session::{Session, builder::SessionBuilder},
};
use serde::{Deserialize, Serialize};

use crate::{Error, graph::Network};

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
    /// Mebibytes of a card's memory that the model may take for its weights and what it computes, its sessions together; with --provider cuda. By default there is no limit
    #[arg(long, env = "DND_GPU_MEMORY", value_name = "MIB")]
    pub gpu_memory: Option<NonZeroU64>,
    /// Bytes of them that each session may take beside the weights of its graph, once [`Self::for_graphs`] has shared them out.
    #[arg(skip)]
    pub spare: Option<u64>,
}

const DEFAULT_QUEUE: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not 0");
const DEFAULT_BATCH: NonZeroUsize = match NonZeroUsize::new(8) {
    Some(batch) => batch,
    None => NonZeroUsize::MIN,
};
const MEBIBYTE: u64 = 1 << 20;
/// Bytes that the copies of a model take together, unless it is said how many there are.
const COPIES: u64 = 1 << 30;

impl Default for EngineArgs {
    fn default() -> Self {
        Self { provider: Provider::Cpu, threads: None, sessions: None, batch: DEFAULT_BATCH, queue: DEFAULT_QUEUE, gpu_memory: None, spare: None }
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

    /// Arguments for one of the sessions by itself, with its share of the threads and of the card's memory.
    #[must_use]
    pub fn for_one_of_them(&self) -> Self {
        let gpu_memory = self.gpu_memory.map(|mebibytes| NonZeroU64::new(mebibytes.get() / self.session_count() as u64).unwrap_or(NonZeroU64::MIN));
        Self { threads: NonZeroUsize::new(self.threads_per_session()), sessions: Some(NonZeroUsize::MIN), gpu_memory, ..self.clone() }
    }

    /// These arguments for sessions of these graphs, so that all of them keep to what the model may take of a card: ONNX Runtime bounds each session by itself,
    /// and none gives back what it has taken. So each has room for the weights of its graph, and what the limit leaves beside all weights is shared out evenly.
    ///
    /// # Errors
    ///
    /// If the weights alone take more, or a graph can't be read.
    pub fn for_graphs(&self, graphs: &[&Path]) -> Result<Self, Error> {
        let Some(limit) = self.gpu_memory else { return Ok(self.clone()) };
        let copies = self.session_count() as u64;
        let weights = graphs.iter().map(|graph| weights(graph)).sum::<Result<u64, _>>()?.saturating_mul(copies);
        let left = bytes(limit).checked_sub(weights).ok_or_else(|| Error::Provider {
            provider: self.provider.name(),
            problem: format!("the weights of {copies} session(s) of the model take {} MiB, and --gpu-memory is {limit}", weights.div_ceil(MEBIBYTE)),
        })?;
        Ok(Self { spare: Some(left / (copies * graphs.len().max(1) as u64)), ..self.clone() })
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

fn bytes(mebibytes: NonZeroU64) -> u64 {
    mebibytes.get().saturating_mul(MEBIBYTE)
}

/// Bytes of a graph's file and of its external data: mostly its weights.
fn weights(file: &Path) -> Result<u64, Error> {
    let size = |file: &Path| fs::metadata(file).map(|meta| meta.len()).map_err(|e| Error::file(file, e.to_string()));
    let network = Network::read(file)?;
    let external = network.external_files()?.into_keys().map(|name| size(&network.folder().join(name))).sum::<Result<u64, _>>()?;
    Ok(size(file)? + external)
}

/// A session of the model in a file.
pub fn session(file: &Path, args: &EngineArgs) -> Result<Session, Error> {
    let limit = match args.spare {
        Some(spare) => Some(weights(file)? + spare),
        None => args.gpu_memory.map(bytes),
    };
    builder(args, limit)?.commit_from_file(file).map_err(|e| Error::file(file, e.to_string()))
}

/// A session of a model in memory, whose external data, if any, lies in `folder`.
pub fn session_of(model: &[u8], folder: &Path, args: &EngineArgs) -> Result<Session, Error> {
    // Where a relative path of external data starts, for a model that comes from no file.
    const EXTERNAL_DATA: &str = "session.model_external_initializers_file_folder_path";
    let builder = builder(args, args.gpu_memory.map(bytes))?.with_config_entry(EXTERNAL_DATA, folder.to_string_lossy());
    builder.map_err(ort::Error::from)?.commit_from_memory(model).map_err(|e| Error::Graph(format!("ONNX Runtime does not take the network: {e}")))
}

/// Whether a provider can be used here; the error says what is missing.
pub fn check_provider(provider: Provider) -> Result<(), Error> {
    builder(&EngineArgs { provider, ..EngineArgs::default() }, None).map(drop)
}

/// Sets a session up, which may take so many bytes of a card's memory.
fn builder(args: &EngineArgs, limit: Option<u64>) -> Result<SessionBuilder, Error> {
    if limit.is_some() && args.provider != Provider::Cuda {
        return Err(Error::Provider { provider: args.provider.name(), problem: "it keeps to no limit: --gpu-memory goes with --provider cuda".to_owned() });
    }
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
        Provider::Cuda => {
            let cuda = ep::CUDA::default();
            match limit {
                // As it is needed: by default what is taken is doubled each time, and so a good part of the limit lies idle.
                Some(limit) => cuda.with_memory_limit(limit as usize).with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested),
                None => cuda,
            }
            .build()
        }
        Provider::Tensorrt => ep::TensorRT::default().build(),
    };
    builder.with_execution_providers([provider.error_on_failure()]).map_err(|e| Error::Provider {
        provider: args.provider.name(),
        problem: format!(
            "{e} The GPU's providers come with the library of the onnxruntime-gpu package: name it with {VARIABLE}, its provider libraries beside it"
        ),
    })
}

#[cfg(test)]
mod tests {
    use dnd_testing::sketch;

    use super::*;

    fn limited(mebibytes: u64, sessions: usize) -> EngineArgs {
        EngineArgs { provider: Provider::Cuda, gpu_memory: NonZeroU64::new(mebibytes), ..EngineArgs::sized(1, sessions) }
    }

    #[test]
    fn all_sessions_of_a_model_together_keep_to_what_it_may_take_of_a_card() {
        let graphs = ["text_encoder", "unet", "vae_decoder"].map(|part| sketch("diffusion").join(part).join("model.onnx"));
        let graphs: Vec<&Path> = graphs.iter().map(PathBuf::as_path).collect();
        let weights: u64 = graphs.iter().map(|graph| weights(graph).unwrap()).sum();
        for (mebibytes, sessions) in [(64, 1), (64, 3), (1000, 7)] {
            let args = limited(mebibytes, sessions).for_graphs(&graphs).unwrap();
            let together = sessions as u64 * (weights + graphs.len() as u64 * args.spare.unwrap());
            let limit = mebibytes * MEBIBYTE;
            assert!(together <= limit && limit - together < (sessions * graphs.len()) as u64, "{together} of {limit}");
        }
        let problem = limited(1, 2).for_graphs(&graphs).unwrap_err().to_string();
        assert!(problem.contains(&format!("{} MiB", (2 * weights).div_ceil(MEBIBYTE))) && problem.contains("--gpu-memory is 1"), "{problem}");
        assert_eq!(EngineArgs::sized(1, 2).for_graphs(&graphs).unwrap().spare, None);
        assert_eq!(limited(1000, 3).for_one_of_them().gpu_memory, NonZeroU64::new(333));
    }

    #[test]
    fn a_limit_that_nothing_keeps_to_is_refused() {
        let args = EngineArgs { provider: Provider::Tensorrt, ..limited(1000, 1) };
        let problem = session(&sketch("diffusion/unet/model.onnx"), &args).unwrap_err().to_string();
        assert!(problem.contains("tensorrt") && problem.contains("--provider cuda"), "{problem}");
    }
}
