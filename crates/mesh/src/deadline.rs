//! Deadlines: a call's `grpc-timeout` holds for its whole stream, and goes on to the calls that are made for it, less what was spent.

use std::{future::Future, time::Duration};

use http::HeaderValue;
use tokio::{task::futures::TaskLocalFuture, time::Instant};

/// The header of a call that says how long its caller waits.
pub(crate) const HEADER: &str = "grpc-timeout";
/// The most digits that the header takes.
const MOST: u128 = 99_999_999;

tokio::task_local! {
    static DEADLINE: Option<Instant>;
}

/// When what is being done now has to be done.
pub fn current() -> Option<Instant> {
    DEADLINE.try_with(|deadline| *deadline).ok().flatten()
}

/// Work whose calls have to be answered within `limit`, or before the deadline that holds already.
pub fn within<F: Future>(limit: Duration, work: F) -> TaskLocalFuture<Option<Instant>, F> {
    let limit = Instant::now().checked_add(limit);
    DEADLINE.scope(current().into_iter().chain(limit).min(), work)
}

/// The header for a call that has so long.
pub(crate) fn header(left: Duration) -> HeaderValue {
    let text = match left.as_millis() {
        millis @ ..=MOST => format!("{millis}m"),
        _ => format!("{}S", u128::from(left.as_secs()).min(MOST)),
    };
    // Digits and a letter are a header's value.
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("0m"))
}

#[cfg(test)]
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_read_in_all_its_units_and_written_so_that_it_is_read_as_the_same() {
        for (text, millis) in [("2H", 7_200_000), ("3M", 180_000), ("4S", 4000), ("5m", 5), ("6000u", 6), ("7000000n", 7)] {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "S", "1", "-1S", "1.5S", "123456789S", "1s", "é"] {
            assert_eq!(parse(text), None, "{text}");
        }
        for left in [Duration::from_millis(1), Duration::from_secs(99_999), Duration::from_secs(10_000_000)] {
            assert_eq!(parse(header(left).to_str().unwrap()), Some(left));
        }
    }

    #[tokio::test]
    async fn the_earliest_deadline_holds() {
        assert_eq!(current(), None);
        let (outer, inner) =
            within(Duration::from_secs(5), async { (current().unwrap(), within(Duration::from_secs(60), async { current().unwrap() }).await) }).await;
        assert_eq!(outer, inner);
        let sooner = within(Duration::from_secs(60), within(Duration::from_secs(5), async { current().unwrap() })).await;
        assert!(sooner < Instant::now() + Duration::from_secs(6));
    }
}
