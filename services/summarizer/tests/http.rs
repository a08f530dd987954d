//! A language model over HTTP, against an endpoint on this machine that answers as such endpoints do, faults included.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::{self, Write},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, Response, StatusCode, header},
    routing::{get, post},
};
use dnd_mesh::{
    Slot, fault,
    server::{InProcess, Services},
};
use dnd_method::prompts;
use dnd_onnx::runtime::EngineArgs;
use dnd_proto::v1::{
    Answer, Sampling, SimplifyRequest, SummarizeRequest, SummaryServiceGetModelRequest, Usage, simplify_response, summarize_response,
    summary_service_client::SummaryServiceClient,
};
use dnd_summarizer::{LlmArgs, Summarizer, add_to};
use dnd_testing::HttpServer;
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tonic::{Code, Status, transport::Channel};
use tracing_subscriber::util::SubscriberInitExt as _;

const KEY: &str = "sk-very-secret-0123456789";

/// How the endpoint answers a question.
enum Reply {
    /// With a status, one header, and a body.
    Plain(u16, Option<(header::HeaderName, String)>, String),
    /// Not at all.
    Hang,
    /// With half of what it announces.
    Cut,
    /// With the words of this many bytes.
    Long(usize),
}

fn said(content: Value, finish_reason: &str) -> Reply {
    message(json!({"role": "assistant", "content": content}), finish_reason)
}

