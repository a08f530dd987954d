//! What can be asked of a target: found out by running it once with every value as an output.

use std::collections::HashMap;

use dnd_mesh::Fault;
use dnd_onnx::{
    Error,
    graph::{Input, Layer, Network, Wanted},
    runtime::{self, EngineArgs},
};
use dnd_proto::v1 as proto;
use ort::value::Tensor;

/// The input of a network that does not say its size.
pub(crate) const USUAL_SIZE: (u32, u32) = (224, 224);
/// Pictures of the trial run, where the graph leaves the number open: a value that does not have as many rows is no layer.
const TRIAL_BATCH: usize = 2;

/// A layer whose units can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerInfo {
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) operator: String,
    pub(crate) kind: LayerKind,
    pub(crate) units: u32,
}

impl LayerInfo {
    /// Values of a unit's activation map; none without space.
    pub(crate) fn map_values(&self) -> usize {
        match self.kind {
            LayerKind::Channels { height, width } => height * width,
            LayerKind::Tokens { tokens } => tokens,
            LayerKind::Units => 0,
        }
    }
}

/// The shape of a layer's value, the batch aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerKind {
    /// Channels of (N, C, height, width).
    Channels { height: usize, width: usize },
    /// Dimensions of (N, tokens, C).
    Tokens { tokens: usize },
    /// Units of (N, C).
    Units,
}

impl LayerKind {
    fn of(shape: &[i64], batch: usize) -> Option<(Self, u32)> {
        let sizes: Vec<usize> = shape.iter().map(|&n| usize::try_from(n).ok().filter(|n| *n > 0)).collect::<Option<_>>()?;
        match sizes[..] {
            [n, units, height, width] if n == batch => Some((Self::Channels { height, width }, units as u32)),
            [n, tokens, units] if n == batch => Some((Self::Tokens { tokens }, units as u32)),
            [n, units] if n == batch => Some((Self::Units, units as u32)),
            _ => None,
        }
    }

    /// Rows and columns of the activation map of a layer with space.
    pub(crate) fn map(self) -> Option<(usize, usize)> {
        match self {
            Self::Channels { height, width } => Some((height, width)),
            Self::Tokens { .. } | Self::Units => None,
        }
    }
}

impl From<&LayerInfo> for proto::Layer {
    fn from(layer: &LayerInfo) -> Self {
        let kind = match layer.kind {
            LayerKind::Channels { .. } => proto::LayerKind::Channels,
            LayerKind::Tokens { .. } => proto::LayerKind::Tokens,
            LayerKind::Units => proto::LayerKind::Units,
        };
        Self {
            name: layer.name.clone(),
            value: layer.value.clone(),
            operator: layer.operator.clone(),
            kind: kind.into(),
            units: layer.units,
            map: layer.kind.map().map_or_else(Vec::new, |(height, width)| vec![height as u32, width as u32]),
        }
    }
}

/// The layers of a network in its graph's order.
pub(crate) fn layers(network: &Network, input: &Input, preprocessing: &proto::Preprocessing, args: &EngineArgs) -> Result<Vec<LayerInfo>, Fault> {
    let candidates = network.layers()?;
    let wanted: Vec<Wanted> = candidates.iter().map(|layer| Wanted { value: layer.value.clone(), reduce: None }).collect();
    let mut session = runtime::session_of(&network.cut(&wanted)?, network.folder(), args)?;
    let batch = input.batch.unwrap_or(TRIAL_BATCH);
    let (height, width) = (preprocessing.height as usize, preprocessing.width as usize);
    let blank = Tensor::from_array(([batch, 3, height, width], vec![0.0_f32; batch * 3 * height * width])).map_err(Error::from)?;
    let outputs = session.run(vec![(input.name.as_str(), blank)]).map_err(Error::from)?;
    let shapes: HashMap<&str, (LayerKind, u32)> = outputs
        .iter()
        .filter_map(|(name, value)| {
            let (shape, _) = value.try_extract_tensor::<f32>().ok()?;
            Some((name, LayerKind::of(shape, batch)?))
        })
        .collect();
    let known = |layer: Layer| {
        let &(kind, units) = shapes.get(layer.value.as_str())?;
        Some(LayerInfo { name: layer.name, value: layer.value, operator: layer.operator, kind, units })
    };
    let layers: Vec<LayerInfo> = candidates.into_iter().filter_map(known).collect();
    if layers.is_empty() {
        return Err(
            Error::Graph("the network has no layer whose units can be told apart: no value of floats with the batch as its first axis".to_owned()).into()
        );
    }
    Ok(layers)
}

/// The layers and units that a caller asks for: names looked up, all units where none are named, each in its range. `field` is the request's.
pub(crate) fn resolve(network: &Network, layers: &[LayerInfo], asked: &[proto::LayerUnits]) -> Result<Vec<(LayerInfo, Vec<u32>)>, Fault> {
    const MOST_LAYERS: usize = 1000;
    if asked.is_empty() || asked.len() > MOST_LAYERS {
        return Err(Fault::field("layers", format!("{} layers; 1 to {MOST_LAYERS} can be asked for", asked.len())));
    }
    let mut resolved: Vec<(LayerInfo, Vec<u32>)> = Vec::with_capacity(asked.len());
    for asked in asked {
        let found = network.layer(&asked.layer)?;
        let info = layers
            .iter()
            .find(|layer| layer.value == found.value)
            .ok_or_else(|| Error::Graph(format!("{} is not a layer of floats with the batch as its first axis", asked.layer)))?;
        // By the name that was meant: several modules may end in one value.
        let info = LayerInfo { name: found.name, ..info.clone() };
        if resolved.iter().any(|(other, _)| other.value == info.value) {
            return Err(Fault::field("layers", format!("{} is asked for twice", info.name)));
        }
        let mut units = if asked.units.is_empty() { (0..info.units).collect() } else { asked.units.clone() };
        units.sort_unstable();
        units.dedup();
        if let Some(&unit) = units.iter().find(|unit| **unit >= info.units) {
            return Err(Error::UnitOutOfRange { layer: info.name, unit, units: info.units }.into());
        }
        resolved.push((info, units));
    }
    Ok(resolved)
}
