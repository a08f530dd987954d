//! Clients of the model services.

use std::time::Duration;

use clap::Args;
use dnd_mesh::{
    Fault, MAX_MESSAGE_BYTES,
    balance::{Balanced, Watch},
    channel,
};
use dnd_proto::v1::{
    activation_service_client::ActivationServiceClient, caption_service_client::CaptionServiceClient, diffusion_service_client::DiffusionServiceClient,
    embedding_service_client::EmbeddingServiceClient, summary_service_client::SummaryServiceClient, upload_service_client::UploadServiceClient,
};
use tonic::{Code, Status};

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
    pub fn at(endpoints: &Endpoints) -> Result<Self, Fault> {
        let Endpoints { activation, captioner, summarizer, diffusion, clip, stage_timeout } = endpoints;
        let watch = Watch { silence: Some(Duration::from_secs(*stage_timeout)), ..Watch::default() };
        let at = |endpoint: &str| channel::watched(endpoint, watch);
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

/// A fault of a model service, as the caller of this one should see it: with its own reason, and whose it is.
pub(crate) fn passed_on(service: &str, status: &Status) -> Fault {
    let reason = dnd_mesh::fault::reason_of(status);
    match status.code() {
        // What is wrong with the request is the caller's to see as it is.
        Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound => Fault::relayed(status),
        code => {
            Fault::new(code, "SERVICE_FAILED", format!("the {service} service{}: {}", reason.map(|r| format!(" ({r})")).unwrap_or_default(), status.message()))
        }
    }
}
