//! Results as a table: a unit a row.

use bytes::Bytes;
use dnd_mesh::Fault;
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
    name(unit.state())
}

pub(crate) fn name(state: UnitState) -> &'static str {
    match state {
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

/// Cells as a row of a table's file.
///
/// # Errors
///
/// None but a defect.
pub fn record(cells: &[impl AsRef<[u8]>]) -> Result<Bytes, Fault> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let failed = |error: String| Fault::internal(format!("a row can't be written: {error}"));
    table.write_record(cells).map_err(|error| failed(error.to_string()))?;
    table.into_inner().map(Bytes::from).map_err(|error| failed(error.to_string()))
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
