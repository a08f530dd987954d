use std::path::PathBuf;

use dnd_mesh::Fault;
use tonic::Code;

/// What can be wrong with a model, a network's file, or a picture.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// ONNX Runtime can't be found or is too old.
    #[error("ONNX Runtime: {0}")]
    Library(String),
    /// An execution provider can't be used.
    #[error("execution provider {provider}: {problem}")]
    Provider {
        /// Its name, as the flag has it.
        provider: &'static str,
        /// What is missing.
        problem: String,
    },
    /// A file of a model can't be right.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// The file is no ONNX file, or one that can't be used.
    #[error("{0}")]
    Graph(String),
    /// No layer has that name.
    #[error("no layer {layer:?} in the network{}", nearest_text(nearest))]
    UnknownLayer {
        /// The name asked for.
        layer: String,
        /// The most alike names.
        nearest: Vec<String>,
    },
    /// Several layers end in that name.
    #[error("{layer:?} could be any of {}; say more of the name", candidates.join(", "))]
    AmbiguousLayer {
        /// The name asked for.
        layer: String,
        /// What it could be.
        candidates: Vec<String>,
    },
    /// The layer has fewer units.
    #[error("unit {unit} of layer {layer:?} is out of range: it has units 0 to {}", units.saturating_sub(1))]
    UnitOutOfRange {
        /// The layer.
        layer: String,
        /// The unit asked for.
        unit: u32,
        /// How many it has.
        units: u32,
    },
    /// A picture can't be used.
    #[error("{0}")]
    Picture(String),
    /// The model failed on its input.
    #[error("the model failed: {0}")]
    Run(String),
    /// It was not run to its end.
    #[error(transparent)]
    Stopped(#[from] Fault),
}

fn nearest_text(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!("; the nearest are {}", nearest.join(", ")) }
}

impl Error {
    /// A problem with a file of a model.
    pub fn file(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::File { path: path.into(), problem: problem.into() }
    }

    fn code_and_reason(&self) -> (Code, &'static str) {
        match self {
            Self::Library(_) => (Code::Internal, "RUNTIME_LIBRARY"),
            Self::Provider { .. } => (Code::Internal, "EXECUTION_PROVIDER"),
            Self::File { .. } => (Code::FailedPrecondition, "MODEL_FILE"),
            Self::Graph(_) => (Code::InvalidArgument, "UNUSABLE_NETWORK"),
            Self::UnknownLayer { .. } => (Code::InvalidArgument, "UNKNOWN_LAYER"),
            Self::AmbiguousLayer { .. } => (Code::InvalidArgument, "AMBIGUOUS_LAYER"),
            Self::UnitOutOfRange { .. } => (Code::InvalidArgument, "UNIT_OUT_OF_RANGE"),
            Self::Picture(_) => (Code::InvalidArgument, "UNUSABLE_PICTURE"),
            Self::Run(_) => (Code::Internal, "MODEL_FAILED"),
            Self::Stopped(_) => (Code::Unavailable, "SHUTTING_DOWN"),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        if let Error::Stopped(fault) = error {
            return fault;
        }
        let (code, reason) = error.code_and_reason();
        Fault::new(code, reason, error.to_string())
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        Fault::from(error).into()
    }
}

impl From<ort::Error> for Error {
    fn from(error: ort::Error) -> Self {
        Self::Run(error.to_string())
    }
}
