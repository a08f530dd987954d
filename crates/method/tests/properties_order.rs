//! What holds of every choice by activation: top images, ranks, scores, labels.

#![allow(clippy::unwrap_used, reason = "it is all tests")]

use dnd_method::{
    embedding::Embedding,
    labels::distinct_labels,
    parameters::{GeneratedSubset, Parameters, Scoring, Summary},
    ranks::ranks,
    score::{GeneratedImage, RankedConcept, rank_concepts},
    summary::summarize,
    top::{Source, Top},
};
use proptest::{prelude::*, sample::Index};

/// Few different values, so that many are equal.
fn activation() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (-3_i8..4).prop_map(|n| f32::from(n) / 2.0),
        1 => -10.0_f32..10.0,
        1 => prop::sample::select(vec![-0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ]
}

fn finite() -> impl Strategy<Value = f32> {
    activation().prop_filter("finite", |activation| activation.is_finite())
}

/// Different images with their activations, in any order.
fn images() -> impl Strategy<Value = Vec<(f32, Source)>> {
    let source = prop_oneof![(0_u64..20).prop_map(Source::Original), (0_u64..20, 0_u32..4).prop_map(|(parent, crop)| Source::Crop(parent, crop))];
    prop::collection::btree_map(source, activation(), 0..40)
        .prop_map(|images| images.into_iter().map(|(at, activation)| (activation, at)).collect::<Vec<_>>())
        .prop_shuffle()
}

fn top_of(size: usize, images: &[(f32, Source)]) -> Top<Source, u32> {
    let mut top = Top::new(size);
    for &(activation, at) in images {
        top.offer(activation, at, || activation.to_bits());
    }
    top
}

fn embedding() -> impl Strategy<Value = Embedding> {
    prop::array::uniform3(-1.0_f32..1.0).prop_filter_map("no direction", |components| Embedding::new(&components).ok())
}

fn candidates() -> impl Strategy<Value = Vec<Vec<Option<GeneratedImage>>>> {
    let image = (activation(), embedding()).prop_map(|(activation, embedding)| GeneratedImage { activation, embedding });
    prop::collection::vec(prop::collection::vec(prop::option::weighted(0.8, image), 1..6), 1..6)
}

fn parameters() -> impl Strategy<Value = Parameters> {
    let scorings = vec![Scoring::Mean, Scoring::TopkSquared, Scoring::ImageProducts, Scoring::TopkSquaredImageProducts];
    let subsets = vec![GeneratedSubset::ConceptTop, GeneratedSubset::OverallTop];
    (prop::sample::select(scorings), 1_u32..7, 1_u32..7, prop::sample::select(subsets), 1_u32..12).prop_map(
        |(scoring, beta, generated_top, generated_subset, overall_top)| Parameters {
            scoring,
            beta,
            generated_top,
            generated_subset,
            overall_top,
            ..Parameters::default()
        },
    )
}

/// Of each concept its scores, by candidate.
fn by_candidate(mut ranked: Vec<RankedConcept>) -> Vec<RankedConcept> {
    ranked.sort_by_key(|concept| concept.candidate);
    ranked
}

