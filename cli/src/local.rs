//! The whole mesh in this process: the same servers and the same messages as over ports.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use dnd_activation::Activation;
use dnd_captioner::Captioner;
use dnd_clip::Clip;
use dnd_diffusion::Diffusion;
use dnd_mesh::{
    Fault, Slot,
    blobs::{self, Blobs},
    server::{InProcess, Services},
};
use dnd_onnx::{folder, runtime};
use dnd_orchestrator::{Data, DataArgs, Models, WorksOn};
use dnd_summarizer::Summarizer;
use serde::Deserialize;

use crate::{args::MeshArgs, problem::Problem};

/// The manifest of a model suite, `suite.json`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Suite {
    /// Its name.
    pub(crate) name: String,
    /// What its users are to be told.
    #[serde(default)]
    pub(crate) notice: String,
    /// The folder of each model, relative to the suite's.
    models: BTreeMap<String, PathBuf>,
    /// Networks to try it on.
    #[serde(default)]
    targets: BTreeMap<String, PathBuf>,
    /// Pictures to try it on.
    probing_set: Option<PathBuf>,
    #[serde(skip)]
    root: PathBuf,
}

/// The models that a suite has.
pub(crate) const MODELS: [&str; 4] = ["captioner", "summarizer", "diffusion", "clip"];

impl Suite {
    /// Reads the manifest of a folder; one without a manifest holds each model in a folder of the service's name.
    pub(crate) fn read(root: &Path) -> Result<Self, Problem> {
        if !root.is_dir() {
            return Err(Problem::input(format!("{}: no such folder; --models names a folder of models", root.display())));
        }
        let manifest = root.join("suite.json");
        let mut suite = if manifest.is_file() {
            folder::read_json::<Self>(&manifest)?
        } else {
            let name = root.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            Self { name, notice: String::new(), models: BTreeMap::new(), targets: BTreeMap::new(), probing_set: None, root: PathBuf::new() }
        };
        suite.root = root.to_owned();
        Ok(suite)
    }

    /// The folder of a model.
    pub(crate) fn model(&self, name: &str) -> PathBuf {
        self.root.join(self.models.get(name).map_or(Path::new(name), PathBuf::as_path))
    }

    /// A network that comes with the suite.
    pub(crate) fn target(&self, name: &str) -> Result<PathBuf, Problem> {
        let path = self.targets.get(name).ok_or_else(|| Problem::input(format!("{}: the suite has no target {name:?}", self.root.display())))?;
        Ok(self.root.join(path))
    }

    /// The pictures that come with the suite.
    pub(crate) fn probing_set(&self) -> Result<PathBuf, Problem> {
        let path = self.probing_set.as_ref().ok_or_else(|| Problem::input(format!("{}: the suite has no probing_set", self.root.display())))?;
        Ok(self.root.join(path))
    }
}

/// The engines of all services, each put in once it has loaded.
#[derive(Clone, Default)]
pub(crate) struct Engines {
    activation: Slot<Activation>,
    captioner: Slot<Captioner>,
    summarizer: Slot<Summarizer>,
    diffusion: Slot<Diffusion>,
    clip: Slot<Clip>,
}

impl Engines {
    /// Loads everything. Blocking.
    pub(crate) fn load(&self, suite: &Suite, args: &MeshArgs, blobs: Arc<Blobs>) -> Result<(), Fault> {
        runtime::library_path()?;
        self.load_activation(args, blobs);
        self.captioner.fill(Captioner::load(&suite.model("captioner"), &args.captioner, &args.engine_of("captioner"))?);
        self.summarizer.fill(Summarizer::open(&suite.model("summarizer"), &args.engine_of("summarizer"), &args.llm)?);
        self.diffusion.fill(Diffusion::load(&suite.model("diffusion"), &args.engine_of("diffusion"))?);
        self.clip.fill(Clip::load(&suite.model("clip"), &args.engine_of("clip"))?);
        Ok(())
    }

    /// Puts in the activation engine, which loads nothing before it is asked.
    pub(crate) fn load_activation(&self, args: &MeshArgs, blobs: Arc<Blobs>) {
        self.activation.fill(Activation::new(args.engine_of("target"), args.activation.clone(), blobs));
    }

    /// Adds the services of all engines.
    pub(crate) fn add_to(&self, services: Services) -> Services {
        let services = dnd_activation::add_to(services, self.activation.clone());
        let services = dnd_captioner::add_to(services, self.captioner.clone());
        let services = dnd_summarizer::add_to(services, self.summarizer.clone());
        let services = dnd_diffusion::add_to(services, self.diffusion.clone());
        dnd_clip::add_to(services, self.clip.clone())
    }
}

/// The mesh of this process, and the network inside it that the orchestrator reaches the models over.
pub(crate) struct LocalMesh {
    pub(crate) engines: Engines,
    pub(crate) blobs: Arc<Blobs>,
    /// All services, the orchestrator's too.
    pub(crate) services: Services,
    _models: InProcess,
}

impl LocalMesh {
    /// Makes it; nothing is loaded yet.
    pub(crate) async fn new(args: &MeshArgs, works_on: WorksOn) -> Result<Self, Problem> {
        args.check_card().await?;
        let data = Data::open(&args.data).await.map_err(|e| Problem::failure(e.to_string()))?;
        let blobs = Arc::clone(&data.blobs);
        let engines = Engines::default();
        let with_models = blobs::add_to(engines.add_to(Services::default()), Arc::clone(&blobs));
        let inner = InProcess::start(with_models.clone());
        let channel = || inner.channel().into();
        let models = Models::over(channel(), channel(), channel(), channel(), channel());
        let services = dnd_orchestrator::add_to(with_models, models, data, &args.orchestrator, works_on);
        Ok(Self { engines, blobs, services, _models: inner })
    }
}

/// Whether jobs or results of models are kept in a folder: what only looks at them must not begin a place for them.
pub(crate) fn kept_in(folder: &Path, data: &DataArgs) -> Result<(), Problem> {
    if data.store.is_some() || Data::is_in(folder) {
        return Ok(());
    }
    let what = if folder.is_dir() { "nothing is kept in it" } else { "no such folder" };
    Err(Problem::input(format!("{}: {what}; --data names the folder that jobs and results are kept in, such as OUT/.dnd", folder.display())))
}

/// What is said where a suite is needed and none is named.
pub(crate) fn no_suite() -> Problem {
    Problem::input(
        "no model suite: name one with --models, or an orchestrator with --endpoint.\n  \
         --models models/sketch   small, comes with the project, trained on drawn pictures only: for trying dnd out on drawn pictures\n  \
         --models DIR             full-size models for real photographs: a BLIP captioner, a causal language model, Stable Diffusion and CLIP as ONNX\n                           \
         in DIR/captioner, DIR/summarizer, DIR/diffusion and DIR/clip (`dnd models check DIR` says what is missing)",
    )
}
