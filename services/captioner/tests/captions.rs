//! The captioner over gRPC, with the sketch suite's model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use dnd_captioner::{Captioner, CaptionerArgs, Generation, Picture, add_to};
use dnd_clip::Clip;
use dnd_mesh::{
    Slot, fault,
    server::{InProcess, Services},
};
use dnd_onnx::{
    format::{
        GraphProto, ModelProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto::Dimension, type_proto,
    },
    runtime::EngineArgs,
};
use dnd_proto::v1::{Caption, CaptionRequest, CaptionServiceGetModelRequest, caption_response::Result as Answer, caption_service_client::CaptionServiceClient};
use dnd_testing::{copy_without, pictures, sketch};
use futures::stream;
use prost::Message as _;
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt as _;

fn start(batch: usize, sessions: usize) -> (InProcess, CaptionServiceClient<Channel>) {
    let args = EngineArgs::sized(batch, sessions);
    let captioner = Captioner::load(&sketch("captioner"), &CaptionerArgs::default(), &args).unwrap();
    let server = InProcess::start(add_to(Services::default(), Slot::filled(captioner)));
    let client = CaptionServiceClient::new(server.channel());
    (server, client)
}

async fn caption(client: &mut CaptionServiceClient<Channel>, requests: Vec<CaptionRequest>) -> Vec<Answer> {
    let count = requests.len();
    let mut answers = client.caption(stream::iter(requests)).await.unwrap().into_inner();
    let mut results: Vec<Option<Answer>> = vec![None; count];
    while let Some(answer) = answers.message().await.unwrap() {
        results[answer.item_id as usize] = answer.result;
    }
    results.into_iter().map(|result| result.expect("every item is answered")).collect()
}

fn requests(pictures: impl IntoIterator<Item = Bytes>) -> Vec<CaptionRequest> {
    (0..).zip(pictures).map(|(item_id, picture)| CaptionRequest { item_id, picture, ..Default::default() }).collect()
}

fn captions(answers: Vec<Answer>) -> Vec<Caption> {
    answers
        .into_iter()
        .map(|answer| match answer {
            Answer::Caption(caption) => caption,
            Answer::Status(status) => panic!("{}", status.message),
        })
        .collect()
}

#[tokio::test]
async fn a_caption_depends_on_neither_batch_nor_companions() {
    let pictures: Vec<Bytes> = pictures(24, 7).into_iter().map(|(_, bytes)| bytes).collect();
    let (_alone, mut alone) = start(1, 1);
    let (_together, mut together) = start(8, 2);
    let one_by_one = captions(caption(&mut alone, requests(pictures.clone())).await);
    let batched = captions(caption(&mut together, requests(pictures.clone())).await);
    let reversed = captions(caption(&mut together, requests(pictures.into_iter().rev())).await);
    assert_eq!(one_by_one, batched);
    assert_eq!(one_by_one, reversed.into_iter().rev().collect::<Vec<_>>());
    let different: HashSet<&str> = one_by_one.iter().map(|caption| caption.text.as_str()).collect();
    assert!(different.len() > 6, "the model tells pictures apart: {different:?}");
}

#[tokio::test]
async fn a_bad_picture_is_answered_and_the_stream_goes_on() {
    let good = pictures(1, 1).remove(0).1;
    let truncated = good.slice(..good.len() / 2);
    let (_server, mut client) = start(8, 1);
    let answers = caption(&mut client, requests([good.clone(), Bytes::new(), Bytes::from_static(b"just text"), truncated, good])).await;
    let reasons: Vec<Option<String>> = answers
        .iter()
        .map(|answer| match answer {
            Answer::Caption(_) => None,
            Answer::Status(status) => {
                assert_eq!(status.code, Code::InvalidArgument as i32, "{}", status.message);
                fault::reason_of(&fault::item_status(status))
            }
        })
        .collect();
    let bad = || Some("UNUSABLE_PICTURE".to_owned());
    assert_eq!(reasons, [None, bad(), bad(), bad(), None]);
}

#[tokio::test]
async fn the_length_of_a_caption_is_the_callers() {
    let picture = pictures(1, 3).remove(0).1;
    let (_server, mut client) = start(4, 1);
    let request = |item_id, max_new_tokens, min_length| CaptionRequest { item_id, picture: picture.clone(), max_new_tokens, min_length, ..Default::default() };
    let answers =
        caption(&mut client, vec![request(0, Some(3), None), request(1, Some(24), Some(24)), request(2, Some(0), None), request(3, None, Some(513))]).await;
    let Answer::Caption(short) = &answers[0] else { panic!("{answers:?}") };
    assert!(short.token_ids.len() <= 3);
    let Answer::Caption(long) = &answers[1] else { panic!("{answers:?}") };
    assert!(long.token_ids.len() >= 23, "no end before {} tokens with the start token", 24);
    for (answer, field) in [(&answers[2], "max_new_tokens"), (&answers[3], "min_length")] {
        assert_eq!(field_of(answer), field);
    }
}

