//! What holds of prompts, answers and draws.

#![allow(clippy::unwrap_used, reason = "it is all tests")]

use std::collections::HashSet;

use dnd_method::{
    answers::{NoConcept, Reading, candidates, given_candidates, read, read_again},
    draw::{Key, noise, shuffle, token},
    prompts::{self, Message, Role},
};
use proptest::prelude::*;

/// Answers as models give them: words with the marks that are taken off.
fn answer() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::collection::vec(
            prop::sample::select(vec![
                "Red", "dots", "design", "Graphics", "É", "Σ", "\"", "'", "`", "“", "”", "‘", "’", ".", ",", ":", " ", "\n", ". ", "Label: "
            ]),
            0..8
        )
        .prop_map(|parts| parts.concat()),
        any::<String>(),
    ]
}

fn concept() -> impl Strategy<Value = String> {
    prop_oneof![prop::sample::select(vec!["", "dots", "a design", "a design background", "graphics", "red"]).prop_map(str::to_owned), answer()]
}

proptest! {
    #[test]
    fn a_cleaned_answer_is_clean(answer in answer()) {
        let cleaned = read_again(&answer);
        prop_assume!(!cleaned.contains(':'));
        prop_assert_eq!(&read_again(&cleaned), &cleaned);
        prop_assert_eq!(cleaned.trim(), &cleaned[..]);
        prop_assert!(!cleaned.ends_with('.'));
        for (open, close) in [('"', '"'), ('\'', '\''), ('“', '”'), ('‘', '’'), ('`', '`')] {
            prop_assert!(!(cleaned.chars().count() > 1 && cleaned.starts_with(open) && cleaned.ends_with(close)));
        }
        prop_assert_eq!(cleaned.to_lowercase(), cleaned);
    }

    #[test]
    fn only_what_follows_the_first_colon_counts(before in "[^:]*", after in answer()) {
        // A second colon is a character like any other.
        let answer = format!("{before}:{after}");
        prop_assert_eq!(read_again(&answer), read_again(&format!(":{after}")));
        prop_assert_eq!(read(&answer), read(&format!(":{after}")));
        let plain = after.replace(':', "");
        prop_assert_eq!(read(&format!("{before}:{plain}")), read(&plain));
    }

    #[test]
    fn lists_are_asked_about_once_more(answer in answer()) {
        let after = answer.split_once(':').map_or(&answer[..], |(_, after)| after);
        match read(&answer) {
            Reading::Concept(concept) => {
                prop_assert!(!after.chars().any(|c| c != ',' && !c.is_whitespace()) || !after.contains(','));
                prop_assert_eq!(concept, read_again(&answer));
            }
            Reading::AskAgain(parts) => {
                prop_assert!(after.contains(','));
                prop_assert!(parts.iter().all(|part| !part.is_empty() && part.trim() == part && !part.contains(',')));
                let without: String = after.chars().filter(|c| *c != ',' && !c.is_whitespace()).collect();
                prop_assert_eq!(parts.concat().chars().filter(|c| !c.is_whitespace()).collect::<String>(), without);
            }
        }
    }

    #[test]
    fn candidates_are_different_and_in_order(concepts in prop::collection::vec(concept(), 0..8)) {
        let Ok(t) = candidates(&concepts) else {
            prop_assert!(concepts.iter().all(String::is_empty));
            return Ok(());
        };
        prop_assert_eq!(t.iter().collect::<HashSet<_>>().len(), t.len());
        prop_assert!(t.iter().all(|concept| !concept.is_empty()));
        let mut originals: Vec<&String> = Vec::new();
        for concept in concepts.iter().filter(|concept| !concept.is_empty()) {
            if !originals.contains(&concept) {
                originals.push(concept);
            }
        }
        prop_assert_eq!(t[..originals.len()].iter().collect::<Vec<_>>(), originals.clone());
        for twin in &t[originals.len()..] {
            let original = twin.strip_suffix(" background");
            prop_assert!(original.is_some_and(|original| originals.iter().any(|o| *o == original)), "{}", twin);
        }
        prop_assert_eq!(candidates(&t), Ok(t.clone()), "doing it again changes nothing");
    }

    #[test]
    fn given_candidates_are_kept_word_for_word(concepts in prop::collection::vec(concept(), 0..8)) {
        match given_candidates(&concepts) {
            Err(NoConcept) => prop_assert!(concepts.iter().all(|concept| concept.trim().is_empty())),
            Ok(t) => {
                prop_assert_eq!(t.iter().collect::<HashSet<_>>().len(), t.len());
                prop_assert!(concepts.iter().map(|c| c.trim()).filter(|c| !c.is_empty()).all(|c| t.iter().any(|t| t == c)));
                prop_assert_eq!(given_candidates(&t), Ok(t.clone()));
            }
        }
    }

    #[test]
    fn prompts_hold_descriptions_byte_for_byte(descriptions in prop::collection::vec(any::<String>(), 1..12)) {
        let joined = descriptions.join(", ");
        let turns = prompts::summarize(&descriptions);
        let last = turns.last().unwrap();
        prop_assert_eq!(&last.content, &format!("{} {joined}", prompts::SUMMARIZE));
        prop_assert_eq!(prompts::summarize_again(&descriptions), vec![last.clone()]);
        prop_assert_eq!(&turns[..4], &prompts::summarize(&["other"])[..4], "the examples are always the same");

        let one = &descriptions[0];
        let turns = prompts::simplify(one);
        prop_assert_eq!(&turns.last().unwrap().content, &format!("{} {one}", prompts::SIMPLIFY));
        for turns in [prompts::simplify(one), prompts::summarize(&descriptions)] {
            let asked = turns.iter().map(|Message { role, .. }| *role == Role::User);
            prop_assert!(asked.eq((0..turns.len()).map(|turn| turn % 2 == 0)));
            prop_assert_eq!(turns.len() % 2, 1);
        }
        prop_assert!(prompts::generate(one).ends_with(one.as_str()));
    }

    #[test]
    fn a_shuffle_is_a_permutation_that_its_key_decides(count in 0_usize..60, seed in any::<u64>(), layer in ".{0,8}", unit in any::<u32>(), n in 1_u32..9) {
        let sorted: Vec<usize> = (0..count).collect();
        let order = |seed, layer: &str, unit, n| {
            let mut items = sorted.clone();
            shuffle(&mut items, seed, layer, unit, n);
            items
        };
        let shuffled = order(seed, &layer, unit, n);
        let mut again = shuffled.clone();
        again.sort_unstable();
        prop_assert_eq!(&again, &sorted);
        prop_assert_eq!(&order(seed, &layer, unit, n), &shuffled);
        prop_assert_eq!(&order(seed, &layer, unit, 0), &sorted, "the first summary sees the order of activation");
        if count >= 25 {
            // Two orders of 25 agree by chance once in 10²⁵ times.
            prop_assert_ne!(&order(seed ^ 1, &layer, unit, n), &shuffled);
            prop_assert_ne!(&order(seed, &format!("{layer}."), unit, n), &shuffled);
            prop_assert_ne!(&order(seed, &layer, unit ^ 1, n), &shuffled);
            prop_assert_ne!(&order(seed, &layer, unit, n + 1), &shuffled);
        }
    }

    #[test]
    fn noise_of_fewer_values_is_the_beginning_of_more(seed in any::<u64>(), concept in ".{0,12}", index in any::<u32>(), size in 0_usize..70) {
        let more = noise(seed, &concept, index, 0, 80);
        prop_assert_eq!(&noise(seed, &concept, index, 0, size)[..], &more[..size]);
        // The smallest uniform number, 2⁻³³, gives 6.77.
        prop_assert!(more.iter().all(|value| value.abs() < 6.8));
        for other in [noise(seed ^ 1, &concept, index, 0, 80), noise(seed, &format!("{concept} "), index, 0, 80), noise(seed, &concept, index ^ 1, 0, 80)] {
            prop_assert_ne!(&other, &more);
        }
    }

    #[test]
    fn a_token_is_one_of_the_finite(logits in prop::collection::vec(prop_oneof![4 => -50.0_f32..50.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(f32::NAN)], 1..40), temperature in 0.0_f32..10.0, position in any::<u32>()) {
        let drawn = token(&logits, temperature, 0, "prompt", 0, position) as usize;
        prop_assert!(logits[drawn].is_finite() || logits.iter().all(|logit| !logit.is_finite()));
        let coldest = token(&logits, 0.0, 0, "prompt", 0, position) as usize;
        prop_assert!(logits.iter().filter(|l| l.is_finite()).all(|logit| *logit <= logits[coldest]));
    }
}

