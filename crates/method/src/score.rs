//! Best concept selection (3.3, 3.4, A.1.3): the candidate concepts, ranked by their generated images.

use std::cmp::Ordering;

use crate::{
    embedding::{DimensionError, Embedding, mean_cosine},
    parameters::{GeneratedSubset, Parameters, Scoring},
    ranks::ranks,
};

/// A generated image of a concept.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedImage {
    /// `g(A_n(x))` of the unit. An image on which it is NaN or infinite is unusable.
    pub activation: f32,
    /// What CLIP's image encoder makes of it.
    pub embedding: Embedding,
}

/// A concept's score by each scoring function of A.1.3; the highest is best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// *Mean*: `−(1/Q_j) Σ H_ji`.
    pub mean: f64,
    /// *TopK Squared*: `−(1/m) Σ_{i≤m} H_ji²`, with `m` the smaller of `beta` and `Q_j`.
    pub topk_squared: f64,
    /// *Image Products*: the mean cosine similarity of `I` and `D_j^t`, −1 to 1.
    pub image_products: f64,
    /// *TopK Squared + Image Products*: `(N − Rank_j) · image_products`, or `(Rank_j + 1) · image_products` if that is negative.
    pub topk_squared_image_products: f64,
}

impl Scores {
    /// The score by one of the functions.
    pub fn by(&self, scoring: Scoring) -> f64 {
        match scoring {
            Scoring::Mean => self.mean,
            Scoring::TopkSquared => self.topk_squared,
            Scoring::ImageProducts => self.image_products,
            Scoring::TopkSquaredImageProducts => self.topk_squared_image_products,
        }
    }
}

/// A concept with what speaks for it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedConcept {
    /// Which of the candidates it is, from 0.
    pub candidate: usize,
    /// Rank of each of its images among those of all concepts, in the order of its images; none for unusable ones. Sorted, it is `H_j`.
    pub ranks: Vec<Option<u32>>,
    /// Its scores; none if none of its images can be used.
    pub scores: Option<Scores>,
}

/// Why nothing can be scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScoreError {
    /// `I` is empty.
    #[error("there is no activating image to compare generated ones with")]
    NoActivatingImages,
    /// The embeddings are of different models.
    #[error(transparent)]
    Dimensions(#[from] DimensionError),
}

/// Ranks the candidate concepts of a unit, best first. The first is the unit's label, unless none of its images can be used.
///
/// `activating` are the embeddings of the images `I`. `candidates` has the generated images `D_j` of each concept `j`, none for those that
/// are unusable: all one value, say. `Q_j` is the number of usable images of concept `j`, and `N` that of the concepts that have any. The
/// parameters that count are `scoring`, `beta`, `generated_top`, `generated_subset` and `overall_top`.
///
/// - `H_j` are the [`ranks`] of the concept's images among the usable images of all concepts, in increasing order.
/// - `D_j^t` are the `generated_top` (`t`) highest activating images of the concept, all of them if there are fewer; or with
///   [`GeneratedSubset::OverallTop`] those among the `overall_top` highest of all concepts, and if there are none *Image Products* is −1.
///   Of equal activations the earlier candidate's counts as higher, then the earlier image's.
/// - `Rank_j` in *TopK Squared + Image Products* is the number of concepts whose *TopK Squared* is strictly better. (The paper writes
///   N − Rank with ranks from 1, which gives the worst concept 0 whatever its images; here, as in the authors' code, the best has the
///   factor `N` and the worst 1.) A negative product has the factor `Rank_j + 1` instead, so that a better rank never lowers a score.
/// - Equal scores go to the earlier candidate; concepts without a usable image come last.
pub fn rank_concepts(activating: &[Embedding], candidates: &[Vec<Option<GeneratedImage>>], parameters: &Parameters) -> Result<Vec<RankedConcept>, ScoreError> {
    if activating.is_empty() {
        return Err(ScoreError::NoActivatingImages);
    }
    let activating: Vec<&Embedding> = activating.iter().collect();
    let images = highest_first(candidates);
    let own = |candidate| -> Vec<&Usable> { images.iter().filter(|x| x.candidate == candidate).collect() };
    let concepts: Vec<Vec<&Usable>> = (0..candidates.len()).map(own).collect();
    let counted = concepts.iter().filter(|own| !own.is_empty());
    let topk: Vec<f64> = counted.map(|own| topk_squared(own, parameters.beta)).collect();

    let mut ranked = Vec::with_capacity(concepts.len());
    for (candidate, (own, generated)) in concepts.iter().zip(candidates).enumerate() {
        let mut ranks = vec![None; generated.len()];
        for image in own {
            ranks[image.index] = Some(image.rank);
        }
        let scores = if own.is_empty() { None } else { Some(scores(&activating, own, &topk, parameters)?) };
        ranked.push(RankedConcept { candidate, ranks, scores });
    }
    let score = |concept: &RankedConcept| concept.scores.map(|scores| scores.by(parameters.scoring));
    ranked.sort_by(|a, b| score(b).partial_cmp(&score(a)).unwrap_or(Ordering::Equal));
    Ok(ranked)
}

