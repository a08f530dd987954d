//! Several labels for one unit (A.5).

use crate::{
    embedding::{DimensionError, Embedding, mean_cosine},
    parameters::Parameters,
};

/// Which of the ranked concepts become labels, given CLIP's text embeddings of them, best first: of the best `labels` those that say
/// something new, that is, whose cosine similarity with every better label is at most `label_similarity`. The best concept always is one.
///
/// Similarities are rounded to `f32` before they are compared. (The authors remove from a list while they walk it, so that two of three
/// alike may stay.)
pub fn distinct_labels(ranked: &[Embedding], parameters: &Parameters) -> Result<Vec<usize>, DimensionError> {
    let mut kept: Vec<usize> = Vec::new();
    'next: for (place, embedding) in ranked.iter().enumerate().take(parameters.labels as usize) {
        for &better in &kept {
            let similarity = mean_cosine(&[embedding], &[&ranked[better]])? as f32;
            if similarity > parameters.label_similarity {
                continue 'next;
            }
        }
        kept.push(place);
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Embeddings at these angles, in degrees; cos 35° = 0.819, cos 36° = 0.809.
    fn labels(angles: &[f32], parameters: &Parameters) -> Vec<usize> {
        let at = |angle: &f32| Embedding::new(&[angle.to_radians().cos(), angle.to_radians().sin()]).unwrap();
        distinct_labels(&angles.iter().map(at).collect::<Vec<_>>(), parameters).unwrap()
    }

    #[test]
    fn concepts_that_say_the_same_as_a_better_label_are_dropped() {
        let parameters = Parameters::default();
        assert_eq!(labels(&[0.0, 35.0, 36.0], &parameters), [0, 2]);
        assert_eq!(labels(&[0.0, 5.0, 10.0], &parameters), [0], "all three are alike");
        assert_eq!(labels(&[0.0, 30.0, 60.0], &parameters), [0, 2], "only labels count, not what was dropped");
        assert_eq!(labels(&[0.0, 90.0, 180.0, 270.0], &parameters), [0, 1, 2], "of the best three");
        assert_eq!(labels(&[0.0, 90.0, 180.0, 270.0], &Parameters { labels: 4, ..parameters }), [0, 1, 2, 3]);
        assert!(labels(&[], &Parameters::default()).is_empty());
    }

    #[test]
    fn a_similarity_equal_to_the_bound_does_not_exceed_it() {
        let parameters = Parameters { label_similarity: 1.0, ..Parameters::default() };
        assert_eq!(labels(&[33.0, 33.0], &parameters), [0, 1]);
        assert_eq!(labels(&[0.0, 90.0], &Parameters { label_similarity: 0.0, ..Parameters::default() }), [0, 1]);
    }
}
