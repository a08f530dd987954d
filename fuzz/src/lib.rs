//! Where bytes from anyone come in. What an entry does not take it refuses; it never panics, hangs, or takes more memory than its limits.

use std::{fs, path::Path};

use dnd_diffusion::scheduler::{Scheduler, SchedulerConfig};
use dnd_mesh::{fault, parameters, uri};
use dnd_method::{answers as method, prompts};
use dnd_onnx::{
    folder::ModelFolder,
    graph::{Given, Network, Wanted},
    pictures::{PictureLimits, Preprocessor, decode},
    tokenizer::Tokenizer,
};
use dnd_proto::v1::{CaptionRequest, DissectRequest, GenerateRequest, SelectConceptRequest, SummarizeRequest};
use dnd_summarizer::ChatTemplate;
use prost::Message;

/// An entry with its name, which is also that of its folder of seeds.
pub type Entry = (&'static str, fn(&[u8]));

/// All entries.
pub const ENTRIES: [Entry; 6] =
    [("requests", requests), ("pictures", pictures), ("networks", networks), ("tokenizers", tokenizers), ("schedulers", schedulers), ("answers", answers)];

/// Messages, and the checks of what is in them.
pub fn requests(bytes: &[u8]) {
    if let Ok(request) = DissectRequest::decode(bytes) {
        if let Ok(found) = parameters::from_request(request.parameters.as_ref()) {
            let again = parameters::from_request(Some(&parameters::to_message(&found))).expect("what was resolved is right");
            assert_eq!(again, found);
        }
        if let Some(target) = request.target {
            let _ = uri::to_file(&target.uri);
            let _ = target.options.as_ref().map(Given::from);
            let _ = target.preprocessing.map(|said| Preprocessor::new(&said));
        }
    }
    if let Ok(request) = SelectConceptRequest::decode(bytes) {
        let _ = method::given_candidates(&request.concepts);
    }
    if let Ok(request) = SummarizeRequest::decode(bytes) {
        request.descriptions.iter().for_each(|text| drop(fault::check_text("descriptions", text)));
    }
    let _ = GenerateRequest::decode(bytes).map(|request| fault::check_text("concept", &request.concept));
    let _ = CaptionRequest::decode(bytes).map(|request| decode(&request.picture, small()));
}

/// Pictures in all formats.
pub fn pictures(bytes: &[u8]) {
    if let Ok(picture) = decode(bytes, small()) {
        assert!(u64::from(picture.width()) * u64::from(picture.height()) <= small().pixels);
    }
}

/// Small enough that a fuzzer runs often.
fn small() -> PictureLimits {
    PictureLimits { bytes: 1 << 20, pixels: 1 << 20 }
}

/// Networks, and the surgery on them.
pub fn networks(bytes: &[u8]) {
    with_file("net.onnx", bytes, |file| {
        let Ok(network) = Network::read(file) else { return };
        let _ = network.external_files();
        let Ok(layers) = network.layers() else { return };
        let Ok(input) = network.input(&Given::default()) else { return };
        let wanted: Vec<Wanted> = layers.iter().take(4).map(|layer| Wanted::as_is(&layer.value)).collect();
        for layer in layers.iter().take(4) {
            network.layer(&layer.name).expect("a layer is found by the name that it is listed under");
            let _ = (network.is_quantized(&layer.value), network.around(&layer.value));
        }
        let _ = network.layer("conv");
        let _ = network.cut(&input, &wanted);
    });
}

/// Tokenizers and chat templates: files of a tokenizer.json, or a tokenizer_config.json.
pub fn tokenizers(bytes: &[u8]) {
    with_file("tokenizer.json", bytes, |file| {
        if let Ok(tokenizer) = Tokenizer::read(file)
            && let Ok(ids) = tokenizer.encode("a red dog, 図 \u{1F600} <|im_end|>", true)
        {
            let _ = tokenizer.decode(&ids);
        }
    });
    with_file("tokenizer_config.json", bytes, |file| {
        let folder = file.parent().and_then(|folder| ModelFolder::open(folder).ok());
        if let Some(Ok(template)) = folder.map(|folder| ChatTemplate::read(&folder)) {
            let _ = template.render(&prompts::summarize(&["a red dog", "{{ a }}"]));
        }
    });
}

/// scheduler_config.json.
pub fn schedulers(bytes: &[u8]) {
    let Ok(config) = serde_json::from_slice::<SchedulerConfig>(bytes) else { return };
    if let Ok(scheduler) = Scheduler::new(config) {
        for count in [1, 2, 50] {
            let _ = scheduler.schedule(count);
        }
    }
}

/// What a language model answered.
pub fn answers(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = method::read(&text);
    let concepts: Vec<String> = text.lines().map(method::read_again).collect();
    for concept in method::candidates(&concepts).into_iter().chain(method::given_candidates(&concepts)).flatten() {
        assert!(!concept.trim().is_empty(), "a concept has words");
    }
}

fn with_file(name: &str, bytes: &[u8], look: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let file = folder.path().join(name);
    fs::write(&file, bytes).expect("a file in it");
    look(&file);
}