/// A usable generated image.
struct Usable<'a> {
    candidate: usize,
    /// Which of the candidate's images.
    index: usize,
    embedding: &'a Embedding,
    /// `Rank(x; G_n)`.
    rank: u32,
    /// Its place when equals are told apart, from 0.
    place: usize,
}

/// All usable images: highest activation first, then the earlier candidate's, then the earlier.
fn highest_first(candidates: &[Vec<Option<GeneratedImage>>]) -> Vec<Usable<'_>> {
    let mut images = Vec::new();
    let mut activations = Vec::new();
    for (candidate, generated) in candidates.iter().enumerate() {
        for (index, image) in generated.iter().enumerate() {
            if let Some(GeneratedImage { activation, embedding }) = image
                && activation.is_finite()
            {
                images.push(Usable { candidate, index, embedding, rank: 0, place: 0 });
                activations.push(*activation);
            }
        }
    }
    for (image, rank) in images.iter_mut().zip(ranks(&activations)) {
        image.rank = rank;
    }
    images.sort_by_key(|image| image.rank);
    for (place, image) in images.iter_mut().enumerate() {
        image.place = place;
    }
    images
}

/// The scores of a concept, given its images, at least one, highest first, and the *TopK Squared* of all concepts.
fn scores(activating: &[&Embedding], own: &[&Usable], topk: &[f64], parameters: &Parameters) -> Result<Scores, DimensionError> {
    let mean = -own.iter().map(|x| f64::from(x.rank)).sum::<f64>() / own.len() as f64;
    let topk_squared = topk_squared(own, parameters.beta);
    let image_products = image_products(activating, own, parameters)?;
    let rank = topk.iter().filter(|other| **other > topk_squared).count();
    let factor = if image_products < 0.0 { rank + 1 } else { topk.len() - rank };
    Ok(Scores { mean, topk_squared, image_products, topk_squared_image_products: factor as f64 * image_products })
}

fn topk_squared(own: &[&Usable], beta: u32) -> f64 {
    let best = &own[..own.len().min(beta as usize)];
    -best.iter().map(|x| f64::from(x.rank).powi(2)).sum::<f64>() / best.len() as f64
}

fn image_products(activating: &[&Embedding], own: &[&Usable], parameters: &Parameters) -> Result<f64, DimensionError> {
    let chosen = own.iter().enumerate().filter(|(i, x)| match parameters.generated_subset {
        GeneratedSubset::ConceptTop => *i < parameters.generated_top as usize,
        GeneratedSubset::OverallTop => x.place < parameters.overall_top as usize,
    });
    let chosen: Vec<&Embedding> = chosen.map(|(_, x)| x.embedding).collect();
    if chosen.is_empty() { Ok(-1.0) } else { mean_cosine(activating, &chosen) }
}