fn message(message: Value, finish_reason: &str) -> Reply {
    let body = json!({
        "id": "x", "object": "chat.completion", "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    });
    Reply::Plain(200, None, body.to_string())
}

fn fails(status: u16, body: &Value) -> Reply {
    Reply::Plain(status, None, body.to_string())
}

fn fails_at_once(status: u16) -> Reply {
    Reply::Plain(status, Some((header::RETRY_AFTER, "0".to_owned())), "busy".to_owned())
}

/// What an endpoint was asked.
#[derive(Default)]
struct Log {
    questions: Mutex<Vec<(HeaderMap, Value)>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
}

impl Log {
    fn count(&self) -> usize {
        self.questions.lock().unwrap().len()
    }

    fn question(&self, place: usize) -> (HeaderMap, Value) {
        self.questions.lock().unwrap()[place].clone()
    }
}

/// An endpoint that gives these replies in turn, and then says "Red circles" to everything.
fn endpoint(replies: impl IntoIterator<Item = Reply>) -> (HttpServer, Arc<Log>) {
    let log = Arc::new(Log::default());
    let replies = Arc::new(Mutex::new(replies.into_iter().collect::<VecDeque<_>>()));
    let seen = Arc::clone(&log);
    let answer = move |headers: HeaderMap, body: Bytes| {
        let (seen, replies) = (Arc::clone(&seen), Arc::clone(&replies));
        async move {
            let now = seen.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
            seen.most_in_flight.fetch_max(now, Ordering::SeqCst);
            seen.questions.lock().unwrap().push((headers, serde_json::from_slice(&body).unwrap()));
            let reply = replies.lock().unwrap().pop_front().unwrap_or_else(|| said(json!("Red circles"), "stop"));
            tokio::time::sleep(Duration::from_millis(10)).await;
            seen.in_flight.fetch_sub(1, Ordering::SeqCst);
            match reply {
                Reply::Plain(status, header, body) => {
                    let mut response = Response::builder().status(StatusCode::from_u16(status).unwrap());
                    if let Some((name, value)) = header {
                        response = response.header(name, value);
                    }
                    response.body(Body::from(body)).unwrap()
                }
                Reply::Hang => std::future::pending().await,
                Reply::Cut => {
                    let half = stream::iter([Ok(Bytes::from_static(b"{\"choices\": ["))]).chain(stream::once(async {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        Err(io::Error::other("cut"))
                    }));
                    Response::builder().header(header::CONTENT_LENGTH, 1000).body(Body::from_stream(half)).unwrap()
                }
                Reply::Long(bytes) => {
                    let piece = Bytes::from(vec![b'a'; 1 << 16]);
                    let pieces = stream::repeat_with(move || Ok::<_, Infallible>(piece.clone())).take(bytes >> 16);
                    Response::new(Body::from_stream(pieces))
                }
            }
        }
    };
    let models = || async { json!({"object": "list", "data": [{"id": "m"}]}).to_string() };
    let router = Router::new().route("/v1/chat/completions", post(answer)).route("/v1/models", get(models));
    (HttpServer::start(router), log)
}

fn args(server: &HttpServer) -> LlmArgs {
    LlmArgs { llm_url: Some(format!("{}/v1/", server.url()).parse().unwrap()), llm_model: Some("m".to_owned()), llm_timeout: 1, ..LlmArgs::default() }
}

async fn open(args: LlmArgs) -> Result<Summarizer, dnd_mesh::Fault> {
    let dispatch = tracing::dispatcher::get_default(Clone::clone);
    let open = move || tracing::dispatcher::with_default(&dispatch, || Summarizer::open(Path::new("nowhere"), &EngineArgs::default(), &args));
    tokio::task::spawn_blocking(open).await.unwrap()
}

struct Service {
    _server: InProcess,
    client: SummaryServiceClient<Channel>,
}

impl Service {
    async fn start(args: LlmArgs) -> Self {
        let server = InProcess::start(add_to(Services::default(), Slot::filled(open(args).await.unwrap())));
        let client = SummaryServiceClient::new(server.channel());
        Self { _server: server, client }
    }

    /// Asks for summaries; gives them in the order in which they were asked for.
    async fn summarize(&mut self, requests: Vec<SummarizeRequest>) -> Vec<Result<Answer, Status>> {
        let mut results: Vec<_> = requests.iter().map(|_| None).collect();
        let mut answers = self.client.summarize(stream::iter(requests)).await.unwrap().into_inner();
        while let Some(answer) = answers.message().await.unwrap() {
            results[answer.item_id as usize] = Some(match answer.result.unwrap() {
                summarize_response::Result::Answer(answer) => Ok(answer),
                summarize_response::Result::Status(status) => Err(fault::item_status(&status)),
            });
        }
        results.into_iter().map(Option::unwrap).collect()
    }

    async fn ask(&mut self) -> Result<Answer, Status> {
        self.summarize(vec![question(0)]).await.remove(0)
    }
}

fn question(item_id: u64) -> SummarizeRequest {
    let descriptions = vec!["a red circle".to_owned(), "red circles on grey".to_owned()];
    SummarizeRequest { item_id, descriptions, ..Default::default() }
}

/// A fault with its code, reason, and all parts of its message.
fn fails_with(result: &Result<Answer, Status>, code: Code, reason: &str, parts: &[&str]) {
    let status = result.as_ref().expect_err(reason);
    assert_eq!((status.code(), fault::reason_of(status).as_deref()), (code, Some(reason)), "{}", status.message());
    for part in parts {
        assert!(status.message().contains(part), "{part:?} is not in {:?}", status.message());
    }
}

#[tokio::test]
async fn the_endpoint_is_asked_with_the_methods_prompts_temperature_and_seed_and_the_answer_says_what_it_took() {
    let (server, log) = endpoint([]);
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), format!("{KEY}\n")).unwrap();
    let prices = LlmArgs { llm_price_in: Some(0.5), llm_price_out: Some(1.5), llm_key_file: Some(key.path().to_owned()), ..args(&server) };
    let mut service = Service::start(prices).await;
    let sampling = Sampling { seed: Some(7), temperature: Some(0.3), max_new_tokens: Some(24) };
    let answer = service.summarize(vec![SummarizeRequest { attempt: 3, sampling: Some(sampling), ..question(0) }]).await.remove(0).unwrap();
    let usage = Usage { calls: 1, prompt_tokens: 100, answer_tokens: 10, cost: Some((100.0 * 0.5 + 10.0 * 1.5) / 1e6) };
    assert_eq!(answer, Answer { text: "Red circles".into(), prompt_tokens: 100, answer_tokens: 10, cut_off: false, refused: false, usage: Some(usage) });
    let (headers, body) = log.question(0);
    let messages = json!(prompts::summarize(&question(0).descriptions));
    assert_eq!(messages.as_array().unwrap().len(), 5, "two examples and the question");
    assert_eq!(body, json!({"model": "m", "messages": messages, "temperature": 0.3, "seed": 10, "max_tokens": 24}));
    assert_eq!(headers[header::AUTHORIZATION], format!("Bearer {KEY}"));

    let simplify = SimplifyRequest { item_id: 0, caption: "a red circle".into(), sampling: None };
    let answer = service.client.simplify(stream::iter([simplify])).await.unwrap().into_inner().message().await.unwrap().unwrap();
    assert!(matches!(answer.result, Some(simplify_response::Result::Answer(_))));
    let (_, body) = log.question(1);
    assert_eq!(body, json!({"model": "m", "messages": prompts::simplify("a red circle"), "temperature": 0.3, "seed": 0, "max_tokens": 32}));
}

