//! Stands between orchestrators and the model services, and notes what is asked of them: a process that is killed takes its own counts with it.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
    thread,
    time::{Duration, Instant},
};

use bytes::{Buf as _, Bytes, BytesMut};
use dnd_proto::v1::{ActivateRequest, CropRequest, SimplifyResponse, activate_request, simplify_response};
use http_body::{Body, Frame, SizeHint};
use hyper::{HeaderMap, Request, body::Incoming, client, server, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use sha2::{Digest as _, Sha256};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

/// The stages of a job.
pub const STAGES: [&str; 6] = ["probe", "crop", "caption", "summarize", "generate", "score"];

/// What came within this before a process died may not have been kept, and not be found by another one that looks for it.
const KEPT: Duration = Duration::from_secs(1);

/// The stage that calls of a model are made in, by the method; none of those that ask no model.
fn stage(path: &str) -> Option<&'static str> {
    match path.trim_start_matches("/dnd.v1.") {
        "ActivationService/Probe" => Some("probe"),
        "ActivationService/Crop" => Some("crop"),
        "CaptionService/Caption" => Some("caption"),
        "SummaryService/Simplify" | "SummaryService/Summarize" => Some("summarize"),
        "DiffusionService/Generate" => Some("generate"),
        "ActivationService/Activate" | "EmbeddingService/EmbedImages" | "EmbeddingService/EmbedTexts" => Some("score"),
        _ => None,
    }
}

/// One thing that a model was asked for.
#[derive(Debug)]
struct Item {
    /// Of all that tells it from others.
    digest: [u8; 32],
    sent: Instant,
    /// When its answer came, or the call broke off without one.
    ended: Option<Instant>,
    answered: bool,
}

/// A call that asks for items.
#[derive(Debug)]
struct Call {
    /// Which orchestrator makes it.
    caller: usize,
    path: String,
    stage: &'static str,
    /// By the numbers that the call gives them.
    items: HashMap<u64, Item>,
    ended: bool,
    /// Of an activation call: what the pictures are run through.
    setup: Bytes,
}

impl Call {
    /// Takes in a message of the caller's.
    fn asked(&mut self, message: Bytes) {
        let mut add = |id: u64, parts: &[&[u8]]| {
            let of =
                parts.iter().fold(Sha256::new().chain_update(self.stage), |of, part| of.chain_update((part.len() as u64).to_le_bytes()).chain_update(part));
            self.items.insert(id, Item { digest: of.finalize().into(), sent: Instant::now(), ended: None, answered: false });
        };
        let path = self.path.as_bytes();
        match self.path.rsplit('/').next() {
            Some("Probe") => add(0, &[path, &message]),
            Some("Crop") => {
                let request = CropRequest::decode(message).unwrap();
                for (place, picture) in (0..).zip(&request.pictures) {
                    add(place, &[path, request.layer.as_bytes(), &request.unit.to_le_bytes(), picture.digest.as_bytes()]);
                }
            }
            Some("Activate") => match ActivateRequest::decode(message.clone()).unwrap().message.unwrap() {
                activate_request::Message::Setup(_) => self.setup = message,
                activate_request::Message::Picture(picture) => {
                    let setup = self.setup.clone();
                    add(picture.item_id, &[path, &setup, &picture.picture]);
                }
            },
            _ => {
                let (id, rest) = numbered(message);
                add(id, &[path, &rest]);
            }
        }
    }

    /// Takes in a message of the service's.
    fn answered(&mut self, message: Bytes) {
        let method = self.path.rsplit('/').next();
        if matches!(method, Some("Probe" | "Crop")) {
            return;
        }
        let (id, _) = numbered(message.clone());
        // The two have their answers in the same place.
        if matches!(method, Some("Simplify" | "Summarize"))
            && let Some(simplify_response::Result::Answer(answer)) = SimplifyResponse::decode(message).unwrap().result
            && (answer.cut_off || answer.refused || answer.text.trim().is_empty())
        {
            // No answer that can be used: the model is asked again on purpose.
            self.items.remove(&id);
        }
        if let Some(item) = self.items.get_mut(&id) {
            (item.ended, item.answered) = (Some(Instant::now()), true);
        }
    }

