//! The language model over gRPC, with the sketch suite's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use dnd_mesh::{
    Slot, fault,
    server::{InProcess, Services},
};
use dnd_method::prompts;
use dnd_onnx::runtime::EngineArgs;
use dnd_proto::v1::{
    Answer, Sampling, SimplifyRequest, SummarizeRequest, simplify_response::Result as Simplified, summarize_response::Result as Summarized,
    summary_service_client::SummaryServiceClient,
};
use dnd_summarizer::{Question, Summarizer, add_to};
use dnd_testing::{copy_without, sketch};
use futures::stream;
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt as _;

fn start(batch: usize, sessions: usize) -> (InProcess, SummaryServiceClient<Channel>) {
    let args = EngineArgs::sized(batch, sessions);
    let server = InProcess::start(add_to(Services::default(), Slot::filled(Summarizer::load(&sketch("summarizer"), &args).unwrap())));
    let client = SummaryServiceClient::new(server.channel());
    (server, client)
}

async fn simplify(client: &mut SummaryServiceClient<Channel>, requests: Vec<SimplifyRequest>) -> Vec<Simplified> {
    let mut results: Vec<Option<Simplified>> = vec![None; requests.len()];
    let mut answers = client.simplify(stream::iter(requests)).await.unwrap().into_inner();
    while let Some(answer) = answers.message().await.unwrap() {
        results[answer.item_id as usize] = answer.result;
    }
    results.into_iter().map(|result| result.expect("every item is answered")).collect()
}

async fn summarize(client: &mut SummaryServiceClient<Channel>, requests: Vec<SummarizeRequest>) -> Vec<Summarized> {
    let mut results: Vec<Option<Summarized>> = vec![None; requests.len()];
    let mut answers = client.summarize(stream::iter(requests)).await.unwrap().into_inner();
    while let Some(answer) = answers.message().await.unwrap() {
        results[answer.item_id as usize] = answer.result;
    }
    results.into_iter().map(|result| result.expect("every item is answered")).collect()
}

/// Captions of several lengths, so that not all prompts can share a batch.
fn captions() -> Vec<String> {
    ["a red background", "a large red circle on a blue background", "a picture of a small green star and a large blue ring on a yellow background"]
        .iter()
        .flat_map(|caption| [(*caption).to_owned(), caption.replace("red", "purple"), caption.replace("blue", "orange"), caption.replace("yellow", "pink")])
        .collect()
}

fn requests(captions: &[String], sampling: Sampling) -> Vec<SimplifyRequest> {
    (0..).zip(captions).map(|(item_id, caption)| SimplifyRequest { item_id, caption: caption.clone(), sampling: Some(sampling) }).collect()
}

#[tokio::test]
async fn an_answer_depends_on_neither_batch_nor_companions_even_when_it_is_drawn() {
    let captions = captions();
    let hot = Sampling { temperature: Some(1.5), max_new_tokens: Some(12), ..Default::default() };
    let (_alone, mut alone) = start(1, 1);
    let (_together, mut together) = start(8, 2);
    let one_by_one = simplify(&mut alone, requests(&captions, hot)).await;
    assert_eq!(one_by_one, simplify(&mut together, requests(&captions, hot)).await);
    let backwards: Vec<String> = captions.iter().rev().cloned().collect();
    let mut reversed = simplify(&mut together, requests(&backwards, hot)).await;
    reversed.reverse();
    assert_eq!(one_by_one, reversed);
    let other_seed = simplify(&mut alone, requests(&captions, Sampling { seed: Some(1), ..hot })).await;
    assert_ne!(one_by_one, other_seed, "the seed matters where tokens are drawn");
}

#[tokio::test]
async fn attempts_differ_where_tokens_are_drawn_and_agree_where_they_are_not() {
    let descriptions: Vec<String> = captions().into_iter().take(6).collect();
    let (_server, mut client) = start(8, 1);
    let asked = |temperature: f32| -> Vec<SummarizeRequest> {
        let sampling = Sampling { temperature: Some(temperature), max_new_tokens: Some(12), ..Default::default() };
        (0..4)
            .map(|n| SummarizeRequest { item_id: n, descriptions: descriptions.clone(), attempt: n as u32, without_examples: false, sampling: Some(sampling) })
            .collect()
    };
    let greedy = summarize(&mut client, asked(0.0)).await;
    assert!(greedy.iter().all(|answer| *answer == greedy[0]), "{greedy:?}");
    let drawn = summarize(&mut client, asked(5.0)).await;
    assert!(drawn.iter().any(|answer| *answer != drawn[0]), "{drawn:?}");
}

