//! What becomes of a language model's answers (step 2B): the candidate concepts `T`.
//!
//! The paper asks for a bare label, and models don't always give one. The rules are the authors' code's, made to do what they are for:
//! theirs takes what is between the first and the second colon, never strips quotes, looks for "design" before the period is off, and
//! puts the concepts through a set, which loses their order.

/// The reason that a unit without a candidate concept fails with.
pub const NO_CONCEPT: &str = "no_concept";

/// Nothing was left of the answers, or of the caller's candidates; see [`NO_CONCEPT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no candidate concept: every answer was empty or could not be used")]
pub struct NoConcept;

/// What to do with a summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// It names a concept; empty if it says nothing.
    Concept(String),
    /// It is a list of these: ask once more what they have in common ([`crate::prompts::summarize_again`]), and take the answer by
    /// [`read_again`].
    AskAgain(Vec<String>),
}

/// Reads a summary: what follows its first colon, if it has one. If commas remain, the parts between them, trimmed, empty ones left
/// out, are to be summarised once more; otherwise it is a concept, cleaned as by [`read_again`].
pub fn read(answer: &str) -> Reading {
    let answer = after_colon(answer);
    let parts: Vec<String> = answer.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect();
    if answer.contains(',') && !parts.is_empty() { Reading::AskAgain(parts) } else { Reading::Concept(cleaned(answer)) }
}

/// Reads the answer to the second question: what follows its first colon, if it has one; commas or not, it is a concept. It is trimmed
/// and loses one pair of quotes around it (straight, curly or backticks) and one final period, again until nothing changes; then it
/// becomes lower-case.
pub fn read_again(answer: &str) -> String {
    cleaned(after_colon(answer))
}

/// `T`: the candidate concepts out of what [`read`] and [`read_again`] gave, in the order of the summaries. Empty ones are dropped; after
/// all others, each whose last word is design, designs, graphic or graphics is given a twin with " background" (a diffusion model can
/// draw that); of duplicates the first stays.
pub fn candidates<T: AsRef<str>>(concepts: &[T]) -> Result<Vec<String>, NoConcept> {
    let originals = concepts.iter().map(AsRef::as_ref).filter(|concept| !concept.is_empty());
    let vague = |concept: &&str| matches!(concept.split_whitespace().next_back(), Some("design" | "designs" | "graphic" | "graphics"));
    let twins = originals.clone().filter(vague).map(|concept| format!("{concept} background"));
    first_of_each(originals.clone().map(str::to_owned).chain(twins))
}

/// `T` for selection alone (3.3): the caller's candidates, trimmed, without empty ones and repetitions, and otherwise as they are.
pub fn given_candidates<T: AsRef<str>>(concepts: &[T]) -> Result<Vec<String>, NoConcept> {
    first_of_each(concepts.iter().map(|concept| concept.as_ref().trim().to_owned()).filter(|concept| !concept.is_empty()))
}

fn after_colon(answer: &str) -> &str {
    answer.split_once(':').map_or(answer, |(_, after)| after)
}

fn cleaned(answer: &str) -> String {
    const QUOTES: [(char, char); 5] = [('"', '"'), ('\'', '\''), ('“', '”'), ('‘', '’'), ('`', '`')];
    let mut text = answer;
    loop {
        let before = text;
        text = text.trim();
        if let Some(inner) = QUOTES.iter().find_map(|&(open, close)| text.strip_prefix(open)?.strip_suffix(close)) {
            text = inner;
        }
        text = text.strip_suffix('.').unwrap_or(text);
        if text == before {
            return text.to_lowercase();
        }
    }
}

fn first_of_each(concepts: impl Iterator<Item = String>) -> Result<Vec<String>, NoConcept> {
    let mut kept: Vec<String> = Vec::new();
    for concept in concepts {
        if !kept.contains(&concept) {
            kept.push(concept);
        }
    }
    if kept.is_empty() { Err(NoConcept) } else { Ok(kept) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn concept(answer: &str) -> String {
        match read(answer) {
            Reading::Concept(concept) => concept,
            Reading::AskAgain(parts) => panic!("asks again about {parts:?}"),
        }
    }

    #[test]
    fn answers_lose_what_is_not_the_concept() {
        for (answer, expected) in [
            ("Polka dots", "polka dots"),
            ("  Polka dots.\n", "polka dots"),
            ("\"Polka dots.\"", "polka dots"),
            ("'Polka dots'.", "polka dots"),
            ("“Polka dots”", "polka dots"),
            ("‘Polka dots’", "polka dots"),
            ("`\" Polka dots . \"`", "polka dots"),
            ("Concept label: Polka dots", "polka dots"),
            ("Label: time: Polka dots", "time: polka dots"),
            ("\"Label: polka dots\"", "polka dots\""),
            ("“polka dots\"", "“polka dots\""),
            ("St. Bernard's dogs", "st. bernard's dogs"),
            ("etc...", "etc"),
            ("\"", "\""),
            ("\"\".", ""),
            ("Label:", ""),
            ("ÄPFEL", "äpfel"),
        ] {
            assert_eq!(concept(answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn lists_are_asked_about_once() {
        assert_eq!(read("Cats, dogs , birds."), Reading::AskAgain(vec!["Cats".into(), "dogs".into(), "birds.".into()]));
        assert_eq!(read("a, b: c, d"), Reading::AskAgain(vec!["c".into(), "d".into()]), "the colon comes before the commas");
        assert_eq!(read("a, b: c"), Reading::Concept("c".into()));
        assert_eq!(read("cats,"), Reading::AskAgain(vec!["cats".into()]));
        assert_eq!(read(" , ,"), Reading::Concept(", ,".into()));
        assert_eq!(read_again("Answer: Cats, dogs."), "cats, dogs");
    }

    #[test]
    fn designs_and_graphics_get_a_background_after_all_originals() {
        let t = candidates(&["floral design", "", "design of cats", "graphic", "floral design", "redesign", "floral design background"]);
        assert_eq!(t.unwrap(), ["floral design", "design of cats", "graphic", "redesign", "floral design background", "graphic background"]);
        let t = candidates(&["red designs", "tile graphics"]).unwrap();
        assert_eq!(t, ["red designs", "tile graphics", "red designs background", "tile graphics background"]);
    }

    #[test]
    fn callers_candidates_keep_their_words() {
        let t = given_candidates(&[" Floral design", "Cats, dogs.", "", "Floral design ", "floral design"]).unwrap();
        assert_eq!(t, ["Floral design", "Cats, dogs.", "floral design"]);
    }

    #[test]
    fn nothing_left_is_an_error() {
        assert_eq!(candidates(&["", ""]), Err(NoConcept));
        assert_eq!(candidates::<&str>(&[]), Err(NoConcept));
        assert_eq!(given_candidates(&[" ", "\n"]), Err(NoConcept));
    }
}
