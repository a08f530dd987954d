//! One channel over several replicas on real ports: shares, and what a killed, a frozen and a slow replica cost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dnd_mesh::{
    auth::Guard,
    balance::{Balanced, Watch},
    channel::Dial,
    items,
    retry::Patience,
    server::{Services, serve_on},
};
use dnd_proto::v1::{
    EmbedImagesRequest, EmbedImagesResponse, EmbedTextsRequest, EmbedTextsResponse, Embedding, EmbeddingServiceGetModelRequest,
    EmbeddingServiceGetModelResponse, embed_texts_response,
    embedding_service_client::EmbeddingServiceClient,
    embedding_service_server::{EmbeddingService, EmbeddingServiceServer},
};
use futures::{StreamExt as _, stream};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// Embeds texts, each in so long.
#[derive(Clone)]
struct Replica {
    takes: Duration,
    answered: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl EmbeddingService for Replica {
    async fn get_model(&self, _: Request<EmbeddingServiceGetModelRequest>) -> Result<Response<EmbeddingServiceGetModelResponse>, Status> {
        self.answered.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(EmbeddingServiceGetModelResponse::default()))
    }

    type EmbedImagesStream = items::Responses<EmbedImagesResponse>;

    async fn embed_images(&self, _: Request<Streaming<EmbedImagesRequest>>) -> Result<Response<Self::EmbedImagesStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    type EmbedTextsStream = items::Responses<EmbedTextsResponse>;

    async fn embed_texts(&self, request: Request<Streaming<EmbedTextsRequest>>) -> Result<Response<Self::EmbedTextsStream>, Status> {
        let replica = self.clone();
        let answers = items::answer(request.into_inner(), 4, move |request: EmbedTextsRequest| {
            let replica = replica.clone();
            async move {
                tokio::time::sleep(replica.takes).await;
                replica.answered.fetch_add(1, Ordering::Relaxed);
                EmbedTextsResponse { item_id: request.item_id, result: Some(embed_texts_response::Result::Embedding(Embedding { values: vec![1.0] })) }
            }
        });
        Ok(Response::new(answers))
    }
}

/// A replica with a runtime of its own, so that it can be killed with all its connections.
struct Running {
    address: SocketAddr,
    answered: Arc<AtomicUsize>,
    runtime: Option<Runtime>,
}

impl Running {
    fn start(takes: Duration) -> Self {
        Self::start_at("127.0.0.1:0", takes)
    }

    fn start_at(address: &str, takes: Duration) -> Self {
        let answered = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let services = Services::default().with(EmbeddingServiceServer::new(Replica { takes, answered: Arc::clone(&answered) }));
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
            serve_on(services, Guard::default(), incoming, std::future::pending()).await.unwrap();
        });
        Self { address, answered, runtime: Some(runtime) }
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn over(addresses: &[SocketAddr]) -> Balanced {
    let list: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
    let watch =
        Watch { lookup: Duration::from_secs(1), eject: Duration::from_millis(200), ping: Duration::from_millis(300), ping_timeout: Duration::from_millis(700) };
    Dial::default().watched(&list.join(","), watch).unwrap()
}

/// Has `count` items answered over calls of 16, eight at a time, and tries again what was left open.
async fn embed(channel: &Balanced, count: u64, progress: &AtomicUsize) {
    let ids: Vec<u64> = (0..count).collect();
    let calls = stream::iter(ids.chunks(16)).for_each_concurrent(8, |ids| async move {
        let open = Mutex::new(ids.to_vec());
        let mut patience = Patience::default();
        loop {
            let requests: Vec<_> = open.lock().unwrap().iter().map(|id| EmbedTextsRequest { item_id: *id, text: "a text".into() }).collect();
            if requests.is_empty() {
                return;
            }
            let exchange = async {
                let mut answers = EmbeddingServiceClient::new(channel.clone()).embed_texts(stream::iter(requests)).await?.into_inner();
                while let Some(answer) = answers.message().await? {
                    open.lock().unwrap().retain(|id| *id != answer.item_id);
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<_, Status>(())
            };
            if let Err(status) = exchange.await {
                assert!(patience.wait_after(&status).await, "{status:?}");
            }
        }
    });
    calls.await;
}

#[tokio::test]
async fn no_replica_gets_much_more_than_its_share() {
    let replicas: Vec<Running> = (0..4).map(|_| Running::start(Duration::from_millis(2))).collect();
    let channel = over(&replicas.iter().map(|replica| replica.address).collect::<Vec<_>>());
    embed(&channel, 4000, &AtomicUsize::new(0)).await;
    let shares: Vec<usize> = replicas.iter().map(Running::answered).collect();
    println!("4,000 items over 4 replicas: {shares:?}");
    assert_eq!(shares.iter().sum::<usize>(), 4000);
    assert!(shares.iter().all(|share| *share <= 1300), "{shares:?}");
}

#[tokio::test]
async fn a_killed_a_frozen_and_a_slow_replica_hold_nothing_up() {
    let (fast, slow, mut killed) =
        (Running::start(Duration::from_millis(10)), Running::start(Duration::from_millis(100)), Running::start(Duration::from_millis(10)));
    // Its connections are made, and nothing ever comes back.
    let frozen = TcpListener::bind("127.0.0.1:0").unwrap();
    let channel = over(&[fast.address, slow.address, killed.address, frozen.local_addr().unwrap()]);
    let progress = AtomicUsize::new(0);
    let kill = async {
        while progress.load(Ordering::Relaxed) < 300 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        killed.kill();
    };
    let work = async { tokio::join!(embed(&channel, 1600, &progress), kill) };
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("it ends");
    println!("fast {}, slow {}, killed {}", fast.answered(), slow.answered(), killed.answered());
    assert!(slow.answered() > 0 && 2 * slow.answered() < fast.answered(), "slow {} fast {}", slow.answered(), fast.answered());
}

#[tokio::test]
async fn a_call_that_a_dead_replica_never_saw_is_answered_by_another() {
    let alive = Running::start(Duration::ZERO);
    let dead: Vec<SocketAddr> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()).collect();
    let mut client = EmbeddingServiceClient::new(over(&[&dead[..], &[alive.address]].concat()));
    for _ in 0..20 {
        client.get_model(EmbeddingServiceGetModelRequest {}).await.unwrap();
    }
    assert_eq!(alive.answered(), 20);
    // The last one is asked however often it failed.
    let address = alive.address;
    drop(alive);
    for _ in 0..5 {
        client.get_model(EmbeddingServiceGetModelRequest {}).await.unwrap_err();
    }
    let alive = Running::start_at(&address.to_string(), Duration::ZERO);
    client.get_model(EmbeddingServiceGetModelRequest {}).await.unwrap();
    assert_eq!(alive.answered(), 1);
}
