//! Clients of the model services.

use std::{path::PathBuf, str::FromStr, time::Duration};

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
    /// says nothing meanwhile. `captioner=60` is for that service alone
    #[arg(long, env = "DND_STAGE_TIMEOUT", value_name = "[SERVICE=]SECONDS", value_delimiter = ',', default_value = "3600")]
    pub stage_timeout: Vec<StageTimeout>,
    /// File with the token that calls of them show
    #[arg(long, env = "DND_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// How long a model service may say nothing: the one that is named, or all that no other is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageTimeout {
    service: Option<&'static str>,
    silence: Duration,
}

const STAGE_TIMEOUT: Duration = Duration::from_secs(3600);

impl StageTimeout {
    /// The one of a service, out of all that were said.
    fn of(said: &[Self], service: &str) -> Duration {
        let said_of = |of: Option<&str>| said.iter().rev().find(|timeout| timeout.service == of);
        said_of(Some(service)).or_else(|| said_of(None)).map_or(STAGE_TIMEOUT, |timeout| timeout.silence)
    }
}

impl FromStr for StageTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (service, seconds) = text.split_once('=').map_or((None, text), |(service, seconds)| (Some(service), seconds));
        let known = |name: &str| SERVICES.into_iter().find(|service| *service == name).ok_or_else(|| format!("no service {name:?}: {}", SERVICES.join(", ")));
        let seconds = seconds.parse().ok().filter(|seconds| *seconds > 0).ok_or_else(|| format!("{seconds:?} is no number of seconds, 1 or more"))?;
        Ok(Self { service: service.map(known).transpose()?, silence: Duration::from_secs(seconds) })
    }
}

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
        let at = |service, endpoint: &str| {
            let silence = Some(StageTimeout::of(stage_timeout, service));
            dial.watched(endpoint, Watch { silence, ..Watch::default() })
        };
        Ok(Self::over(
            at("activation", activation)?,
            at("captioner", captioner)?,
            at("summarizer", summarizer)?,
            at("diffusion", diffusion)?,
            at("clip", clip)?,
        ))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_the_limit_that_is_said_of_it_before_the_one_of_all() {
        let said = |text: &str| text.split(',').map(str::parse).collect::<Result<Vec<StageTimeout>, _>>();
        let seconds = |text: &str| SERVICES.map(|service| StageTimeout::of(&said(text).unwrap(), service).as_secs());
        assert_eq!(seconds("60"), [60; 5]);
        assert_eq!(seconds("diffusion=7200"), [3600, 3600, 3600, 7200, 3600]);
        assert_eq!(seconds("captioner=5,60,captioner=7"), [60, 7, 60, 60, 60]);
        for wrong in ["0", "", "captioner=", "captions=5", "1h", "clip=-1"] {
            assert!(said(wrong).is_err(), "{wrong}");
        }
    }
}
