//! What people think of labels (4.3, A.1.5): they see the pictures of a unit and the labels that several methods gave it, without the methods' names, rate each
//! label and say which is best.
//!
//! The paper gives means and shares; the intervals, of 95 %, are added here. Raters of one unit look at the same pictures and labels, so their responses are
//! alike, and it is units that are drawn at random: both intervals allow for that.

use std::collections::BTreeMap;

use statrs::distribution::{ContinuousCDF as _, StudentsT};

use crate::draw::{Key, number};

/// Pictures of `D_probe` that raters see.
pub const PICTURES: usize = 10;
/// The highest rating, "strongly agree"; the lowest is 1, "strongly disagree".
pub const HIGHEST: u8 = 5;

/// 97.5 % of a standard normal distribution lie below.
const Z: f64 = 1.959_963_984_540_054;

/// What a rater said of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Which of the units.
    pub unit: usize,
    /// The rating of each method's label, 1 to 5.
    pub ratings: Vec<u8>,
    /// The method whose label describes the pictures best.
    pub best: usize,
}

impl Response {
    /// Whether it counts: the label that was chosen as best is one of those that were rated highest.
    pub fn is_valid(&self) -> bool {
        self.ratings.get(self.best).is_some_and(|chosen| self.ratings.iter().all(|rating| rating <= chosen))
    }
}

/// How a method fared over valid responses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fared {
    /// Mean rating; NaN without a response.
    pub mean: f64,
    /// The mean's interval, by Student's t over units; none for fewer than two units.
    pub mean_interval: Option<(f64, f64)>,
    /// Responses that say it is best.
    pub best: usize,
    /// Their share of all; NaN without a response.
    pub share: f64,
    /// The share's interval, Wilson's; none without a response.
    pub share_interval: Option<(f64, f64)>,
}

/// How each of the methods fared; responses that are not valid are left out.
pub fn fared(responses: &[Response], methods: usize) -> Vec<Fared> {
    let valid: Vec<&Response> = responses.iter().filter(|response| response.is_valid()).collect();
    let fared = |method: usize| {
        let ratings = Clustered::of(valid.iter().map(|response| (response.unit, response.ratings.get(method).copied().map_or(f64::NAN, f64::from))));
        let chosen = Clustered::of(valid.iter().map(|response| (response.unit, f64::from(u8::from(response.best == method)))));
        Fared {
            mean: ratings.mean,
            mean_interval: ratings.t_interval().map(|(low, high)| (low.max(1.0), high.min(f64::from(HIGHEST)))),
            best: valid.iter().filter(|response| response.best == method).count(),
            share: chosen.mean,
            share_interval: chosen.wilson_interval(),
        }
    };
    (0..methods).map(fared).collect()
}

/// Values of which some belong together.
struct Clustered {
    values: f64,
    clusters: f64,
    mean: f64,
    /// Variance of the mean over clusters, with `G / (G - 1)` for few of them: that of a regression on a constant with clustered errors.
    variance: f64,
}

impl Clustered {
    fn of(values: impl Iterator<Item = (usize, f64)>) -> Self {
        let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for (cluster, value) in values {
            let (count, sum) = sums.entry(cluster).or_default();
            *count += 1.0;
            *sum += value;
        }
        let (count, sum) = sums.values().fold((0.0, 0.0), |(counts, all), (count, sum)| (counts + count, all + sum));
        let (clusters, mean) = (sums.len() as f64, sum / count);
        let squares: f64 = sums.values().map(|(count, sum)| (sum - mean * count).powi(2)).sum();
        Self { values: count, clusters, mean, variance: clusters / (clusters - 1.0) * squares / count.powi(2) }
    }

    fn t_interval(&self) -> Option<(f64, f64)> {
        // It is refused for fewer than two clusters.
        let t = StudentsT::new(0.0, 1.0, self.clusters - 1.0).ok()?.inverse_cdf(0.975);
        let half = t * self.variance.sqrt();
        Some((self.mean - half, self.mean + half))
    }

    /// Of a share, with as many values as would tell as much if none belonged together: as many as there are clusters where the values themselves don't say.
    fn wilson_interval(&self) -> Option<(f64, f64)> {
        let p = self.mean;
        let spread = p * (1.0 - p);
        let n = if spread > 0.0 && self.clusters > 1.0 { (spread / self.variance).min(self.values) } else { self.clusters };
        let squared = Z * Z / n;
        let (middle, half) = ((p + squared / 2.0) / (1.0 + squared), (spread / n * Z * Z + squared * squared / 4.0).sqrt() / (1.0 + squared));
        (n > 0.0).then(|| ((middle - half).max(0.0), (middle + half).min(1.0)))
    }
}

