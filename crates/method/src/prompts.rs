//! What language and diffusion models are asked (A.1.2, 3.3).
//!
//! A conversation is a list of [`Message`]s; its last turn is the user's. A user's turn is the prompt, a space, and the texts joined by
//! ", ". The texts of the examples end in a period, as in the authors' code; live texts are given as they are.

use serde::Serialize;

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The one who asks.
    User,
    /// The language model.
    Assistant,
}

/// Prompt 1 of A.1.2.
pub const SIMPLIFY: &str = "Only state your answer without a period and quotation marks. Do not number your answer. State one coherent and \
    concise concept label that simplifies the following description and deletes any unnecessary details:";

/// Prompt 2 of A.1.2.
pub const SUMMARIZE: &str = "Only state your answer without a period and quotation marks and do not simply repeat the descriptions. State \
    one coherent and concise concept label that is 1-5 words long and can semantically summarize and represent most, not necessarily all, \
    of the conceptual similarities in the following descriptions:";

/// The example of prompt 1, from the authors' code (the paper has none): a description and its answer.
const SIMPLIFY_EXAMPLE: (&str, &str) = ("a red background with a red background and a red background with a red background.", "A red background");

/// The two examples of prompt 2: image captions and their human-identified similarity.
const SUMMARIZE_EXAMPLES: [([&str; 5], &str); 2] = [
    (
        [
            "a purple background with a very soft texture.",
            "a brown background with a diagonal pattern of lines and lines.",
            "a white windmill with a red door and a red door in the middle of the picture.",
            "a beige background with a rough texture of linen.",
            "a beige background with a rough texture and a very soft texture.",
        ],
        "multicolored textiles",
    ),
    (
        [
            "a little girl is sitting in a red tractor with the word sofy on the front.",
            "a toy car sits on a red ottoman in a play room.",
            "a red dress with silver studs and a silver belt.",
            "a red chevrolet camaro is on display at a car show.",
            "a red spool of a cable with the word red on it.",
        ],
        "red-themed scenes",
    ),
];

/// Step 2B: asks to simplify one caption. Prompt 1 with its example.
pub fn simplify(caption: &str) -> Vec<Message> {
    let (description, answer) = SIMPLIFY_EXAMPLE;
    vec![user(SIMPLIFY, &[description]), assistant(answer), user(SIMPLIFY, &[caption])]
}

/// Step 2B: asks what descriptions have in common. Prompt 2 with its examples.
pub fn summarize<T: AsRef<str>>(descriptions: &[T]) -> Vec<Message> {
    let examples = SUMMARIZE_EXAMPLES.iter().flat_map(|(captions, similarity)| [user(SUMMARIZE, captions), assistant(similarity)]);
    examples.chain([user(SUMMARIZE, descriptions)]).collect()
}

/// Asks what the parts of an answer that was itself a list have in common ([`crate::answers::Reading::AskAgain`]). Prompt 2 without
/// examples. (The authors word this one differently.)
pub fn summarize_again<T: AsRef<str>>(parts: &[T]) -> Vec<Message> {
    vec![user(SUMMARIZE, parts)]
}

/// Step 3: what a diffusion model is asked to draw of a concept.
pub fn generate(concept: &str) -> String {
    format!("One realistic image of {concept}")
}

fn user<T: AsRef<str>>(prompt: &str, texts: &[T]) -> Message {
    let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
    Message { role: Role::User, content: format!("{prompt} {}", texts.join(", ")) }
}

fn assistant(answer: &str) -> Message {
    Message { role: Role::Assistant, content: answer.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simplifying_is_prompt_1_with_one_example() {
        let turns = serde_json::to_value(simplify("a photo of a cat sitting on a mat")).unwrap();
        let prompt = "Only state your answer without a period and quotation marks. Do not number your answer. State one coherent and concise concept label that simplifies the following description and deletes any unnecessary details:";
        let expected = serde_json::json!([
            {"role": "user", "content": format!("{prompt} a red background with a red background and a red background with a red background.")},
            {"role": "assistant", "content": "A red background"},
            {"role": "user", "content": format!("{prompt} a photo of a cat sitting on a mat")},
        ]);
        assert_eq!(turns, expected);
    }

    #[test]
    fn summarising_is_prompt_2_with_two_examples() {
        let turns = serde_json::to_value(summarize(&["a cat", "a dog."])).unwrap();
        let prompt = "Only state your answer without a period and quotation marks and do not simply repeat the descriptions. State one coherent and concise concept label that is 1-5 words long and can semantically summarize and represent most, not necessarily all, of the conceptual similarities in the following descriptions:";
        let first = "a purple background with a very soft texture., a brown background with a diagonal pattern of lines and lines., a white windmill with a red door and a red door in the middle of the picture., a beige background with a rough texture of linen., a beige background with a rough texture and a very soft texture.";
        let second = "a little girl is sitting in a red tractor with the word sofy on the front., a toy car sits on a red ottoman in a play room., a red dress with silver studs and a silver belt., a red chevrolet camaro is on display at a car show., a red spool of a cable with the word red on it.";
        let expected = serde_json::json!([
            {"role": "user", "content": format!("{prompt} {first}")},
            {"role": "assistant", "content": "multicolored textiles"},
            {"role": "user", "content": format!("{prompt} {second}")},
            {"role": "assistant", "content": "red-themed scenes"},
            {"role": "user", "content": format!("{prompt} a cat, a dog.")},
        ]);
        assert_eq!(turns, expected);
        assert_eq!(serde_json::to_value(summarize_again(&["a cat", "a dog."])).unwrap(), serde_json::json!([expected[4]]));
    }

    #[test]
    fn drawing() {
        assert_eq!(generate("polka dots"), "One realistic image of polka dots");
    }
}
