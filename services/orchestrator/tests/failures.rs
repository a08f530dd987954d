//! What becomes of a job whose model services fail in part: each failure has its place, and takes nothing from the rest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod stand_ins;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dnd_mesh::{Fault, blobs, fault};
use dnd_orchestrator::{DataArgs, OrchestratorArgs};
use dnd_proto::v1::{
    Answer, DissectRequest, JobDone, JobPaused, Parameters, SelectConceptRequest, SummarizeRequest, UnitResult, UnitState, Usage,
    dissect_service_client::DissectServiceClient, job_event::Event, select_concept_request::Images,
};
use tonic::{Code, Request, Status, Streaming};

use stand_ins::{Behaviour, Fakes, orchestrator, png, request, said};

/// Runs a job over the stand-ins on three live units and a dead one; gives the results in the order of the units.
async fn run(behaviour: Behaviour) -> (Vec<UnitResult>, Arc<Behaviour>) {
    run_with(behaviour, Parameters::default()).await
}

async fn run_with(behaviour: Behaviour, parameters: Parameters) -> (Vec<UnitResult>, Arc<Behaviour>) {
    let (mut units, done, calls) = run_to_the_end(behaviour, parameters, OrchestratorArgs::default()).await;
    let done = done.unwrap();
    assert_eq!((done.labelled + done.failed + done.dead, done.dead), (4, 1));
    units.sort_by_key(|unit| unit.unit);
    assert_eq!(units.len(), 4);
    assert_eq!(units.pop().unwrap().state(), UnitState::Dead);
    (units, calls)
}

/// As [`run`], whatever the job's end: the units as they were finished, and how it ended, or what it waits for.
async fn run_to_the_end(behaviour: Behaviour, parameters: Parameters, args: OrchestratorArgs) -> (Vec<UnitResult>, Result<JobDone, JobPaused>, Arc<Behaviour>) {
    run_over(&DataArgs::default(), behaviour, parameters, args).await
}

/// As [`run_to_the_end`], with what is kept there.
async fn run_over(
    data: &DataArgs,
    behaviour: Behaviour,
    parameters: Parameters,
    args: OrchestratorArgs,
) -> (Vec<UnitResult>, Result<JobDone, JobPaused>, Arc<Behaviour>) {
    let fakes = Fakes(Arc::new(behaviour));
    let models = fakes.start();
    let server = orchestrator(&models, data, &args).await;
    let request = request(vec![0, 1, 2, 99], Parameters { images_per_concept: Some(4), ..parameters });
    let mut events = DissectServiceClient::new(server.channel()).dissect(request).await.unwrap().into_inner();
    let mut units = Vec::new();
    loop {
        match events.message().await.map(|response| response.unwrap().event.unwrap().event.unwrap()) {
            Ok(Event::Unit(unit)) => units.push(unit),
            Ok(Event::Done(done)) => return (units, Ok(done), fakes.0),
            Ok(Event::Paused(paused)) if !paused.by_itself => return (units, Err(paused), fakes.0),
            Ok(_) => {}
            Err(status) => panic!("{status}"),
        }
    }
}

/// What ends a stream that comes to no good end.
async fn broken_off<T>(events: &mut Streaming<T>) -> Status {
    loop {
        if let Err(status) = events.message().await.map(Option::unwrap) {
            return status;
        }
    }
}

fn failed(units: &[UnitResult], reason: &str) {
    for unit in units {
        assert_eq!((unit.state(), unit.reason.as_str(), unit.label.as_str()), (UnitState::Failed, reason, ""), "{}", unit.message);
    }
}

#[tokio::test]
async fn what_units_share_is_made_once() {
    let (units, calls) = run(Behaviour::default()).await;
    for unit in &units {
        assert_eq!((unit.state(), unit.label.as_str()), (UnitState::Labelled, "red circles"), "{} {}", unit.reason, unit.message);
        assert_eq!((unit.images.len(), unit.concepts.len(), unit.answers.len()), (3, 1, 5));
        assert_eq!(unit.images[0].activation, 10.0, "highest first");
    }
    let counted = [&calls.captions, &calls.drawings, &calls.runs].map(|calls| calls.load(Ordering::Relaxed));
    assert_eq!(counted, [3, 4, 4], "three pictures captioned, four drawn and run, for three units");
}