proptest! {
    #[test]
    fn any_order_and_any_shards_give_the_same_top(images in images(), size in 0_usize..12, cuts in prop::collection::vec(any::<Index>(), 0..4), shuffled in any::<u64>()) {
        let once = top_of(size, &images);
        let mut other = images.clone();
        // Another order that proptest can shrink: by a multiplicative hash of the place.
        other.sort_by_key(|(_, at)| match at {
            Source::Original(n) => (n + 1).wrapping_mul(shuffled | 1),
            Source::Crop(n, m) => (n * 64 + u64::from(*m) + 99).wrapping_mul(shuffled | 1),
        });
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(other.len() + 1)).collect();
        places.extend([0, other.len()]);
        places.sort_unstable();
        let mut merged = Top::new(size);
        for pair in places.windows(2).rev() {
            let part = top_of(size, &other[pair[0]..pair[1]]);
            merged.merge(Top::found(size, part.entries().to_vec(), part.range(), part.not_finite()));
        }
        let bits = |top: &Top<Source, u32>| top.range().map(|(lowest, highest)| (lowest.to_bits(), highest.to_bits()));
        prop_assert_eq!(bits(&merged), bits(&once));
        prop_assert_eq!(merged, once);
    }

    #[test]
    fn the_top_is_the_head_of_the_sorted_list(images in images(), size in 0_usize..12) {
        let mut sorted: Vec<(f32, Source)> = images.iter().copied().filter(|(activation, _)| activation.is_finite()).collect();
        sorted.sort_by_key(|(_, at)| *at);
        sorted.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap());
        sorted.truncate(size);
        let top = top_of(size, &images);
        prop_assert_eq!(top.entries().iter().map(|e| (e.activation, e.at)).collect::<Vec<_>>(), sorted);
        prop_assert_eq!(top.not_finite() as usize, images.iter().filter(|(activation, _)| !activation.is_finite()).count());
    }

    #[test]
    fn every_image_is_kept_or_given_back(images in images(), size in 0_usize..12) {
        let mut top = Top::new(size);
        let mut held: Vec<Source> = Vec::new();
        for (activation, at) in images {
            let mut asked = false;
            let dropped = top.offer(activation, at, || asked = true);
            held.extend(asked.then_some(at));
            held.retain(|at| dropped.as_ref().is_none_or(|entry| entry.at != *at));
        }
        held.sort_unstable();
        let mut kept: Vec<Source> = top.into_entries().into_iter().map(|entry| entry.at).collect();
        kept.sort_unstable();
        prop_assert_eq!(kept, held);
    }

    #[test]
    fn a_unit_is_dead_if_and_only_if_nothing_differs(images in images()) {
        let mut values: Vec<f32> = images.iter().map(|(activation, _)| *activation).filter(|a| a.is_finite()).collect();
        values.dedup();
        prop_assert_eq!(top_of(3, &images).is_dead(), values.len() < 2);
    }

    #[test]
    fn ranks_do_not_depend_on_the_order(activations in prop::collection::vec(finite(), 0..30), shuffled in any::<Index>()) {
        let found = ranks(&activations);
        for (activation, rank) in activations.iter().zip(&found) {
            prop_assert_eq!(*rank as usize, 1 + activations.iter().filter(|other| *other > activation).count());
        }
        let start = shuffled.index(activations.len() + 1);
        let turned = [&activations[start..], &activations[..start]].concat();
        prop_assert_eq!(ranks(&turned), [&found[start..], &found[..start]].concat());
    }

    #[test]
    fn a_summary_lies_within_its_map(map in prop::collection::vec(-1e30_f32..1e30, 1..50)) {
        let (lowest, highest) = map.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        let mean = summarize(&map, Summary::Mean);
        prop_assert!(lowest <= mean && mean <= highest);
        prop_assert_eq!(summarize(&map, Summary::Max), highest);
    }

    #[test]
    fn ranked_concepts_are_in_the_order_of_their_scores(activating in prop::collection::vec(embedding(), 1..4), candidates in candidates(), parameters in parameters()) {
        let ranked = rank_concepts(&activating, &candidates, &parameters).unwrap();
        let mut places: Vec<usize> = ranked.iter().map(|concept| concept.candidate).collect();
        let score = |concept: &RankedConcept| concept.scores.map(|scores| scores.by(parameters.scoring));
        for pair in ranked.windows(2) {
            let (better, worse) = (score(&pair[0]), score(&pair[1]));
            prop_assert!(better > worse || better == worse && pair[0].candidate < pair[1].candidate);
        }
        places.sort_unstable();
        prop_assert_eq!(places, (0..candidates.len()).collect::<Vec<_>>());
        for concept in &ranked {
            let images = &candidates[concept.candidate];
            let usable = |image: &Option<GeneratedImage>| image.as_ref().is_some_and(|x| x.activation.is_finite());
            prop_assert_eq!(concept.ranks.iter().map(Option::is_some).collect::<Vec<_>>(), images.iter().map(usable).collect::<Vec<_>>());
            prop_assert_eq!(concept.scores.is_some(), images.iter().any(usable));
            if let Some(scores) = concept.scores {
                prop_assert!(scores.mean <= -1.0 && scores.topk_squared <= -1.0 && scores.image_products.abs() <= 1.0 + 1e-12);
            }
        }
    }

    #[test]
    fn an_unusable_image_is_as_good_as_none(activating in prop::collection::vec(embedding(), 1..4), candidates in candidates(), parameters in parameters()) {
        let usable: Vec<Vec<Option<GeneratedImage>>> =
            candidates.iter().map(|images| images.iter().flatten().filter(|x| x.activation.is_finite()).cloned().map(Some).collect()).collect();
        let scores = |candidates| by_candidate(rank_concepts(&activating, candidates, &parameters).unwrap()).into_iter().map(|c| c.scores).collect::<Vec<_>>();
        prop_assert_eq!(scores(&candidates), scores(&usable));
    }

    #[test]
    fn a_better_rank_never_lowers_a_score(activating in prop::collection::vec(embedding(), 1..4), candidates in candidates(), parameters in parameters(), which in any::<Index>(), by in 0.5_f32..20.0) {
        // All images of one concept activate more, by the same amount: its ranks get better or stay, and its best images stay its best.
        let parameters = Parameters { generated_subset: GeneratedSubset::ConceptTop, ..parameters };
        let j = which.index(candidates.len());
        let mut better = candidates.clone();
        for image in better[j].iter_mut().flatten() {
            image.activation += by;
        }
        let scores = |candidates| by_candidate(rank_concepts(&activating, candidates, &parameters).unwrap())[j].scores;
        if let (Some(before), Some(after)) = (scores(&candidates), scores(&better)) {
            prop_assert_eq!(before.image_products, after.image_products);
            for scoring in [Scoring::Mean, Scoring::TopkSquared, Scoring::TopkSquaredImageProducts] {
                prop_assert!(after.by(scoring) >= before.by(scoring), "{:?}: {:?} {:?}", scoring, before, after);
            }
        }
    }

    #[test]
    fn one_candidate_is_its_own_best(activating in prop::collection::vec(embedding(), 1..4), candidates in candidates(), parameters in parameters()) {
        let parameters = Parameters { generated_subset: GeneratedSubset::ConceptTop, ..parameters };
        let ranked = rank_concepts(&activating, &candidates[..1], &parameters).unwrap();
        prop_assert_eq!(ranked.len(), 1);
        if let Some(scores) = ranked[0].scores {
            prop_assert_eq!(scores.topk_squared_image_products, scores.image_products);
        }
    }

    #[test]
    fn overall_top_is_concept_top_where_all_images_count(activating in prop::collection::vec(embedding(), 1..4), candidates in candidates(), parameters in parameters()) {
        let all = |generated_subset| Parameters { generated_subset, generated_top: 1000, overall_top: 1000, ..parameters.clone() };
        let ranked = |subset| rank_concepts(&activating, &candidates, &all(subset)).unwrap();
        prop_assert_eq!(ranked(GeneratedSubset::ConceptTop), ranked(GeneratedSubset::OverallTop));
    }

    #[test]
    fn labels_say_different_things(ranked in prop::collection::vec(embedding(), 0..8), labels in 1_u32..6, label_similarity in -1.0_f32..=1.0) {
        let kept = distinct_labels(&ranked, &Parameters { labels, label_similarity, ..Parameters::default() }).unwrap();
        let cosine = |a: usize, b: usize| dnd_method::embedding::mean_cosine(&[&ranked[a]], &[&ranked[b]]).unwrap() as f32;
        prop_assert_eq!(kept.first().copied(), (!ranked.is_empty()).then_some(0));
        prop_assert!(kept.is_sorted());
        for place in 0..ranked.len().min(labels as usize) {
            let alike = kept.iter().any(|&better| better < place && cosine(place, better) > label_similarity);
            prop_assert_eq!(kept.contains(&place), !alike);
        }
        prop_assert!(kept.iter().all(|&place| place < labels as usize));
    }
}

#[test]
fn nothing_is_scored_without_activating_images_or_with_embeddings_of_two_models() {
    let image = |components: &[f32]| Some(GeneratedImage { activation: 1.0, embedding: Embedding::new(components).unwrap() });
    let error = rank_concepts(&[], &[vec![image(&[1.0])]], &Parameters::default()).unwrap_err();
    assert_eq!(error.to_string(), "there is no activating image to compare generated ones with");
    let activating = [Embedding::new(&[1.0, 2.0]).unwrap()];
    let error = rank_concepts(&activating, &[vec![image(&[1.0])]], &Parameters::default()).unwrap_err();
    assert_eq!(error.to_string(), "embeddings of 2 and of 1 dimensions can't be compared");
    assert!(distinct_labels(&[Embedding::new(&[1.0]).unwrap(), Embedding::new(&[1.0, 2.0]).unwrap()], &Parameters::default()).is_err());
    assert_eq!(rank_concepts(&activating, &[], &Parameters::default()).unwrap(), []);
}
