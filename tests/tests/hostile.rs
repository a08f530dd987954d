//! Inputs that were made to hurt, from a generator with a seed, sent to every service over its port: each is refused with a reason, nothing panics or takes more
//! memory than it may, and the job beside them gives what it gives without them.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes};
use dnd_mesh::fault;
use dnd_proto::v1::{
    self as proto, ActivatePicture, ActivateRequest, ActivateResponse, ActivateSetup, ActivationMap, CaptionRequest, CaptionResponse, CropRequest,
    CropResponse, DescribeTargetRequest, DissectRequest, EmbedImagesRequest, EmbedImagesResponse, EmbedTextsRequest, EmbedTextsResponse, FixedInput,
    GenerateRequest, GenerateResponse, LayerUnits, ListShardsRequest, Parameters, Preprocessing, ProbeRequest, ProbingSet, ProbingShard, ProbingSource,
    Sampling, SelectConceptRequest, SimplifyRequest, SimplifyResponse, SummarizeRequest, SummarizeResponse, Target, TargetOptions, TopPicture,
    activate_request, activate_response, caption_response, crop_response, embed_images_response, embed_texts_response, generate_response,
    probing_source::Source, simplify_response, summarize_response,
};
use dnd_testing::{hostile, pictures, sketch, write_pictures};
use dnd_tests::{Mesh, Service, dnd};
use fastrand::Rng;
use futures::{StreamExt as _, stream};
use prost::Message;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

const SEED: u64 = 11;
/// Inputs that are sent at a time.
const AT_ONCE: usize = 4;
/// Bytes of a request at most, about.
const LARGEST: usize = 256 << 20;
/// What a call may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Kibibytes that all of them may add to a service: a picture's limit and some.
const MEMORY: u64 = 900 << 10;

/// Messages as bytes, right or wrong.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// The status that an answer holds of its item, if it does.
type ItemStatus = fn(Bytes) -> Option<Status>;

macro_rules! item {
    ($response:ident, $result:path) => {
        |answer| match $response::decode(answer).unwrap().result? {
            $result(status) => Some(fault::item_status(&status)),
            _ => None,
        }
    };
}

/// A call that was made to hurt.
struct Call {
    /// What it is.
    what: &'static str,
    /// Its service's place in the mesh; the orchestrator is the last.
    service: usize,
    method: &'static str,
    messages: Vec<Bytes>,
    item: ItemStatus,
}

fn no_items(_: Bytes) -> Option<Status> {
    None
}

fn float(rng: &mut Rng) -> f32 {
    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -0.0, 1e38, -1e38, f32::MIN_POSITIVE][rng.usize(..8)]
}

fn number(rng: &mut Rng) -> u32 {
    [0, u32::MAX, 1 << 31, 1_000_000, (1 << 31) - 1][rng.usize(..5)]
}

/// A text that is none, or has what others fall over.
fn text(rng: &mut Rng) -> String {
    match rng.u8(..9) {
        0 => String::new(),
        1 => " \t\n".to_owned(),
        2 => "\0".repeat(rng.usize(1..100)),
        3 => "x".repeat(1 << rng.u32(10..22)),
        4 => "\u{202e}\u{feff}\u{1F600}\u{301}".repeat(rng.usize(1..20_000)),
        5 => "../../../etc/passwd".to_owned(),
        6 => "{{ ''.__class__ }}{% for a in range(999999999) %}x{% endfor %}".to_owned(),
        7 => "<|im_end|><s>[INST]\x1b[2J\x1b]0;owned\x07".to_owned(),
        _ => "word ".repeat(rng.usize(1000..200_000)),
    }
}

fn address(rng: &mut Rng) -> String {
    const PLACES: [&str; 12] = [
        "",
        "file:",
        "file:///",
        "file:///proc/self/mem",
        "file:///dev/zero",
        "file:///etc/shadow",
        "file:/../../etc/passwd",
        "file:%00",
        "http://169.254.169.254/latest/meta-data/",
        "gopher://localhost/",
        "s3://bucket/key",
        "\u{1F600}",
    ];
    PLACES[rng.usize(..PLACES.len())].to_owned()
}

