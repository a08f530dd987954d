//! The stack around a service whose model takes its time: admission, fairness between callers, deadlines, callers that leave, load, shutdown.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use dnd_mesh::{
    Fault,
    admin::Admin,
    args::{AccessArgs, ServeArgs, TlsArgs},
    balance::Balanced,
    batch::{Batcher, Limits, Stop, Worker},
    channel::Dial,
    deadline, fault, items,
    retry::Patience,
    server::{self, InProcess, Services},
};
use dnd_proto::v1::{
    EmbedImagesRequest, EmbedImagesResponse, EmbedTextsRequest, EmbedTextsResponse, Embedding, EmbeddingServiceGetModelRequest,
    EmbeddingServiceGetModelResponse, embed_texts_response,
    embedding_service_client::EmbeddingServiceClient,
    embedding_service_server::{EmbeddingService, EmbeddingServiceServer},
};
use futures::{StreamExt as _, stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Request, Response, Status, Streaming};

/// Takes as many steps for a text as it has letters, each of them `step` long; fails on an empty one, and on all once it is broken.
struct Model {
    step: Duration,
    steps: Arc<AtomicUsize>,
    broken: Arc<AtomicBool>,
}

impl Worker for Model {
    type Item = String;
    type Output = Embedding;
    type Key = usize;

    fn key(item: &String) -> usize {
        item.len()
    }

    fn warm_up(&mut self) -> Result<(), Fault> {
        if self.broken.load(Ordering::SeqCst) { Err(Fault::internal("out of order")) } else { Ok(()) }
    }

    fn run(&mut self, batch: Vec<String>, stop: &Stop) -> Vec<Result<Embedding, Fault>> {
        if batch[0].is_empty() || self.broken.load(Ordering::SeqCst) {
            return batch.iter().map(|_| Err(Fault::internal("it failed"))).collect();
        }
        for _ in 0..batch[0].len() {
            if let Err(fault) = stop.check() {
                return batch.iter().map(|_| Err(fault.clone())).collect();
            }
            std::thread::sleep(self.step);
            self.steps.fetch_add(1, Ordering::SeqCst);
        }
        batch.iter().map(|_| Ok(Embedding { values: vec![1.0] })).collect()
    }
}

/// Embeds texts with the model, or asks the next hop.
#[derive(Clone)]
struct Server {
    batcher: Arc<Batcher<Model>>,
    next: Option<Balanced>,
}

#[tonic::async_trait]
impl EmbeddingService for Server {
    async fn get_model(&self, _: Request<EmbeddingServiceGetModelRequest>) -> Result<Response<EmbeddingServiceGetModelResponse>, Status> {
        Ok(Response::new(EmbeddingServiceGetModelResponse::default()))
    }

    type EmbedImagesStream = items::Responses<EmbedImagesResponse>;

    async fn embed_images(&self, _: Request<Streaming<EmbedImagesRequest>>) -> Result<Response<Self::EmbedImagesStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type EmbedTextsStream = items::Responses<EmbedTextsResponse>;

    async fn embed_texts(&self, request: Request<Streaming<EmbedTextsRequest>>) -> Result<Response<Self::EmbedTextsStream>, Status> {
        let server = self.clone();
        let answers = items::answer(request.into_inner(), 16, move |request: EmbedTextsRequest| {
            let server = server.clone();
            async move {
                let EmbedTextsRequest { item_id, text } = request;
                let embedded = match server.next {
                    Some(next) => embed(&next, vec![text]).await.map(|_| Embedding { values: vec![2.0] }).map_err(|status| Fault::relayed(&status)),
                    None => server.batcher.submit(text).await,
                };
                let result = match embedded {
                    Ok(embedding) => embed_texts_response::Result::Embedding(embedding),
                    Err(fault) => embed_texts_response::Result::Status(fault.into_item()),
                };
                EmbedTextsResponse { item_id, result: Some(result) }
            }
        });
        Ok(Response::new(answers))
    }
}