    /// The call is over: with a status, or broken off.
    fn end(&mut self, status: Option<bool>) {
        if self.ended {
            return;
        }
        self.ended = true;
        match status {
            // What the service says no to, it has not made.
            Some(false) => self.items.retain(|_, item| item.answered),
            Some(true) => self.items.values_mut().for_each(|item| item.answered = true),
            None => {}
        }
        self.items.values_mut().filter(|item| item.ended.is_none()).for_each(|item| item.ended = Some(Instant::now()));
    }
}

/// The number of an item, its message's first field, and the rest of the message.
fn numbered(mut message: Bytes) -> (u64, Bytes) {
    const FIRST: u8 = 1 << 3;
    if message.first() != Some(&FIRST) {
        return (0, message);
    }
    message.advance(1);
    let id = prost::encoding::decode_varint(&mut message).unwrap();
    (id, message)
}

/// While what may be lost: from the death of a process until it is known to be over.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    /// When it was killed.
    pub from: Instant,
    /// Until when what is asked for may be lost with it.
    pub until: Instant,
}

/// What was asked for, and what of it more than once.
#[derive(Debug, Default)]
pub struct Asked {
    /// Things that models were asked for, each as often as it was.
    pub calls: usize,
    /// Those that had been asked for before.
    pub repeated: usize,
    /// Those that another orchestrator was asking for at the same time.
    pub side_by_side: usize,
    /// Things that were in flight at the deaths, added up.
    pub in_flight: usize,
    /// Things that were asked for again though they had not been in flight at as many deaths: which, by which orchestrators, and when.
    pub unexplained: Vec<String>,
}

/// What stands before the services.
pub struct Recorder {
    urls: Vec<Vec<String>>,
    calls: Arc<Mutex<Vec<Call>>>,
    /// Ends with this value.
    _runtime: Runtime,
}

impl Recorder {
    /// Stands before services, by their addresses, for so many orchestrators.
    pub fn before(services: &[String], callers: usize) -> Self {
        let runtime = Runtime::new().unwrap();
        let calls = Arc::default();
        let start = |caller: usize, service: &String| {
            let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let (service, calls) = (service.clone(), Arc::clone(&calls));
            runtime.spawn(async move {
                loop {
                    let (connection, _) = listener.accept().await.unwrap();
                    tokio::spawn(pass_on(caller, connection, service.clone(), Arc::clone(&calls)));
                }
            });
            url
        };
        let urls = (0..callers).map(|caller| services.iter().map(|service| start(caller, service)).collect()).collect();
        Self { urls, calls, _runtime: runtime }
    }

    /// Where an orchestrator finds the services.
    pub fn urls(&self, caller: usize) -> &[String] {
        &self.urls[caller]
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap()
    }