#[tokio::test]
async fn an_image_without_a_caption_is_left_out_and_said_and_without_any_the_unit_fails() {
    let refuses_the_second =
        |picture: &[u8]| if picture == png(1) { Err(Fault::new(Code::InvalidArgument, "UNUSABLE_PICTURE", "broken")) } else { Ok("a red circle".into()) };
    let (units, _) = run(Behaviour { caption: Some(refuses_the_second), ..Default::default() }).await;
    for unit in &units {
        assert_eq!(unit.label, "red circles");
        assert_eq!(unit.images.iter().filter(|image| image.caption.is_empty()).count(), 1);
        assert!(unit.warnings.iter().any(|warning| warning.contains("1.png") && warning.contains("broken")), "{:?}", unit.warnings);
    }
    let refuses_all = |_: &[u8]| Err(Fault::new(Code::InvalidArgument, "UNUSABLE_PICTURE", "broken"));
    failed(&run(Behaviour { caption: Some(refuses_all), ..Default::default() }).await.0, "unusable_picture");
    // What is not the picture's fault is no reason to go on without it.
    let breaks_on_the_second = |picture: &[u8]| if picture == png(1) { Err(Fault::internal("out of memory")) } else { Ok("a red circle".into()) };
    failed(&run(Behaviour { caption: Some(breaks_on_the_second), ..Default::default() }).await.0, "internal");
    failed(&run(Behaviour { caption: Some(|_| Ok("  ".into())), ..Default::default() }).await.0, "no_caption");
}

#[tokio::test]
async fn odd_answers_of_a_language_model_are_read_asked_about_again_or_end_the_unit() {
    let list = |request: &SummarizeRequest| {
        if request.without_examples {
            assert_eq!(request.descriptions, ["red circles", "blue stars"]);
            "Shapes: \"Colorful shapes.\"".to_owned()
        } else {
            "Answer: red circles, blue stars".to_owned()
        }
    };
    let (units, _) = run(Behaviour { summary: Some(list), ..Default::default() }).await;
    for unit in &units {
        assert_eq!(unit.label, "colorful shapes");
        assert_eq!(unit.answers.len(), 10, "each answer is kept as it was");
    }
    failed(&run(Behaviour { summary: Some(|_| String::new()), ..Default::default() }).await.0, "no_concept");
    // A caption that simplifying leaves nothing of is used as it is.
    let (units, _) = run(Behaviour { simplified: Some(|_| " ".into()), ..Default::default() }).await;
    assert!(units.iter().all(|unit| unit.state() == UnitState::Labelled && unit.images.iter().all(|image| image.simplified == image.caption)));
}

#[tokio::test]
async fn an_answer_that_was_refused_cut_off_or_empty_is_no_concept_and_its_text_is_kept() {
    fn odd(request: &SummarizeRequest) -> Result<Answer, Fault> {
        let usage = Some(Usage { calls: 3, prompt_tokens: 300, answer_tokens: 30, cost: Some(0.5) });
        Ok(match request.attempt {
            0 => Answer { text: "I can't help with that".into(), refused: true, usage, ..Default::default() },
            1 => Answer { text: "red circles, and".into(), cut_off: true, usage, ..Default::default() },
            2 => Answer { usage, ..Default::default() },
            _ => Answer { usage, ..said("red circles".into()) },
        })
    }
    let (units, done, _) = run_to_the_end(Behaviour { answer: Some(odd), ..Default::default() }, Parameters::default(), OrchestratorArgs::default()).await;
    for unit in units.iter().filter(|unit| unit.state() == UnitState::Labelled) {
        assert_eq!((unit.concepts.len(), unit.label.as_str()), (1, "red circles"));
        assert_eq!(unit.answers, ["red circles", "red circles"]);
        let warnings = unit.warnings.join("\n");
        for warning in [
            "summary 0 failed: the model refused to answer: \"I can't help with that\"",
            "summary 1 failed: the answer was cut off: \"red circles, and\"",
            "summary 2 failed: the answer was empty",
        ] {
            assert!(warnings.contains(warning), "{warnings}");
        }
    }
    // The units have the same descriptions: one asks, and the others take its answers.
    let all_five = Usage { calls: 15, prompt_tokens: 1500, answer_tokens: 150, cost: Some(2.5) };
    assert_eq!(units.iter().filter_map(|unit| unit.usage).collect::<Vec<_>>(), [all_five]);
    assert_eq!(done.unwrap().usage, Some(all_five));
    let refuses = |_: &SummarizeRequest| Ok(Answer { text: "no".into(), refused: true, ..Default::default() });
    failed(&run(Behaviour { answer: Some(refuses), ..Default::default() }).await.0, "no_concept");
    assert!(run(Behaviour::default()).await.0.iter().all(|unit| unit.usage.is_none()), "a model of the service's own is not counted");
}