/// The services over a model, the steps that it has taken, and what breaks it.
fn services(name: &str, next: Option<Balanced>, step: Duration, limits: Limits) -> (Services, Arc<AtomicUsize>, Arc<AtomicBool>) {
    let (steps, broken) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let model = Model { step, steps: Arc::clone(&steps), broken: Arc::clone(&broken) };
    let batcher = Arc::new(Batcher::start(name, vec![model], limits).unwrap());
    (Services::default().with(EmbeddingServiceServer::new(Server { batcher, next })), steps, broken)
}

struct Running {
    server: InProcess,
    steps: Arc<AtomicUsize>,
}

impl Running {
    fn start(step: Duration, limits: Limits) -> Self {
        Self::before(None, step, limits)
    }

    fn before(next: Option<Balanced>, step: Duration, limits: Limits) -> Self {
        let (services, steps, _) = services("model", next, step, limits);
        Self { server: InProcess::start(services), steps }
    }

    fn channel(&self) -> Balanced {
        self.server.channel().into()
    }

    fn steps(&self) -> usize {
        self.steps.load(Ordering::SeqCst)
    }
}

fn requests(texts: Vec<String>) -> Vec<EmbedTextsRequest> {
    (0..).zip(texts).map(|(item_id, text)| EmbedTextsRequest { item_id, text }).collect()
}

/// Embeds texts over one call; gives when each was answered. The first item that failed fails it.
async fn embed(channel: &Balanced, texts: Vec<String>) -> Result<Vec<Instant>, Status> {
    let mut answers = EmbeddingServiceClient::new(channel.clone()).embed_texts(stream::iter(requests(texts))).await?.into_inner();
    let mut times = Vec::new();
    while let Some(answer) = answers.message().await? {
        match answer.result.unwrap() {
            embed_texts_response::Result::Embedding(_) => times.push(Instant::now()),
            embed_texts_response::Result::Status(status) => return Err(fault::item_status(&status)),
        }
    }
    Ok(times)
}