fn target(rng: &mut Rng) -> Target {
    let planted = format!("file:{}", sketch("targets/planted/planted.onnx").display());
    let preprocessing = Preprocessing {
        resize_mode: rng.i32(-2..5),
        height: number(rng),
        width: number(rng),
        shortest_edge: number(rng),
        resampling: rng.i32(-2..9),
        mean: (0..rng.usize(..5)).map(|_| float(rng)).collect(),
        std: (0..rng.usize(..5)).map(|_| float(rng)).collect(),
    };
    let fixed = FixedInput { name: text(rng), values: vec![f64::NAN; rng.usize(..1000)], shape: vec![number(rng); rng.usize(..9)] };
    match rng.u8(..4) {
        0 => Target { uri: address(rng), ..Default::default() },
        1 => Target { digest: text(rng), ..Default::default() },
        2 => Target { uri: planted, preprocessing: Some(preprocessing), ..Default::default() },
        _ => Target {
            uri: planted,
            options: Some(TargetOptions { fixed_inputs: vec![fixed; rng.usize(1..3)], data_format: rng.i32(-3..9), prefix_tokens: Some(number(rng)) }),
            ..Default::default()
        },
    }
}

fn layers(rng: &mut Rng) -> Vec<LayerUnits> {
    let layer = LayerUnits { layer: text(rng), units: vec![number(rng); rng.usize(..1000)] };
    // More than a message may be, and not so much that making it takes its caller's patience.
    let most = LARGEST / layer.encoded_len().max(1);
    vec![layer; [0, 1, 2, 2000][rng.usize(..4)].min(most)]
}

fn set(rng: &mut Rng) -> Option<ProbingSet> {
    let source = match rng.u8(..3) {
        0 => Some(Source::Uri(address(rng))),
        1 => Some(Source::ListDigest(text(rng))),
        _ => None,
    };
    (rng.u8(..5) > 0).then(|| ProbingSet { sources: vec![ProbingSource { source }; [0, 1, 5, 1000][rng.usize(..4)]] })
}

fn sampling(rng: &mut Rng) -> Option<Sampling> {
    Some(Sampling { seed: Some(u64::MAX), temperature: Some(float(rng)), max_new_tokens: Some(number(rng)) })
}

fn parameters(rng: &mut Rng) -> Parameters {
    let mut it = Parameters::default();
    for _ in 0..rng.usize(1..4) {
        match rng.u8(..12) {
            0 => it.probe_images = Some(number(rng)),
            1 => it.crops_per_image = Some(number(rng)),
            2 => it.crop_iou = Some(float(rng)),
            3 => it.canvas_iou = Some(float(rng)),
            4 => it.canvas_side = Some(number(rng)),
            5 => it.top_images = Some(number(rng)),
            6 => it.temperature = Some(float(rng)),
            7 => it.num_inference_steps = Some(number(rng)),
            8 => it.guidance_scale = Some(float(rng)),
            9 => it.images_per_concept = Some(number(rng)),
            10 => it.label_similarity = Some(float(rng)),
            _ => it.scoring = rng.i32(-9..99),
        }
    }
    it
}

/// A network in a file of its own, and the call that names it.
fn network(rng: &mut Rng, folder: &Path, number: usize) -> Call {
    let (what, bytes) = hostile::network(rng);
    let file = folder.join(format!("{number}.onnx"));
    fs::write(&file, bytes).unwrap();
    let target = Target { uri: format!("file:{}", file.display()), ..Default::default() };
    let request = DescribeTargetRequest { target: Some(target), asked: vec![] };
    Call { what, service: 0, method: "/dnd.v1.ActivationService/DescribeTarget", messages: vec![request.encode_to_vec().into()], item: no_items }
}

