//! Targets, probing sets, and the passes over them.

mod cache;
mod describe;
mod probe;
mod probing_set;
mod target;

use std::{
    collections::HashMap,
    io::{self, ErrorKind},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use clap::{Args, builder::RangedU64ValueParser};
use dnd_mesh::{
    Fault,
    blobs::{self, Blobs},
    uri::Roots,
};
use dnd_onnx::{
    Error,
    graph::{Given, Input, Network},
    pictures::{PictureLimits, Preprocessor, default_preprocessing},
    preprocessing,
    runtime::EngineArgs,
};
use dnd_proto::v1 as proto;
use prost::Message as _;
use tonic::Code;

use crate::process::Host;

use cache::Cache;
pub(crate) use describe::{LayerInfo, LayerKind, resolve};
pub(crate) use probe::{Collector, Found, Probed, ProbedMap};
pub(crate) use probing_set::ProbingSet;
pub(crate) use target::{Cut, Output, Reading, Source};

const DEFAULT_TARGETS: NonZeroUsize = NonZeroUsize::new(4).expect("4 is not 0");

/// Bounds on what the service holds.
#[derive(Debug, Clone, Args)]
pub struct ActivationArgs {
    /// Targets that are kept loaded, each with the layers that were asked for together
    #[arg(long, env = "DND_TARGETS", default_value_t = DEFAULT_TARGETS)]
    pub targets: NonZeroUsize,
    /// Mebibytes of activation maps that a probing pass keeps; beyond them pictures are run again at its end
    #[arg(long, env = "DND_MAP_MEMORY", default_value_t = 256)]
    pub map_memory: usize,
    /// Mebibytes that a loaded target may take, its sessions together, each in a process of its own; one that needs more is refused. By default half of what the container or the machine has
    #[arg(long, env = "DND_TARGET_MEMORY")]
    pub target_memory: Option<u64>,
    /// Seconds that a target may take to load, or for a batch; its process is killed then
    #[arg(long, env = "DND_TARGET_TIMEOUT", default_value_t = 300, value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    pub target_timeout: u64,
    /// Pixels of a picture at most; larger ones are skipped
    #[arg(long, env = "DND_MAX_PIXELS", default_value_t = PictureLimits::default().pixels, value_parser = RangedU64ValueParser::<u64>::new().range(1..=PictureLimits::default().pixels))]
    pub max_pixels: u64,
    /// Folder in which requests may name files by `file:` URIs; may be given several times, in the variable with colons between. By default any file for callers of this machine, and none for others
    #[arg(long = "root", env = "DND_ROOT", value_name = "DIR", value_delimiter = ':')]
    pub roots: Vec<PathBuf>,
    /// Whether callers may be of other machines
    #[arg(skip)]
    pub remote: bool,
    /// The program that runs targets: one whose `main` looks at [`crate::is_target_process`]; by default this one
    #[arg(skip)]
    pub program: Option<PathBuf>,
}

impl Default for ActivationArgs {
    fn default() -> Self {
        Self {
            targets: DEFAULT_TARGETS,
            map_memory: 256,
            target_memory: None,
            target_timeout: 300,
            max_pixels: PictureLimits::default().pixels,
            roots: Vec::new(),
            remote: false,
            program: None,
        }
    }
}

/// The engine of the service.
pub struct Activation {
    args: EngineArgs,
    limits: ActivationArgs,
    blobs: Arc<Blobs>,
    roots: Roots,
    host: Arc<Host>,
    digests: Cache<FileState, String>,
    networks: Cache<(PathBuf, String), Network>,
    described: Cache<String, Described>,
    cuts: Cache<CutKey, Cut>,
    sets: Cache<Vec<u8>, ProbingSet>,
}

/// A target's file, read, and what can be asked of it.
pub(crate) struct Described {
    pub(crate) digest: String,
    pub(crate) network: Arc<Network>,
    pub(crate) preprocessing: proto::Preprocessing,
    pub(crate) layers: Vec<LayerInfo>,
    /// Why the network's other values are no layers.
    refused: HashMap<String, String>,
    input: Input,
    /// The batch size, where it runs at no other.
    batch: Option<usize>,
    /// Bytes of its files.
    size: u64,
    /// All that it depends on.
    key: String,
}

impl Described {
    fn layer(&self, value: &str) -> Option<&LayerInfo> {
        self.layers.iter().find(|layer| layer.value == value)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct CutKey {
    described: String,
    layers: Vec<String>,
    reading: Reading,
}

/// What tells that a file is still what it was.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileState {
    path: PathBuf,
    size: u64,
    modified: Option<SystemTime>,
}

/// Sets whose listing is kept, and files whose digest is.
const LISTINGS: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");
const MOST_PICTURES_IN_WORK: usize = 128;
const DIGESTS: NonZeroUsize = NonZeroUsize::new(256).expect("256 is not 0");

impl Activation {
    /// An engine that finds uploads in `blobs`.
    pub fn new(args: EngineArgs, limits: ActivationArgs, blobs: Arc<Blobs>) -> Self {
        let targets = limits.targets;
        Self {
            args,
            roots: Roots::new(&limits.roots, !limits.remote),
            host: Arc::new(Host::new(&limits)),
            limits,
            blobs,
            digests: Cache::new(DIGESTS),
            networks: Cache::new(targets),
            described: Cache::new(targets),
            cuts: Cache::new(targets),
            sets: Cache::new(LISTINGS),
        }
    }

    /// What runs the targets.
    pub(crate) fn model(&self) -> proto::Model {
        let limits = self.picture_limits();
        let limits = proto::ModelLimits { picture_bytes: limits.bytes as u64, picture_pixels: limits.pixels, text_tokens: 0, batch: self.args.batch() as u32 };
        proto::Model { name: "target".to_owned(), layout: "onnx".to_owned(), engine: self.args.engine(), limits: Some(limits), ..Default::default() }
    }

    pub(crate) fn picture_limits(&self) -> PictureLimits {
        PictureLimits { pixels: self.limits.max_pixels, ..PictureLimits::default() }
    }

    /// Bytes of maps that a probing pass keeps.
    pub(crate) fn map_memory(&self) -> usize {
        self.limits.map_memory << 20
    }

    /// Pictures that are in work at a time: enough for every session to have its next batch waiting, and not so many that they fill the memory.
    pub(crate) fn concurrency(&self) -> usize {
        (2 * self.args.batch() * self.args.thread_budget()).min(MOST_PICTURES_IN_WORK)
    }

    /// The pictures of a set; listed once for calls in a row.
    pub(crate) async fn set(&self, said: Option<proto::ProbingSet>) -> Result<Arc<ProbingSet>, Fault> {
        let said = said.ok_or_else(|| Fault::field("probing_set", "not set; say where the pictures are"))?;
        let (blobs, roots) = (Arc::clone(&self.blobs), self.roots.clone());
        self.sets.get(said.encode_to_vec(), || blocking(move || ProbingSet::open(&said, &blobs, &roots))).await
    }

    /// Lists a set anew, as a probing pass does: files may have come since.
    pub(crate) async fn fresh_set(&self, said: Option<proto::ProbingSet>) -> Result<Arc<ProbingSet>, Fault> {
        if let Some(said) = &said {
            self.forget_set(said);
        }
        self.set(said).await
    }

    /// The next who needs the set lists it anew.
    pub(crate) fn forget_set(&self, said: &proto::ProbingSet) {
        self.sets.forget(&said.encode_to_vec());
    }

    async fn target_file(&self, target: &proto::Target) -> Result<PathBuf, Fault> {
        if target.uri.is_empty() {
            let missing = || {
                Fault::new(Code::FailedPrecondition, "NOT_UPLOADED", format!("the target {:?} was not uploaded, and no URI says where it is", target.digest))
            };
            return self.blobs.path(&target.digest).await.map_err(blobs::storage)?.ok_or_else(missing);
        }
        let (roots, uri) = (self.roots.clone(), target.uri.clone());
        blocking(move || roots.find(&uri, "target.uri")).await
    }

    /// The digest of a file, read once while it stays as it is.
    async fn digest(&self, path: PathBuf) -> Result<Arc<String>, Fault> {
        let meta = tokio::fs::metadata(&path).await.map_err(|e| not_found(&path, &e))?;
        let state = FileState { path: path.clone(), size: meta.len(), modified: meta.modified().ok() };
        self.digests.get(state, || async move { blobs::digest_of(&path).await.map_err(|e| not_found(&path, &e)) }).await
    }

    /// Reads a target, and runs it once to see its layers. Beside it where its pre-processing comes from.
    pub(crate) async fn describe(&self, target: Option<proto::Target>) -> Result<(Arc<Described>, String), Fault> {
        let target = target.ok_or_else(|| Fault::field("target", "not set; say which network to dissect"))?;
        let file = self.target_file(&target).await?;
        let digest = self.digest(file.clone()).await?;
        let network = {
            let (file, target) = (file.clone(), target.clone());
            self.networks.get((file.clone(), digest.to_string()), || blocking(move || read_target(&file, &target))).await?
        };
        let (external, size) = self.external_data(&file, &network, &target).await?;
        // Files of external data are a part of the network: what it is known by is of all of them.
        let whole = if external.is_empty() { digest.to_string() } else { blobs::digest(format!("{digest} {external:?}").as_bytes()) };
        if !target.digest.is_empty() && ![digest.as_str(), &whole].contains(&target.digest.as_str()) {
            return Err(Fault::field("target.digest", format!("{} has the digest {whole}, not {}", file.display(), target.digest)));
        }
        let options = target.options.clone().unwrap_or_default();
        let input = network.input(&Given::from(&options))?;
        // Who uploads a network has what lies beside it.
        let beside = (!target.uri.is_empty()).then_some(file.as_path());
        let (preprocessing, source) = preprocessing(target.preprocessing, beside, input.size)?;
        let key = format!("{file:?} {whole} {preprocessing:?} {options:?}");
        let args = self.args.for_model(u64::MAX);
        let make = || {
            let (key, host) = (key.clone(), Arc::clone(&self.host));
            blocking(move || {
                let describe::Trial { layers, refused, batch } =
                    describe::trial(&host, &whole, &network, &input, &options, (preprocessing.height, preprocessing.width), &args)?;
                Ok(Described { digest: whole, network, preprocessing, layers, refused, input, batch, size, key })
            })
        };
        Ok((self.described.get(key.clone(), make).await?, source))
    }

    /// The digests of a target's files of external data, by their names, which count as its own does; and the bytes of all its files.
    async fn external_data(&self, file: &Path, network: &Network, target: &proto::Target) -> Result<(Vec<(PathBuf, String)>, u64), Fault> {
        let names = network.external_files()?;
        if target.uri.is_empty() && !names.is_empty() {
            let message = "the network has external data, which can't be uploaded: save it as one file, or name it by a URI that the service can read";
            return Err(Fault::new(Code::InvalidArgument, "EXTERNAL_DATA", message));
        }
        let size = async |path: &Path| tokio::fs::metadata(path).await.map(|meta| meta.len());
        let mut bytes = size(file).await.map_err(|e| not_found(file, &e))?;
        let mut digests = Vec::with_capacity(names.len());
        for (name, least) in names {
            let path = network.folder().join(&name);
            let (roots, link) = (self.roots.clone(), path.clone());
            if !blocking(move || Ok(roots.hold(&link))).await? {
                let problem = format!("external data in {}, which is not in the folders that this service reads for others", name.display());
                return Err(Error::file(file, problem).into());
            }
            let wrong = |problem: String| Fault::from(Error::file(file, format!("its weights are in {}: {problem}", path.display())));
            let held = size(&path).await.map_err(|e| wrong(if e.kind() == ErrorKind::NotFound { "no such file".to_owned() } else { e.to_string() }))?;
            if held < least {
                return Err(wrong(format!("{held} bytes, and the network reads {least}; the file is not whole, or another network's")));
            }
            bytes += held;
            digests.push((name, self.digest(path).await?.to_string()));
        }
        Ok((digests, bytes))
    }

    /// The target as far as the asked-for layers need it, loaded, with those layers in their order.
    pub(crate) async fn cut(&self, described: &Arc<Described>, layers: &[LayerInfo], reading: Reading) -> Result<Arc<Cut>, Fault> {
        let key = CutKey { described: described.key.clone(), layers: layers.iter().map(|layer| layer.value.clone()).collect(), reading };
        let (described, layers, limits) = (Arc::clone(described), layers.to_vec(), self.picture_limits());
        let (args, host) = (self.args.for_model(described.size), Arc::clone(&self.host));
        self.cuts.get(key, || blocking(move || Cut::load(&host, &described, layers, reading, &args, limits))).await
    }
}

/// Reads a target's file; an error names an uploaded one as its owner knows it.
fn read_target(file: &Path, target: &proto::Target) -> Result<Network, Fault> {
    Network::read(file).map_err(|error| match error {
        Error::File { problem, .. } if target.uri.is_empty() => Error::Graph(format!("the uploaded target {}: {problem}", target.digest)).into(),
        error => error.into(),
    })
}

/// The pre-processing as it was said, else as a file beside the network has it, else the usual one of a network of that input size; and which it was.
fn preprocessing(said: Option<proto::Preprocessing>, file: Option<&Path>, input: Option<(u32, u32)>) -> Result<(proto::Preprocessing, String), Fault> {
    let beside = |file: &Path| preprocessing::beside(file, input);
    let (chosen, source) = match said {
        Some(said) => (said, "the request".to_owned()),
        None => match file.map(beside).transpose()?.flatten() {
            Some((found, name)) => (found, format!("{name} beside the network")),
            None => {
                let (height, width) = input.unwrap_or(preprocessing::USUAL_SIZE);
                (default_preprocessing(height, width), "what is usual for ImageNet networks".to_owned())
            }
        },
    };
    if let Some(size) = input.filter(|size| (chosen.height, chosen.width) != *size) {
        let message = format!("{} x {} ({source}), but the network takes pictures of {} x {}", chosen.height, chosen.width, size.0, size.1);
        return Err(Fault::field("target.preprocessing", message));
    }
    Preprocessor::new(&chosen)?;
    Ok((chosen, source))
}

fn not_found(path: &Path, error: &io::Error) -> Fault {
    let why = if error.kind() == ErrorKind::NotFound { "no such file".to_owned() } else { error.to_string() };
    Fault::new(Code::InvalidArgument, "UNREADABLE_SOURCE", format!("{}: {why}", path.display()))
}

/// Runs work that blocks on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Fault::internal("the service panicked on this work; its log has the details"))?
}
