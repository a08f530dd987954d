//! A loaded target: cut down to what the asked-for layers need, run picture by picture in batches.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    batch::{Batcher, Limits, Stop, Worker},
};
use dnd_method::{
    parameters::{Summary, TokenSummary},
    resize::Map,
};
use dnd_onnx::{
    Error,
    graph::Wanted,
    pictures::{PictureLimits, Preprocessor},
    runtime::EngineArgs,
};
use image::RgbImage;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tonic::Code;

use super::{Collector, Described, LayerInfo, LayerKind, ProbedMap};
use crate::process::{self, Answer, Given, Host, Load, MapOf, Process, Request, Size, Target};

/// How units' values become numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Reading {
    pub(crate) summary: Summary,
    pub(crate) token_summary: TokenSummary,
}

/// A loaded target.
pub(crate) struct Cut {
    pub(crate) layers: Arc<[LayerInfo]>,
    pub(crate) preprocessor: Preprocessor,
    batcher: Batcher<Runner>,
}

/// A picture, and what is wanted of it.
pub(crate) struct Item {
    pub(crate) picture: Source,
    pub(crate) wanted: Output,
}

/// A picture as it is at hand.
#[derive(Clone)]
pub(crate) enum Source {
    Encoded(Bytes),
    Decoded(Arc<RgbImage>),
}

/// What is made of a run.
#[derive(Clone)]
pub(crate) enum Output {
    /// `g` of every unit of every layer.
    Activations,
    /// As that, but handed to a probing pass with the maps that it wants to keep; `index` is the picture's place in the set.
    Probe { collector: Arc<Collector>, index: u64 },
}

impl Cut {
    /// Loads the network for some of its layers, each session in a process of its own. Blocking.
    pub(crate) fn load(
        host: &Arc<Host>,
        described: &Arc<Described>,
        layers: Vec<LayerInfo>,
        reading: Reading,
        args: &EngineArgs,
        limits: PictureLimits,
    ) -> Result<Self, Fault> {
        layers.iter().try_for_each(|layer| check_tokens(layer, reading))?;
        let preprocessor = Preprocessor::new(&described.preprocessing)?;
        let load = Load { folder: described.network.folder().to_string_lossy().into_owned(), engine: args.for_one_of_them(), input: described.input.fed() };
        let target = Target {
            batch: described.batch,
            layers: layers.clone(),
            reading,
            preprocessing: described.preprocessing.encode_to_vec(),
            picture_bytes: limits.bytes,
            picture_pixels: limits.pixels,
        };
        let starter = Arc::new(Starter { host: Arc::clone(host), described: Arc::clone(described), sessions: args.session_count(), load, target });
        let network = starter.network()?;
        // They load side by side.
        let starting = (0..args.session_count()).map(|_| starter.begin(&network)).collect::<Result<Vec<_>, _>>()?;
        let runners = starting.into_iter().map(|process| Ok(Runner { process: Some(starter.end(process, &Stop::default())?), starter: Arc::clone(&starter) }));
        let runners = runners.collect::<Result<Vec<_>, Fault>>()?;
        let batch = described.batch.unwrap_or(args.batch()).max(1);
        let batcher = Batcher::start("target", runners, Limits { batch, ..args.limits(1) })?;
        Ok(Self { layers: layers.into(), preprocessor, batcher })
    }

    /// Runs a picture; gives, a layer after the other, `g` of every unit.
    pub(crate) async fn run(&self, picture: Source, wanted: Output) -> Result<Vec<Vec<f32>>, Fault> {
        self.batcher.submit(Item { picture, wanted }).await
    }
}

/// What a target's processes are started with.
struct Starter {
    host: Arc<Host>,
    described: Arc<Described>,
    sessions: usize,
    load: Load,
    target: Target,
}

impl Starter {
    fn network(&self) -> Result<Vec<u8>, Fault> {
        let whole = |layer: &LayerInfo| layer.reduced(self.target.reading.summary).into_iter().chain([layer.whole()]);
        let wanted: Vec<Wanted> = self.target.layers.iter().flat_map(whole).collect();
        Ok(self.described.network.cut(&self.described.input, &wanted)?)
    }

