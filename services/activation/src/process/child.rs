//! The process of a target, from inside.

use std::{
    env,
    error::Error as StdError,
    io::{self, BufReader, ErrorKind, Read as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    process::{self, ExitCode},
    thread,
    time::Duration,
};

use dnd_mesh::Fault;
use dnd_method::{parameters::TokenSummary, summary};
use dnd_onnx::{
    Error,
    graph::{DataFormat, Wanted},
    pictures::{self, PictureLimits, Preprocessor},
    runtime,
};
use dnd_proto::v1::Preprocessing;
use image::RgbImage;
use ort::{
    session::{HasSelectedOutputs, OutputSelector, RunOptions, Session, SessionOutputs},
    value::{Tensor, TensorElementType, ValueType},
};
use prost::Message as _;

use super::{Answer, Element, Given, Load, Look, Looked, MapOf, NAME, Request, Size, Target, answer_of, bytes_of, read, write};
use crate::engine::{LayerInfo, LayerKind, Reading};

/// Pictures of the trial run, where the graph leaves the number open: a value that does not have as many rows is no layer.
const TRIAL_BATCH: usize = 2;
/// Pixels of a batch that a network fixes at most.
const MOST_INPUT_PIXELS: usize = 1 << 26;
/// How long a process has to end by itself when its service is gone.
const LAST: Duration = Duration::from_secs(1);

/// Whether this process was started to run a target: its program's `main` hands over to [`run_target`] then, before anything else.
pub fn is_target_process() -> bool {
    env::args_os().next().is_some_and(|name| name == NAME)
}

/// Runs a target, to the end of the service that started this process.
pub fn run_target() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{NAME}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Ends this process when its service has gone, also while a model runs that never ends: nothing is sent on this socket, and it closes with the service.
fn end_with(service: UnixStream) -> io::Result<()> {
    let watch = move || {
        let _ = (&service).read(&mut [0]);
        thread::sleep(LAST);
        process::abort();
    };
    thread::Builder::new().name("service".to_owned()).spawn(watch).map(drop)
}

fn serve() -> Result<(), Box<dyn StdError>> {
    end_with(UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?))?;
    let mut answers = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut requests = BufReader::new(answers.try_clone()?);
    let mut next = || read(&mut requests, u64::MAX);
    let (first, model): (Request, Vec<u8>) = next()?;
    let (load, target) = match first {
        Request::Look(load, look) => {
            let looked = trial(&load, &look, &model).map_err(Fault::from);
            return Ok(write(&mut answers, &answer_of(looked), &[])?);
        }
        Request::Load(load, target) => (load, target),
        Request::Run { .. } | Request::Maps { .. } => return Err("no network was named".into()),
    };
    let loaded = Runner::load(load, target, &model).map_err(Fault::from);
    drop(model);
    let (mut runner, ready) = match loaded {
        Ok(runner) => (Some(runner), Ok(())),
        Err(fault) => (None, Err(fault)),
    };
    write(&mut answers, &answer_of(ready), &[])?;
    let Some(runner) = &mut runner else { return Ok(()) };
    let mut request = next();
    while let Ok((Request::Run { pictures, probing }, bytes)) = request {
        let Runner { session, input, target, preprocessor } = runner;
        let Batch { read, pixels, count } = Batch::read(&pictures, &bytes, preprocessor, target.limits());
        let options = selected(target, probing)?;
        let shape = preprocessor.size();
        let outputs = if count == 0 { Ok(None) } else { activations(session, &options, input, target, shape, pixels, count).map(Some) };
        let (answer, values) = match &outputs {
            Ok(Some((_, values))) => (Ok(read), bytes_of(values)),
            Ok(None) => (Ok(read), Vec::new()),
            Err(fault) => (Err(fault.clone()), Vec::new()),
        };
        write(&mut answers, &answer_of(answer), &values)?;
        let outputs = outputs.ok().flatten().map(|(outputs, _)| outputs);
        request = loop {
            match next() {
                Ok((Request::Maps(wanted), _)) => {
                    let rows = target.batch.unwrap_or(count);
                    let mut values = Vec::new();
                    let all = wanted.iter().try_for_each(|of| map(outputs.as_ref()?, target.layers.get(of.layer)?, target.reading, of, rows, &mut values));
                    let all = all.ok_or_else(|| Fault::internal("a map was asked for that is not there"));
                    write(&mut answers, &answer_of(all), &bytes_of(&values))?;
                }
                other => break other,
            }
        };
    }
    match request {
        Ok(_) => Err("pictures come after a network".into()),
        // The service has let go of the target.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Runs a network once on blank pictures.
fn trial(load: &Load, look: &Look, model: &[u8]) -> Result<Looked, Error> {
    let mut session = runtime::session_of(model, load.folder.as_ref(), &load.engine)?;
    let mut run = |batch| values(&mut session, &load.input, look.size, batch);
    let (batch, fixed, values) = match look.batch {
        Some(batch) => (batch, Some(batch), run(batch)?),
        // A graph may leave the number of pictures open and be for one all the same, by a shape that was traced with one.
        None => match run(TRIAL_BATCH) {
            Ok(values) => (TRIAL_BATCH, None, values),
            Err(error) => (1, Some(1), run(1).map_err(|_| error)?),
        },
    };
    Ok(Looked { batch, fixed, values })
}

/// The types and shapes of all outputs that are tensors, on blank pictures.
fn values(session: &mut Session, input: &str, (height, width): (usize, usize), batch: usize) -> Result<Vec<(String, Element, Vec<usize>)>, Error> {
    if batch * height * width > MOST_INPUT_PIXELS {
        return Err(Error::Graph(format!("it takes {batch} pictures of {height} x {width} at a time; that is more than {MOST_INPUT_PIXELS} pixels together")));
    }
    let blank = Tensor::from_array(([batch, 3, height, width], vec![0.0_f32; batch * 3 * height * width]))?;
    let outputs = session.run(vec![(input, blank)])?;
    let tensor = |name: &str, value: &ValueType| match value {
        ValueType::Tensor { ty, shape, .. } => Some((name.to_owned(), element(*ty), shape.iter().map(|side| usize::try_from(*side).unwrap_or(0)).collect())),
        _ => None,
    };
    Ok(outputs.iter().filter_map(|(name, value)| tensor(name, value.dtype())).collect())
}

fn element(element: TensorElementType) -> Element {
    use TensorElementType as Of;
    match element {
        Of::Float32 => Element::Float32,
        Of::Float16 | Of::Bfloat16 | Of::Float64 => Element::Float,
        Of::Int8 | Of::Uint8 => Element::EightBits,
        other => Element::Other(other.to_string()),
    }
}

/// A loaded target.
struct Runner {
    session: Session,
    input: String,
    target: Target,
    preprocessor: Preprocessor,
}

impl Runner {
    fn load(load: Load, target: Target, model: &[u8]) -> Result<Self, Error> {
        let preprocessing = Preprocessing::decode(&*target.preprocessing).map_err(|e| Error::Run(format!("no pre-processing: {e}")))?;
        let session = runtime::session_of(model, load.folder.as_ref(), &load.engine)?;
        Ok(Self { session, input: load.input, target, preprocessor: Preprocessor::new(&preprocessing)? })
    }
}

/// Pictures that were read.
struct Batch {
    /// The width and height of each, or why it can't be used.
    read: Vec<Answer<Size>>,
    /// The input of those that can be.
    pixels: Vec<f32>,
    /// How many these are.
    count: usize,
}

impl Batch {
    fn read(pictures: &[Given], bytes: &[u8], preprocessor: &Preprocessor, limits: PictureLimits) -> Self {
        let (mut pixels, mut rest) = (Vec::with_capacity(pictures.len() * preprocessor.values()), bytes);
        let mut read = |picture: &Given| -> Result<Size, Error> {
            let picture = match picture {
                Given::Encoded(size) => pictures::decode(take(&mut rest, *size)?, limits)?,
                Given::Pixels { width, height } => {
                    let bytes = take(&mut rest, 3 * *width as usize * *height as usize)?;
                    RgbImage::from_raw(*width, *height, bytes.to_vec()).ok_or_else(|| Error::Picture("no pixels".to_owned()))?
                }
            };
            preprocessor.append(&picture, &mut pixels)?;
            Ok(picture.dimensions())
        };
        let read: Vec<_> = pictures.iter().map(|picture| answer_of(read(picture).map_err(Fault::from))).collect();
        let count = read.iter().filter(|picture| picture.is_ok()).count();
        Self { read, pixels, count }
    }
}

fn take<'b>(bytes: &mut &'b [u8], count: usize) -> Result<&'b [u8], Error> {
    bytes.split_off(..count).ok_or_else(|| Error::Picture("its bytes did not arrive".to_owned()))
}

