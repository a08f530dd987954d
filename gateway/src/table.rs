//! Results as a table: a unit a row.

use dnd_proto::v1::{UnitResult, UnitState};

/// The columns' names.
pub const COLUMNS: [&str; 8] = ["layer", "unit", "label", "score", "second", "third", "state", "reason"];

/// A unit's row.
pub fn row(unit: &UnitResult) -> [String; COLUMNS.len()] {
    let concept = |place: usize| unit.concepts.get(place).map(|concept| cell(&concept.concept)).unwrap_or_default();
    let score = unit.concepts.first().and_then(|concept| concept.score).map(|score| score.to_string()).unwrap_or_default();
    [cell(&unit.layer), unit.unit.to_string(), cell(&unit.label), score, concept(1), concept(2), state(unit).to_owned(), cell(&unit.reason)]
}

/// What a unit's state is called.
pub fn state(unit: &UnitResult) -> &'static str {
    match unit.state() {
        UnitState::Unspecified => "?",
        UnitState::Labelled => "labelled",
        UnitState::Dead => "dead",
        UnitState::Failed => "failed",
    }
}

/// Text of models and file names as a table's cell: a spreadsheet must not take it for a formula.
pub fn cell(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_never_a_formula() {
        assert_eq!(cell("=HYPERLINK(\"http://x\")"), "'=HYPERLINK(\"http://x\")");
        assert_eq!(cell("red - stripes"), "red - stripes");
    }
}
