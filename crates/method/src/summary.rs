//! `g`: an activation map as one number (3.2).

use crate::parameters::Summary;

/// `g(A_k(x))`, given the values of the activation map in any layout. Of a unit without space it is the single value.
///
/// The mean is summed in `f64`, in order, and rounded to `f32` once. A map with a value that is NaN or infinite, or without values,
/// gives NaN: it says nothing about the image, and the image is never picked (see [`crate::top`]).
pub fn summarize(map: &[f32], summary: Summary) -> f32 {
    if map.is_empty() || map.iter().any(|value| !value.is_finite()) {
        return f32::NAN;
    }
    match summary {
        Summary::Mean => (map.iter().map(|&value| f64::from(value)).sum::<f64>() / map.len() as f64) as f32,
        Summary::Max => map.iter().copied().fold(f32::NEG_INFINITY, f32::max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_maximum() {
        let map = [1.0, -2.0, 4.5, 0.5];
        assert_eq!(summarize(&map, Summary::Mean), 1.0);
        assert_eq!(summarize(&map, Summary::Max), 4.5);
        assert_eq!(summarize(&[-3.0, -1.0], Summary::Max), -1.0);
    }

    #[test]
    fn the_mean_neither_overflows_nor_drifts() {
        assert_eq!(summarize(&[f32::MAX; 9], Summary::Mean), f32::MAX);
        assert_eq!(summarize(&vec![0.1; 1 << 20], Summary::Mean), 0.1);
    }

    #[test]
    fn values_that_are_not_finite_spoil_the_map() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for summary in [Summary::Mean, Summary::Max] {
                assert!(summarize(&[1.0, value, 2.0], summary).is_nan());
            }
        }
        assert!(summarize(&[], Summary::Max).is_nan());
    }
}
