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
    graph::{DataFormat, Wanted},
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
        let wanted: Vec<Wanted> = layers.iter().flat_map(|layer| layer.reduced(reading.summary).into_iter().chain([layer.whole()])).collect();
        let model = described.network.cut(&described.input, &wanted)?;
        let layers: Arc<[LayerInfo]> = layers.into();
        let runners = (0..args.session_count())
            .map(|_| {
                Ok(Runner {
                    session: runtime::session_of(&model, described.network.folder(), args)?,
                    input: described.input.fed(),
                    fixed_batch: described.batch,
                    layers: Arc::clone(&layers),
                    reading,
                    preprocessor: preprocessor.clone(),
                    limits,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let batch = described.batch.unwrap_or(args.batch()).max(1);
        let batcher = Batcher::start("target", runners, Limits { batch, ..args.limits(1) })?;
        Ok(Self { layers, preprocessor, batcher })
    }

    /// Runs a picture; gives, a layer after the other, `g` of every unit.
    pub(crate) async fn run(&self, picture: Source, wanted: Output) -> Result<Vec<Vec<f32>>, Fault> {
        self.batcher.submit(Item { picture, wanted }).await
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

    /// A target is its caller's: what it can't do is no failure of the service.
    fn warm_up(&mut self) -> Result<(), Fault> {
        Ok(())
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
                good.push(Readable { size, output: &item.wanted });
                Ok(())
            })
            .collect();
        let run = self.activations(tensor, &good);
        batch::spread(read, run.map_err(Fault::from))
    }
}

/// A picture that could be read: its width and height, and what is wanted of it.
struct Readable<'i> {
    size: (u32, u32),
    output: &'i Output,
}

impl Runner {
    fn read(&self, picture: &RgbImage, tensor: &mut Vec<f32>) -> Result<(u32, u32), Error> {
        self.preprocessor.append(picture, tensor)?;
        Ok(picture.dimensions())
    }

    fn activations(&mut self, mut pixels: Vec<f32>, pictures: &[Readable<'_>]) -> Result<Vec<Vec<Vec<f32>>>, Error> {
        let count = pictures.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        // A graph of a fixed batch gets blank pictures for the rest of it.
        let rows = self.fixed_batch.unwrap_or(count);
        pixels.resize(rows * self.preprocessor.values(), 0.0);
        let (height, width) = self.preprocessor.size();
        let pixels = Tensor::from_array(([rows, 3, height, width], pixels))?;
        let probing = pictures.iter().any(|picture| matches!(picture.output, Output::Probe { .. }));
        // Whole feature maps are copied out only where a pass may keep them.
        let needed = self.layers.iter().flat_map(|layer| {
            let reduced = layer.reduced(self.reading.summary);
            let whole = (probing || reduced.is_none()).then(|| layer.whole());
            reduced.into_iter().chain(whole)
        });
        let selected = needed.fold(OutputSelector::no_default(), |selected, wanted| selected.with(wanted.output()));
        let options = RunOptions::new()?.with_outputs(selected);
        let outputs = self.session.run_with_options(vec![(self.input.as_str(), pixels)], &options)?;

        let mut activations = vec![Vec::with_capacity(self.layers.len()); count];
        for layer in self.layers.iter() {
            for (row, activations) in activations.iter_mut().enumerate() {
                activations.push(summaries(&outputs, layer, self.reading, row, rows)?);
            }
        }
        for (row, picture) in pictures.iter().enumerate() {
            if let Output::Probe { collector, index } = picture.output {
                let maps = |layer: usize, unit: u32| self.layers.get(layer).and_then(|layer| map(&outputs, layer, self.reading, row, rows, unit));
                collector.offer(*index, picture.size, &activations[row], maps);
            }
        }
        Ok(activations)
    }
}

fn values<'o>(outputs: &'o SessionOutputs<'_>, wanted: &Wanted, row: usize, rows: usize) -> Result<&'o [f32], Error> {
    let name = wanted.output();
    let (_, all) = outputs.get(&name).ok_or_else(|| Error::Run(format!("no output {name}")))?.try_extract_tensor::<f32>()?;
    let each = all.len() / rows;
    all.get(row * each..(row + 1) * each).ok_or_else(|| Error::Run(format!("{name} has no row {row}")))
}

/// `g` of every unit of a layer for one picture of a batch.
fn summaries(outputs: &SessionOutputs<'_>, layer: &LayerInfo, reading: Reading, row: usize, rows: usize) -> Result<Vec<f32>, Error> {
    if let Some(reduced) = layer.reduced(reading.summary) {
        return Ok(values(outputs, &reduced, row, rows)?.to_vec());
    }
    let value = values(outputs, &layer.whole(), row, rows)?;
    let units = layer.units as usize;
    let over = |first: usize| (0..units).map(|unit| summary::summarize(&column(value, units, unit, first), reading.summary)).collect();
    Ok(match (layer.kind, reading.token_summary) {
        (LayerKind::Channels { .. }, _) => over(0),
        (LayerKind::Tokens { prefix, .. }, TokenSummary::PatchMean) => over(prefix),
        (LayerKind::Tokens { .. }, TokenSummary::Class) => value[..units].to_vec(),
        (LayerKind::Units, _) => value.to_vec(),
    })
}

/// A unit's activation map on one picture of a batch, if the layer has space.
fn map(outputs: &SessionOutputs<'_>, layer: &LayerInfo, reading: Reading, row: usize, rows: usize, unit: u32) -> Option<Map> {
    if matches!((layer.kind, reading.token_summary), (LayerKind::Tokens { .. }, TokenSummary::Class)) {
        return None;
    }
    let (height, width) = layer.kind.map()?;
    let value = values(outputs, &layer.whole(), row, rows).ok()?;
    let (unit, units) = (unit as usize, layer.units as usize);
    let map = match layer.kind {
        LayerKind::Channels { data_format: DataFormat::ChannelsFirst, .. } => value.get(unit * height * width..(unit + 1) * height * width)?.to_vec(),
        LayerKind::Channels { data_format: DataFormat::ChannelsLast, .. } => column(value, units, unit, 0),
        LayerKind::Tokens { prefix, .. } => column(value, units, unit, prefix),
        LayerKind::Units => return None,
    };
    Map::new(height, width, map)
}

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

/// A unit's values, from the place `first` on, of values with the units as their last axis.
fn column(value: &[f32], units: usize, unit: usize, first: usize) -> Vec<f32> {
    value.iter().skip(first * units + unit).step_by(units).copied().collect()
}