/// Units of a layer that raters see: `most` of them, drawn at random, in their own order.
///
/// Key ("rated", seed, layer): the first `most` of the shuffled units.
pub fn drawn_units(units: &[u32], most: usize, seed: u64, layer: &str) -> Vec<u32> {
    let mut drawn = units.to_vec();
    Key::new(&[b"rated", &number(seed), layer.as_bytes()]).shuffle(&mut drawn);
    drawn.truncate(most);
    drawn.sort_unstable();
    drawn
}

/// The order in which a rater sees the labels of a unit: at each place the method whose label stands there. It tells nothing of the methods.
///
/// Key ("labels", study, rater, layer, unit).
pub fn order_of_labels(methods: usize, study: &str, rater: &str, layer: &str, unit: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..methods).collect();
    Key::new(&[b"labels", study.as_bytes(), rater.as_bytes(), layer.as_bytes(), &number(unit)]).shuffle(&mut order);
    order
}

/// The order in which a rater sees units, each by its place.
///
/// Key ("units", study, rater).
pub fn order_of_units(units: usize, study: &str, rater: &str) -> Vec<usize> {
    let mut order: Vec<usize> = (0..units).collect();
    Key::new(&[b"units", study.as_bytes(), rater.as_bytes()]).shuffle(&mut order);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(unit: usize, ratings: &[u8], best: usize) -> Response {
        Response { unit, ratings: ratings.to_vec(), best }
    }

    #[test]
    fn a_response_counts_if_its_best_label_is_one_of_the_highest_rated() {
        assert!(response(0, &[3, 5, 2], 1).is_valid());
        assert!(response(0, &[5, 5, 2], 0).is_valid() && response(0, &[5, 5, 2], 1).is_valid(), "one of the highest will do");
        assert!(!response(0, &[5, 4, 2], 1).is_valid());
        assert!(!response(0, &[5, 5, 2], 3).is_valid());
    }

    #[test]
    fn what_does_not_count_changes_nothing() {
        let valid = vec![response(0, &[5, 2], 0), response(0, &[4, 4], 1), response(1, &[3, 1], 0)];
        let more = [valid.clone(), vec![response(1, &[1, 5], 0), response(2, &[5, 1], 1)]].concat();
        assert_eq!(fared(&more, 2), fared(&valid, 2));
        assert_eq!((fared(&valid, 2)[0].mean, fared(&valid, 2)[1].best), (4.0, 1));
    }

    #[test]
    fn without_enough_responses_there_is_no_interval() {
        let [none] = fared(&[], 1)[..] else { panic!() };
        assert!(none.mean.is_nan() && none.share.is_nan() && none.mean_interval.is_none() && none.share_interval.is_none());
        let [one] = fared(&[response(4, &[5], 0), response(4, &[1], 0)], 1)[..] else { panic!() };
        assert_eq!((one.mean, one.mean_interval, one.share), (3.0, None, 1.0));
        let (low, high) = one.share_interval.unwrap();
        assert!(low < 0.25 && high == 1.0, "one unit says little, however many look at it: {low}");
    }

    #[test]
    fn raters_see_units_and_labels_in_orders_of_their_own_and_always_the_same() {
        let orders: Vec<Vec<usize>> = (0..40).map(|rater| order_of_labels(4, "study", &format!("rater {rater}"), "layer", 3)).collect();
        assert!((0..4).all(|method| (0..4).all(|place| orders.iter().any(|order| order[place] == method))), "each method stands at each place");
        assert_eq!(order_of_labels(4, "study", "rater 7", "layer", 3), orders[7]);
        assert!((0..8).any(|unit| order_of_labels(4, "study", "rater 7", "layer", unit) != orders[7]));
        let mut units = order_of_units(50, "study", "a");
        assert_ne!(units, order_of_units(50, "study", "b"));
        units.sort_unstable();
        assert_eq!(units, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn units_are_drawn_by_seed_and_layer_each_once() {
        let all: Vec<u32> = (10..90).collect();
        let drawn = drawn_units(&all, 20, 0, "layer4");
        assert!(drawn.len() == 20 && drawn.is_sorted_by(|a, b| a < b) && drawn.iter().all(|unit| all.contains(unit)));
        assert!(drawn != drawn_units(&all, 20, 1, "layer4") && drawn != drawn_units(&all, 20, 0, "layer3"));
        assert_eq!(drawn_units(&all, 100, 0, "layer4"), all);
    }
}