#[tokio::test]
async fn the_model_is_its_endpoint_and_its_name_and_promises_nothing() {
    let (server, _) = endpoint([]);
    let of = async |url: String, name: &str| {
        let mut service = Service::start(LlmArgs { llm_url: Some(url.parse().unwrap()), llm_model: Some(name.into()), ..args(&server) }).await;
        service.client.get_model(SummaryServiceGetModelRequest {}).await.unwrap().into_inner().model.unwrap()
    };
    let model = of(format!("{}/v1", server.url()), "m").await;
    assert_eq!((model.name.as_str(), model.layout.as_str(), model.engine.as_str(), model.digest.len()), ("m", "openai", "http", 64));
    assert!(model.notice.contains("not promised to repeat"), "{}", model.notice);
    assert_eq!(of(format!("http://user:pass@{}/v1/?key=1", server.address()), "m").await.digest, model.digest, "credentials are no part of it");
    assert_ne!(of(format!("{}/v1", server.url()), "n").await.digest, model.digest);
    assert_ne!(of(format!("{}/v2", server.url()), "m").await.digest, model.digest);
}

#[tokio::test]
async fn what_fails_for_now_is_tried_again() {
    for (what, reply) in [
        ("a server error", fails(500, &json!({"error": {"message": "oops"}}))),
        ("a server error without words", Reply::Plain(502, None, "<html>".into())),
        ("a question that hangs", Reply::Hang),
        ("a connection cut in the answer", Reply::Cut),
    ] {
        let (server, log) = endpoint([reply]);
        let answer = Service::start(args(&server)).await.ask().await;
        assert_eq!(answer.unwrap_or_else(|status| panic!("{what}: {status}")).text, "Red circles", "{what}");
        assert_eq!(log.count(), 2, "{what}");
    }
}

#[tokio::test]
async fn an_endpoint_that_says_when_to_come_back_is_left_alone_until_then() {
    let seconds = || "2".to_owned();
    let date = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(3));
    for (status, after) in [(429, seconds as fn() -> String), (503, date)] {
        let (server, log) = endpoint([Reply::Plain(status, Some((header::RETRY_AFTER, after())), String::new())]);
        let mut service = Service::start(args(&server)).await;
        let since = Instant::now();
        assert_eq!(service.ask().await.unwrap().text, "Red circles");
        // By itself it would be back after a second at the latest; dates have no fractions.
        assert!(since.elapsed() > Duration::from_millis(1500), "{:?}", since.elapsed());
        assert_eq!(log.count(), 2);
    }
    let (server, log) = endpoint([Reply::Plain(429, Some((header::RETRY_AFTER, "7200".into())), "come back later".into())]);
    let answer = Service::start(args(&server)).await.ask().await;
    fails_with(&answer, Code::Unavailable, "LLM_UNAVAILABLE", &["7200 s", "come back later", &server.url()]);
    assert_eq!(log.count(), 1, "that long is not waited");
}

#[tokio::test]
async fn tries_have_an_end() {
    let (server, log) = endpoint(std::iter::repeat_with(|| fails_at_once(503)).take(20));
    let answer = Service::start(args(&server)).await.ask().await;
    fails_with(&answer, Code::Unavailable, "LLM_UNAVAILABLE", &[&server.url(), "503", "busy", "tried 6 times"]);
    assert_eq!(log.count(), 6);
}

