//! Step 3: best concept selection (3.3, 3.4, A.1.3), and multiple labels (A.5).

use std::collections::HashMap;

use dnd_method::{
    embedding::Embedding,
    labels,
    score::{self, GeneratedImage},
};
use dnd_proto::v1::{ConceptScores, GeneratedPicture, RankedConcept, Stage, UnitState};

use super::{ActivatingImages, Course, Unit};
use crate::{calls::Drawing, failure::Failure};

impl<C: Course> Unit<'_, C> {
    /// Draws pictures of each candidate, shows them to the network, and ranks the candidates; the best is the label.
    pub(crate) async fn select(&mut self, candidates: &[String], images: &ActivatingImages) -> Result<(), Failure> {
        let pictures = self.draw(candidates).await?;
        self.through(Stage::Generate).await?;
        self.result.concepts = self.rank(candidates, pictures, images).await?;
        let labels = self.labels().await?;
        let label = labels.first().cloned();
        self.result.label = label.ok_or_else(|| Failure::new("no_usable_picture", "none of the pictures drawn of the candidate concepts can be used"))?;
        self.result.labels = labels;
        self.result.state = UnitState::Labelled.into();
        self.through(Stage::Score).await?;
        Ok(())
    }

    /// Q pictures of each candidate (3.3, step 1), in the order of the candidates.
    async fn draw(&mut self, candidates: &[String]) -> Result<Vec<Vec<GeneratedPicture>>, Failure> {
        let count = self.calls.parameters().images_per_concept;
        let wanted: Vec<(String, u32)> = candidates.iter().flat_map(|concept| (0..count).map(move |index| (concept.clone(), index))).collect();
        let drawn = self.timed(Stage::Generate, self.calls.drawings(&wanted)).await;
        let mut pictures: Vec<GeneratedPicture> = Vec::with_capacity(drawn.len());
        for ((concept, index), drawn) in wanted.iter().zip(drawn) {
            let (digest, unusable) = match drawn {
                Ok(Drawing::Picture(digest)) => (digest, String::new()),
                Ok(Drawing::Unusable(reason)) => (String::new(), reason),
                Err(failure) if failure.is_the_items => {
                    self.warn(format!("picture {index} of {concept:?} was not drawn: {}", failure.message));
                    (String::new(), failure.message)
                }
                Err(failure) => return Err(failure),
            };
            pictures.push(GeneratedPicture { index: *index, digest, unusable, ..Default::default() });
        }
        Ok(pictures.chunks(count as usize).map(<[_]>::to_vec).collect())
    }

    /// Activations of the drawn pictures (3.3, step 2), their ranks (step 3), and the candidates' scores (step 4).
    async fn rank(
        &mut self,
        candidates: &[String],
        mut pictures: Vec<Vec<GeneratedPicture>>,
        images: &ActivatingImages,
    ) -> Result<Vec<RankedConcept>, Failure> {
        let drawn: Vec<String> = pictures.iter().flatten().map(|picture| picture.digest.clone()).filter(|digest| !digest.is_empty()).collect();
        let activating = images.digests();
        let (layer, unit) = (self.result.layer.clone(), self.result.unit);
        let (activations, embeddings, activating) = self
            .timed(Stage::Score, async {
                tokio::join!(self.calls.activations(&layer, unit, &drawn), self.calls.image_embeddings(&drawn), self.calls.image_embeddings(&activating))
            })
            .await;
        let mut embedded = Vec::with_capacity(activating.len());
        for (image, embedding) in images.0.iter().zip(activating) {
            match embedding {
                Ok(embedding) => embedded.push(Embedding::clone(&embedding)),
                Err(failure) if failure.is_the_items => self.warn(format!("{} was left out of the image products: {}", image.path, failure.message)),
                Err(failure) => return Err(failure),
            }
        }
        let seen: HashMap<String, (Result<f32, Failure>, Result<_, Failure>)> = drawn.into_iter().zip(activations.into_iter().zip(embeddings)).collect();

        for picture in pictures.iter_mut().flatten().filter(|picture| !picture.digest.is_empty()) {
            match seen.get(&picture.digest) {
                Some((Ok(activation), _)) if !activation.is_finite() => picture.unusable = "the unit's activation on it is not finite".to_owned(),
                Some((Ok(activation), Ok(_))) => picture.activation = Some(*activation),
                Some((Err(failure), _) | (_, Err(failure))) if failure.is_the_items => picture.unusable = failure.message.clone(),
                Some((Err(failure), _) | (_, Err(failure))) => return Err(failure.clone()),
                None => {}
            }
        }
        let usable = |picture: &GeneratedPicture| match (picture.activation, seen.get(&picture.digest)) {
            (Some(activation), Some((_, Ok(embedding)))) => Some(GeneratedImage { activation, embedding: Embedding::clone(embedding) }),
            _ => None,
        };
        let generated: Vec<Vec<Option<GeneratedImage>>> = pictures.iter().map(|pictures| pictures.iter().map(usable).collect()).collect();
        let scoring = self.calls.parameters().scoring;
        let ranked = score::rank_concepts(&embedded, &generated, self.calls.parameters()).map_err(|e| Failure::new("scores", e.to_string()))?;
        let concept = |ranked: score::RankedConcept| {
            let mut pictures = pictures.get(ranked.candidate).cloned().unwrap_or_default();
            for (picture, rank) in pictures.iter_mut().zip(&ranked.ranks) {
                picture.rank = rank.unwrap_or_default();
            }
            RankedConcept {
                concept: candidates.get(ranked.candidate).cloned().unwrap_or_default(),
                score: ranked.scores.map(|scores| scores.by(scoring)),
                scores: ranked.scores.map(|scores| ConceptScores {
                    mean: scores.mean,
                    topk_squared: scores.topk_squared,
                    image_products: scores.image_products,
                    topk_squared_image_products: scores.topk_squared_image_products,
                }),
                candidate: ranked.candidate as u32,
                pictures,
            }
        };
        Ok(ranked.into_iter().map(concept).collect())
    }

    /// The best concepts that say different things (A.5).
    async fn labels(&self) -> Result<Vec<String>, Failure> {
        let ranked = self.result.concepts.iter();
        let best: Vec<String> =
            ranked.filter(|concept| concept.score.is_some()).take(self.calls.parameters().labels as usize).map(|concept| concept.concept.clone()).collect();
        let embeddings = self.timed(Stage::Score, self.calls.text_embeddings(&best)).await;
        let embeddings: Vec<Embedding> = embeddings.into_iter().map(|e| e.map(|e| (*e).clone())).collect::<Result<_, _>>()?;
        let kept = labels::distinct_labels(&embeddings, self.calls.parameters()).map_err(|e| Failure::new("labels", e.to_string()))?;
        Ok(kept.into_iter().filter_map(|place| best.get(place).cloned()).collect())
    }
}
