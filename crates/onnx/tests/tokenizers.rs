//! Texts of many scripts become the ids that transformers makes of them, and ids the same text again.
//!
//! The texts and digests are made by tests/parity/language_small.py, with the sketch suite's tokenizers: a WordPiece as BERT's, a BPE as CLIP's, and one
//! over bytes as GPT-2's. tests/parity/language.py does it with public vocabularies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, env, fs, path::Path};

use dnd_onnx::{folder::ModelFolder, tokenizer::Tokenizer};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use sha2::{Digest as _, Sha256};

#[derive(Deserialize)]
struct Golden {
    model: String,
    plain: Vec<String>,
    special: Vec<String>,
    decoded: Option<Vec<String>>,
    cleaned_up: Option<Vec<String>>,
}

fn read<T: DeserializeOwned>(path: &Path) -> T {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut sha = Sha256::new();
    for part in parts {
        sha.update((part.len() as u64).to_le_bytes());
        sha.update(part);
    }
    sha.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn ids_digest(ids: &[Vec<u32>]) -> String {
    let bytes: Vec<Vec<u8>> = ids.iter().map(|ids| ids.iter().flat_map(|id| id.to_le_bytes()).collect()).collect();
    digest(bytes.iter().map(Vec::as_slice))
}

/// A model's tokenizer, beside another configuration.
fn tokenizer(model: &Path, config: serde_json::Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(model.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::of(&ModelFolder::open(folder.path()).unwrap(), "").unwrap()
}

#[test]
fn texts_of_many_scripts_have_the_ids_that_transformers_gives_them_and_come_back_as_the_same_text() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let texts: Vec<String> = read(&root.join("tests/goldens/tokenizers/texts.json"));
    assert_eq!(texts.len(), 5000);
    for golden in read::<Vec<Golden>>(&root.join("tests/goldens/tokenizers/digests.json")) {
        let model = root.join("../../models/sketch").join(&golden.model);
        let tokenizer = tokenizer(&model, json!({}));
        let cleaning = self::tokenizer(&model, json!({"clean_up_tokenization_spaces": true}));
        for (hundred, texts) in texts.chunks(100).enumerate() {
            let ids = |special| texts.iter().map(|text| tokenizer.encode(text, special).unwrap()).collect::<Vec<_>>();
            let (plain, special) = (ids(false), ids(true));
            let which = format!("{}, texts {hundred}00 to {hundred}99", golden.model);
            assert_eq!(ids_digest(&plain), golden.plain[hundred], "{which}");
            assert_eq!(ids_digest(&special), golden.special[hundred], "{which}, with special tokens");
            for (tokenizer, expected) in [(&tokenizer, &golden.decoded), (&cleaning, &golden.cleaned_up)] {
                let Some(expected) = expected else { continue };
                let decoded: Vec<String> = special.iter().map(|ids| tokenizer.decode(ids).unwrap()).collect();
                assert_eq!(digest(decoded.iter().map(|text| text.as_bytes())), expected[hundred], "{which}, as text again");
            }
        }
    }
}

#[test]
fn a_folder_without_a_tokenizer_file_is_refused_with_what_makes_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("vocab.txt"), "a").unwrap();
    let error = Tokenizer::of(&ModelFolder::open(folder.path()).unwrap(), "tokenizer/").unwrap_err().to_string();
    assert!(error.contains("tokenizer/tokenizer.json") && error.contains("AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"), "{error}");
}

/// With the vocabularies of BERT, CLIP and SmolLM2.
#[test]
#[ignore = "needs what tests/parity/language.py writes, in the folder DND_PARITY/language"]
fn public_vocabularies_give_the_same_ids() {
    let folder = Path::new(&env::var("DND_PARITY").expect("DND_PARITY")).join("language/tokenizers");
    let texts: Vec<String> = read(&folder.join("texts.json"));
    let parted: BTreeMap<String, String> = read(&folder.join("parted.json"));
    let mut rows = Vec::new();
    for (name, expected) in read::<BTreeMap<String, Vec<Vec<u32>>>>(&folder.join("ids.json")) {
        let tokenizer = Tokenizer::of(&ModelFolder::open(&folder.join(&name)).unwrap(), "").unwrap();
        let differing = |change: fn(&str) -> String| {
            let ids = texts.iter().map(|text| tokenizer.encode(&change(text), false).unwrap());
            ids.zip(&expected).filter(|(ids, expected)| ids != *expected).count()
        };
        let (differ, control) = (differing(str::to_owned), differing(str::to_uppercase));
        rows.push(json!({
            "what": format!("ids of texts of many scripts, {name}"),
            "reference": "transformers 5.24.0",
            "measured": format!("{} of {} equal; {}", texts.len() - differ, texts.len(), parted[&name]),
            "limit": "all",
            "control": format!("in capitals {control} differ"),
        }));
        println!("{name}: {differ} of {} differ; in capitals {control}", texts.len());
        assert!(differ == 0 && control > 100, "{name}");
    }
    fs::write(folder.join("measured.json"), serde_json::to_string_pretty(&rows).unwrap()).unwrap();
}