#[tokio::test]
async fn what_would_fail_again_is_not_tried_again_and_is_said_with_the_endpoints_own_words() {
    let error = json!({"error": {"message": "the server's own words", "type": "x", "code": null}});
    let quota = json!({"error": {"message": "the server's own words", "code": "insufficient_quota"}});
    for (reply, code, reason) in [
        (fails(400, &error), Code::InvalidArgument, "LLM_REQUEST"),
        (fails(401, &error), Code::Unauthenticated, "LLM_KEY"),
        (fails(403, &json!({"message": "the server's own words"})), Code::PermissionDenied, "LLM_FORBIDDEN"),
        (fails(404, &json!({"detail": "the server's own words"})), Code::NotFound, "LLM_NOT_FOUND"),
        (fails(402, &json!({"error": "the server's own words"})), Code::ResourceExhausted, "LLM_QUOTA"),
        (fails(429, &quota), Code::ResourceExhausted, "LLM_QUOTA"),
        (Reply::Plain(307, Some((header::LOCATION, "/elsewhere".into())), "the server's own words".into()), Code::NotFound, "LLM_NOT_FOUND"),
        (Reply::Plain(200, None, "<html>the server's own words".into()), Code::Internal, "LLM_ANSWER"),
        (fails(200, &error), Code::Internal, "LLM_ANSWER"),
    ] {
        let (server, log) = endpoint([reply]);
        let url = format!("http://user:pass@{}/v1?version=1", server.address()).parse().unwrap();
        let answer = Service::start(LlmArgs { llm_url: Some(url), ..args(&server) }).await.ask().await;
        fails_with(&answer, code, reason, &[&format!("http://{}/v1:", server.address()), "the server's own words"]);
        let message = answer.unwrap_err().message().to_owned();
        assert!(!message.contains("pass") && !message.contains("version=1"), "{message}");
        assert_eq!(log.count(), 1, "{reason}");
    }
}

