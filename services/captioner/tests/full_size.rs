//! BLIP at its published size beside transformers. `tests/parity/captions.py` makes the model and what is expected of it, in $DND_PARITY/captions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::HashSet, env, fs, num::NonZeroUsize, path::PathBuf};

use dnd_captioner::{Captioner, CaptionerArgs, Generation, Picture};
use dnd_onnx::runtime::EngineArgs;
use futures::future::try_join_all;
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Case {
    max_new_tokens: u32,
    min_length: u32,
    num_beams: u32,
    repetition_penalty: f32,
    length_penalty: f32,
    token_ids: Vec<Vec<u32>>,
    /// Tokens, the end token counted, before the reference's two best are as good as equal.
    sure: Vec<usize>,
    texts: Vec<String>,
}

impl Case {
    fn agrees(&self, at: usize, got: &[u32]) -> bool {
        let (want, sure) = (&self.token_ids[at], self.sure[at]);
        if sure > want.len() { got == want } else { got.get(..sure) == Some(&want[..sure]) }
    }
}

#[tokio::test]
#[ignore = "needs the models that tests/parity/captions.py makes, and minutes"]
async fn blip_base_says_what_it_says_in_transformers() {
    let folder = PathBuf::from(env::var_os("DND_PARITY").expect("DND_PARITY names the folder of the models")).join("captions");
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(folder.join("expected.json")).unwrap()).unwrap();
    // All threads, and a picture's beams at a time.
    let args = EngineArgs { batch: NonZeroUsize::new(5).unwrap(), ..EngineArgs::one_session() };
    let captioner = Captioner::load(&folder.join("model"), &CaptionerArgs::default(), &args).unwrap();
    let mut rows = Vec::new();
    for case in &cases {
        let Case { max_new_tokens, min_length, num_beams, repetition_penalty, length_penalty, .. } = *case;
        let generation = Generation { max_new_tokens, min_length, num_beams, repetition_penalty, length_penalty };
        let count = case.token_ids.len();
        let pictures: Vec<_> = (0..count).map(|at| fs::read(folder.join(format!("pictures/{at:02}.png"))).unwrap()).collect();
        let captions = try_join_all(pictures.into_iter().map(|bytes| captioner.caption(Picture { bytes: bytes.into(), generation }))).await.unwrap();

        let exact = (0..count).filter(|at| case.agrees(*at, &captions[*at].token_ids)).count();
        let near = (0..count).filter(|at| case.sure[*at] <= case.token_ids[*at].len()).count();
        let different: HashSet<_> = captions.iter().map(|caption| &caption.token_ids).collect();
        // The first cases are of all pictures; the others differ from them in what they are asked.
        let (control, unlike) = if count >= 32 {
            ("each picture replaced by the next", (0..count).filter(|at| !case.agrees(*at, &captions[(at + 1) % count].token_ids)).count())
        } else {
            let plain = &cases[usize::from(num_beams > 1)];
            let cut = |at: usize| plain.token_ids[at].iter().copied().take(max_new_tokens as usize).collect::<Vec<_>>();
            ("without what is asked", (0..count).filter(|at| !case.agrees(*at, &cut(*at))).count())
        };
        let row = json!({
            "what": format!(
                "BLIP base, random weights, {count} photographs: {}, up to {max_new_tokens} tokens, min_length {min_length}, repetition_penalty {repetition_penalty}, length_penalty {length_penalty}",
                if num_beams == 1 { "greedy".to_owned() } else { format!("{num_beams} beams") },
            ),
            "reference": "transformers 5.24.0",
            "measured": format!("{exact} of {count} token-exact up to near-ties, of which there are {near}; {} different captions", different.len()),
            "limit": format!("{count} of {count}"),
            "control": format!("{control}: {unlike} of {count} differ"),
        });
        println!("{row:#}");
        rows.push(row);
        fs::write(folder.join("measured.json"), serde_json::to_string_pretty(&rows).unwrap() + "\n").unwrap();
        assert!(different.len() >= count / 2, "the captions tell the pictures apart");
        // A shortest length changes only what would be shorter.
        let enough = if count >= 32 { count / 2 } else { 1 };
        assert!(unlike >= enough, "the comparison would not notice a wrong picture or a changed constant");
        assert_eq!(exact, count);
        for (at, (caption, text)) in captions.iter().zip(&case.texts).enumerate() {
            if case.sure[at] > case.token_ids[at].len() {
                assert_eq!(&caption.text, text);
            }
        }
    }
}