/// The outputs that are wanted of a run: whole feature maps only where a pass may keep them.
fn selected(target: &Target, probing: bool) -> Result<RunOptions<HasSelectedOutputs>, ort::Error> {
    let needed = target.layers.iter().flat_map(|layer| {
        let reduced = layer.reduced(target.reading.summary);
        let whole = (probing || reduced.is_none()).then(|| layer.whole());
        reduced.into_iter().chain(whole)
    });
    Ok(RunOptions::new()?.with_outputs(needed.fold(OutputSelector::no_default(), |selected, wanted| selected.with(wanted.output()))))
}

/// Runs `count` pictures: what the network gives, and `g` of every unit, a picture after the other.
fn activations<'s>(
    session: &'s mut Session,
    options: &'s RunOptions<HasSelectedOutputs>,
    input: &str,
    target: &Target,
    (height, width): (usize, usize),
    mut pixels: Vec<f32>,
    count: usize,
) -> Result<(SessionOutputs<'s>, Vec<f32>), Fault> {
    // A graph of a fixed batch gets blank pictures for the rest of it.
    let rows = target.batch.unwrap_or(count);
    pixels.resize(rows * 3 * height * width, 0.0);
    let run = || -> Result<_, Error> {
        let pixels = Tensor::from_array(([rows, 3, height, width], pixels))?;
        let outputs = session.run_with_options(vec![(input, pixels)], options)?;
        let mut activations = Vec::new();
        for row in 0..count {
            for layer in &target.layers {
                activations.extend(summaries(&outputs, layer, target.reading, row, rows)?);
            }
        }
        Ok((outputs, activations))
    };
    run().map_err(Fault::from)
}

