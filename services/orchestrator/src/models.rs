//! Clients of the model services.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use dnd_mesh::{
    Fault, MAX_MESSAGE_BYTES,
    balance::{Balanced, Watch},
    channel::Dial,
    retry::is_away,
};
use dnd_proto::v1::{
    ActivationServiceGetModelRequest, CaptionServiceGetModelRequest, DiffusionServiceGetModelRequest, EmbeddingServiceGetModelRequest, Model,
    SummaryServiceGetModelRequest, activation_service_client::ActivationServiceClient, caption_service_client::CaptionServiceClient,
    diffusion_service_client::DiffusionServiceClient, embedding_service_client::EmbeddingServiceClient, summary_service_client::SummaryServiceClient,
    upload_service_client::UploadServiceClient,
};
use tonic::{Code, Status};

use crate::calls::{TRIES, once_loaded};

/// Where the model services are. Each is a name, of which all addresses are used, or several with commas between them.
#[derive(Debug, Clone, Args)]
pub struct Endpoints {
    /// The activation service, such as http://localhost:50052; of this and the others, all addresses that the name has are used, and there may be several names, with commas between them
    #[arg(long, env = "DND_ACTIVATION")]
    pub activation: String,
    /// The captioner
    #[arg(long, env = "DND_CAPTIONER")]
    pub captioner: String,
    /// The language model
    #[arg(long, env = "DND_SUMMARIZER")]
    pub summarizer: String,
    /// The diffusion model
    #[arg(long, env = "DND_DIFFUSION")]
    pub diffusion: String,
    /// CLIP
    #[arg(long, env = "DND_CLIP")]
    pub clip: String,
    /// Seconds that a model service may say nothing of a call, of up to 64 items, before the call and what it was for fail; one that works through a large batch
    /// says nothing meanwhile
    #[arg(long, env = "DND_STAGE_TIMEOUT", value_name = "SECONDS", default_value_t = STAGE_TIMEOUT, value_parser = clap::value_parser!(u64).range(1..))]
    pub stage_timeout: u64,
    /// File with the token that calls of them show
    #[arg(long, env = "DND_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

const STAGE_TIMEOUT: u64 = 3600;

/// A client of each model service.
#[derive(Debug, Clone)]
pub struct Models {
    pub(crate) activation: ActivationServiceClient<Balanced>,
    pub(crate) uploads: UploadServiceClient<Balanced>,
    pub(crate) captioner: CaptionServiceClient<Balanced>,
    pub(crate) summarizer: SummaryServiceClient<Balanced>,
    pub(crate) diffusion: DiffusionServiceClient<Balanced>,
    pub(crate) clip: EmbeddingServiceClient<Balanced>,
}

macro_rules! client {
    ($kind:ident, $channel:expr) => {
        $kind::new($channel).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
    };
}

impl Models {
    /// Clients that connect with their first call: the services may start later, and come back.
    pub fn at(endpoints: &Endpoints, dial: &Dial) -> Result<Self, Fault> {
        let Endpoints { activation, captioner, summarizer, diffusion, clip, stage_timeout, .. } = endpoints;
        let watch = Watch { silence: Some(Duration::from_secs(*stage_timeout)), ..Watch::default() };
        let at = |endpoint: &str| dial.watched(endpoint, watch);
        Ok(Self::over(at(activation)?, at(captioner)?, at(summarizer)?, at(diffusion)?, at(clip)?))
    }

    /// Clients over channels.
    pub fn over(activation: Balanced, captioner: Balanced, summarizer: Balanced, diffusion: Balanced, clip: Balanced) -> Self {
        Self {
            uploads: client!(UploadServiceClient, activation.clone()),
            activation: client!(ActivationServiceClient, activation),
            captioner: client!(CaptionServiceClient, captioner),
            summarizer: client!(SummaryServiceClient, summarizer),
            diffusion: client!(DiffusionServiceClient, diffusion),
            clip: client!(EmbeddingServiceClient, clip),
        }
    }
}

/// The model services, in the order of [`Models::models`].
pub(crate) const SERVICES: [&str; 5] = ["activation", "captioner", "summarizer", "diffusion", "clip"];

macro_rules! model_of {
    ($models:ident, $tries:expr, $service:ident, $request:ident) => {
        async {
            let model = once_loaded($tries, || {
                let mut client = $models.$service.clone();
                async move { client.get_model($request {}).await }
            });
            model.await.map(|model| model.into_inner().model).map_err(|status| passed_on(stringify!($service), &status))
        }
    };
}

impl Models {
    /// CLIP's model.
    pub(crate) async fn clip_model(&self) -> Result<Option<Model>, Fault> {
        model_of!(self, TRIES, clip, EmbeddingServiceGetModelRequest).await
    }

    /// The model of each service. One that is still loading its model is asked again so often; one that is not there is told at once.
    pub(crate) async fn models(&self, tries: u32) -> Result<[Option<Model>; 5], Fault> {
        let (activation, captioner, summarizer, diffusion, clip) = tokio::try_join!(
            model_of!(self, tries, activation, ActivationServiceGetModelRequest),
            model_of!(self, tries, captioner, CaptionServiceGetModelRequest),
            model_of!(self, tries, summarizer, SummaryServiceGetModelRequest),
            model_of!(self, tries, diffusion, DiffusionServiceGetModelRequest),
            model_of!(self, tries, clip, EmbeddingServiceGetModelRequest),
        )?;
        Ok([activation, captioner, summarizer, diffusion, clip])
    }
}

/// The reason of a fault of a service that is not there.
pub(crate) const SERVICE_AWAY: &str = "SERVICE_AWAY";

/// A fault of a model service, as the caller of this one should see it: with its own reason, and whose it is.
pub(crate) fn passed_on(service: &str, status: &Status) -> Fault {
    let reason = dnd_mesh::fault::reason_of(status);
    match status.code() {
        // What is wrong with the request is the caller's to see as it is.
        Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound => Fault::relayed(status),
        _ if is_away(status) => Fault::new(Code::Unavailable, SERVICE_AWAY, format!("the {service} service: {}", status.message())),
        code => {
            Fault::new(code, "SERVICE_FAILED", format!("the {service} service{}: {}", reason.map(|r| format!(" ({r})")).unwrap_or_default(), status.message()))
        }
    }
}
