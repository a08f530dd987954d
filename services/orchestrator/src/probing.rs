//! The probing pass (3.1, 3.2) in shards: each is run by whichever activation service is free, or is there from an earlier pass, and together they give what
//! one pass over the whole set gives.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    sync::atomic::{AtomicU64, Ordering},
    vec,
};

use bytes::{Bytes, BytesMut};
use clap::Args;
use dnd_mesh::{Fault, retry::Patience};
use dnd_method::{
    parameters::Parameters,
    top::{Entry, Top},
};
use dnd_proto::v1::{ListShardsResponse, ProbeProgress, ProbeTotal, ProbedUnit, ProbingShard, SkippedPicture, Stage, probe_response::Event};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::{
    calls::{Calls, TRIES},
    models::passed_on,
    steps::looked_at,
    store::Passed,
};

/// How a probing set is run.
#[derive(Debug, Clone, Args)]
pub struct ProbingArgs {
    /// Pictures of a shard of the probing set: what is run in one call, and kept once it is done
    #[arg(long, env = "DND_SHARD_PICTURES", default_value_t = SHARD_PICTURES)]
    pub shard_pictures: NonZeroU32,
    /// Shards that are run at a time: with several activation services at least as many as there are of them
    #[arg(long, env = "DND_SHARDS_IN_FLIGHT", default_value_t = SHARDS_IN_FLIGHT)]
    pub shards_in_flight: NonZeroUsize,
}

const SHARD_PICTURES: NonZeroU32 = NonZeroU32::new(4096).expect("4096 is not 0");
const SHARDS_IN_FLIGHT: NonZeroUsize = NonZeroUsize::new(2).expect("2 is not 0");

impl Default for ProbingArgs {
    fn default() -> Self {
        Self { shard_pictures: SHARD_PICTURES, shards_in_flight: SHARDS_IN_FLIGHT }
    }
}

/// Bytes of units from which on they make a blob. One of each shard is in memory when they are merged.
const CHUNK: usize = 1 << 20;
/// Events that wait for a slow listener before the pass waits too.
const WAITING: usize = 64;
/// How often a set is listed again that changes while it is run.
const CHANGES: u32 = 3;
const CHANGED: &str = "PROBING_SET_CHANGED";

/// What a pass over a shard found. Its units are in blobs, in the order of the layers and of the units in each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProbedShard {
    pictures: u64,
    duplicates: u64,
    rerun: u64,
    /// Paths, and why.
    skipped: Vec<(String, String)>,
    /// Digests of length-delimited ProbedUnits, one after the other.
    pub(crate) chunks: Vec<String>,
}

/// What a pass has to say, as it goes on.
pub(crate) type Told = mpsc::Receiver<Event>;

/// Runs the probing set of a job. `listen` is told its progress as it goes on, then each picture that can't be used, every unit, and the total; what comes of
/// that is given back. What is wrong with the set is told when all before it is heard.
pub(crate) async fn probe<T, E, L>(calls: &Calls, args: &ProbingArgs, listen: impl FnOnce(Told) -> L) -> Result<T, E>
where
    E: From<Fault>,
    L: Future<Output = Result<T, E>>,
{
    let (events, told) = mpsc::channel(WAITING);
    let pass = Pass { calls, args: args.clone(), events, done: AtomicU64::new(0), pictures: AtomicU64::new(0) };
    let run = async move { Ok(pass.run().await) };
    // The pass goes on while it is heard: it may hold what the listener waits for, such as the connection through which the database is written.
    let (ran, heard) = tokio::try_join!(run, listen(told))?;
    ran?;
    Ok(heard)
}

struct Pass<'c> {
    calls: &'c Calls,
    args: ProbingArgs,
    events: mpsc::Sender<Event>,
    /// Pictures that are done, and all.
    done: AtomicU64,
    pictures: AtomicU64,
}

/// Why a pass over a shard broke off.
enum Broken {
    Service(Status),
    Here(Fault),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        Self::Service(status)
    }
}

impl From<Fault> for Broken {
    fn from(fault: Fault) -> Self {
        Self::Here(fault)
    }
}