#[tokio::test]
async fn a_budget_that_is_reached_pauses_the_job_and_what_is_finished_stays() {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    fn seven_answers(_: &SummarizeRequest) -> Result<Answer, Fault> {
        if ASKED.fetch_add(1, Ordering::SeqCst) < 7 {
            Ok(Answer { usage: Some(Usage { calls: 1, ..Default::default() }), ..said("red circles".into()) })
        } else {
            Err(Fault::new(Code::ResourceExhausted, "LLM_BUDGET", "the budget of 7 answers is reached"))
        }
    }
    let one_by_one = OrchestratorArgs { units_in_flight: 1.try_into().unwrap(), ..OrchestratorArgs::default() };
    // No two units have a description in common.
    let told_apart = |picture: &[u8]| Ok(format!("a circle {}", blobs::digest(picture)));
    let behaviour = Behaviour { answer: Some(seven_answers), caption: Some(told_apart), own_pictures: true, ..Default::default() };
    let (units, done, _) = run_to_the_end(behaviour, Parameters::default(), one_by_one).await;
    let labels: Vec<(u32, &str)> = units.iter().map(|unit| (unit.unit, unit.label.as_str())).collect();
    assert_eq!(labels, [(0, "red circles")], "five answers are the first unit's; the second gets two, and no result");
    let paused = done.unwrap_err();
    assert_eq!((paused.reason.as_str(), paused.message.as_str()), ("LLM_BUDGET", "the budget of 7 answers is reached"));
    assert_eq!(ASKED.load(Ordering::SeqCst), 10, "the third unit is not begun");
}

#[tokio::test]
async fn pictures_that_cannot_be_used_are_left_out_and_without_any_there_is_no_label() {
    let some = |_: &str, index: u32| (index > 0).then(|| png(100 + index as u8));
    let odd = |picture: &[u8]| if picture == png(101) { f32::NAN } else { 1.0 };
    let (units, _) = run(Behaviour { drawing: Some(some), activation: Some(odd), ..Default::default() }).await;
    for unit in &units {
        assert_eq!(unit.label, "red circles");
        let unusable: Vec<&str> = unit.concepts[0].pictures.iter().map(|picture| picture.unusable.as_str()).collect();
        assert_eq!(unusable, ["all one value", "the unit's activation on it is not finite", "", ""]);
        let ranks: Vec<u32> = unit.concepts[0].pictures.iter().map(|picture| picture.rank).collect();
        assert_eq!(ranks, [0, 0, 1, 1], "equal activations share a rank");
    }
    failed(&run(Behaviour { drawing: Some(|_, _| None), ..Default::default() }).await.0, "no_usable_picture");
}

