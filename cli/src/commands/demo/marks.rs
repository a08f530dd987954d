//! What counts as a right label: `words.json` of the suite says, and `units.json` of the planted network what each unit detects.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use dnd_method::draw;
use dnd_onnx::folder::read_json;
use dnd_proto::v1::UnitResult;
use serde::Deserialize;

use crate::problem::Problem;

/// Words that a right label may have at most.
const MOST_WORDS: usize = 6;

/// A unit whose concept is known.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct PlantedUnit {
    layer: String,
    unit: u32,
    /// In words; none for a dead unit.
    pub(super) concept: Option<String>,
    /// The content words that a right label holds.
    words: Vec<String>,
    /// Whether it is a combination that no model of the suite has seen in training.
    pub(super) withheld: bool,
    /// Whether it answers all pictures alike.
    pub(super) dead: bool,
}

#[derive(Debug, Deserialize)]
struct Words {
    colours: BTreeMap<String, Vec<String>>,
    patterns: BTreeMap<String, Vec<String>>,
    shapes: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    others: BTreeMap<String, Vec<String>>,
}

/// The planted units, and what is accepted for each content word.
#[derive(Debug)]
pub(super) struct Marks {
    pub(super) units: Vec<PlantedUnit>,
    accepted: BTreeMap<String, Vec<String>>,
    /// Words that say a colour, a pattern or a shape.
    telling: BTreeSet<String>,
}

impl Marks {
    pub(super) fn read(suite: &Path, planted: &Path) -> Result<Self, Problem> {
        let units = read_json(&planted.with_file_name("units.json"))?;
        let Words { colours, patterns, shapes, others } = read_json(&suite.join("words.json"))?;
        let accepted: BTreeMap<String, Vec<String>> = [colours, patterns, shapes].into_iter().flatten().collect();
        let telling = accepted.values().flatten().cloned().chain(others.into_values().flatten()).collect();
        Ok(Self { units, accepted, telling })
    }

    /// The layers, in the order of the units.
    pub(super) fn layers(&self) -> impl Iterator<Item = &str> {
        let mut seen = BTreeSet::new();
        self.units.iter().map(|unit| unit.layer.as_str()).filter(move |layer| seen.insert(*layer))
    }

    pub(super) fn unit(&self, result: &UnitResult) -> Option<&PlantedUnit> {
        self.units.iter().find(|unit| unit.layer == result.layer && unit.unit == result.unit)
    }

    /// Whether a label is right: at most six words, every content word of the unit's concept or an accepted one for it, and no word for another
    /// colour, pattern or shape.
    pub(super) fn is_right(&self, planted: &PlantedUnit, label: &str) -> bool {
        let label = label.to_lowercase();
        let words: Vec<&str> = label.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let accepts = |content: &String, word: &str| self.accepted.get(content).is_some_and(|accepted| accepted.iter().any(|a| a == word));
        let holds_all = planted.words.iter().all(|content| words.iter().any(|word| accepts(content, word)));
        let nothing_else = words.iter().filter(|word| self.telling.contains(**word)).all(|word| planted.words.iter().any(|content| accepts(content, word)));
        (1..=MOST_WORDS).contains(&words.len()) && holds_all && nothing_else
    }
}

/// The numbers below `count` in an order that is always the same, none in its own place where that can be.
pub(super) fn shuffled(count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    draw::shuffle(&mut order, 0, "labels", 0, 1);
    for i in 0..count {
        if order[i] == i {
            order.swap(i, (i + 1) % count);
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> Marks {
        let all =
            |words: &[(&str, &[&str])]| words.iter().map(|(word, accepted)| ((*word).to_owned(), accepted.iter().map(|a| (*a).to_owned()).collect())).collect();
        let accepted: BTreeMap<String, Vec<String>> =
            all(&[("red", &["red"]), ("blue", &["blue"]), ("stripes", &["stripes", "striped"]), ("vertical", &["vertical"])]);
        let telling = accepted.values().flatten().cloned().chain(["patterns".to_owned()]).collect();
        Marks { units: Vec::new(), accepted, telling }
    }

    #[test]
    fn a_label_is_right_if_it_says_all_of_the_concept_and_nothing_else_in_a_few_words() {
        let planted = PlantedUnit {
            layer: "mixture".into(),
            unit: 0,
            concept: Some("red vertical stripes".into()),
            words: vec!["red".into(), "vertical".into(), "stripes".into()],
            withheld: false,
            dead: false,
        };
        let is_right = |label| marks().is_right(&planted, label);
        assert!(is_right("red vertical stripes"));
        assert!(is_right("Vertical-striped red things"));
        assert!(!is_right("vertical stripes"), "red is missing");
        assert!(!is_right("red and blue vertical stripes"), "blue is another colour");
        assert!(!is_right("red vertical stripes and patterns"), "another pattern word");
        assert!(!is_right("red vertical stripes on a lot of things"), "too many words");
        assert!(!is_right(""));
    }

    #[test]
    fn shuffled_labels_are_all_there_and_none_is_in_its_place() {
        let order = shuffled(46);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..46).collect::<Vec<_>>());
        assert!(order.iter().enumerate().all(|(i, j)| i != *j));
    }
}
