//! Draws against an implementation in Python (`goldens/make.py`).

#![allow(clippy::unwrap_used, reason = "it is all tests")]

mod common;

use common::goldens;
use dnd_method::draw::{Key, noise, philox4x32_10, shuffle, token};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Case {
    Philox { counter: [u32; 4], key: [u32; 2], words: [u32; 4] },
    Key { parts: Vec<Part>, words: [u32; 2] },
    Noise { seed: u64, concept: String, index: u32, size: usize, tail: Vec<f32> },
    Shuffle { seed: u64, layer: String, unit: u32, n: u32, order: Vec<u32> },
    Token { logits: Vec<f32>, temperature: f32, seed: u64, prompt: String, n: u32, position: u32, token: u32 },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Part {
    Number(u64),
    Text(String),
}

#[test]
fn draws_are_the_same() {
    let mut values = 0;
    let mut off = 0;
    let mut checked = [0; 5];
    for case in goldens::<Case>("draws.json") {
        match case {
            Case::Philox { counter, key, words } => {
                assert_eq!(philox4x32_10(counter, key), words);
                checked[0] += 1;
            }
            Case::Key { parts, words } => {
                let parts: Vec<Vec<u8>> = parts
                    .into_iter()
                    .map(|part| match part {
                        Part::Number(number) => number.to_le_bytes().to_vec(),
                        Part::Text(text) => text.into_bytes(),
                    })
                    .collect();
                assert_eq!(Key::new(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>()).0, words);
                checked[1] += 1;
            }
            Case::Noise { seed, concept, index, size, tail } => {
                let drawn = noise(seed, &concept, index, 0, size);
                assert_eq!(drawn.len(), size);
                for (ours, theirs) in drawn[size - tail.len()..].iter().zip(&tail) {
                    let ulps = ours.to_bits().abs_diff(theirs.to_bits());
                    assert!(ulps <= 1, "{ours} {theirs}");
                    values += 1;
                    off += ulps;
                }
                checked[2] += 1;
            }
            Case::Shuffle { seed, layer, unit, n, order } => {
                let mut items: Vec<u32> = (0..order.len() as u32).collect();
                shuffle(&mut items, seed, &layer, unit, n);
                assert_eq!(items, order, "{layer} {unit} {n}");
                checked[3] += 1;
            }
            Case::Token { logits, temperature, seed, prompt, n, position, token: expected } => {
                assert_eq!(token(&logits, temperature, seed, &prompt, n, position), expected);
                checked[4] += 1;
            }
        }
    }
    assert!(checked.iter().zip([50, 6, 13, 44, 390]).all(|(checked, least)| *checked >= least), "{checked:?}");
    // Two implementations of sine may differ in the last place of an f64, and so, once in a great while, of an f32.
    assert!(values >= 1000 && off <= 1, "{off} of {values}");
}