#[tokio::test]
async fn a_newer_model_that_refuses_max_tokens_is_asked_as_it_wants_and_only_once_in_vain() {
    let message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.";
    let (server, log) = endpoint([fails(400, &json!({"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}))]);
    let mut service = Service::start(args(&server)).await;
    for _ in 0..2 {
        assert_eq!(service.summarize(vec![question(0)]).await.remove(0).unwrap().text, "Red circles");
    }
    let asked: Vec<_> = (0..log.count()).map(|n| log.question(n).1).map(|body| (body["max_tokens"].clone(), body["max_completion_tokens"].clone())).collect();
    assert_eq!(asked, [(json!(32), Value::Null), (Value::Null, json!(32)), (Value::Null, json!(32))]);
}

#[tokio::test]
async fn an_answer_without_end_is_not_read_to_its_end() {
    let (server, log) = endpoint([Reply::Long(64 << 20)]);
    let answer = Service::start(LlmArgs { llm_timeout: 20, ..args(&server) }).await.ask().await;
    fails_with(&answer, Code::Internal, "LLM_ANSWER", &["longer than 1048576 bytes"]);
    assert_eq!(log.count(), 1);
}

#[tokio::test]
async fn an_answer_that_is_empty_refused_or_cut_off_is_asked_for_again_and_then_told_with_its_text() {
    let refusal = || message(json!({"role": "assistant", "content": null, "refusal": "I can't help with that"}), "stop");
    type Case = (&'static str, fn() -> Reply, Answer);
    let cases: [Case; 5] = [
        ("empty", || said(json!("  "), "stop"), Answer::default()),
        ("without content", || said(Value::Null, "stop"), Answer::default()),
        ("refused", refusal, Answer { text: "I can't help with that".into(), refused: true, ..Default::default() }),
        ("filtered", || said(json!("Red"), "content_filter"), Answer { text: "Red".into(), refused: true, ..Default::default() }),
        ("cut off", || said(json!("Red circles, and"), "length"), Answer { text: "Red circles, and".into(), cut_off: true, ..Default::default() }),
    ];
    for (what, reply, expected) in cases {
        let (server, log) = endpoint([reply(), reply(), reply()]);
        let answer = Service::start(args(&server)).await.ask().await.unwrap();
        let usage = Usage { calls: 3, prompt_tokens: 300, answer_tokens: 30, cost: None };
        assert_eq!(answer, Answer { prompt_tokens: 100, answer_tokens: 10, usage: Some(usage), ..expected }, "{what}");
        let seeds: Vec<u64> = (0..log.count()).map(|place| log.question(place).1["seed"].as_u64().unwrap()).collect();
        assert_eq!(seeds, [0, 1000, 2000], "{what}: each attempt draws anew");

        let (server, log) = endpoint([reply()]);
        let answer = Service::start(args(&server)).await.ask().await.unwrap();
        assert_eq!((answer.text.as_str(), answer.usage.unwrap().calls, log.count()), ("Red circles", 2, 2), "{what}");
        assert!(!answer.cut_off && !answer.refused, "{what}");
    }
}

#[tokio::test]
async fn nothing_is_asked_once_the_budget_is_reached() {
    let (server, log) = endpoint([]);
    let priced = LlmArgs { llm_price_in: Some(1000.0), llm_price_out: Some(10_000.0), ..args(&server) };
    // An answer takes 110 tokens, and at these prices 0.2.
    for args in [LlmArgs { llm_budget: Some(300), ..args(&server) }, LlmArgs { llm_budget_cost: Some(0.5), ..priced }] {
        let before = log.count();
        let mut service = Service::start(args).await;
        for _ in 0..3 {
            service.ask().await.unwrap();
        }
        fails_with(&service.ask().await, Code::ResourceExhausted, "LLM_BUDGET", &["3 answers", "300 tokens of prompts", "30 of answers"]);
        assert_eq!(log.count() - before, 3);
    }
    let silent = json!({"choices": [{"message": {"content": "Red circles"}, "finish_reason": "stop"}]});
    let (server, _) = endpoint([fails(200, &silent), fails(200, &silent)]);
    let answer = Service::start(LlmArgs { llm_budget: Some(300), ..args(&server) }).await.ask().await;
    fails_with(&answer, Code::ResourceExhausted, "LLM_BUDGET", &["usage"]);
    let answer = Service::start(args(&server)).await.ask().await.unwrap();
    assert_eq!((answer.text.as_str(), answer.prompt_tokens), ("Red circles", 0), "without a budget it need not say");
}

#[tokio::test]
async fn no_more_calls_are_in_flight_than_were_allowed() {
    let (server, log) = endpoint([]);
    let mut service = Service::start(LlmArgs { llm_concurrency: 3.try_into().unwrap(), ..args(&server) }).await;
    let mut other = service.client.clone();
    let together = tokio::join!(service.summarize((0..15).map(question).collect()), async {
        let answers = other.summarize(stream::iter((0..15).map(question))).await.unwrap().into_inner();
        answers.collect::<Vec<_>>().await
    });
    assert_eq!((together.0.len(), together.1.len(), log.count()), (15, 15, 30));
    assert_eq!(log.most_in_flight.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_or_does_not_take_the_key_is_refused_at_the_start() {
    let gone = {
        let (server, _) = endpoint([]);
        args(&server)
    };
    let fault = open(gone).await.err().unwrap();
    assert!(fault.code() == Code::Unavailable && fault.to_string().contains("no connection"), "{fault}");
    let models = || async { (StatusCode::UNAUTHORIZED, json!({"error": {"message": "who are you?"}}).to_string()) };
    let server = HttpServer::start(Router::new().route("/v1/models", get(models)));
    let fault = open(args(&server)).await.err().unwrap();
    assert_eq!((fault.code(), fault.reason()), (Code::Unauthenticated, "LLM_KEY"));
    assert!(fault.to_string().contains("who are you?") && fault.to_string().contains("DND_LLM_KEY"), "{fault}");
    // One that has no list of models may be right all the same.
    assert!(open(args(&HttpServer::start(Router::new()))).await.is_ok());
}

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_key_is_in_no_log_no_error_no_answer_and_no_description() {
    let captured = Captured::default();
    let writer = captured.clone();
    let _logs = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish().set_default();
    // It sends the key back wherever it can.
    let back = format!("Incorrect API key provided: {KEY}");
    let error = json!({"error": {"message": back}});
    let (server, log) =
        endpoint([fails(500, &error), said(json!(back), "stop"), fails(401, &error), fails(400, &json!(back)), Reply::Plain(200, None, back.clone())]);
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), KEY).unwrap();
    let args = LlmArgs { llm_key_file: Some(key.path().to_owned()), ..args(&server) };
    let mut told = format!("{args:?}");
    let mut service = Service::start(args).await;
    for _ in 0..4 {
        told += &format!("{:?}", service.ask().await);
    }
    told += &format!("{:?}", service.client.get_model(SummaryServiceGetModelRequest {}).await.unwrap());
    assert_eq!(log.count(), 5);
    assert!((0..5).all(|place| log.question(place).0[header::AUTHORIZATION].to_str().unwrap().contains(KEY)), "it was sent");
    let logs = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
    assert!(logs.contains("trying again") && logs.contains("hyper"), "what libraries log is looked at, too: {logs}");
    assert!(told.contains("Incorrect API key provided: [key]"), "{told}");
    assert!(!logs.contains(KEY) && !told.contains(KEY));
}
