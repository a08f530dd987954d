//! A connection to a mesh, wherever it is.

use dnd_mesh::{MAX_MESSAGE_BYTES, balance::Balanced, channel::Dial, server::InProcess};
use dnd_orchestrator::WorksOn;
use dnd_proto::v1::{
    activation_service_client::ActivationServiceClient, dissect_service_client::DissectServiceClient, picture_service_client::PictureServiceClient,
    upload_service_client::UploadServiceClient,
};

use crate::{
    args::{JobsArgs, MeshArgs},
    local::{LocalMesh, Suite, kept_in, no_suite},
    problem::Problem,
};

/// Clients of an orchestrator.
pub(crate) struct Mesh {
    pub(crate) dissect: DissectServiceClient<Balanced>,
    pub(crate) pictures: PictureServiceClient<Balanced>,
    pub(crate) uploads: UploadServiceClient<Balanced>,
    /// The mesh of this process, if it is that.
    local: Option<Local>,
}

impl Mesh {
    /// Connects to the endpoint, or loads the suite into this process.
    pub(crate) async fn open(args: &MeshArgs) -> Result<Self, Problem> {
        match (&args.endpoint, &args.models) {
            (Some(url), _) => Ok(Self::over(Dial::open(&args.tls, args.token_file.as_deref())?.connect(url).await?, None)),
            (None, Some(models)) => Self::load(Suite::read(models)?, args).await,
            (None, None) => Err(no_suite()),
        }
    }

    /// Connects to the endpoint, or to the jobs of the data folder, without anything that could work on them.
    pub(crate) async fn of_jobs(args: &JobsArgs) -> Result<Self, Problem> {
        let JobsArgs { endpoint, data, token_file, tls } = args;
        if let Some(url) = endpoint {
            return Ok(Self::over(Dial::open(tls, token_file.as_deref())?.connect(url).await?, None));
        }
        match &data.data {
            Some(folder) => kept_in(folder, data)?,
            None if data.store.is_some() => {}
            None => {
                return Err(Problem::input(
                    "neither --endpoint nor --data is given: name an orchestrator, or the folder that jobs are kept in, such as OUT/.dnd",
                ));
            }
        }
        let local = Local::new(&MeshArgs { data: data.clone(), ..MeshArgs::default() }, WorksOn::NoJobs).await?;
        Ok(Self::over(local.server.channel().into(), Some(local)))
    }

    /// Loads a suite into this process.
    pub(crate) async fn load(suite: Suite, args: &MeshArgs) -> Result<Self, Problem> {
        let local = Local::new(args, WorksOn::AskedJobs).await?;
        let (engines, blobs, args) = (local.mesh.engines.clone(), local.mesh.blobs.clone(), args.clone());
        let loading = tokio::task::spawn_blocking(move || engines.load(&suite, &args, blobs));
        loading.await.map_err(|_| Problem::failure("the models' loader panicked"))??;
        let channel = local.server.channel().into();
        Ok(Self::over(channel, Some(local)))
    }

    fn over(channel: Balanced, local: Option<Local>) -> Self {
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

/// The mesh of this process, and the network inside it that it is reached over.
pub(crate) struct Local {
    mesh: LocalMesh,
    server: InProcess,
}

impl Local {
    async fn new(args: &MeshArgs, works_on: WorksOn) -> Result<Self, Problem> {
        let mesh = LocalMesh::new(args, works_on).await?;
        let server = InProcess::start(mesh.services.clone());
        Ok(Self { mesh, server })
    }
}

/// The activation service alone, in this process: enough to look at a network. It lives as long as the second value.
pub(crate) async fn activation_alone(args: &MeshArgs) -> Result<(ActivationServiceClient<Balanced>, Local), Problem> {
    dnd_onnx::runtime::library_path()?;
    let local = Local::new(args, WorksOn::NoJobs).await?;
    local.mesh.engines.load_activation(args, local.mesh.blobs.clone());
    let client = ActivationServiceClient::new(local.server.channel().into()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Ok((client, local))
}
