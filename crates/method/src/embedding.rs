//! CLIP's embeddings of images and texts, and their cosine similarity (3.4, A.1.3, A.5).

use serde::{Deserialize, Serialize};

/// The direction of an embedding: all that a cosine sees of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embedding(Vec<f64>);

/// An embedding without a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EmbeddingError {
    /// A component is NaN or infinite.
    #[error("an embedding holds a value that is not finite")]
    NotFinite,
    /// All components are 0, or there are none.
    #[error("an embedding is zero: it has no direction")]
    Zero,
}

/// Embeddings of different models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("embeddings of {0} and of {1} dimensions can't be compared")]
pub struct DimensionError(pub usize, pub usize);

impl Embedding {
    /// An embedding as a model gives it, of any length but 0.
    pub fn new(components: &[f32]) -> Result<Self, EmbeddingError> {
        if components.iter().any(|component| !component.is_finite()) {
            return Err(EmbeddingError::NotFinite);
        }
        // Squares of f32 neither overflow nor vanish in f64.
        let length = components.iter().map(|&component| f64::from(component).powi(2)).sum::<f64>().sqrt();
        if length == 0.0 {
            return Err(EmbeddingError::Zero);
        }
        Ok(Self(components.iter().map(|&component| f64::from(component) / length).collect()))
    }

    /// Its dimensions.
    pub fn dimensions(&self) -> usize {
        self.0.len()
    }
}

/// Mean cosine similarity over all pairs of one of `some` and one of `others`; NaN if either is empty. In `f64`.
pub fn mean_cosine(some: &[&Embedding], others: &[&Embedding]) -> Result<f64, DimensionError> {
    let all = || some.iter().chain(others);
    let dimensions = all().next().map_or(0, |embedding| embedding.dimensions());
    if let Some(odd) = all().find(|embedding| embedding.dimensions() != dimensions) {
        return Err(DimensionError(dimensions, odd.dimensions()));
    }
    // The mean of the products is the product of the means.
    let mean = |embeddings: &[&Embedding], i: usize| embeddings.iter().filter_map(|e| e.0.get(i)).sum::<f64>() / embeddings.len() as f64;
    Ok((0..dimensions).map(|i| mean(some, i) * mean(others, i)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directions_count() {
        let [a, b] = [Embedding::new(&[3.0, 4.0]).unwrap(), Embedding::new(&[0.6e-20, 0.8e-20]).unwrap()];
        assert!((mean_cosine(&[&a], &[&b]).unwrap() - 1.0).abs() < 1e-7);
        let c = Embedding::new(&[-4.0, 3.0]).unwrap();
        assert!(mean_cosine(&[&a], &[&c]).unwrap().abs() < 1e-15);
        assert!((mean_cosine(&[&a, &a], &[&a, &c]).unwrap() - 0.5).abs() < 1e-15);
        assert!(mean_cosine(&[&a], &[]).unwrap().is_nan());
    }

    #[test]
    fn what_has_no_direction_is_no_embedding() {
        assert_eq!(Embedding::new(&[0.0, -0.0]), Err(EmbeddingError::Zero));
        assert_eq!(Embedding::new(&[]), Err(EmbeddingError::Zero));
        assert_eq!(Embedding::new(&[1.0, f32::NAN]), Err(EmbeddingError::NotFinite));
        assert_eq!(Embedding::new(&[1.0, f32::NEG_INFINITY]), Err(EmbeddingError::NotFinite));
        assert!(Embedding::new(&[f32::MAX, f32::MAX]).is_ok());
    }

    #[test]
    fn embeddings_of_different_models_are_not_compared() {
        let [a, b] = [Embedding::new(&[1.0]).unwrap(), Embedding::new(&[1.0, 0.0]).unwrap()];
        assert_eq!(mean_cosine(&[&a], &[&a, &b]), Err(DimensionError(1, 2)));
    }
}