fn letters(count: usize) -> String {
    "x".repeat(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_items_of_one_caller_do_not_hold_up_the_one_of_another() {
    let running = Running::start(Duration::from_millis(5), Limits { queue: 64, batch: 4 });
    let mut others = Vec::new();
    for _ in 0..2 {
        let channel = running.channel();
        others.push(tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move { embed(&channel, vec![letters(1); 10_000]).await })));
    }
    while running.steps() < 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let before = running.steps();
    embed(&running.channel(), vec![letters(1)]).await.unwrap();
    let batches = running.steps() - before;
    assert!(batches <= 6, "answered after {batches} batches, though it was the next caller's turn");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_whole_calls_with_when_to_come_again_and_who_does_is_answered() {
    let running = Running::start(Duration::from_millis(20), Limits { queue: 4, batch: 2 });
    let mut first = stream::iter(0..30).map(|_| embed_owned(running.channel(), vec![letters(1); 3])).buffer_unordered(30);
    let (mut answered, mut refused) = (0, 0);
    while let Some(outcome) = first.next().await {
        match outcome {
            Ok(times) => {
                assert_eq!(times.len(), 3, "what was taken in is answered to its end");
                answered += 1;
            }
            Err(status) => {
                assert_eq!((status.code(), fault::reason_of(&status).as_deref()), (Code::ResourceExhausted, Some("QUEUE_FULL")), "{status:?}");
                assert!(fault::retry_after(&status).is_some_and(|delay| delay >= Duration::from_millis(100)));
                refused += 1;
            }
        }
    }
    assert!(answered >= 4 && refused >= 10, "{answered} answered, {refused} refused");
    let patient = stream::iter(0..30).for_each_concurrent(30, |_| async {
        let mut patience = Patience::default();
        while let Err(status) = embed(&running.channel(), vec![letters(1); 3]).await {
            assert!(patience.wait_after(&status).await, "{status:?}");
        }
    });
    tokio::time::timeout(Duration::from_secs(60), patient).await.expect("all are answered in the end");
}

async fn embed_owned(channel: Balanced, texts: Vec<String>) -> Result<Vec<Instant>, Status> {
    embed(&channel, texts).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_holds_over_hops_and_the_whole_stream_and_compute_stops_with_it() {
    let model = Running::start(Duration::from_millis(10), Limits { queue: 64, batch: 4 });
    let middle = Running::before(Some(model.channel()), Duration::ZERO, Limits { queue: 64, batch: 4 });
    // The first text is answered within the deadline, the second would take half a minute.
    let since = Instant::now();
    let channel = middle.channel();
    let outcome = deadline::within(Duration::from_millis(1500), async {
        let (first_came, then) = tokio::sync::oneshot::channel();
        let long = stream::once(async {
            then.await.unwrap();
            EmbedTextsRequest { item_id: 1, text: letters(3000) }
        });
        let sent = stream::iter(requests(vec![letters(1)])).chain(long);
        let mut answers = EmbeddingServiceClient::new(channel).embed_texts(sent).await?.into_inner();
        let first = answers.message().await?.unwrap().item_id;
        first_came.send(()).unwrap();
        Ok::<_, Status>((first, answers.message().await))
    });
    let (first, second) = outcome.await.unwrap();
    // Which hop tells of it first is a matter of milliseconds.
    let status = match second {
        Err(status) => status,
        Ok(answer) => match answer.unwrap().result.unwrap() {
            embed_texts_response::Result::Status(status) => fault::item_status(&status),
            other => unreachable!("{other:?}"),
        },
    };
    assert_eq!((first, status.code(), fault::reason_of(&status).as_deref()), (0, Code::DeadlineExceeded, Some("DEADLINE")));
    assert!(status.message().contains("dnd.v1.EmbeddingService/EmbedTexts"), "{status:?}");
    assert!((1000..4000).contains(&since.elapsed().as_millis()), "{:?}", since.elapsed());
    tokio::time::sleep(Duration::from_millis(50)).await;
    let steps = model.steps();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(model.steps(), steps, "nothing goes on at the last hop");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_cancelled_stop_their_compute_within_a_step_and_leave_nothing_behind() {
    cancel(1100).await;
}

/// Cancels calls at random moments: more of them than may be open at a time, so that one that leaves its permit behind is noticed.
async fn cancel(calls: usize) {
    let running = Running::start(Duration::from_millis(2), Limits { queue: 1000, batch: 4 });
    let channel = running.channel();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    embed(&channel, vec![letters(1)]).await.unwrap();
    let before = tasks();
    let cancelled = stream::iter(0..calls).for_each_concurrent(100, |_| async {
        let call = embed(&channel, vec![letters(1000); 1 + fastrand::usize(..20)]);
        let _ = tokio::time::timeout(Duration::from_millis(fastrand::u64(..40)), call).await;
    });
    cancelled.await;
    // The step that was running when the last one left.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let steps = running.steps();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(running.steps(), steps, "nothing is computed for nobody");
    let since = Instant::now();
    embed(&channel, vec![letters(1)]).await.expect("no permit is left behind");
    assert!(since.elapsed() < Duration::from_millis(500), "nothing waits before it: {:?}", since.elapsed());
    assert!(tasks() <= before + 2, "{} tasks, {before} before", tasks());
}

/// A GET over plain HTTP: the status line and the body.
async fn get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_answers_nothing_any_more_ends_its_service_and_inputs_that_it_fails_on_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let port_file = folder.path().join("port");
    let any = || "127.0.0.1:0".parse().unwrap();
    let args = ServeArgs {
        listen: any(),
        admin: Some(any()),
        grace: 5,
        log: String::new(),
        otlp: None,
        port_file: Some(port_file.clone()),
        tls: TlsArgs::default(),
        access: AccessArgs::default(),
    };
    // Measuring begins with the first admin port; a service's model is loaded after that.
    let _measured = Admin::open(any(), None).await.unwrap();
    let (services, _, broken) = services("fragile", None, Duration::from_millis(1), Limits { queue: 64, batch: 4 });
    let (load, loading) = std::sync::mpsc::channel::<()>();
    let served = tokio::spawn(async move {
        let ended = server::serve(&args, services, move || loading.recv().map_err(|e| e.to_string())).await;
        ended.map_err(|error| error.to_string())
    });
    while !port_file.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let admin = std::fs::read_to_string(folder.path().join("port.admin")).unwrap();
    assert_eq!(get(&admin, "/livez").await.0, "HTTP/1.1 200 OK");
    assert_eq!(get(&admin, "/readyz").await, ("HTTP/1.1 503 Service Unavailable".to_owned(), "the model is loading\n".to_owned()));
    load.send(()).unwrap();
    while get(&admin, "/readyz").await.0 != "HTTP/1.1 200 OK" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(get(&admin, "/").await.0, "HTTP/1.1 404 Not Found");

    let channel = Dial::default().lazy(&std::fs::read_to_string(&port_file).unwrap()).unwrap();
    for _ in 0..9 {
        assert_eq!(embed(&channel, vec![String::new()]).await.unwrap_err().code(), Code::Internal);
    }
    assert_eq!(embed(&channel, vec![letters(1)]).await.unwrap().len(), 1);
    assert_eq!(get(&admin, "/readyz").await.0, "HTTP/1.1 200 OK");
    let measured = get(&admin, "/metrics").await.1;
    for line in [
        "dnd_calls_total{service=\"dnd.v1.EmbeddingService\",method=\"EmbedTexts\",code=\"ok\"} ",
        "dnd_engine_failures_total{model=\"fragile\"} 9",
        "dnd_queue_depth_units{model=\"fragile\"} 0",
        "# HELP dnd_batch_size_items ",
    ] {
        assert!(measured.contains(line), "{line} is not in {measured}");
    }

    broken.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        embed(&channel, vec![letters(1)]).await.unwrap_err();
    }
    let last_word = tokio::time::timeout(Duration::from_secs(10), served).await.expect("it ends by itself").unwrap().unwrap_err();
    assert_eq!(last_word, "the fragile model failed 3 times in a row, and then at its warm-up: out of order");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_callers_at_four_times_capacity_are_served_at_capacity() {
    load(Duration::from_secs(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute"]
async fn two_hundred_callers_at_four_times_capacity_for_a_minute() {
    load(Duration::from_secs(60)).await;
}

/// Callers that come four times as fast as they can be served, and again when they are told to.
async fn load(time: Duration) {
    const CALLERS: usize = 200;
    const QUEUE: usize = 40;
    let running = Running::start(Duration::from_millis(40), Limits { queue: QUEUE, batch: 8 });
    let channel = running.channel();
    let alone = Instant::now();
    embed(&channel, vec![letters(1); 200]).await.unwrap();
    let capacity = 200.0 / alone.elapsed().as_secs_f64();
    let memory = resident();
    let end = Instant::now() + time;
    let pause = Duration::from_secs_f64(CALLERS as f64 / (4.0 * capacity));
    let callers = stream::iter(0..CALLERS).map(|_| async {
        let (mut took, mut refused) = (Vec::new(), 0);
        tokio::time::sleep(pause.mul_f64(fastrand::f64())).await;
        while Instant::now() < end {
            let since = Instant::now();
            match embed(&channel, vec![letters(1)]).await {
                Ok(_) => took.push(since.elapsed()),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    assert!(fault::retry_after(&status).is_some(), "{status:?}");
                    refused += 1;
                }
            }
            tokio::time::sleep(pause.saturating_sub(since.elapsed())).await;
        }
        (took, refused)
    });
    let outcomes: Vec<(Vec<Duration>, usize)> = callers.buffer_unordered(CALLERS).collect().await;
    let mut took: Vec<Duration> = outcomes.iter().flat_map(|(took, _)| took).copied().collect();
    let refused: usize = outcomes.iter().map(|(_, refused)| refused).sum();
    took.sort();
    let goodput = took.len() as f64 / time.as_secs_f64();
    let late = took[took.len() * 99 / 100];
    let grown = resident().saturating_sub(memory);
    println!("capacity {capacity:.0} a second, goodput {goodput:.0}, {refused} refused, 99th percentile {late:.0?}, memory grown by {grown} KiB");
    assert!(goodput >= 0.9 * capacity, "{goodput} of {capacity} a second");
    assert!(refused > took.len(), "{refused} of {} calls", took.len() + refused);
    let queued = Duration::from_secs_f64((QUEUE + 16) as f64 / capacity);
    assert!(late < 2 * queued, "the 99th percentile is {late:?}, a full queue {queued:?}");
    assert!(grown < 64 << 10, "memory grew by {grown} KiB");
}

/// Resident memory of this process in KiB.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    4 * statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
}