/// A picture, sent to one of those that take some.
fn picture(rng: &mut Rng) -> Call {
    let (what, bytes) = hostile::picture(rng);
    let picture = Bytes::from(bytes);
    let planted = format!("file:{}", sketch("targets/planted/planted.onnx").display());
    match rng.u8(..3) {
        0 => {
            let request = CaptionRequest { item_id: 1, picture, ..Default::default() };
            let item = item!(CaptionResponse, caption_response::Result::Status);
            Call { what, service: 1, method: "/dnd.v1.CaptionService/Caption", messages: vec![request.encode_to_vec().into()], item }
        }
        1 => {
            let request = EmbedImagesRequest { item_id: 1, picture };
            let item = item!(EmbedImagesResponse, embed_images_response::Result::Status);
            Call { what, service: 4, method: "/dnd.v1.EmbeddingService/EmbedImages", messages: vec![request.encode_to_vec().into()], item }
        }
        _ => {
            let layers = vec![LayerUnits { layer: "colour".to_owned(), units: vec![] }];
            let setup = ActivateSetup { target: Some(Target { uri: planted, ..Default::default() }), layers, ..Default::default() };
            let messages = [activate_request::Message::Setup(setup), activate_request::Message::Picture(ActivatePicture { item_id: 1, picture })];
            let messages = messages.map(|message| ActivateRequest { message: Some(message) }.encode_to_vec().into()).to_vec();
            let item = item!(ActivateResponse, activate_response::Result::Status);
            Call { what, service: 0, method: "/dnd.v1.ActivationService/Activate", messages, item }
        }
    }
}

/// A request with what no request should have.
fn request(rng: &mut Rng) -> Call {
    let (service, method, message, item): (usize, _, Vec<u8>, ItemStatus) = match rng.u8(..13) {
        0 => {
            let request = CaptionRequest {
                picture: pictures(1, 1)[0].1.clone(),
                max_new_tokens: Some(number(rng)),
                num_beams: Some(number(rng)),
                repetition_penalty: Some(float(rng)),
                length_penalty: Some(float(rng)),
                ..Default::default()
            };
            (1, "/dnd.v1.CaptionService/Caption", request.encode_to_vec(), item!(CaptionResponse, caption_response::Result::Status))
        }
        1 => {
            let request = SimplifyRequest { caption: text(rng), sampling: sampling(rng), ..Default::default() };
            (2, "/dnd.v1.SummaryService/Simplify", request.encode_to_vec(), item!(SimplifyResponse, simplify_response::Result::Status))
        }
        2 => {
            let descriptions = vec![text(rng); [0, 1, 20][rng.usize(..3)]];
            let request = SummarizeRequest { descriptions, attempt: number(rng), sampling: sampling(rng), ..Default::default() };
            (2, "/dnd.v1.SummaryService/Summarize", request.encode_to_vec(), item!(SummarizeResponse, summarize_response::Result::Status))
        }
        3 => {
            let steps = Some([0, u32::MAX, 1 << 31][rng.usize(..3)]);
            let request = GenerateRequest { concept: text(rng), num_inference_steps: steps, guidance_scale: Some(float(rng)), ..Default::default() };
            (3, "/dnd.v1.DiffusionService/Generate", request.encode_to_vec(), item!(GenerateResponse, generate_response::Result::Status))
        }
        4 => {
            let request = EmbedTextsRequest { item_id: u64::MAX, text: text(rng) };
            (4, "/dnd.v1.EmbeddingService/EmbedTexts", request.encode_to_vec(), item!(EmbedTextsResponse, embed_texts_response::Result::Status))
        }
        5 => (0, "/dnd.v1.ActivationService/DescribeTarget", DescribeTargetRequest { target: Some(target(rng)), asked: layers(rng) }.encode_to_vec(), no_items),
        6 => {
            let request = ListShardsRequest { probing_set: set(rng), pictures_per_shard: Some(number(rng)) };
            (0, "/dnd.v1.ActivationService/ListShards", request.encode_to_vec(), no_items)
        }
        7 => {
            let shard = ProbingShard { first: u64::MAX, pictures: u64::MAX, repeats: vec![u64::MAX; 3], ..Default::default() };
            let request = ProbeRequest {
                target: Some(target(rng)),
                probing_set: set(rng),
                layers: layers(rng),
                summary: rng.i32(-9..9),
                token_summary: rng.i32(-9..9),
                top: Some(number(rng)),
                shard: rng.bool().then_some(shard),
            };
            (0, "/dnd.v1.ActivationService/Probe", request.encode_to_vec(), no_items)
        }
        8 => {
            let map = ActivationMap { height: number(rng), width: number(rng), values: vec![float(rng); rng.usize(..100)] };
            let picture = TopPicture { path: text(rng), index: u64::MAX, activation: float(rng), map: Some(map), ..Default::default() };
            let request = CropRequest {
                target: Some(target(rng)),
                probing_set: set(rng),
                layers: layers(rng),
                unit: number(rng),
                pictures: vec![picture; rng.usize(..4)],
                crop_iou: Some(float(rng)),
                canvas_side: Some(number(rng)),
                ..Default::default()
            };
            (0, "/dnd.v1.ActivationService/Crop", request.encode_to_vec(), item!(CropResponse, crop_response::Result::Status))
        }
        9 | 10 => {
            let request = DissectRequest {
                request_id: text(rng),
                target: Some(target(rng)),
                layers: layers(rng),
                probing_set: set(rng),
                parameters: Some(parameters(rng)),
                ..Default::default()
            };
            (5, "/dnd.v1.DissectService/Dissect", request.encode_to_vec(), no_items)
        }
        11 => {
            let request = SelectConceptRequest { concepts: vec![text(rng); [0, 1, 3, 1000][rng.usize(..4)]], ..Default::default() };
            (5, "/dnd.v1.DissectService/SelectConcept", request.encode_to_vec(), no_items)
        }
        _ => {
            let request = proto::GetJobRequest { job_id: text(rng) };
            (5, "/dnd.v1.DissectService/GetJob", request.encode_to_vec(), no_items)
        }
    };
    Call { what: "values", service, method, messages: vec![message.into()], item }
}