fn row_of<'o>(outputs: &'o SessionOutputs<'_>, wanted: &Wanted, row: usize, rows: usize) -> Result<&'o [f32], Error> {
    let name = wanted.output();
    let (_, all) = outputs.get(&name).ok_or_else(|| Error::Run(format!("no output {name}")))?.try_extract_tensor::<f32>()?;
    let each = all.len() / rows;
    all.get(row * each..(row + 1) * each).ok_or_else(|| Error::Run(format!("{name} has no row {row}")))
}

/// `g` of every unit of a layer for one picture of a batch.
fn summaries(outputs: &SessionOutputs<'_>, layer: &LayerInfo, reading: Reading, row: usize, rows: usize) -> Result<Vec<f32>, Error> {
    if let Some(reduced) = layer.reduced(reading.summary) {
        return Ok(row_of(outputs, &reduced, row, rows)?.to_vec());
    }
    let value = row_of(outputs, &layer.whole(), row, rows)?;
    let units = layer.units as usize;
    let over = |first: usize| (0..units).map(|unit| summary::summarize(&column(value, units, unit, first).collect::<Vec<_>>(), reading.summary)).collect();
    Ok(match (layer.kind, reading.token_summary) {
        (LayerKind::Channels { .. }, _) => over(0),
        (LayerKind::Tokens { prefix, .. }, TokenSummary::PatchMean) => over(prefix),
        (LayerKind::Tokens { .. }, TokenSummary::Class) => value.get(..units).unwrap_or(value).to_vec(),
        (LayerKind::Units, _) => value.to_vec(),
    })
}

/// Appends a unit's activation map on one picture of a batch.
fn map(outputs: &SessionOutputs<'_>, layer: &LayerInfo, reading: Reading, of: &MapOf, rows: usize, to: &mut Vec<f32>) -> Option<()> {
    let (height, width) = layer.map(reading)?;
    let value = row_of(outputs, &layer.whole(), of.row, rows).ok()?;
    let (unit, units) = (of.unit as usize, layer.units as usize);
    match layer.kind {
        LayerKind::Channels { data_format: DataFormat::ChannelsFirst, .. } => to.extend(value.get(unit * height * width..(unit + 1) * height * width)?),
        LayerKind::Channels { data_format: DataFormat::ChannelsLast, .. } => to.extend(column(value, units, unit, 0)),
        LayerKind::Tokens { prefix, .. } => to.extend(column(value, units, unit, prefix)),
        LayerKind::Units => return None,
    }
    Some(())
}

/// A unit's values, from the place `first` on, of values with the units as their last axis.
fn column(value: &[f32], units: usize, unit: usize, first: usize) -> impl Iterator<Item = f32> {
    value.iter().skip(first * units + unit).step_by(units).copied()
}