impl Pass<'_> {
    async fn run(&self) -> Result<(), Fault> {
        let mut changes = 0;
        let (unreadable, shards) = loop {
            match self.shards().await {
                // Shards that did not change are there by then.
                Err(fault) if fault.reason() == CHANGED && changes < CHANGES => changes += 1,
                ended => break ended?,
            }
        };
        let mut total = ProbeTotal::default();
        let mut skipped = unreadable;
        for (_, shard) in &shards {
            skipped.extend(shard.skipped.iter().map(|(path, reason)| SkippedPicture { path: path.clone(), reason: reason.clone() }));
        }
        for skipped in skipped {
            self.say(Event::Skipped(skipped)).await?;
        }
        for (_, shard) in &shards {
            total.pictures += shard.pictures;
            total.duplicates += shard.duplicates;
            total.skipped += shard.skipped.len() as u64;
            total.rerun += shard.rerun;
        }
        if total.pictures == 0 {
            let message = format!("none of the {} pictures of the probing set can be used", self.pictures.load(Ordering::Relaxed));
            return Err(Fault::new(Code::InvalidArgument, "NO_GOOD_PICTURES", message));
        }
        self.merge(shards).await?;
        self.say(Event::Total(total)).await
    }

    /// What of the sources can't be listed, and what the shards' passes found, in order.
    async fn shards(&self) -> Result<(Vec<SkippedPicture>, Vec<(ProbingShard, ProbedShard)>), Fault> {
        let listed = self.calls.shards(self.args.shard_pictures.get()).await?;
        self.done.store(0, Ordering::Relaxed);
        self.pictures.store(listed.first().map_or(0, |listed| listed.pictures), Ordering::Relaxed);
        let (mut unreadable, mut shards) = (Vec::new(), Vec::new());
        for ListShardsResponse { shard, unreadable: some, .. } in listed {
            unreadable.extend(some);
            shards.extend(shard);
        }
        let probed = stream::iter(shards).map(|shard| async move {
            let probed = self.probed(&shard).await?;
            Ok::<_, Fault>((shard, probed))
        });
        let mut probed: Vec<_> = probed.buffer_unordered(self.args.shards_in_flight.get()).try_collect().await?;
        probed.sort_by_key(|(shard, _)| shard.first);
        Ok((unreadable, probed))
    }

    async fn probed(&self, shard: &ProbingShard) -> Result<ProbedShard, Fault> {
        let Some(kept) = self.calls.kept_shard(shard).await? else { return self.make(shard).await };
        self.calls.progress().calls(Stage::Probe, 0, kept.pictures);
        self.step(shard.pictures).await?;
        Ok(kept)
    }

    /// Runs a shard, and keeps what comes of it.
    async fn make(&self, shard: &ProbingShard) -> Result<ProbedShard, Fault> {
        let mut patience = Patience::of(TRIES);
        loop {
            let mut done = 0;
            match self.over(shard, &mut done).await {
                Ok(probed) => {
                    self.calls.progress().calls(Stage::Probe, probed.pictures + probed.rerun, 0);
                    return Ok(probed);
                }
                Err(Broken::Service(status)) if patience.wait_after(&status).await => {
                    self.done.fetch_sub(done, Ordering::Relaxed);
                }
                Err(Broken::Service(status)) => return Err(passed_on("activation", &status)),
                Err(Broken::Here(fault)) => return Err(fault),
            }
        }
    }

    /// One try of [`Self::make`]; `done` is how many of the shard's pictures were told.
    async fn over(&self, shard: &ProbingShard, done: &mut u64) -> Result<ProbedShard, Broken> {
        let mut messages = self.calls.probe(shard.clone()).await?;
        let mut probed = ProbedShard { pictures: 0, duplicates: 0, rerun: 0, skipped: Vec::new(), chunks: Vec::new() };
        let mut chunk = BytesMut::new();
        let mut total = None;
        while let Some(message) = messages.message().await? {
            match message.event {
                Some(Event::Progress(progress)) => {
                    let more = progress.done.saturating_sub(*done);
                    *done += more;
                    self.step(more).await?;
                }
                Some(Event::Skipped(skipped)) => probed.skipped.push((skipped.path, skipped.reason)),
                Some(Event::Unit(unit)) => {
                    unit.encode_length_delimited(&mut chunk).map_err(|e| Fault::internal(e.to_string()))?;
                    if chunk.len() >= CHUNK {
                        probed.chunks.push(self.calls.keep_chunk(chunk.split().freeze()).await?);
                    }
                }
                Some(Event::Total(all)) => total = Some(all),
                None => {}
            }
        }
        let total = total.ok_or_else(|| Status::unavailable("the pass ended before its total"))?;
        if !chunk.is_empty() {
            probed.chunks.push(self.calls.keep_chunk(chunk.freeze()).await?);
        }
        ProbeTotal { pictures: probed.pictures, duplicates: probed.duplicates, rerun: probed.rerun, .. } = total;
        // Where a picture went away before its maps were there, another pass may find more.
        if total.skipped == probed.skipped.len() as u64 {
            probed = self.calls.keep_shard(shard, probed).await?;
        }
        Ok(probed)
    }

    /// Merges the units of all shards, one unit after the other.
    ///
    /// Each is what one pass would have found: a shard was run without the pictures that are byte-equal to one before it, so that no picture counts twice, and
    /// a picture that is not among the highest of its shard is outdone by as many pictures of the shard as are asked for.
    async fn merge(&self, shards: Vec<(ProbingShard, ProbedShard)>) -> Result<(), Fault> {
        let size = looked_at(self.calls.parameters()) as usize;
        let reader = |(shard, probed): (ProbingShard, ProbedShard)| Reader {
            shard,
            chunks: probed.chunks.into_iter(),
            units: Bytes::new(),
            taken: 0,
            pass_over: 0,
            made_again: false,
        };
        let mut readers: Vec<Reader> = shards.into_iter().map(reader).collect();
        loop {
            let mut parts = Vec::with_capacity(readers.len());
            for reader in &mut readers {
                parts.extend(reader.next(self).await?);
            }
            if parts.is_empty() {
                return Ok(());
            }
            if parts.len() < readers.len() {
                return Err(Fault::internal("the shards of a probing set have different units"));
            }
            self.say(Event::Unit(merged(parts, size)?)).await?;
        }
    }

    async fn step(&self, pictures: u64) -> Result<(), Fault> {
        let done = self.done.fetch_add(pictures, Ordering::Relaxed) + pictures;
        let pictures = self.pictures.load(Ordering::Relaxed);
        self.say(Event::Progress(ProbeProgress { done: done.min(pictures), pictures })).await
    }

    async fn say(&self, event: Event) -> Result<(), Fault> {
        let gone = |_| Fault::new(Code::Cancelled, "CALLER_GONE", "the caller has gone");
        self.events.send(event).await.map_err(gone)
    }
}