/// The field that a request was refused for.
fn field_of(answer: &Answer) -> String {
    let Answer::Status(status) = answer else { panic!("{answer:?}") };
    fault::item_status(status).get_details_bad_request().unwrap().field_violations.remove(0).field
}

#[tokio::test]
async fn beams_and_penalties_are_the_callers_and_checked() {
    let picture = pictures(1, 3).remove(0).1;
    let (_server, mut client) = start(4, 1);
    let with = |change: fn(&mut CaptionRequest)| {
        let mut request = CaptionRequest { picture: picture.clone(), ..Default::default() };
        change(&mut request);
        request
    };
    let wrong = [
        ("num_beams", with(|r| r.num_beams = Some(0))),
        ("num_beams", with(|r| r.num_beams = Some(17))),
        ("repetition_penalty", with(|r| r.repetition_penalty = Some(0.0))),
        ("repetition_penalty", with(|r| r.repetition_penalty = Some(f32::NAN))),
        ("length_penalty", with(|r| r.length_penalty = Some(f32::INFINITY))),
        // The sketch captioner's texts have 64 positions.
        ("max_new_tokens", with(|r| r.max_new_tokens = Some(65))),
    ];
    for (field, request) in wrong {
        assert_eq!(field_of(&caption(&mut client, vec![request]).await[0]), field);
    }
    let usual = captions(caption(&mut client, vec![with(|_| ())]).await).remove(0);
    let said = captions(caption(&mut client, vec![with(|r| (r.num_beams, r.repetition_penalty, r.length_penalty) = (Some(1), Some(1.0), Some(1.0)))]).await);
    assert_eq!(said[0], usual, "these are the defaults");
    let penalised = captions(caption(&mut client, vec![with(|r| r.repetition_penalty = Some(100.0))]).await).remove(0);
    assert_ne!(penalised, usual);
}

#[tokio::test]
async fn captions_from_fixed_concepts_are_those_nearest_to_the_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let concepts = ["a red circle", "a blue background with stripes", "a green star", "a yellow square"];
    let file = folder.path().join("concepts.txt");
    fs::write(&file, format!("\n{}  \n\n", concepts.join("\n"))).unwrap();
    let load = || Captioner::load(&sketch("clip"), &CaptionerArgs { concepts: Some(file.clone()) }, &EngineArgs::sized(4, 1));
    let captioner = load().unwrap();
    assert_eq!(captioner.model().layout, "clip");
    let clip = Clip::load(&sketch("clip"), &EngineArgs::sized(1, 1)).unwrap();
    let mut said = HashSet::new();
    for (_, bytes) in pictures(12, 17) {
        let picture = clip.image(bytes.clone()).await.unwrap().values;
        let mut nearest = ("", f32::MIN);
        for concept in concepts {
            let text = clip.text(concept.to_owned()).await.unwrap().values;
            let cosine = picture.iter().zip(&text).map(|(a, b)| a * b).sum();
            nearest = if cosine > nearest.1 { (concept, cosine) } else { nearest };
        }
        let caption = captioner.caption(Picture { bytes, generation: Generation::default() }).await.unwrap();
        assert_eq!((caption.text.as_str(), caption.token_ids.len()), (nearest.0, 0));
        said.insert(caption.text);
    }
    assert!(said.len() > 1, "{said:?}");

    let before = captioner.model().digest.clone();
    fs::write(&file, "a red circle\n").unwrap();
    let other = load().unwrap();
    assert!(before != other.model().digest && other.model().digest != clip.model().digest, "the digest is of the concepts, too");
    fs::write(&file, " \n").unwrap();
    let error = load().err().unwrap().to_string();
    assert!(error.contains("concepts.txt") && error.contains("one a line"), "{error}");
}

