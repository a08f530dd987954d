//! Trying again: calls of models are pure, so nothing that is tried again is done twice.

use std::{sync::LazyLock, time::Duration};

use tokio::time::sleep;
use tonic::{Code, Status};
use tower::retry::budget::{Budget as _, TpsBudget};
use tracing::warn;

use crate::fault;

/// How often a call whose service is away is tried again without anything having come of it, and how long after the first time; twice as long after each
/// further one, up to a bound. Together about a minute: long enough for a service that was restarted to load its model.
const RETRIES: u32 = 12;
const AFTER: Duration = Duration::from_millis(250);
const AT_LAST_AFTER: Duration = Duration::from_secs(8);
/// No wait that a service asks for is longer.
const LONGEST: Duration = Duration::from_secs(60);

/// What this process may try again: 10 calls a second, and one for every five that were answered. Where more want to, they wait another turn: services that come
/// back are not met by all that waited for them at once.
static BUDGET: LazyLock<TpsBudget> = LazyLock::new(|| TpsBudget::new(Duration::from_secs(10), 10, 0.2));

/// A call was answered.
pub(crate) fn answered() {
    BUDGET.deposit();
}

/// How long a call waits for a service that is away.
#[derive(Debug)]
pub struct Patience {
    tries: u32,
    after: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self::of(RETRIES)
    }
}

impl Patience {
    /// Of so many tries.
    pub fn of(tries: u32) -> Self {
        Self { tries, after: AFTER }
    }

    /// Waits if the failed call is worth another try, and gives whether it is.
    pub async fn wait_after(&mut self, status: &Status) -> bool {
        while let Some(delay) = self.delay(status) {
            warn!(%status, "a model service is away; trying again in {delay:?}");
            sleep(delay).await;
            if BUDGET.withdraw() {
                return true;
            }
        }
        false
    }

    /// How long to wait before the next try; nothing if there is to be none. No two callers wait equally long, so that they do not come back as one.
    fn delay(&mut self, status: &Status) -> Option<Duration> {
        if !is_away(status) {
            return None;
        }
        let jitter = fastrand::f64();
        if let (Code::ResourceExhausted, Some(asked)) = (status.code(), fault::retry_after(status)) {
            // A service that says when to come again is there, and gets to everyone: that is no reason to give up.
            return Some(asked.min(LONGEST).mul_f64(1.0 + jitter / 2.0));
        }
        self.tries = self.tries.checked_sub(1)?;
        let delay = self.after.mul_f64(0.75 + jitter / 2.0).max(fault::retry_after(status).unwrap_or_default().min(LONGEST));
        self.after = (2 * self.after).min(AT_LAST_AFTER);
        Some(delay)
    }
}

/// Whether a status says that the service was not there, or not to the end. A broken connection has many codes, and never a reason of ours.
pub fn is_away(status: &Status) -> bool {
    let broken = matches!(status.code(), Code::Unknown | Code::Cancelled | Code::Internal) && fault::reason_of(status).is_none();
    broken || matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fault;

    #[test]
    fn what_is_the_requests_fault_is_never_tried_again_and_what_is_away_not_for_ever() {
        for code in [Code::InvalidArgument, Code::FailedPrecondition, Code::NotFound, Code::DeadlineExceeded, Code::Unauthenticated] {
            assert_eq!(Patience::default().delay(&Status::new(code, "no")), None, "{code:?}");
        }
        assert_eq!(Patience::default().delay(&Fault::internal("a defect").into()), None);
        let mut patience = Patience::default();
        let delays: Vec<Duration> = std::iter::from_fn(|| patience.delay(&Status::unavailable("away"))).collect();
        assert_eq!(delays.len(), 12);
        let total: Duration = delays.iter().sum();
        assert!((40..90).contains(&total.as_secs()), "{total:?}");
        assert!(delays[0] < Duration::from_millis(320) && delays[11] > Duration::from_secs(5), "{delays:?}");
    }

    #[test]
    fn a_full_service_is_asked_again_when_it_says_so_and_not_by_all_at_once() {
        let full: Status = Fault::new(Code::ResourceExhausted, "QUEUE_FULL", "full").retry_after(Duration::from_secs(2)).into();
        let mut patience = Patience::default();
        let delays: Vec<Duration> = (0..50).map(|_| patience.delay(&full).unwrap()).collect();
        assert!(delays.iter().all(|delay| (2.0..=3.0).contains(&delay.as_secs_f64())), "{delays:?}");
        assert!(delays.iter().any(|delay| *delay != delays[0]));
    }
}
