//! Ranks and scores against NumPy's (`goldens/make.py`).

#![allow(clippy::unwrap_used, reason = "it is all tests")]

mod common;

use common::goldens;
use dnd_method::{
    embedding::Embedding,
    parameters::{GeneratedSubset, Parameters, Scoring},
    score::{GeneratedImage, rank_concepts},
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    parameters: Parameters,
    activating: Vec<Vec<f32>>,
    candidates: Vec<Vec<Option<Image>>>,
    ranks: Vec<Vec<Option<u32>>>,
    scores: Vec<Option<Scores>>,
    order: Vec<usize>,
}

#[derive(Deserialize)]
struct Image {
    activation: f32,
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct Scores {
    mean: f64,
    topk_squared: f64,
    image_products: f64,
    topk_squared_image_products: f64,
}

#[test]
fn ranks_and_scores_are_the_same() {
    let (mut negative, mut ties, mut without, mut overall) = (0, 0, 0, 0);
    let mut scorings = [0; 4];
    let cases = goldens::<Case>("scores.json");
    assert!(cases.len() >= 150);
    for case in cases {
        let embedding = |components: &Vec<f32>| Embedding::new(components).unwrap();
        let activating: Vec<Embedding> = case.activating.iter().map(embedding).collect();
        let image = |image: &Image| GeneratedImage { activation: image.activation, embedding: embedding(&image.embedding) };
        let candidates: Vec<Vec<Option<GeneratedImage>>> =
            case.candidates.iter().map(|images| images.iter().map(|x| x.as_ref().map(image)).collect()).collect();
        let ranked = rank_concepts(&activating, &candidates, &case.parameters).unwrap();

        assert_eq!(ranked.iter().map(|concept| concept.candidate).collect::<Vec<_>>(), case.order);
        for concept in &ranked {
            assert_eq!(concept.ranks, case.ranks[concept.candidate]);
            let expected = &case.scores[concept.candidate];
            assert_eq!(concept.scores.is_some(), expected.is_some());
            let Some((found, expected)) = concept.scores.zip(expected.as_ref()) else {
                without += 1;
                continue;
            };
            let pairs = [
                (found.mean, expected.mean),
                (found.topk_squared, expected.topk_squared),
                (found.image_products, expected.image_products),
                (found.topk_squared_image_products, expected.topk_squared_image_products),
            ];
            assert!(pairs.iter().all(|(found, expected)| (found - expected).abs() <= 1e-12 * expected.abs().max(1.0)), "{pairs:?}");
            negative += usize::from(found.image_products < 0.0);
            overall += usize::from(found.image_products == -1.0);
        }
        let scoring = case.parameters.scoring;
        ties += ranked
            .windows(2)
            .filter(|pair| pair.iter().all(|c| c.scores.is_some()) && pair[0].scores.map(|s| s.by(scoring)) == pair[1].scores.map(|s| s.by(scoring)))
            .count();
        scorings
            [[Scoring::Mean, Scoring::TopkSquared, Scoring::ImageProducts, Scoring::TopkSquaredImageProducts].iter().position(|s| *s == scoring).unwrap()] += 1;
        assert!(case.parameters.generated_subset == GeneratedSubset::OverallTop || ranked.iter().all(|c| c.scores.is_none_or(|s| s.image_products > -1.0)));
    }
    // The cases are there that the rules are about.
    assert!(negative >= 100 && ties >= 20 && without >= 20 && overall >= 10, "{negative} {ties} {without} {overall}");
    assert!(scorings.iter().all(|cases| *cases >= 20), "{scorings:?}");
}