#[tokio::test]
async fn the_model_says_what_it_is_and_nothing_is_answered_before_it_is_there() {
    let (_server, mut client) = start(1, 1);
    let model = client.get_model(CaptionServiceGetModelRequest {}).await.unwrap().into_inner().model.unwrap();
    assert_eq!((model.layout.as_str(), model.digest.len()), ("blip", 64));
    assert!(model.engine.starts_with("onnxruntime") && model.engine.contains("cpu"), "{}", model.engine);
    assert!(model.notice.contains("drawn pictures only"), "{}", model.notice);

    let loading = InProcess::start(add_to(Services::default(), Slot::default()));
    let status = CaptionServiceClient::new(loading.channel()).get_model(CaptionServiceGetModelRequest {}).await.unwrap_err();
    assert_eq!((status.code(), fault::reason_of(&status).as_deref()), (Code::Unavailable, Some("MODEL_LOADING")));
}

#[test]
fn a_folder_that_cannot_be_right_is_refused_with_what_is_missing() {
    for missing in ["config.json", "preprocessor_config.json", "tokenizer.json", "onnx/vision_model.onnx", "onnx/text_decoder_model.onnx"] {
        let folder = tempfile::tempdir().unwrap();
        copy_without(&sketch("captioner"), folder.path(), &[missing]);
        let error = Captioner::load(folder.path(), &CaptionerArgs::default(), &EngineArgs::default()).err().expect(missing).to_string();
        assert!(error.contains(missing), "{missing}: {error}");
    }
}

/// What a folder is refused with.
fn refusal(folder: &Path, concepts: Option<&str>) -> String {
    Captioner::load(folder, &CaptionerArgs { concepts: concepts.map(PathBuf::from) }, &EngineArgs::sized(1, 1)).err().expect("it is refused").to_string()
}

#[test]
fn a_model_of_another_kind_is_refused_with_what_would_be_right() {
    let error = refusal(&sketch("clip"), None);
    assert!(error.contains("config.json") && error.contains("--concepts"), "{error}");
    let error = refusal(&sketch("captioner"), Some("words.txt"));
    assert!(error.contains("--concepts words.txt") && error.contains("\"blip\""), "{error}");
    let error = refusal(&sketch("clip"), Some("no/such/words.txt"));
    assert!(error.contains("no/such/words.txt"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"model_type": "git"}"#).unwrap();
    for concepts in [None, Some("words.txt")] {
        let error = refusal(folder.path(), concepts);
        for known in ["\"git\"", "\"blip\"", "\"blip-2\"", "\"vision-encoder-decoder\"", "\"clip\""] {
            assert!(error.contains(known), "{known}: {error}");
        }
    }
}

/// A tiny BLIP-2.
fn blip2() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blip2")
}