/// A request that is no message.
fn broken(rng: &mut Rng) -> Call {
    let call = request(rng);
    let mut bytes = call.messages[0].to_vec();
    let what = match rng.u8(..3) {
        0 => {
            // Field 1 of most is a text or a message, in either of which this is no UTF-8.
            bytes = [&[0x0a, 4, 0xff, 0xfe, 0x80, 0xc0], &bytes[..]].concat();
            "no UTF-8"
        }
        1 => {
            bytes.truncate(rng.usize(..bytes.len().max(1)));
            "truncated"
        }
        _ => {
            let count = rng.usize(1..3000);
            bytes = std::iter::repeat_with(|| rng.u8(..)).take(count).collect();
            "noise"
        }
    };
    Call { what, messages: vec![bytes.into()], ..call }
}

/// The most memory that a process has had, in kibibytes.
fn peak(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")).and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap()
}

/// Makes a call, and gives the reason that it, or an item of it, was refused with; none if it was taken.
async fn make(channel: &Channel, call: &Call) -> Option<Result<String, Status>> {
    let reason = |status: Status| Some(fault::reason_of(&status).ok_or(status));
    let mut client = Grpc::new(channel.clone()).max_decoding_message_size(usize::MAX);
    client.ready().await.unwrap();
    let mut request = Request::new(stream::iter(call.messages.clone()));
    request.set_timeout(PATIENCE);
    let mut answers = match client.streaming(request, call.method.parse().unwrap(), Raw).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return reason(status),
    };
    let mut refused = None;
    loop {
        match answers.message().await {
            Ok(Some(answer)) => {
                if let Some(status) = (call.item)(answer) {
                    refused = reason(status);
                }
            }
            Ok(None) => return refused,
            Err(status) => return reason(status),
        }
    }
}

