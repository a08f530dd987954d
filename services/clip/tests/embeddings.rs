//! CLIP over gRPC, with the sketch suite's model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use dnd_clip::{Clip, add_to};
use dnd_mesh::{
    Slot,
    server::{InProcess, Services},
};
use dnd_onnx::runtime::EngineArgs;
use dnd_proto::v1::{
    EmbedImagesRequest, EmbedTextsRequest, embed_images_response::Result as ImageAnswer, embed_texts_response::Result as TextAnswer,
    embedding_service_client::EmbeddingServiceClient,
};
use dnd_testing::{copy_without, pictures, sketch};
use futures::stream;
use tonic::transport::Channel;

fn start(batch: usize, sessions: usize) -> (InProcess, EmbeddingServiceClient<Channel>) {
    let args = EngineArgs::sized(batch, sessions);
    let server = InProcess::start(add_to(Services::default(), Slot::filled(Clip::load(&sketch("clip"), &args).unwrap())));
    let client = EmbeddingServiceClient::new(server.channel());
    (server, client)
}

/// Embeddings of pictures, none for those that could not be read.
async fn images(client: &mut EmbeddingServiceClient<Channel>, pictures: &[Bytes]) -> Vec<Option<Vec<f32>>> {
    let requests: Vec<_> = (0..).zip(pictures).map(|(item_id, picture)| EmbedImagesRequest { item_id, picture: picture.clone() }).collect();
    let mut answers = client.embed_images(stream::iter(requests)).await.unwrap().into_inner();
    let mut results = vec![None; pictures.len()];
    while let Some(answer) = answers.message().await.unwrap() {
        if let Some(ImageAnswer::Embedding(embedding)) = answer.result {
            results[answer.item_id as usize] = Some(embedding.values);
        }
    }
    results
}

async fn texts(client: &mut EmbeddingServiceClient<Channel>, texts: &[&str]) -> Vec<Vec<f32>> {
    let requests: Vec<_> = (0..).zip(texts).map(|(item_id, text)| EmbedTextsRequest { item_id, text: (*text).to_owned() }).collect();
    let mut answers = client.embed_texts(stream::iter(requests)).await.unwrap().into_inner();
    let mut results = vec![Vec::new(); texts.len()];
    while let Some(answer) = answers.message().await.unwrap() {
        let Some(TextAnswer::Embedding(embedding)) = answer.result else { panic!("{answer:?}") };
        results[answer.item_id as usize] = embedding.values;
    }
    results
}

fn length(embedding: &[f32]) -> f64 {
    embedding.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

#[tokio::test]
async fn an_embedding_depends_on_neither_batch_nor_companions_and_has_unit_length() {
    let all: Vec<Bytes> = pictures(20, 11).into_iter().map(|(_, bytes)| bytes).collect();
    let said = ["red circles", "a large blue star on a yellow background", "", "green horizontal stripes", "polka dots"];
    let (_alone, mut alone) = start(1, 1);
    let (_together, mut together) = start(8, 2);
    let one_by_one = images(&mut alone, &all).await;
    assert_eq!(one_by_one, images(&mut together, &all).await);
    let text_by_text = texts(&mut alone, &said).await;
    assert_eq!(text_by_text, texts(&mut together, &said).await);
    for embedding in one_by_one.iter().flatten().chain(&text_by_text) {
        assert!((length(embedding) - 1.0).abs() < 1e-5);
    }
    assert_eq!(one_by_one[0].as_ref().unwrap().len(), text_by_text[0].len(), "pictures and texts share a space");
}

#[tokio::test]
async fn a_text_is_cut_where_it_gets_too_long() {
    let long = "a red circle and ".repeat(40);
    let (_server, mut client) = start(4, 1);
    let embedded = texts(&mut client, &[&long, &format!("{long} and a blue star"), "a blue star"]).await;
    assert_eq!(embedded[0], embedded[1], "what is cut off changes nothing");
    assert_ne!(embedded[0], embedded[2]);
}

#[tokio::test]
async fn a_bad_picture_leaves_the_others_alone() {
    let good = pictures(1, 1).remove(0).1;
    let (_server, mut client) = start(8, 1);
    let embedded = images(&mut client, &[good.clone(), Bytes::from_static(b"nothing"), good]).await;
    assert!(embedded[1].is_none());
    assert_eq!(embedded[0], embedded[2]);
}

#[test]
fn a_folder_that_cannot_be_right_is_refused_with_what_is_missing() {
    for missing in ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "onnx/vision_model.onnx", "onnx/text_model.onnx"] {
        let folder = tempfile::tempdir().unwrap();
        copy_without(&sketch("clip"), folder.path(), &[missing]);
        let error = Clip::load(folder.path(), &EngineArgs::default()).err().expect(missing).to_string();
        assert!(error.contains(missing), "{missing}: {error}");
    }
    // An encoder without the projection gives vectors that can't be compared with the other's.
    for (encoder, without, output) in
        [("vision_model", "captioner/onnx/vision_model.onnx", "image_embeds"), ("text_model", "diffusion/text_encoder/model.onnx", "text_embeds")]
    {
        let folder = tempfile::tempdir().unwrap();
        copy_without(&sketch("clip"), folder.path(), &[]);
        std::fs::copy(sketch(without), folder.path().join(format!("onnx/{encoder}.onnx"))).unwrap();
        let error = Clip::load(folder.path(), &EngineArgs::default()).err().unwrap().to_string();
        assert!(error.contains(encoder) && error.contains(output) && error.contains("projection"), "{error}");
    }
}
