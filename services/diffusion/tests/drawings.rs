//! The diffusion model over gRPC, with the sketch suite's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use dnd_diffusion::{Diffusion, add_to};
use dnd_mesh::{
    Slot, fault,
    server::{InProcess, Services},
};
use dnd_onnx::{
    pictures::{PictureLimits, decode},
    runtime::EngineArgs,
};
use dnd_proto::v1::{GenerateRequest, diffusion_service_client::DiffusionServiceClient, generate_response::Result as Answer};
use dnd_testing::{copy_without, sketch};
use futures::stream;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

fn start(batch: usize, sessions: usize) -> (InProcess, DiffusionServiceClient<Channel>) {
    let args = EngineArgs::sized(batch, sessions);
    let server = InProcess::start(add_to(Services::default(), Slot::filled(Diffusion::load(&sketch("diffusion"), &args).unwrap())));
    let client = DiffusionServiceClient::new(server.channel());
    (server, client)
}

async fn draw(client: &mut DiffusionServiceClient<Channel>, requests: Vec<GenerateRequest>) -> Vec<Answer> {
    let mut results: Vec<Option<Answer>> = vec![None; requests.len()];
    let mut answers = client.generate(stream::iter(requests)).await.unwrap().into_inner();
    while let Some(answer) = answers.message().await.unwrap() {
        results[answer.item_id as usize] = answer.result;
    }
    results.into_iter().map(|result| result.expect("every item is answered")).collect()
}

fn pictures(answers: Vec<Answer>) -> Vec<Bytes> {
    answers
        .into_iter()
        .map(|answer| match answer {
            Answer::Picture(picture) => picture,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn request(item_id: u64, concept: &str, index: u32) -> GenerateRequest {
    GenerateRequest { item_id, concept: concept.to_owned(), index, num_inference_steps: Some(4), ..Default::default() }
}

#[tokio::test]
async fn a_picture_depends_on_seed_concept_and_index_and_on_nothing_else() {
    let wanted: Vec<(&str, u32)> =
        vec![("red circles", 0), ("red circles", 1), ("blue stars", 0), ("blue stars", 1), ("red horizontal stripes", 0), ("green squares", 3)];
    let requests =
        |order: &mut dyn Iterator<Item = &(&str, u32)>| (0..).zip(order).map(|(id, (concept, index))| request(id, concept, *index)).collect::<Vec<_>>();
    let (_alone, mut alone) = start(1, 1);
    let (_together, mut together) = start(4, 2);
    let one_by_one = pictures(draw(&mut alone, requests(&mut wanted.iter())).await);
    assert_eq!(one_by_one, pictures(draw(&mut together, requests(&mut wanted.iter())).await));
    let mut reversed = pictures(draw(&mut together, requests(&mut wanted.iter().rev())).await);
    reversed.reverse();
    assert_eq!(one_by_one, reversed);
    let different: std::collections::HashSet<&Bytes> = one_by_one.iter().collect();
    assert_eq!(different.len(), wanted.len(), "index and concept make another picture");
    let other_seed = GenerateRequest { seed: Some(1), ..request(0, "red circles", 0) };
    assert_ne!(pictures(draw(&mut alone, vec![other_seed]).await)[0], one_by_one[0]);
    let decoded = decode(&one_by_one[0], PictureLimits::default()).unwrap();
    assert_eq!(decoded.dimensions(), (64, 64), "the size that the model's configuration says");
}

#[tokio::test]
async fn guidance_leads_towards_the_concept_and_at_one_and_below_there_is_none() {
    let (_server, mut client) = start(4, 1);
    let guided = |item_id, scale| GenerateRequest { guidance_scale: Some(scale), ..request(item_id, "red circles", 0) };
    let drawn = pictures(draw(&mut client, vec![guided(0, 7.5), guided(1, 1.0), guided(2, 0.0), guided(3, 3.0)]).await);
    assert_eq!(drawn[1], drawn[2]);
    assert_ne!(drawn[0], drawn[1]);
    assert_ne!(drawn[0], drawn[3]);
}

#[tokio::test]
async fn a_request_out_of_range_is_answered_by_its_field_and_the_others_go_on() {
    let (_server, mut client) = start(4, 1);
    let wrong = |item_id, change: fn(&mut GenerateRequest)| {
        let mut request = request(item_id, "red circles", 0);
        change(&mut request);
        request
    };
    let requests = vec![
        wrong(0, |r| r.concept = "  ".into()),
        wrong(1, |r| r.num_inference_steps = Some(0)),
        wrong(2, |r| r.guidance_scale = Some(f32::NAN)),
        request(3, "red circles", 0),
    ];
    let answers = draw(&mut client, requests).await;
    for (answer, field) in answers.iter().zip(["concept", "num_inference_steps", "guidance_scale"]) {
        let Answer::Status(status) = answer else { panic!("{answer:?}") };
        assert_eq!(fault::item_status(status).get_details_bad_request().unwrap().field_violations[0].field, field);
    }
    assert!(matches!(answers[3], Answer::Picture(_)));
}

#[test]
fn a_folder_that_cannot_be_right_is_refused_with_what_is_missing() {
    let files = [
        "model_index.json",
        "unet/config.json",
        "unet/model.onnx",
        "text_encoder/model.onnx",
        "vae_decoder/config.json",
        "vae_decoder/model.onnx",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ];
    for missing in files {
        let folder = tempfile::tempdir().unwrap();
        copy_without(&sketch("diffusion"), folder.path(), &[missing]);
        let error = Diffusion::load(folder.path(), &EngineArgs::default()).err().expect(missing).to_string();
        assert!(error.contains(missing), "{missing}: {error}");
    }
}