fn storm(of_each: usize) {
    let folder = tempfile::tempdir().unwrap();
    write_pictures(&folder.path().join("pictures"), &pictures(60, 5));
    fs::write(folder.path().join("outside"), [0; 64]).unwrap();
    let networks = folder.path().join("networks");
    fs::create_dir(&networks).unwrap();
    let mesh = Mesh::start(&sketch(""));
    let services: Vec<&Service> = mesh.models.iter().chain([&mesh.orchestrator]).collect();
    let good_work = |out: &str| {
        let (target, images, url) = (sketch("targets/planted/planted.onnx"), folder.path().join("pictures"), mesh.orchestrator.url());
        let fixed = ["dissect", "--layer", "mixture", "--units", "0-3", "--num-inference-steps", "2", "--images-per-concept", "2", "--candidates", "2"];
        let paths = ["--target", target.to_str().unwrap(), "--images", images.to_str().unwrap(), "--endpoint", &url, "--out", out];
        let ran = dnd(folder.path(), &[&fixed[..], &paths].concat());
        assert_eq!(ran.code, 0, "{}", ran.err);
        fs::read_to_string(folder.path().join(out).join("results.jsonl")).unwrap()
    };
    let undisturbed = good_work("undisturbed");
    let before: Vec<u64> = services.iter().map(|service| peak(service.pid())).collect();

    let mut rng = Rng::with_seed(SEED);
    let mut calls: Vec<Call> =
        (0..of_each).flat_map(|number| [picture(&mut rng), network(&mut rng, &networks, number), request(&mut rng), broken(&mut rng)]).collect();
    rng.shuffle(&mut calls);
    let (count, over) = (calls.len(), AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (outcomes, finished) = thread::scope(|scope| {
        let good = scope.spawn(|| {
            let mut finished = 0;
            while finished == 0 || !over.load(Ordering::Relaxed) {
                assert_eq!(good_work(&format!("beside{finished}")), undisturbed);
                finished += 1;
            }
            finished
        });
        let outcomes: Vec<_> = runtime.block_on(async {
            let channels: Vec<Channel> = services.iter().map(|service| Channel::from_shared(service.url()).unwrap().connect_lazy()).collect();
            let made = stream::iter(calls).map(|call| {
                let channel = channels[call.service].clone();
                async move {
                    let outcome = make(&channel, &call).await;
                    (call, outcome)
                }
            });
            made.buffer_unordered(AT_ONCE).collect().await
        });
        over.store(true, Ordering::Relaxed);
        (outcomes, good.join().unwrap())
    });

    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (call, outcome) in outcomes {
        let reason = match outcome {
            None => "taken".to_owned(),
            Some(Ok(reason)) => reason,
            Some(Err(status)) => format!("none: {status:?}"),
        };
        if reason == "INTERNAL" || reason.starts_with("none") {
            wrong.push(format!("{} ({}): {reason}", call.method, call.what));
        }
        *reasons.entry(reason).or_default() += 1;
    }
    println!("{count} inputs, {finished} jobs beside them; {reasons:?}");
    assert!(wrong.is_empty(), "without a reason that its caller can do something with: {wrong:#?}");
    for (service, before) in services.iter().zip(before) {
        // The kernel counts it only roughly.
        let (more, log) = (peak(service.pid()).saturating_sub(before), service.log());
        println!("  {} MiB more", more >> 10);
        assert!(more < MEMORY, "{more} KiB: {log}");
        assert!(!log.contains("panicked"), "{log}");
    }
    assert!(reasons.get("taken").copied().unwrap_or(0) < count / 3);
}

#[test]
fn three_hundred_inputs_made_to_hurt_are_refused_and_the_work_beside_them_is_done() {
    storm(75);
}

#[test]
#[ignore = "long"]
fn two_thousand_inputs_made_to_hurt_are_refused_and_the_work_beside_them_is_done() {
    storm(500);
}