#[test]
fn a_blip_2_with_a_part_missing_or_of_another_model_is_refused_by_the_name_of_the_part() {
    let needed =
        ["config.json", "preprocessor_config.json", "tokenizer.json", "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx"];
    let folder = tempfile::tempdir().unwrap();
    for missing in needed {
        copy_without(&blip2(), &folder.path().join(missing), &[missing]);
        let error = refusal(&folder.path().join(missing), None);
        assert!(error.contains(&format!("looked for {missing}")), "{missing}: {error}");
    }
    // An encoder's output and embeddings of tokens may be what other models have in these places.
    let (vision, embeddings, decoder) = ("onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx");
    for (place, other, told) in [
        (vision, sketch("captioner/onnx/vision_model.onnx"), "vision_encoder.onnx: not the image encoder of such a model: no output named image_features"),
        (embeddings, blip2().join(decoder), "embed_tokens.onnx: embeds no tokens: no input named input_ids"),
        (embeddings, sketch("captioner/onnx/text_decoder_model.onnx"), "embed_tokens.onnx: embeds no tokens: no output named inputs_embeds"),
        (decoder, sketch("captioner/onnx/text_decoder_model.onnx"), "decoder_model_merged.onnx: not a text decoder: no input named inputs_embeds"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        copy_without(&blip2(), folder.path(), &[place]);
        fs::copy(other, folder.path().join(place)).unwrap();
        let error = refusal(folder.path(), None);
        assert!(error.contains(told), "{told:?} is not in: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    copy_without(&blip2(), folder.path(), &[]);
    let config = fs::read_to_string(blip2().join("config.json")).unwrap();
    fs::write(folder.path().join("config.json"), config.replace("image_token_index", "image_token")).unwrap();
    let error = refusal(folder.path(), None);
    assert!(error.contains("config.json") && error.contains("image_token_index"), "{error}");
}

#[tokio::test]
async fn the_picture_takes_its_part_of_the_longest_text_of_a_blip_2() {
    let captioner = Captioner::load(&blip2(), &CaptionerArgs::default(), &EngineArgs::sized(1, 1)).unwrap();
    assert_eq!(captioner.model().layout, "blip-2");
    let picture = pictures(1, 3).remove(0).1;
    // Its texts have 48 positions, and a picture is 4 of them.
    let caption = |max_new_tokens| {
        captioner.caption(Picture { bytes: picture.clone(), generation: Generation { max_new_tokens, min_length: 44, ..Generation::default() } })
    };
    assert!(caption(44).await.unwrap().token_ids.len() >= 43);
    let fault = caption(45).await.unwrap_err().to_string();
    assert!(fault.contains("44 tokens at most"), "{fault}");
}

/// The sketch captioner with its text decoder changed.
fn with_decoder(change: impl FnOnce(&mut GraphProto)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_without(&sketch("captioner"), folder.path(), &[]);
    let file = folder.path().join("onnx/text_decoder_model.onnx");
    let mut model = ModelProto::decode(fs::read(&file).unwrap().as_slice()).unwrap();
    change(model.graph.as_mut().unwrap());
    fs::write(file, model.encode_to_vec()).unwrap();
    folder
}

#[test]
fn a_decoder_without_its_past_is_refused_with_what_would_be_right() {
    // The past is none, for good.
    let folder = with_decoder(|graph| {
        let (past, rest) = graph.input.drain(..).partition(|input| input.name().starts_with("past_key_values."));
        graph.input = rest;
        let none = |input: ValueInfoProto| TensorProto { name: input.name, data_type: Some(1), dims: vec![1, 4, 0, 32], ..Default::default() };
        graph.initializer.extend(Vec::into_iter(past).map(none));
    });
    let error = refusal(folder.path(), None);
    assert!(error.contains("text_decoder_model.onnx") && error.contains("past_key_values.0.key") && error.contains("decoder_model_merged.onnx"), "{error}");

    let folder = with_decoder(|graph| graph.output.retain(|output| output.name() != "present.1.value"));
    assert!(refusal(folder.path(), None).contains("present.1.value"));
    // Half of a pair.
    let folder = tempfile::tempdir().unwrap();
    copy_without(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vit_gpt2"), folder.path(), &["onnx/decoder_model_merged_fp16.onnx"]);
    let onnx = folder.path().join("onnx");
    fs::rename(onnx.join("decoder_model_merged.onnx"), onnx.join("decoder_model.onnx")).unwrap();
    let error = refusal(folder.path(), None);
    assert!(error.contains("decoder_model.onnx") && error.contains("use decoder_model_merged.onnx"), "{error}");
}

/// An input of the network: numbers of a type, of so many axes.
fn input(name: &str, elem_type: i32, axes: usize) -> ValueInfoProto {
    let shape = TensorShapeProto { dim: vec![Dimension::default(); axes] };
    let tensor = type_proto::Tensor { elem_type: Some(elem_type), shape: Some(shape) };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(r#type), ..Default::default() }
}

#[tokio::test]
async fn a_decoder_is_fed_what_it_declares_and_nothing_unknown() {
    const INT32: i32 = 6;
    const INT64: i32 = 7;
    let picture = pictures(1, 3).remove(0).1;
    let say = async |folder: &Path| {
        let captioner = Captioner::load(folder, &CaptionerArgs::default(), &EngineArgs::sized(1, 1)).unwrap();
        captioner.caption(Picture { bytes: picture.clone(), generation: Generation { num_beams: 2, ..Generation::default() } }).await.unwrap()
    };
    let plain = say(&sketch("captioner")).await;
    for (mask, positions, axes) in [(INT64, INT64, 0), (INT32, INT32, 1)] {
        let more = [input("attention_mask", mask, 2), input("position_ids", positions, 2), input("num_logits_to_keep", INT64, axes)];
        let folder = with_decoder(|graph| graph.input.extend(more));
        assert_eq!(say(folder.path()).await, plain);
    }
    let error = refusal(with_decoder(|graph| graph.input.push(input("token_type_ids", INT64, 2))).path(), None);
    assert!(error.contains("text_decoder_model.onnx") && error.contains("token_type_ids"), "{error}");
}

#[test]
fn external_data_that_is_missing_is_named() {
    let folder = with_decoder(|graph| {
        let largest = graph.initializer.iter_mut().max_by_key(|tensor| tensor.raw_data().len()).unwrap();
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
        largest.external_data = vec![entry("location", "text_decoder_model.onnx_data".to_owned()), entry("length", largest.raw_data().len().to_string())];
        largest.data_location = Some(1);
        largest.raw_data = None;
    });
    let error = refusal(folder.path(), None);
    assert!(error.contains("text_decoder_model.onnx_data"), "{error}");
}