#[tokio::test]
async fn a_service_that_is_away_for_a_moment_costs_a_moment() {
    let (units, calls) = run(Behaviour { away: AtomicUsize::new(2), ..Default::default() }).await;
    assert!(units.iter().all(|unit| unit.state() == UnitState::Labelled));
    assert_eq!(calls.captions.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_call_that_is_over_time_says_which_stage_it_was_at() {
    let models = Fakes(Arc::new(Behaviour { drawing_takes: Duration::from_secs(3600), ..Default::default() })).start();
    let server = orchestrator(&models, &DataArgs::default(), &OrchestratorArgs::default()).await;
    let mut client = DissectServiceClient::new(server.channel());
    let asked = || request(vec![0, 99], Parameters { images_per_concept: Some(4), ..Default::default() });
    let over_time = |status: Status, at: &str| {
        assert_eq!((status.code(), fault::reason_of(&status).as_deref()), (Code::DeadlineExceeded, Some("DEADLINE")), "{status}");
        assert!(status.message().contains(at), "{at}: {}", status.message());
    };

    let mut call = Request::new(asked());
    call.set_timeout(Duration::from_secs(4));
    let mut events = client.dissect(call).await.unwrap().into_inner();
    over_time(broken_off(&mut events).await, "it was at probe 3/3, crop 2/2, caption 2/2, summarize 2/2, generate 1/2, score 1/2");

    let DissectRequest { target, probing_set, parameters, .. } = asked();
    let images = probing_set.map(Images::ProbingSet);
    let select = SelectConceptRequest { target, layer: "layer".into(), unit: 0, concepts: vec!["rings".into()], images, parameters };
    let mut call = Request::new(select);
    call.set_timeout(Duration::from_secs(4));
    let mut events = client.select_concept(call).await.unwrap().into_inner();
    over_time(broken_off(&mut events).await, "it was at generate");
}

#[tokio::test]
async fn the_highest_activating_images_are_of_all_pictures_whatever_is_cropped() {
    for (probe_images, top_images, count) in [(1, 3, 3), (3, 2, 2)] {
        let parameters = Parameters { probe_images: Some(probe_images), top_images: Some(top_images), ..Default::default() };
        let (units, _) = run_with(Behaviour::default(), parameters).await;
        let of_live: Vec<usize> = units.iter().filter(|unit| unit.unit != 99).map(|unit| unit.images.len()).collect();
        assert_eq!(of_live, [count; 3]);
    }
}

#[tokio::test]
async fn a_service_that_is_still_loading_its_model_is_waited_for() {
    let (units, calls) = run(Behaviour { loading: AtomicUsize::new(2), ..Default::default() }).await;
    assert!(units.iter().all(|unit| unit.state() == UnitState::Labelled));
    assert_eq!(calls.loading.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_second_job_over_the_same_inputs_calls_no_model_and_reads_no_picture() {
    let folder = tempfile::tempdir().unwrap();
    let data = DataArgs { data: Some(folder.path().to_owned()), ..Default::default() };
    let one_by_one = || OrchestratorArgs { units_in_flight: 1.try_into().unwrap(), ..OrchestratorArgs::default() };
    let mut results = Vec::new();
    for expected in [[1, 9, 3, 6, 4, 4], [0; 6]] {
        let (mut units, done, calls) = run_over(&data, Behaviour { crops: true, ..Default::default() }, Parameters::default(), one_by_one()).await;
        assert_eq!(done.unwrap().pictures, 3);
        let Behaviour { probes, cropped, read, captions, drawings, runs, .. } = &*calls;
        assert_eq!([probes, cropped, read, captions, drawings, runs].map(|calls| calls.load(Ordering::Relaxed)), expected);
        units.sort_by_key(|unit| unit.unit);
        results.push(units);
    }
    assert_eq!(results[0], results[1]);
    assert_eq!((results[0][0].crops.len(), results[0][0].images.len()), (3, 6));

    // Without the pictures that it refers to what is kept counts for nothing: they are made again, those that units share once.
    for file in std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path()).filter(|file| file.file_name().unwrap().len() == 64) {
        std::fs::remove_file(file).unwrap();
    }
    let (mut units, _, calls) = run_over(&data, Behaviour { crops: true, ..Default::default() }, Parameters::default(), one_by_one()).await;
    let Behaviour { probes, cropped, captions, .. } = &*calls;
    assert_eq!([probes, cropped, captions].map(|calls| calls.load(Ordering::Relaxed)), [1, 3, 0]);
    units.sort_by_key(|unit| unit.unit);
    assert_eq!(units, results[0]);
}

#[tokio::test]
async fn the_better_candidate_wins_and_the_ranked_rest_is_there() {
    let two = |request: &SummarizeRequest| if request.attempt.is_multiple_of(2) { "blue stars".to_owned() } else { "red circles".to_owned() };
    let drawn = |concept: &str, index: u32| Some(png(if concept == "red circles" { 200 } else { 100 } + index as u8));
    let shade = |picture: &[u8]| f32::from(image::load_from_memory(picture).unwrap().to_rgb8().get_pixel(1, 1).0[0]);
    let (units, _) = run(Behaviour { summary: Some(two), drawing: Some(drawn), activation: Some(shade), ..Default::default() }).await;
    for unit in &units {
        let order: Vec<(&str, u32)> = unit.concepts.iter().map(|concept| (concept.concept.as_str(), concept.candidate)).collect();
        assert_eq!(order, [("red circles", 1), ("blue stars", 0)]);
        let scores = unit.concepts[0].scores.as_ref().unwrap();
        assert_eq!((scores.mean, scores.topk_squared), (-2.5, -7.5), "ranks 1 to 4");
        assert_eq!(unit.label, unit.labels[0]);
    }
}
