//! Why a unit, or a part of it, failed, and what follows from that: it is left out, tried again, or holds up the whole job.

use dnd_mesh::{Fault, fault, retry::is_away};
use tonic::{Code, Status};

use crate::{models::passed_on, store::Pause};

/// Reasons of the summarizer's that every further question would be answered with, too: the job waits for whoever can change that.
const PAUSES_THE_JOB: [&str; 4] = ["LLM_BUDGET", "LLM_KEY", "LLM_NOT_FOUND", "LLM_QUOTA"];

/// Why a unit, or a part of it, failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A stable word.
    pub(crate) reason: String,
    /// A sentence.
    pub(crate) message: String,
    /// Whether the item itself is at fault (a picture that can't be read, a text that is too long) and would be again. Such an item is left out and said;
    /// any other failure is the service's, and a result without the item would be another than the method's: it fails the unit.
    pub(crate) is_the_items: bool,
    /// Whether it may be another time.
    pub(crate) retry: bool,
    /// What the whole job waits for, if this is a failure that every unit would meet: the unit has no result then.
    pub(crate) pauses: Option<Box<Pause>>,
}

impl Failure {
    pub(crate) fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into(), is_the_items: false, retry: false, pauses: None }
    }

    /// It may be another time.
    pub(crate) fn worth_another_try(self) -> Self {
        Self { retry: true, ..self }
    }

    /// Of a whole call of a service. One that is away holds up the whole job.
    pub(crate) fn of(service: &str, status: &Status) -> Self {
        let Self { reason, message, .. } = Self::status(status);
        let away = is_away(status).then(|| Box::new(Pause { fault: passed_on(service, status), by_itself: true }));
        Self { pauses: away, ..Self::new(&reason, format!("the {service} service: {message}")).worth_another_try() }
    }

    /// Of what is kept here.
    pub(crate) fn storage(message: impl Into<String>) -> Self {
        let message = message.into();
        let pause = Pause { fault: Fault::new(Code::Internal, "STORAGE", message.clone()), by_itself: true };
        Self { pauses: Some(Box::new(pause)), ..Self::new("storage", message) }
    }

    fn status(status: &Status) -> Self {
        let reason = fault::reason_of(status).unwrap_or_else(|| format!("{:?}", status.code()));
        Self::new(&reason.to_lowercase(), status.message())
    }

    /// Of one item of a stream.
    pub(crate) fn item(status: &tonic_types::Status) -> Self {
        let status = fault::item_status(status);
        let pauses = fault::reason_of(&status).filter(|reason| PAUSES_THE_JOB.contains(&reason.as_str()));
        let pauses = pauses.map(|_| Box::new(Pause { fault: Fault::relayed(&status), by_itself: false }));
        // The codes that say that asking again would be answered alike. What the network can't do is no fault of the picture that it was doing it on.
        let is_the_networks = fault::reason_of(&status).is_some_and(|reason| reason.starts_with("TARGET_"));
        let for_good = matches!(status.code(), Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition | Code::OutOfRange | Code::DataLoss);
        let is_the_items = for_good && !is_the_networks;
        Self { is_the_items: is_the_items && pauses.is_none(), retry: !is_the_items, pauses, ..Self::status(&status) }
    }

    /// Of an answer that holds nothing.
    pub(crate) fn empty() -> Self {
        Self::new("internal", "a model service did not answer this item").worth_another_try()
    }
}
