//! What raters say, summed up, against statsmodels (`goldens/ratings.py`).

#![allow(clippy::unwrap_used, reason = "it is all tests")]

mod common;

use common::goldens;
use dnd_method::rating::{Response, fared};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    /// Unit, ratings, best.
    responses: Vec<(usize, Vec<u8>, usize)>,
    valid: usize,
    methods: Vec<Method>,
}

#[derive(Deserialize)]
struct Method {
    mean: f64,
    mean_interval: Option<(f64, f64)>,
    best: usize,
    share: f64,
    share_interval: (f64, f64),
}

#[test]
fn means_shares_and_their_intervals_are_the_same() {
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-9, "{found} {expected}");
    let (mut never, mut narrow, mut alone) = (0, 0, 0);
    let cases = goldens::<Case>("ratings.json");
    assert!(cases.len() >= 60);
    for case in cases {
        let responses: Vec<Response> = case.responses.into_iter().map(|(unit, ratings, best)| Response { unit, ratings, best }).collect();
        assert_eq!(responses.iter().filter(|response| response.is_valid()).count(), case.valid);
        let found = fared(&responses, case.methods.len());
        for (found, expected) in found.iter().zip(&case.methods) {
            near(found.mean, expected.mean);
            near(found.share, expected.share);
            assert_eq!((found.best, found.mean_interval.is_some()), (expected.best, expected.mean_interval.is_some()));
            let intervals = [(found.mean_interval, expected.mean_interval), (found.share_interval, Some(expected.share_interval))];
            for ((low, high), (lower, upper)) in intervals.into_iter().filter_map(|(found, expected)| found.zip(expected)) {
                near(low, lower);
                near(high, upper);
            }
            never += usize::from(found.best == 0);
            alone += usize::from(found.mean_interval.is_none());
            narrow += usize::from(found.mean_interval.is_some_and(|(low, high)| low > 1.0 && high < 5.0));
        }
    }
    // The cases are there that the rules are about.
    assert!(never >= 5 && alone >= 3 && narrow >= 80, "{never} {alone} {narrow}");
}