/// The units of a shard, one after the other.
struct Reader {
    shard: ProbingShard,
    chunks: vec::IntoIter<String>,
    /// What is left of the current chunk.
    units: Bytes,
    taken: usize,
    /// Units that had been taken before the shard was run again.
    pass_over: usize,
    made_again: bool,
}

impl Reader {
    async fn next(&mut self, pass: &Pass<'_>) -> Result<Option<ProbedUnit>, Fault> {
        loop {
            if self.units.is_empty() {
                let Some(chunk) = self.chunks.next() else { return Ok(None) };
                match pass.calls.chunk(&chunk).await? {
                    Some(units) => self.units = units,
                    None if self.made_again => {
                        return Err(Fault::new(Code::Internal, "STORAGE", format!("{chunk}, a part of the probing pass, was lost twice")));
                    }
                    // Lost or damaged since it was looked for: the shard is run again.
                    None => {
                        self.made_again = true;
                        self.pass_over = self.taken;
                        self.chunks = pass.make(&self.shard).await?.chunks.into_iter();
                    }
                }
                continue;
            }
            let unit = ProbedUnit::decode_length_delimited(&mut self.units).map_err(|e| Fault::internal(format!("a kept unit can't be read: {e}")))?;
            if self.pass_over > 0 {
                self.pass_over -= 1;
                continue;
            }
            self.taken += 1;
            return Ok(Some(unit));
        }
    }
}

/// A unit of the whole set out of what was found of it in each shard, with the `size` highest activating pictures at most.
fn merged(parts: Vec<ProbedUnit>, size: usize) -> Result<ProbedUnit, Fault> {
    let mut top = Top::new(size);
    let mut whole: Option<(String, u32)> = None;
    for part in parts {
        let (layer, unit) = whole.get_or_insert_with(|| (part.layer.clone(), part.unit));
        if (&part.layer, part.unit) != (layer, *unit) {
            return Err(Fault::internal("the shards of a probing set have their units in different orders"));
        }
        let entries: Vec<_> = part.top.into_iter().map(|picture| Entry { activation: picture.activation, at: picture.index, with: picture }).collect();
        // Where a picture has a finite activation, one is among the highest.
        let range = (!entries.is_empty()).then_some((part.lowest, part.highest));
        top.merge(Top::found(size, entries, range, part.not_finite));
    }
    let (layer, unit) = whole.unwrap_or_default();
    let (lowest, highest) = top.range().unwrap_or_default();
    let (dead, not_finite) = (top.is_dead(), top.not_finite());
    Ok(ProbedUnit { layer, unit, dead, not_finite, lowest, highest, top: top.into_entries().into_iter().map(|entry| entry.with).collect() })
}

/// What of a pass is told as it goes on.
pub(crate) enum Probed {
    Progress(ProbeProgress),
    Unit(ProbedUnit),
}

impl Passed {
    /// Takes what of a pass is told at its end, and gives the rest back.
    pub(crate) fn hear(&mut self, event: Event, parameters: &Parameters) -> Option<Probed> {
        match event {
            Event::Unit(unit) => return Some(Probed::Unit(unit)),
            Event::Progress(progress) => return Some(Probed::Progress(progress)),
            Event::Skipped(skipped) => self.skipped.push(skipped),
            Event::Total(total) => {
                self.pictures = total.pictures;
                let wanted = u64::from(looked_at(parameters));
                if total.pictures < wanted {
                    self.warnings.push(format!(
                        "the probing set has {} good pictures, fewer than the {wanted} that are looked at for each unit: all are used",
                        total.pictures
                    ));
                }
                if total.duplicates > 0 {
                    self.warnings.push(format!("{} pictures were left out because a byte-equal one comes before them", total.duplicates));
                }
            }
        }
        None
    }
}

/// A fault of what is kept here.
pub(crate) fn kept(failure: &crate::failure::Failure) -> Fault {
    Fault::new(Code::Internal, "STORAGE", failure.message.clone())
}
