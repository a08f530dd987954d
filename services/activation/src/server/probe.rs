//! The probing pass: the set read once, in order, and run on all sessions side by side.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dnd_mesh::{Fault, MAX_MESSAGE_BYTES, blobs, call, items};
use dnd_method::top::Entry;
use dnd_onnx::pictures;
use dnd_proto::v1::{
    self as proto, ProbeProgress, ProbeRequest, ProbeResponse, ProbeTotal, ProbedUnit, ProbingShard, SkippedPicture, TopPicture, probe_response::Event,
};
use futures::{FutureExt as _, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{Prepared, prepare, reading, shards::Contents};
use crate::{
    Activation,
    engine::{Collector, Cut, Found, LayerInfo, Output, Probed, ProbedMap, ProbingSet, Source, blocking},
};

const DEFAULT_TOP: u32 = 10;
const MOST_TOP: u32 = 1000;
/// Bytes of a unit's maps: they go into one message with a little more.
const MOST_MAP_BYTES: usize = MAX_MESSAGE_BYTES / 8 * 7;
/// Between two messages of progress.
const PROGRESS: Duration = Duration::from_millis(250);
/// Messages that wait for a slow caller before the pass waits too.
const WAITING: usize = 64;

/// Starts a pass; its messages come as it goes on, and it ends when nobody takes them any more.
pub(super) async fn probe(activation: Arc<Activation>, request: ProbeRequest) -> Result<items::Responses<ProbeResponse>, Fault> {
    let top = request.top.unwrap_or(DEFAULT_TOP);
    if !(1..=MOST_TOP).contains(&top) {
        return Err(Fault::field("top", format!("{top}; it is 1 to {MOST_TOP}")));
    }
    let reading = reading(request.summary(), request.token_summary());
    let Prepared { cut, layers, units } = prepare(&activation, request.target, &request.layers, reading).await?;
    if let Some(layer) = layers.iter().find(|layer| top as usize * layer.map_values() * size_of::<f32>() > MOST_MAP_BYTES) {
        let most = MOST_MAP_BYTES / (layer.map_values() * size_of::<f32>());
        return Err(Fault::field("top", format!("{top}; of {} {most} pictures' activation maps go into one message", layer.name)));
    }
    let ProbeRequest { probing_set: said, shard, .. } = request;
    // The shards of a set share a listing: whether it is still right, their digests tell.
    let set = if shard.is_some() { activation.set(said.clone()).await? } else { activation.fresh_set(said.clone()).await? };
    let (events, messages) = mpsc::channel(WAITING);
    let last = events.clone();
    let pass = Pass { activation, cut, layers, said: said.unwrap_or_default(), set, shard, events };
    // The pass is a part of the stream: it is polled with it, and dropped with it. A fault of it is told after what it had to say before.
    let run = AssertUnwindSafe(pass.run(units, top as usize))
        .catch_unwind()
        .map(|ended| ended.unwrap_or_else(|_| Err(Fault::internal("the probing pass panicked; the service's log has the details"))));
    let run = run.then(|ended| async move {
        if let Err(fault) = ended {
            // Nobody is told if nobody listens.
            let _ = last.send(Err(fault.into())).await;
        }
    });
    let run = stream::once(run).filter_map(|()| async { None });
    Ok(Box::pin(stream::select(ReceiverStream::new(messages), run)))
}

struct Pass {
    activation: Arc<Activation>,
    cut: Arc<Cut>,
    layers: Vec<LayerInfo>,
    /// The set as it was asked for, and what it holds.
    said: proto::ProbingSet,
    set: Arc<ProbingSet>,
    /// What is run of it, if not all.
    shard: Option<ProbingShard>,
    events: mpsc::Sender<Result<ProbeResponse, Status>>,
}

/// A picture that was read, or why it could not be.
pub(super) struct Read {
    pub(super) index: u64,
    pub(super) bytes: Result<Bytes, String>,
    pub(super) digest: String,
}

impl Pass {
    async fn run(self, units: Vec<Vec<u32>>, top: usize) -> Result<(), Fault> {
        // Of a shard's pass they are told where the shards are listed.
        for (path, reason) in self.set.unreadable().iter().filter(|_| self.shard.is_none()) {
            self.say(Event::Skipped(SkippedPicture { path: path.clone(), reason: reason.clone() })).await?;
        }
        let units = units.into_iter().enumerate().collect();
        let collector = Arc::new(Collector::new(units, top, self.activation.map_memory()));
        let (digests, mut total) = self.over_all(&collector).await?;
        if digests.is_empty() && self.shard.is_none() {
            return Err(Fault::new(
                Code::InvalidArgument,
                "NO_GOOD_PICTURES",
                format!("none of the {} pictures of the probing set can be used", self.set.len()),
            ));
        }
        // Units go out in groups, so that the maps that had not fitted are in memory for one group at a time.
        let mut found = collector.finish().into_iter().peekable();
        while found.peek().is_some() {
            let mut room = self.activation.map_memory();
            let mut group = Vec::new();
            while let Some(unit) = found.next_if(|unit| group.is_empty() || self.dropped_bytes(unit) <= room) {
                room = room.saturating_sub(self.dropped_bytes(&unit));
                group.push(unit);
            }
            total.rerun += self.fill_maps(&mut group).await?;
            for unit in group {
                self.say(Event::Unit(self.result(unit, &digests))).await?;
            }
        }
        self.say(Event::Total(total)).await
    }

    /// Bytes that a unit's maps would take that had not fitted.
    fn dropped_bytes(&self, unit: &Found) -> usize {
        let map = self.cut.layers.get(unit.layer).map_or(0, |layer| layer.map_values()) * size_of::<f32>();
        unit.top.iter().filter(|entry| matches!(entry.with.map, ProbedMap::Dropped)).count() * map
    }

    async fn say(&self, event: Event) -> Result<(), Fault> {
        let gone = |_| Fault::new(Code::Cancelled, "CALLER_GONE", "the caller has gone");
        self.events.send(Ok(ProbeResponse { event: Some(event) })).await.map_err(gone)
    }

    /// The fault for a set that is not what it was when its shards were listed; whoever lists them again sees what it is now.
    fn changed(&self) -> Fault {
        self.activation.forget_set(&self.said);
        Fault::new(Code::FailedPrecondition, "PROBING_SET_CHANGED", "pictures of the probing set have changed, come or gone since its shards were listed")
    }

    /// Runs every different picture of the set, or the shard; gives the digests of those that were run.
    async fn over_all(&self, collector: &Arc<Collector>) -> Result<(BTreeMap<u64, String>, ProbeTotal), Fault> {
        let limit = self.activation.picture_limits().bytes;
        let all = self.set.len() as u64;
        let whole = ProbingShard { pictures: all, ..Default::default() };
        let ProbingShard { first, pictures, digest: expected, repeats: left_out } = self.shard.as_ref().unwrap_or(&whole);
        let (first, pictures) = (*first, *pictures);
        let end = first.checked_add(pictures).filter(|end| *end <= all).ok_or_else(|| self.changed())?;
        let left_out: HashSet<u64> = left_out.iter().copied().collect();
        let mut contents = Contents::default();
        // Read in order, a few ahead: which of byte-equal pictures is the first is known before it is run.
        let reads = stream::iter(first..end)
            .map(|index| {
                let set = Arc::clone(&self.set);
                blocking(move || Ok(read(&set, index, limit)))
            })
            .buffered(self.activation.concurrency());
        let mut firsts: HashMap<String, u64> = HashMap::new();
        let mut repeats: Vec<(u64, u64)> = Vec::new();
        let unlike = reads.filter_map(|read| {
            let mut new = true;
            if let Ok(read) = &read {
                contents.add(&self.set, read);
            }
            if let Ok(Read { index, bytes: Ok(_), digest }) = &read {
                let first = *firsts.entry(digest.clone()).or_insert(*index);
                new = first == *index;
                if !new {
                    repeats.push((*index, first));
                }
            }
            std::future::ready(new.then_some(read))
        });
        let left_out = &left_out;
        let runs = unlike
            .map(|read| async move {
                let Read { index, bytes, digest } = read?;
                let ran = match bytes {
                    Ok(bytes) if left_out.contains(&index) => self.check(bytes).await.map(|()| None),
                    Ok(bytes) => {
                        let wanted = Output::Probe { collector: Arc::clone(collector), index };
                        self.cut.run(Source::Encoded(bytes), wanted).await.map(|_| Some(digest)).map_err(SkipOrStop::from)
                    }
                    Err(reason) => Err(SkipOrStop::Skip(reason)),
                };
                Ok::<_, Fault>((index, ran))
            })
            .buffer_unordered(self.activation.concurrency());
        let mut digests = BTreeMap::new();
        let mut duplicates = 0;
        let mut skipped: BTreeMap<u64, String> = BTreeMap::new();
        let mut said = Instant::now();
        {
            let mut runs = std::pin::pin!(runs);
            while let Some(ran) = runs.next().await {
                match ran? {
                    (index, Ok(Some(digest))) => {
                        digests.insert(index, digest);
                    }
                    (_, Ok(None)) => duplicates += 1,
                    (index, Err(SkipOrStop::Skip(reason))) => {
                        self.skip(index, &reason).await?;
                        skipped.insert(index, reason);
                    }
                    (_, Err(SkipOrStop::Stop(fault))) => return Err(fault),
                }
                if said.elapsed() >= PROGRESS {
                    said = Instant::now();
                    let done = (digests.len() + skipped.len()) as u64 + duplicates;
                    call::doing(|| format!("picture {done} of {pictures}"));
                    self.say(Event::Progress(ProbeProgress { done, pictures })).await?;
                }
            }
        }
        if !expected.is_empty() && contents.digest() != *expected {
            return Err(self.changed());
        }
        duplicates += repeats.len() as u64;
        let mut bad_repeats = 0;
        for (index, first) in repeats {
            // A picture that is equal to one that can't be used can't be used either.
            if let Some(reason) = skipped.get(&first) {
                self.skip(index, reason).await?;
                bad_repeats += 1;
            }
        }
        self.say(Event::Progress(ProbeProgress { done: pictures, pictures })).await?;
        let total = ProbeTotal { pictures: digests.len() as u64, duplicates: duplicates - bad_repeats, skipped: skipped.len() as u64 + bad_repeats, rerun: 0 };
        Ok((digests, total))
    }

    /// Whether a picture could be run.
    async fn check(&self, bytes: Bytes) -> Result<(), SkipOrStop> {
        let (preprocessor, limits) = (self.cut.preprocessor.clone(), self.activation.picture_limits());
        let readable = blocking(move || Ok(preprocessor.append(&pictures::decode(&bytes, limits)?, &mut Vec::new())?));
        readable.await.map_err(SkipOrStop::from)
    }

    async fn skip(&self, index: u64, reason: &str) -> Result<(), Fault> {
        let path = self.set.get(index).map(|picture| picture.path.clone()).unwrap_or_default();
        self.say(Event::Skipped(SkippedPicture { path, reason: reason.to_owned() })).await
    }

    /// Runs pictures again whose maps had not fitted; gives how many.
    async fn fill_maps(&self, found: &mut [Found]) -> Result<u64, Fault> {
        let mut wanted: BTreeMap<u64, Vec<(usize, usize)>> = BTreeMap::new();
        for (i, unit) in found.iter().enumerate() {
            for (j, entry) in unit.top.iter().enumerate() {
                if matches!(entry.with.map, ProbedMap::Dropped) {
                    wanted.entry(entry.at).or_default().push((i, j));
                }
            }
        }
        let limit = self.activation.picture_limits().bytes;
        let reruns = wanted.len() as u64;
        let units = |places: &[(usize, usize)]| places.iter().filter_map(|(i, _)| found.get(*i)).map(|found| (found.layer, vec![found.unit])).collect();
        let jobs: Vec<_> = wanted
            .into_iter()
            .map(|(index, places)| {
                let collector = Arc::new(Collector::new(units(&places), 1, usize::MAX));
                (index, places, collector)
            })
            .collect();
        let mut runs = stream::iter(jobs)
            .map(|(index, places, collector)| async move {
                let set = Arc::clone(&self.set);
                let ran = match blocking(move || Ok(read(&set, index, limit))).await?.bytes {
                    Ok(bytes) => self
                        .cut
                        .run(Source::Encoded(bytes), Output::Probe { collector: Arc::clone(&collector), index })
                        .await
                        .map(drop)
                        .map_err(SkipOrStop::from),
                    Err(reason) => Err(SkipOrStop::Skip(reason)),
                };
                match ran {
                    Ok(()) => {}
                    Err(SkipOrStop::Skip(reason)) => self.skip(index, &format!("it could not be read again for its activation maps: {reason}")).await?,
                    Err(SkipOrStop::Stop(fault)) => return Err(fault),
                }
                Ok((places, collector))
            })
            .buffer_unordered(self.activation.concurrency());
        while let Some(ran) = runs.next().await {
            let (places, collector) = ran?;
            for ((i, j), mut rerun) in places.into_iter().zip(collector.finish()) {
                let kept = rerun.top.pop().map(|entry| entry.with);
                if let (Some(kept), Some(entry)) = (kept, found.get_mut(i).and_then(|found| found.top.get_mut(j))) {
                    entry.with = kept;
                }
            }
        }
        Ok(reruns)
    }

    fn result(&self, found: Found, digests: &BTreeMap<u64, String>) -> ProbedUnit {
        let (lowest, highest) = found.range.unwrap_or_default();
        let picture = |entry: Entry<u64, Probed>| TopPicture {
            path: self.set.get(entry.at).map(|picture| picture.path.clone()).unwrap_or_default(),
            digest: digests.get(&entry.at).cloned().unwrap_or_default(),
            index: entry.at,
            activation: entry.activation,
            seen: {
                let (width, height) = entry.with.size;
                let pictures::Seen { left, top, width: across, height: down } = self.cut.preprocessor.seen((width, height));
                let edge = |at: f64, side: u32| at.clamp(0.0, f64::from(side)) as u32;
                Some(proto::Box {
                    left: edge(left.floor(), width),
                    top: edge(top.floor(), height),
                    right: edge((left + across).ceil(), width),
                    bottom: edge((top + down).ceil(), height),
                })
            },
            map: match entry.with.map {
                ProbedMap::Kept(map) => {
                    let (height, width) = map.size();
                    Some(proto::ActivationMap { height: height as u32, width: width as u32, values: map.values().to_vec() })
                }
                ProbedMap::None | ProbedMap::Dropped => None,
            },
        };
        let Found { layer, unit, dead, not_finite, top, .. } = found;
        let layer = self.layers.get(layer).map(|layer| layer.name.clone()).unwrap_or_default();
        ProbedUnit { layer, unit, dead, not_finite, lowest, highest, top: top.into_iter().map(picture).collect() }
    }
}

/// What a failed run of a picture means: the picture is at fault, or the target.
enum SkipOrStop {
    Skip(String),
    Stop(Fault),
}

impl From<Fault> for SkipOrStop {
    fn from(fault: Fault) -> Self {
        if fault.reason() == "UNUSABLE_PICTURE" { Self::Skip(fault.to_string()) } else { Self::Stop(fault) }
    }
}

/// Reads a picture of a set. Blocking.
pub(super) fn read(set: &ProbingSet, index: u64, limit: usize) -> Read {
    let bytes = set.get(index).ok_or_else(|| "not in the set".to_owned()).and_then(|picture| picture.read(limit).map_err(|e| e.to_string()));
    let digest = bytes.as_ref().map(|bytes| blobs::digest(bytes)).unwrap_or_default();
    Read { index, bytes, digest }
}
