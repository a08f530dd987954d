//! The captioner over gRPC, with the sketch suite's model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use dnd_captioner::{Captioner, CaptionerArgs, add_to};
use dnd_mesh::{
    Slot, fault,
    server::{InProcess, Services},
};
use dnd_onnx::runtime::EngineArgs;
use dnd_proto::v1::{Caption, CaptionRequest, CaptionServiceGetModelRequest, caption_response::Result as Answer, caption_service_client::CaptionServiceClient};
use dnd_testing::{copy_without, pictures, sketch};
use futures::stream;
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
    let different: std::collections::HashSet<&str> = one_by_one.iter().map(|caption| caption.text.as_str()).collect();
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
        let Answer::Status(status) = answer else { panic!("{answers:?}") };
        let violations = fault::item_status(status).get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
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
    let error = Captioner::load(&sketch("clip"), &CaptionerArgs::default(), &EngineArgs::default()).err().unwrap().to_string();
    assert!(error.contains("config.json") && error.contains("clip"), "{error}");
}
