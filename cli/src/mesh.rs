//! A connection to a mesh, wherever it is.

use dnd_mesh::{MAX_MESSAGE_BYTES, channel};
use dnd_proto::v1::{
    activation_service_client::ActivationServiceClient, dissect_service_client::DissectServiceClient, picture_service_client::PictureServiceClient,
    upload_service_client::UploadServiceClient,
};
use tonic::transport::Channel;

use crate::{
    args::MeshArgs,
    local::{LocalMesh, Suite, no_suite},
    problem::Problem,
};

/// Clients of an orchestrator.
pub(crate) struct Mesh {
    pub(crate) dissect: DissectServiceClient<Channel>,
    pub(crate) pictures: PictureServiceClient<Channel>,
    pub(crate) uploads: UploadServiceClient<Channel>,
    /// The mesh of this process, if it is that.
    local: Option<LocalMesh>,
}

impl Mesh {
    /// Connects to the endpoint, or loads the suite into this process.
    pub(crate) async fn open(args: &MeshArgs) -> Result<Self, Problem> {
        match (&args.endpoint, &args.models) {
            (Some(url), _) => Ok(Self::over(channel::connect(url).await?, None)),
            (None, Some(models)) => Self::load(Suite::read(models)?, args).await,
            (None, None) => Err(no_suite()),
        }
    }

    /// Loads a suite into this process.
    pub(crate) async fn load(suite: Suite, args: &MeshArgs) -> Result<Self, Problem> {
        let mut local = LocalMesh::new(args)?;
        let (engines, blobs, args) = (local.engines.clone(), local.blobs.clone(), args.clone());
        let loading = tokio::task::spawn_blocking(move || engines.load(&suite, &args, blobs));
        loading.await.map_err(|_| Problem::failure("the models' loader panicked"))??;
        let channel = local.serve().channel();
        Ok(Self::over(channel, Some(local)))
    }

    fn over(channel: Channel, local: Option<LocalMesh>) -> Self {
        Self {
            dissect: DissectServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES),
            pictures: PictureServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            uploads: UploadServiceClient::new(channel),
            local,
        }
    }

    /// Whether the mesh can read this machine's files.
    pub(crate) fn is_local(&self) -> bool {
        self.local.is_some()
    }
}

/// The activation service alone, in this process: enough to look at a network.
pub(crate) async fn activation_alone(args: &MeshArgs) -> Result<(ActivationServiceClient<Channel>, LocalMesh), Problem> {
    let mut local = LocalMesh::new(args)?;
    dnd_onnx::runtime::library_path()?;
    local.engines.load_activation(args, local.blobs.clone());
    let client = ActivationServiceClient::new(local.serve().channel()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Ok((client, local))
}