    /// Starts a process, which then loads the network.
    fn begin(&self, network: &[u8]) -> Result<Process, Fault> {
        let mut process = self.host.start(&self.described.digest, self.sessions)?;
        process.send(&Request::Load(self.load.clone(), self.target.clone()), network, &Stop::default())?;
        Ok(process)
    }

    /// Waits until it has.
    fn end(&self, mut process: Process, stop: &Stop) -> Result<Process, Fault> {
        let (loaded, _) = process.answer::<()>(MOST_HEADER, stop)?;
        process.meant(loaded)?;
        Ok(process)
    }
}

/// `g` of every unit of every layer on a picture.
type Activations = Vec<Vec<f32>>;

/// A session of a target.
struct Runner {
    /// None after it was lost; another is started for the next batch.
    process: Option<Process>,
    starter: Arc<Starter>,
}

impl Worker for Runner {
    type Item = Item;
    type Output = Vec<Vec<f32>>;
    /// Maps are made outputs of the session only where a pass wants them.
    type Key = bool;

    fn key(item: &Item) -> bool {
        matches!(item.wanted, Output::Probe { .. })
    }

    /// A target is its caller's: what it can't do is no failure of the service.
    fn warm_up(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn run(&mut self, items: Vec<Item>, stop: &Stop) -> Vec<Result<Vec<Vec<f32>>, Fault>> {
        let mut ran = self.batch(&items, stop);
        // Whoever killed it may have had a reason that has nothing to do with the target.
        if ran.as_ref().is_err_and(|fault| fault.reason() == "TARGET_DIED") {
            ran = self.batch(&items, stop);
        }
        ran.unwrap_or_else(|fault| items.iter().map(|_| Err(fault.clone())).collect())
    }
}

impl Runner {
    /// Runs a batch on the process; an error is the end of that, or was so in all pictures.
    fn batch(&mut self, items: &[Item], stop: &Stop) -> Result<Vec<Result<Activations, Fault>>, Fault> {
        let mut process = match self.process.take() {
            Some(process) => process,
            None => self.starter.end(self.starter.begin(&self.starter.network()?)?, stop)?,
        };
        let layers = &self.starter.target.layers;
        let mut bytes = Vec::new();
        let mut give = |picture: &Source| match picture {
            Source::Encoded(encoded) => {
                bytes.extend_from_slice(encoded);
                Given::Encoded(encoded.len())
            }
            Source::Decoded(picture) => {
                bytes.extend_from_slice(picture.as_raw());
                Given::Pixels { width: picture.width(), height: picture.height() }
            }
        };
        let pictures: Vec<Given> = items.iter().map(|item| give(&item.picture)).collect();
        let probing = items.iter().any(|item| matches!(item.wanted, Output::Probe { .. }));
        let of_each: usize = layers.iter().map(|layer| layer.units as usize).sum();
        let most = MOST_HEADER.saturating_add((items.len() * of_each * size_of::<f32>()) as u64);
        let (ran, values) = process.ask::<Vec<Answer<Size>>>(&Request::Run { pictures, probing }, &bytes, most, stop)?;
        let ran = match process.meant(ran) {
            Ok(ran) => ran,
            Err(fault) => {
                self.process = Some(process);
                return Err(fault);
            }
        };
        let values = process::floats_of(&values);
        let mut values = values.chunks_exact(of_each.max(1));
        let results = ran.into_iter().map(|size| {
            let size = process.meant(size)?;
            let mut values = values.next().ok_or_else(short)?;
            let layers = layers.iter().map(|layer| values.split_off(..layer.units as usize).map(<[f32]>::to_vec).ok_or_else(short));
            Ok((size, layers.collect::<Result<Vec<_>, Fault>>()?))
        });
        let results: Vec<Result<(Size, Activations), Fault>> = results.collect();
        if results.len() != items.len() {
            return Err(short());
        }
        // All maps before any picture is offered: where the process is lost meanwhile, all is run again.
        let good = items.iter().zip(&results).filter_map(|(item, result)| Some((&item.wanted, result.as_ref().ok()?)));
        let offers: Vec<_> = good
            .enumerate()
            .filter_map(|(row, (wanted, (size, activations)))| match wanted {
                Output::Probe { collector, index } => Some((row, collector, *index, *size, activations)),
                Output::Activations => None,
            })
            .collect();
        let map = |layer: usize| layers.get(layer).and_then(|layer| layer.map(self.starter.target.reading));
        let wanted = offers.iter().flat_map(|(row, collector, index, _, activations)| {
            let wanted = collector.wants(*index, activations, |layer| map(layer).map_or(0, |(height, width)| height * width));
            wanted.into_iter().map(|(layer, unit)| MapOf { row: *row, layer, unit })
        });
        let mut maps = maps_of(&mut process, wanted.collect(), map, stop)?;
        for (row, collector, index, size, activations) in offers {
            let kept = |layer: usize, unit| match map(layer) {
                None => ProbedMap::None,
                Some(_) => maps.remove(&(row, layer, unit)).map_or(ProbedMap::Dropped, ProbedMap::Kept),
            };
            collector.offer(index, size, activations, kept);
        }
        self.process = Some(process);
        Ok(results.into_iter().map(|result| result.map(|(_, activations)| activations)).collect())
    }
}

/// Maps of the pictures that were run last, by row, layer and unit; `size` is that of a layer's maps.
fn maps_of(
    process: &mut Process,
    wanted: Vec<MapOf>,
    size: impl Fn(usize) -> Option<(usize, usize)>,
    stop: &Stop,
) -> Result<HashMap<(usize, usize, u32), Map>, Fault> {
    let mut maps = HashMap::with_capacity(wanted.len());
    for wanted in wanted.chunks(MAPS_AT_A_TIME) {
        let sizes: Vec<(usize, usize)> = wanted.iter().map(|of| size(of.layer).unwrap_or_default()).collect();
        let most: usize = sizes.iter().map(|(height, width)| height * width * size_of::<f32>()).sum();
        let (answer, values) = process.ask::<()>(&Request::Maps(wanted.to_vec()), &[], MOST_HEADER.saturating_add(most as u64), stop)?;
        process.meant(answer)?;
        let values = process::floats_of(&values);
        let mut values = &values[..];
        for (of, (height, width)) in wanted.iter().zip(sizes) {
            let values = values.split_off(..height * width).ok_or_else(short)?;
            maps.insert((of.row, of.layer, of.unit), Map::new(height, width, values.to_vec()).ok_or_else(short)?);
        }
    }
    Ok(maps)
}

/// Maps that are asked for together: some megabytes.
const MAPS_AT_A_TIME: usize = 4096;

/// The fault of a process that does not give what it was asked for.
fn short() -> Fault {
    Fault::new(Code::Aborted, "TARGET_DIED", "the target's process gave less than it was asked for")
}

/// Bytes of an answer at most, the values aside: what is wrong with each picture of a batch.
const MOST_HEADER: u64 = 16 << 20;

/// Whether a layer of tokens can be read in the way that is asked for.
fn check_tokens(layer: &LayerInfo, reading: Reading) -> Result<(), Error> {
    let LayerKind::Tokens { tokens, prefix, grid } = layer.kind else { return Ok(()) };
    let wrong = |problem: String| Err(Error::Graph(format!("layer {:?}: {problem}", layer.name)));
    match (reading.token_summary, prefix, grid) {
        (TokenSummary::Class, 0, Some((rows, columns))) => {
            wrong(format!("its {tokens} tokens are a grid of {rows} x {columns} without a class token: its units can be read with token_summary patch_mean"))
        }
        (TokenSummary::PatchMean, 1, None) if tokens == 1 => {
            wrong("its one token is no grid of patches: its units can be read with token_summary class".to_owned())
        }
        (TokenSummary::PatchMean, _, None) => wrong(format!(
            "its {tokens} tokens are no grid of patches that is known, with up to 16 tokens before it: say prefix_tokens (--prefix-tokens), or read the class token"
        )),
        _ => Ok(()),
    }
}
