//! Reading what `goldens/make.py` has written.

use serde::de::DeserializeOwned;

/// The cases of one file.
pub(crate) fn goldens<T: DeserializeOwned>(name: &str) -> Vec<T> {
    let path = format!("{}/tests/goldens/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