    /// The stages that calls are in flight of.
    pub fn stages(&self) -> Vec<&'static str> {
        let open: Vec<&str> = self.lock().iter().filter(|call| !call.ended && !call.items.is_empty()).map(|call| call.stage).collect();
        STAGES.into_iter().filter(|stage| open.contains(stage)).collect()
    }

    /// What was asked for in all, given what died meanwhile.
    pub fn asked(&self, deaths: &[Death]) -> Asked {
        let calls = self.lock();
        let now = Instant::now();
        let mut asked = Asked::default();
        let mut by_digest: HashMap<[u8; 32], Vec<(Instant, Instant, &Call)>> = HashMap::new();
        for call in calls.iter() {
            for item in call.items.values() {
                asked.calls += 1;
                by_digest.entry(item.digest).or_default().push((item.sent, item.ended.unwrap_or(now), call));
            }
        }
        for times in by_digest.values_mut() {
            times.sort_by_key(|(sent, ..)| *sent);
            let died = |death: &&Death| times.iter().any(|(sent, ended, _)| *sent <= death.until && *ended + KEPT >= death.from);
            let in_flight = deaths.iter().filter(died).count();
            let is_beside = |place: usize| {
                let (sent, _, of) = times[place];
                times[..place].iter().any(|(_, ended, other)| other.caller != of.caller && *ended + KEPT > sent)
            };
            let (beside, repeated): (Vec<usize>, Vec<usize>) = (1..times.len()).partition(|place| is_beside(*place));
            asked.in_flight += in_flight;
            asked.side_by_side += beside.len();
            asked.repeated += repeated.len();
            if repeated.len() > in_flight {
                let since = |at: Instant| at.duration_since(times[0].0);
                let told = times.iter().map(|(sent, ended, call)| format!("{} from {:?} to {:?}", call.caller, since(*sent), since(*ended)));
                asked.unexplained.push(format!("{} by {}; {in_flight} deaths", times[0].2.path, told.collect::<Vec<_>>().join(", ")));
            }
        }
        asked
    }

    /// Waits for calls of one of these stages, and gives one that is in flight still after `then`; none if there is none for that long.
    pub fn catch(&self, stages: &[&'static str], then: Duration, patience: Duration) -> Option<&'static str> {
        let since = Instant::now();
        while since.elapsed() < patience {
            let open = self.stages();
            let wanted = |open: Vec<&'static str>| open.into_iter().find(|stage| stages.contains(stage));
            if wanted(open).is_some() {
                thread::sleep(then);
                if let Some(stage) = wanted(self.stages()) {
                    return Some(stage);
                }
            }
            thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

/// Passes on the calls of one connection over one to the service; where one breaks, so does the other.
async fn pass_on(caller: usize, connection: TcpStream, service: String, calls: Arc<Mutex<Vec<Call>>>) {
    let Ok(there) = TcpStream::connect(&service).await else { return };
    let Ok((sender, onward)) = client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(there)).await else { return };
    let pass = service_fn(|request: Request<Incoming>| {
        let (mut sender, calls) = (sender.clone(), Arc::clone(&calls));
        async move {
            let note = stage(request.uri().path()).map(|stage| {
                let mut all = calls.lock().unwrap();
                all.push(Call { caller, path: request.uri().path().to_owned(), stage, items: HashMap::new(), ended: false, setup: Bytes::new() });
                Arc::new(Note { place: all.len() - 1, calls: Arc::clone(&calls) })
            });
            let asked = note.clone();
            let request = request.map(|body| Tapped { body, messages: BytesMut::new(), note: asked, is_answer: false });
            let response = sender.send_request(request).await?;
            if let Some(note) = &note {
                note.status(response.headers());
            }
            Ok::<_, hyper::Error>(response.map(|body| Tapped { body, messages: BytesMut::new(), note, is_answer: true }))
        }
    });
    let served = server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(connection), pass);
    tokio::select! { _ = served => {}, _ = onward => {} }
}

/// Where a call is noted; with the last of it the call is over.
struct Note {
    place: usize,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Note {
    fn with(&self, note: impl FnOnce(&mut Call)) {
        note(&mut self.calls.lock().unwrap()[self.place]);
    }

    fn status(&self, headers: &HeaderMap) {
        if let Some(status) = headers.get("grpc-status") {
            self.with(|call| call.end(Some(status == "0")));
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.with(|call| call.end(None));
    }
}

/// A body whose messages are noted as they pass.
struct Tapped {
    body: Incoming,
    /// What has passed of a message that is not whole.
    messages: BytesMut,
    note: Option<Arc<Note>>,
    is_answer: bool,
}

impl Body for Tapped {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let this = &mut *self;
        let (Some(Ok(passing)), Some(note)) = (&frame, &this.note) else { return Poll::Ready(frame) };
        if let Some(trailers) = passing.trailers_ref() {
            note.status(trailers);
        }
        if let Some(data) = passing.data_ref() {
            // A message is a byte that says that it is not compressed, its length in four, and itself.
            const HEAD: usize = 5;
            this.messages.extend_from_slice(data);
            while this.messages.len() >= HEAD {
                let length = (&this.messages[1..HEAD]).get_u32() as usize;
                if this.messages.len() < HEAD + length {
                    break;
                }
                let message = this.messages.split_to(HEAD + length).freeze().slice(HEAD..);
                note.with(|call| if this.is_answer { call.answered(message) } else { call.asked(message) });
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
