//! A loaded target: cut down to what the asked-for layers need, run picture by picture in batches.

use std::sync::Arc;

use bytes::Bytes;
use dnd_mesh::{
    Fault,
    batch::{self, Batcher, Limits, Stop, Worker},
};
use dnd_method::{
    parameters::{Summary, TokenSummary},
    resize::Map,
    summary,
};
use dnd_onnx::{
    Error,
    graph::{self, reduced},
    pictures::{self, PictureLimits, Preprocessor},
    runtime::{self, EngineArgs},
};
use image::RgbImage;
use ort::{
    session::{OutputSelector, RunOptions, Session, SessionOutputs},
    value::Tensor,
};

use super::{Collector, Described, LayerInfo, LayerKind};

/// How units' values become numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// Loads the network for some of its layers. Blocking.
    pub(crate) fn load(described: &Described, layers: Vec<LayerInfo>, reading: Reading, args: &EngineArgs, limits: PictureLimits) -> Result<Self, Fault> {
        layers.iter().try_for_each(|layer| check_tokens(layer, reading))?;
        let preprocessor = Preprocessor::new(&described.preprocessing)?;
        let input = described.network.input()?;
        let wanted: Vec<graph::Wanted> = layers.iter().flat_map(|layer| outputs_of(layer, reading)).collect();
        let model = described.network.cut(&wanted)?;
        let layers: Arc<[LayerInfo]> = layers.into();
        let runners = (0..args.session_count())
            .map(|_| {
                Ok(Runner {
                    session: runtime::session_of(&model, described.network.folder(), args)?,
                    input: input.name.clone(),
                    fixed_batch: input.batch,
                    layers: Arc::clone(&layers),
                    reading,
                    preprocessor: preprocessor.clone(),
                    limits,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let batch = input.batch.unwrap_or(args.batch()).max(1);
        let limits = Limits { queue: 4 * batch * runners.len(), batch };
        let batcher = Batcher::start("target", runners, limits).map_err(|e| Error::Run(e.to_string()))?;
        Ok(Self { layers, preprocessor, batcher })
    }

    /// Runs a picture; gives, a layer after the other, `g` of every unit.
    pub(crate) async fn run(&self, picture: Source, wanted: Output) -> Result<Vec<Vec<f32>>, Fault> {
        self.batcher.submit(Item { picture, wanted }).await
    }
}

/// The outputs that a layer needs: its value reduced over space, and the value itself for maps.
fn outputs_of(layer: &LayerInfo, reading: Reading) -> Vec<graph::Wanted> {
    let value = |reduce| graph::Wanted { value: layer.value.clone(), reduce };
    match layer.kind {
        LayerKind::Channels { .. } => vec![value(Some(reading.summary)), value(None)],
        LayerKind::Tokens { .. } | LayerKind::Units => vec![value(None)],
    }
}

struct Runner {
    session: Session,
    input: String,
    fixed_batch: Option<usize>,
    layers: Arc<[LayerInfo]>,
    reading: Reading,
    preprocessor: Preprocessor,
    limits: PictureLimits,
}

impl Worker for Runner {
    type Item = Item;
    type Output = Vec<Vec<f32>>;
    /// Maps are copied out of the session only where a pass wants them.
    type Key = bool;

    fn key(item: &Item) -> bool {
        matches!(item.wanted, Output::Probe { .. })
    }

    fn run(&mut self, items: Vec<Item>, _: &Stop) -> Vec<Result<Vec<Vec<f32>>, Fault>> {
        let mut tensor = Vec::with_capacity(items.len() * self.preprocessor.values());
        let mut good = Vec::with_capacity(items.len());
        let read: Vec<Result<(), Fault>> = items
            .iter()
            .map(|item| {
                let size = match &item.picture {
                    Source::Encoded(bytes) => self.read(&pictures::decode(bytes, self.limits)?, &mut tensor)?,
                    Source::Decoded(picture) => self.read(picture, &mut tensor)?,
                };
                good.push(Wanted { size, output: &item.wanted });
                Ok(())
            })
            .collect();
        let run = self.activations(tensor, &good);
        batch::spread(read, run.map_err(Fault::from))
    }
}

/// What is wanted of a picture that could be read, and its width and height.
struct Wanted<'i> {
    size: (u32, u32),
    output: &'i Output,
}

impl Runner {
    fn read(&self, picture: &RgbImage, tensor: &mut Vec<f32>) -> Result<(u32, u32), Error> {
        self.preprocessor.append(picture, tensor)?;
        Ok(picture.dimensions())
    }

    fn activations(&mut self, mut pixels: Vec<f32>, wanted: &[Wanted<'_>]) -> Result<Vec<Vec<Vec<f32>>>, Error> {
        let count = wanted.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        // A graph of a fixed batch gets blank pictures for the rest of it.
        let rows = self.fixed_batch.unwrap_or(count);
        pixels.resize(rows * self.preprocessor.values(), 0.0);
        let (height, width) = self.preprocessor.size();
        let pixels = Tensor::from_array(([rows, 3, height, width], pixels))?;
        let probing = wanted.iter().any(|wanted| matches!(wanted.output, Output::Probe { .. }));
        let needs_value = |layer: &&LayerInfo| probing || layer.kind.map().is_none();
        let selected = OutputSelector::no_default();
        let selected = self.layers.iter().filter(|layer| layer.kind.map().is_some()).fold(selected, |s, layer| s.with(reduced(&layer.value)));
        let selected = self.layers.iter().filter(needs_value).fold(selected, |s, layer| s.with(&layer.value));
        let options = RunOptions::new()?.with_outputs(selected);
        let outputs = self.session.run_with_options(vec![(self.input.as_str(), pixels)], &options)?;

        let mut activations = vec![Vec::with_capacity(self.layers.len()); count];
        for layer in self.layers.iter() {
            for (row, activations) in activations.iter_mut().enumerate() {
                activations.push(summaries(&outputs, layer, self.reading, row, rows)?);
            }
        }
        for (row, wanted) in wanted.iter().enumerate() {
            if let Output::Probe { collector, index } = wanted.output {
                let maps = |layer: usize, unit: u32| self.layers.get(layer).and_then(|layer| map(&outputs, layer, self.reading, row, rows, unit));
                collector.offer(*index, wanted.size, &activations[row], maps);
            }
        }
        Ok(activations)
    }
}

fn values<'o>(outputs: &'o SessionOutputs<'_>, name: &str, row: usize, rows: usize) -> Result<&'o [f32], Error> {
    let (_, all) = outputs.get(name).ok_or_else(|| Error::Run(format!("no output {name}")))?.try_extract_tensor::<f32>()?;
    let each = all.len() / rows;
    all.get(row * each..(row + 1) * each).ok_or_else(|| Error::Run(format!("{name} has no row {row}")))
}

/// `g` of every unit of a layer for one picture of a batch.
fn summaries(outputs: &SessionOutputs<'_>, layer: &LayerInfo, reading: Reading, row: usize, rows: usize) -> Result<Vec<f32>, Error> {
    match layer.kind {
        LayerKind::Channels { .. } => Ok(values(outputs, &reduced(&layer.value), row, rows)?.to_vec()),
        LayerKind::Units => Ok(values(outputs, &layer.value, row, rows)?.to_vec()),
        LayerKind::Tokens { tokens } => {
            let value = values(outputs, &layer.value, row, rows)?;
            let units = layer.units as usize;
            Ok(match reading.token_summary {
                TokenSummary::Class => value[..units].to_vec(),
                TokenSummary::PatchMean => {
                    let first = first_patch(tokens)?;
                    (0..units).map(|unit| summary::summarize(&column(value, units, unit, first), reading.summary)).collect()
                }
            })
        }
    }
}

/// A unit's activation map on one picture of a batch, if the layer has space.
fn map(outputs: &SessionOutputs<'_>, layer: &LayerInfo, reading: Reading, row: usize, rows: usize, unit: u32) -> Option<Map> {
    let value = values(outputs, &layer.value, row, rows).ok()?;
    let (unit, units) = (unit as usize, layer.units as usize);
    match (layer.kind, reading.token_summary) {
        (LayerKind::Channels { height, width }, _) => Map::new(height, width, value.get(unit * height * width..(unit + 1) * height * width)?.to_vec()),
        (LayerKind::Tokens { tokens }, TokenSummary::PatchMean) => {
            let first = first_patch(tokens).ok()?;
            let side = (tokens - first).isqrt();
            Map::new(side, side, column(value, units, unit, first))
        }
        (LayerKind::Tokens { .. }, TokenSummary::Class) | (LayerKind::Units, _) => None,
    }
}

/// Whether a layer of tokens can be read in the way that is asked for.
fn check_tokens(layer: &LayerInfo, reading: Reading) -> Result<(), Error> {
    let LayerKind::Tokens { tokens } = layer.kind else { return Ok(()) };
    match (first_patch(tokens), reading.token_summary) {
        (Ok(0), TokenSummary::Class) => Err(Error::Graph(format!(
            "layer {:?} has {tokens} tokens, a grid without a class token: its units can be read with token_summary patch_mean",
            layer.name
        ))),
        (Err(problem), TokenSummary::PatchMean) => Err(Error::Graph(format!("layer {:?}: {problem}", layer.name))),
        _ => Ok(()),
    }
}

fn column(value: &[f32], units: usize, unit: usize, first: usize) -> Vec<f32> {
    value.iter().skip(first * units + unit).step_by(units).copied().collect()
}

/// Where the patch tokens begin: after a class token, or at once, whichever leaves a square grid.
fn first_patch(tokens: usize) -> Result<usize, Error> {
    let square = |n: usize| n > 0 && n.isqrt().pow(2) == n;
    match tokens {
        n if n > 1 && square(n - 1) => Ok(1),
        n if square(n) => Ok(0),
        n => Err(Error::Graph(format!("{n} tokens are no square grid of patches, with or without a class token"))),
    }
}