#[tokio::test]
async fn an_answer_says_how_long_it_and_its_prompt_were_and_whether_it_was_cut_off() {
    let (_server, mut client) = start(1, 1);
    let sampling = |max_new_tokens| Sampling { temperature: Some(0.0), max_new_tokens: Some(max_new_tokens), ..Default::default() };
    let long = "a large red circle and a small blue star on a green background".to_owned();
    let answers = simplify(
        &mut client,
        [requests(std::slice::from_ref(&long), sampling(1)), requests(&["a red background".to_owned(), long], sampling(32))[1..].to_vec()].concat(),
    )
    .await;
    let said = |answer: &Simplified| match answer {
        Simplified::Answer(answer) => answer.clone(),
        Simplified::Status(status) => panic!("{}", status.message),
    };
    let (cut, whole): (Answer, Answer) = (said(&answers[0]), said(&answers[1]));
    assert!(cut.answer_tokens <= 1 && cut.cut_off, "{cut:?}");
    assert_eq!(cut.prompt_tokens, whole.prompt_tokens, "the same prompt");
    assert!(whole.prompt_tokens > 60, "the example is part of it: {whole:?}");
}

#[tokio::test]
async fn an_answer_that_cannot_be_used_is_drawn_again_as_another_attempt_and_at_last_told_as_it_is() {
    let model = Summarizer::load(&sketch("summarizer"), &EngineArgs::sized(8, 1)).unwrap();
    let (_server, mut client) = start(8, 1);
    let (temperature, max_new_tokens) = (2.0, 8);
    let sampling = Sampling { seed: Some(0), temperature: Some(temperature), max_new_tokens: Some(max_new_tokens) };
    let answers = simplify(&mut client, requests(&captions(), sampling)).await;
    let mut drawn = [0; 3];
    for (caption, answer) in captions().iter().zip(answers) {
        let mut expected = None;
        for (again, drawn) in drawn.iter_mut().enumerate() {
            let attempt = again as u32 * 1000;
            let said = model.ask(Question { messages: prompts::simplify(caption), seed: 0, attempt, temperature, max_new_tokens }).await.unwrap();
            *drawn += 1;
            let usable = !said.cut_off && !said.text.is_empty();
            expected = Some(Simplified::Answer(said));
            if usable {
                break;
            }
        }
        assert_eq!(Some(answer), expected, "{caption}");
    }
    assert!(drawn[0] > drawn[1] && drawn[1] > drawn[2] && drawn[2] > 0, "some are right at once, some later: {drawn:?}");
}

#[tokio::test]
async fn a_question_that_cannot_be_asked_is_answered_with_why_and_the_others_go_on() {
    let (_server, mut client) = start(4, 1);
    let good = SimplifyRequest { item_id: 0, caption: "a red background".into(), sampling: Some(Sampling { max_new_tokens: Some(2), ..Default::default() }) };
    let wrong = |item_id, change: fn(&mut SimplifyRequest)| {
        let mut request = SimplifyRequest { item_id, ..good.clone() };
        change(&mut request);
        request
    };
    let requests = vec![
        good.clone(),
        wrong(1, |r| r.caption = " ".into()),
        wrong(2, |r| r.sampling = Some(Sampling { temperature: Some(-1.0), ..Default::default() })),
        wrong(3, |r| r.caption = "red ".repeat(3000)),
    ];
    let answers = simplify(&mut client, requests).await;
    assert!(matches!(answers[0], Simplified::Answer(_)));
    for (answer, field) in answers[1..3].iter().zip(["caption", "sampling.temperature"]) {
        let Simplified::Status(status) = answer else { panic!("{answer:?}") };
        assert_eq!(fault::item_status(status).get_details_bad_request().unwrap().field_violations[0].field, field);
    }
    let Simplified::Status(status) = &answers[3] else { panic!("{answers:?}") };
    let status = fault::item_status(status);
    assert_eq!((status.code(), fault::reason_of(&status).as_deref()), (Code::InvalidArgument, Some("PROMPT_LENGTH")), "{}", status.message());
}

#[test]
fn a_folder_that_cannot_be_right_is_refused_with_what_is_missing() {
    for missing in ["config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx"] {
        let folder = tempfile::tempdir().unwrap();
        copy_without(&sketch("summarizer"), folder.path(), &[missing]);
        let error = Summarizer::load(folder.path(), &EngineArgs::default()).err().expect(missing).to_string();
        assert!(error.contains(missing), "{missing}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    copy_without(&sketch("summarizer"), folder.path(), &[]);
    std::fs::copy(sketch("captioner/onnx/vision_model.onnx"), folder.path().join("onnx/model.onnx")).unwrap();
    let error = Summarizer::load(folder.path(), &EngineArgs::default()).err().unwrap().to_string();
    assert!(error.contains("not a text decoder"), "{error}");
}