#[test]
fn noise_is_normal() {
    let values = noise(0, "polka dots", 0, 0, 1 << 16);
    let moment = |power: i32| values.iter().map(|v| f64::from(*v).powi(power)).sum::<f64>() / values.len() as f64;
    // Five standard errors.
    let close = |found: f64, expected: f64, variance: f64| (found - expected).abs() < 5.0 * (variance / values.len() as f64).sqrt();
    assert!(close(moment(1), 0.0, 1.0) && close(moment(2), 1.0, 2.0) && close(moment(3), 0.0, 15.0) && close(moment(4), 3.0, 96.0));
    let neighbours = values.windows(2).map(|pair| f64::from(pair[0]) * f64::from(pair[1])).sum::<f64>() / values.len() as f64;
    assert!(close(neighbours, 0.0, 1.0));
}

#[test]
fn tokens_are_drawn_as_often_as_their_softmax_says() {
    let logits = [1.0, 0.0, -1.0, 0.5];
    let weights = logits.map(|logit: f32| (f64::from(logit) / 0.5).exp());
    let mut counts = [0_u32; 4];
    for position in 0..20_000 {
        counts[token(&logits, 0.5, 0, "", 0, position) as usize] += 1;
    }
    for (count, weight) in counts.iter().zip(weights) {
        let p = weight / weights.iter().sum::<f64>();
        assert!((f64::from(*count) / 20_000.0 - p).abs() < 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(), "{counts:?}");
    }
}

#[test]
fn every_place_of_a_shuffle_is_equally_likely() {
    let mut counts = [[0_u32; 5]; 5];
    for unit in 0..10_000 {
        let mut items = [0, 1, 2, 3, 4];
        shuffle(&mut items, 0, "layer", unit, 1);
        for (place, item) in items.into_iter().enumerate() {
            counts[place][item] += 1;
        }
    }
    // Five standard deviations of 10,000 draws with probability 1/5.
    assert!(counts.iter().flatten().all(|count| count.abs_diff(2000) < 200), "{counts:?}");
}

#[test]
fn words_go_on_from_block_to_block() {
    let key = Key::new(&[b"test"]);
    let words: Vec<u32> = key.words().take(12).collect();
    for (block, four) in words.chunks_exact(4).enumerate() {
        assert_eq!(dnd_method::draw::philox4x32_10([block as u32, 0, 0, 0], key.0), four);
    }
}
