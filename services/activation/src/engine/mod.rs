//! Targets, probing sets, and the passes over them.

mod describe;
mod probe;
mod probing_set;
mod target;

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc};

use clap::Args;
use dnd_mesh::{
    Fault,
    blobs::{self, Blobs},
};
use dnd_onnx::{
    graph::Network,
    pictures::{PictureLimits, Preprocessor, default_preprocessing},
    runtime::EngineArgs,
};
use dnd_proto::v1 as proto;
use lru::LruCache;
use prost::Message as _;
use tokio::sync::Mutex;
use tonic::Code;

pub(crate) use describe::{LayerInfo, LayerKind, resolve};
pub(crate) use probe::{Collector, Found, Probed, ProbedMap};
pub(crate) use probing_set::ProbingSet;
pub(crate) use target::{Cut, Output, Reading, Source};

/// Bounds on what the service holds.
#[derive(Debug, Clone, Args)]
pub struct ActivationArgs {
    /// Targets that are kept loaded, each with the layers that were asked for together
    #[arg(long, env = "DND_TARGETS", default_value_t = 4)]
    pub targets: usize,
    /// Mebibytes of activation maps that a probing pass keeps; beyond them pictures are run again at its end
    #[arg(long, env = "DND_MAP_MEMORY", default_value_t = 256)]
    pub map_memory: usize,
    /// Pixels of a picture at most; larger ones are skipped
    #[arg(long, env = "DND_MAX_PIXELS", default_value_t = PictureLimits::default().pixels)]
    pub max_pixels: u64,
}

impl Default for ActivationArgs {
    fn default() -> Self {
        Self { targets: 4, map_memory: 256, max_pixels: PictureLimits::default().pixels }
    }
}

/// The engine of the service.
pub struct Activation {
    args: EngineArgs,
    options: ActivationArgs,
    blobs: Arc<Blobs>,
    described: Mutex<LruCache<String, Arc<Described>>>,
    cuts: Mutex<LruCache<CutKey, Arc<Cut>>>,
    sets: Mutex<LruCache<Vec<u8>, Arc<ProbingSet>>>,
}

/// A target's file, read, and what can be asked of it.
pub(crate) struct Described {
    pub(crate) digest: String,
    pub(crate) network: Network,
    pub(crate) preprocessing: proto::Preprocessing,
    pub(crate) layers: Vec<LayerInfo>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct CutKey {
    digest: String,
    preprocessing: Vec<u8>,
    layers: Vec<String>,
    reading: Reading,
}

/// Sets whose listing is kept.
const OPEN_SETS: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

impl Activation {
    /// An engine that finds uploads in `blobs`.
    pub fn new(args: EngineArgs, options: ActivationArgs, blobs: Arc<Blobs>) -> Self {
        let targets = NonZeroUsize::new(options.targets).unwrap_or(NonZeroUsize::MIN);
        Self {
            args,
            options,
            blobs,
            described: Mutex::new(LruCache::new(targets)),
            cuts: Mutex::new(LruCache::new(targets)),
            sets: Mutex::new(LruCache::new(OPEN_SETS)),
        }
    }

    /// What runs the targets.
    pub(crate) fn model(&self) -> proto::Model {
        let limits = self.picture_limits();
        let limits = proto::ModelLimits { picture_bytes: limits.bytes as u64, picture_pixels: limits.pixels, text_tokens: 0, batch: self.args.batch as u32 };
        proto::Model { name: "target".to_owned(), layout: "onnx".to_owned(), engine: self.args.engine(), limits: Some(limits), ..Default::default() }
    }

    pub(crate) fn picture_limits(&self) -> PictureLimits {
        PictureLimits { pixels: self.options.max_pixels, ..PictureLimits::default() }
    }

    /// Bytes of maps that a probing pass keeps.
    pub(crate) fn map_memory(&self) -> usize {
        self.options.map_memory << 20
    }

    /// Pictures that are in work at a time.
    pub(crate) fn concurrency(&self) -> usize {
        2 * self.args.batch * self.args.session_count()
    }

    /// The pictures of a set; listed once for calls in a row.
    pub(crate) async fn set(&self, said: Option<proto::ProbingSet>) -> Result<Arc<ProbingSet>, Fault> {
        let said = said.ok_or_else(|| Fault::field("probing_set", "not set; say where the pictures are"))?;
        let key = said.encode_to_vec();
        let mut sets = self.sets.lock().await;
        if let Some(set) = sets.get(&key) {
            return Ok(Arc::clone(set));
        }
        let blobs = Arc::clone(&self.blobs);
        let set = blocking(move || ProbingSet::open(&said, &blobs)).await?;
        let set = Arc::new(set);
        sets.put(key, Arc::clone(&set));
        Ok(set)
    }

    /// Lists a set anew, as a probing pass does: files may have come since.
    pub(crate) async fn fresh_set(&self, said: Option<proto::ProbingSet>) -> Result<Arc<ProbingSet>, Fault> {
        if let Some(said) = &said {
            self.sets.lock().await.pop(&said.encode_to_vec());
        }
        self.set(said).await
    }

    fn target_file(&self, target: &proto::Target) -> Result<PathBuf, Fault> {
        if target.uri.is_empty() {
            let missing = || {
                Fault::new(Code::FailedPrecondition, "NOT_UPLOADED", format!("the target {:?} was not uploaded, and no URI says where it is", target.digest))
            };
            return self.blobs.path(&target.digest).ok_or_else(missing);
        }
        probing_set::local_path(&target.uri, "target.uri")
    }

    /// Reads a target, and runs it once to see its layers.
    pub(crate) async fn describe(&self, target: Option<proto::Target>) -> Result<Arc<Described>, Fault> {
        let target = target.ok_or_else(|| Fault::field("target", "not set; say which network to dissect"))?;
        let file = self.target_file(&target)?;
        let digest = match (target.uri.is_empty(), &file) {
            (true, _) => target.digest.clone(),
            (false, file) => blobs::digest_of(file).await.map_err(|e| not_found(file, &e))?,
        };
        if !target.digest.is_empty() && target.digest != digest {
            return Err(Fault::field("target.digest", format!("{} has the digest {digest}, not {}", file.display(), target.digest)));
        }
        let key = format!("{digest} {:?}", target.preprocessing);
        let mut described = self.described.lock().await;
        if let Some(known) = described.get(&key) {
            return Ok(Arc::clone(known));
        }
        let args = self.args.clone();
        let made = blocking(move || {
            let network = Network::read(&file)?;
            let input = network.input()?;
            let preprocessing = match (target.preprocessing, input.size) {
                (Some(said), Some(size)) if (said.height, said.width) != size => {
                    let message = format!("{} x {}, but the network takes pictures of {} x {}", said.height, said.width, size.0, size.1);
                    return Err(Fault::field("target.preprocessing", message));
                }
                (Some(said), _) => said,
                (None, size) => {
                    let (height, width) = size.unwrap_or(describe::USUAL_SIZE);
                    default_preprocessing(height, width)
                }
            };
            Preprocessor::new(&preprocessing)?;
            let layers = describe::layers(&network, &input, &preprocessing, &args)?;
            Ok(Described { digest, network, preprocessing, layers })
        });
        let made = Arc::new(made.await?);
        described.put(key, Arc::clone(&made));
        Ok(made)
    }

    /// The target as far as the asked-for layers need it, loaded, with those layers in their order.
    pub(crate) async fn cut(&self, described: &Arc<Described>, layers: &[LayerInfo], reading: Reading) -> Result<Arc<Cut>, Fault> {
        let key = CutKey {
            digest: described.digest.clone(),
            preprocessing: described.preprocessing.encode_to_vec(),
            layers: layers.iter().map(|layer| layer.value.clone()).collect(),
            reading,
        };
        let mut cuts = self.cuts.lock().await;
        if let Some(cut) = cuts.get(&key) {
            return Ok(Arc::clone(cut));
        }
        let (described, layers, args, limits) = (Arc::clone(described), layers.to_vec(), self.args.clone(), self.picture_limits());
        let cut = Arc::new(blocking(move || Cut::load(&described, layers, reading, &args, limits)).await?);
        if let Some((_, evicted)) = cuts.push(key, Arc::clone(&cut)) {
            // It waits for its threads to end.
            tokio::task::spawn_blocking(move || drop(evicted)).await.map_err(|_| Fault::internal("a target could not be unloaded"))?;
        }
        Ok(cut)
    }
}

fn not_found(path: &std::path::Path, error: &std::io::Error) -> Fault {
    let why = if error.kind() == std::io::ErrorKind::NotFound { "no such file".to_owned() } else { error.to_string() };
    Fault::new(Code::InvalidArgument, "UNREADABLE_SOURCE", format!("{}: {why}", path.display()))
}

/// Runs work that blocks on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Fault::internal("the service panicked on this work; its log has the details"))?
}
