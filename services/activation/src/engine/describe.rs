//! What can be asked of a target: found out by running it once with every value as an output.

use std::{collections::HashMap, sync::Arc};

use dnd_mesh::{Fault, batch::Stop};
use dnd_method::parameters::{Summary, TokenSummary};
use dnd_onnx::{
    Error,
    graph::{DataFormat, Given, Input, Layer, Network, ToFloat, Wanted},
    runtime::EngineArgs,
};
use dnd_proto::v1 as proto;
use serde::{Deserialize, Serialize};

use super::{Described, Reading};
use crate::process::{Element, Host, Load, Look, Looked, Request};

/// Tokens before the patches at most: a class token, a distillation token, registers.
const MOST_PREFIX_TOKENS: usize = 16;

/// Bytes of what is told of a network's values at most.
const MOST_LOOKED: u64 = 64 << 20;

/// A layer whose units can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerInfo {
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) operator: String,
    pub(crate) kind: LayerKind,
    pub(crate) units: u32,
    to_float: ToFloat,
}

impl LayerInfo {
    /// Values of a unit's activation map; none without space.
    pub(crate) fn map_values(&self) -> usize {
        self.kind.map().map_or(0, |(height, width)| height * width)
    }

    /// Rows and columns of a unit's activation map in that reading; none without space, as for class tokens.
    pub(crate) fn map(&self, reading: Reading) -> Option<(usize, usize)> {
        let class = matches!((self.kind, reading.token_summary), (LayerKind::Tokens { .. }, TokenSummary::Class));
        if class { None } else { self.kind.map() }
    }

    /// The layer's value.
    pub(crate) fn whole(&self) -> Wanted {
        Wanted { value: self.value.clone(), to_float: self.to_float, reduce: None }
    }

    /// A feature map reduced over space by the runtime. With channels last it is done here: the runtime's sum over axes that are not the last depends on the
    /// batch's size.
    pub(crate) fn reduced(&self, summary: Summary) -> Option<Wanted> {
        let first = matches!(self.kind, LayerKind::Channels { data_format: DataFormat::ChannelsFirst, .. });
        first.then(|| Wanted { reduce: Some(summary), ..self.whole() })
    }
}

/// The shape of a layer's value, the batch aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LayerKind {
    /// Channels of (N, C, height, width) or (N, height, width, C).
    Channels { height: usize, width: usize, data_format: DataFormat },
    /// Dimensions of (N, tokens, C): tokens of the whole picture, then those of a grid of patches if there is one.
    Tokens { tokens: usize, prefix: usize, grid: Option<(usize, usize)> },
    /// Units of (N, C).
    Units,
}

impl LayerKind {
    /// Rows and columns of the activation map of a layer with space.
    pub(crate) fn map(self) -> Option<(usize, usize)> {
        match self {
            Self::Channels { height, width, .. } => Some((height, width)),
            Self::Tokens { grid, .. } => grid,
            Self::Units => None,
        }
    }
}

impl From<&LayerInfo> for proto::Layer {
    fn from(layer: &LayerInfo) -> Self {
        let (kind, data_format, prefix) = match layer.kind {
            LayerKind::Channels { data_format: DataFormat::ChannelsFirst, .. } => (proto::LayerKind::Channels, proto::DataFormat::ChannelsFirst, 0),
            LayerKind::Channels { data_format: DataFormat::ChannelsLast, .. } => (proto::LayerKind::Channels, proto::DataFormat::ChannelsLast, 0),
            LayerKind::Tokens { prefix, .. } => (proto::LayerKind::Tokens, proto::DataFormat::Unspecified, prefix),
            LayerKind::Units => (proto::LayerKind::Units, proto::DataFormat::Unspecified, 0),
        };
        Self {
            name: layer.name.clone(),
            value: layer.value.clone(),
            operator: layer.operator.clone(),
            kind: kind.into(),
            units: layer.units,
            map: layer.kind.map().map_or_else(Vec::new, |(height, width)| vec![height as u32, width as u32]),
            data_format: data_format.into(),
            prefix_tokens: prefix as u32,
        }
    }
}

/// What a trial run showed.
pub(crate) struct Trial {
    /// The layers in the graph's order.
    pub(crate) layers: Vec<LayerInfo>,
    /// Why other values are no layers.
    pub(crate) refused: HashMap<String, String>,
    /// The batch size, where the network runs at no other.
    pub(crate) batch: Option<usize>,
}

/// Runs a network once, in a process of its own, and looks at all its values. Blocking.
pub(crate) fn trial(
    host: &Arc<Host>,
    digest: &str,
    network: &Network,
    input: &Input,
    options: &proto::TargetOptions,
    size: (u32, u32),
    args: &EngineArgs,
) -> Result<Trial, Fault> {
    let candidates = network.layers()?;
    let wanted: Vec<Wanted> = candidates.iter().map(|layer| Wanted::as_is(&layer.value)).collect();
    let load = Load { folder: network.folder().to_string_lossy().into_owned(), engine: args.for_one_of_them(), input: input.fed() };
    let look = Look { size: (size.0 as usize, size.1 as usize), batch: input.batch };
    let mut process = host.start(digest, 1)?;
    let (looked, _) = process.ask(&Request::Look(load, look), &network.cut(input, &wanted)?, MOST_LOOKED, &Stop::default())?;
    let Looked { batch, fixed, values } = process.meant(looked)?;
    let values: HashMap<String, (Element, Vec<usize>)> = values.into_iter().map(|(name, element, shape)| (name, (element, shape))).collect();
    let mut shapes: HashMap<String, Vec<usize>> = values.iter().map(|(name, (_, shape))| (name.clone(), shape.clone())).collect();
    let (height, width) = (size.0 as usize, size.1 as usize);
    let picture = match input.data_format {
        DataFormat::ChannelsFirst => vec![batch, 3, height, width],
        DataFormat::ChannelsLast => vec![batch, height, width, 3],
    };
    shapes.insert(input.name.clone(), picture);
    let formats = network.data_formats(input, &shapes)?;
    let format = |value: &str| formats.get(value).copied();
    let said = Given::from(options).data_format;
    let maps: Vec<(DataFormat, usize, usize)> = shapes
        .iter()
        .filter_map(|(value, shape)| match (format(value)?, &shape[..]) {
            (format @ DataFormat::ChannelsFirst, &[_, _, height, width]) | (format @ DataFormat::ChannelsLast, &[_, height, width, _]) => {
                Some((format, height, width))
            }
            _ => None,
        })
        .collect();
    // What was stacked or picked from feature maps is of their size, and in their order.
    let like = |shape: &[usize]| match *shape {
        [_, second, third, fourth] => [(DataFormat::ChannelsFirst, third, fourth), (DataFormat::ChannelsLast, second, third)]
            .into_iter()
            .find(|map| map.1 * map.2 > 1 && maps.contains(map))
            .map(|map| map.0),
        _ => None,
    };
    let format = |value: &str, shape: &[usize]| format(value).or_else(|| like(shape));
    let sizes = maps.iter().map(|(_, height, width)| (*height, *width)).collect();
    let grids = Grids { maps: sizes, input: (height, width), prefix: options.prefix_tokens.map(|tokens| tokens as usize) };
    let mut layers = Vec::new();
    let mut refused = HashMap::new();
    let mut last = String::new();
    for Layer { name, value, operator } in candidates {
        let found = match values.get(&value) {
            Some((element, shape)) => to_float(network, &value, element)?
                .and_then(|to_float| kind(shape, batch, format(&value, shape), said, &grids).map(|(kind, units)| (to_float, kind, units as u32))),
            None => Err("it is no tensor".to_owned()),
        };
        match found {
            Ok((to_float, kind, units)) => layers.push(LayerInfo { name, value, operator, kind, units, to_float }),
            Err(why) => {
                last = format!("{value}: {why}");
                refused.insert(value, why);
            }
        }
    }
    if layers.is_empty() {
        return Err(Error::Graph(format!("the network has no layer whose units can be told apart, not even its last value, {last}")).into());
    }
    Ok(Trial { layers, refused, batch: fixed })
}

/// What brings a value of that type to 32-bit floats, or why nothing does.
fn to_float(network: &Network, value: &str, element: &Element) -> Result<Result<ToFloat, String>, Error> {
    Ok(match element {
        Element::Float32 => Ok(ToFloat::AsIs),
        Element::Float => Ok(ToFloat::Cast),
        Element::EightBits if network.is_quantized(value)? => Ok(ToFloat::Dequantize),
        Element::EightBits => Err("it holds integers of 8 bits, not floats".to_owned()),
        Element::Other(other) => Err(format!("it holds {other}, not floats")),
    })
}

/// What a value of that shape is, and how many units it has; or why it is no layer.
fn kind(shape: &[usize], batch: usize, format: Option<DataFormat>, said: Option<DataFormat>, grids: &Grids) -> Result<(LayerKind, usize), String> {
    let sides = || shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
    match *shape {
        _ if shape.contains(&0) => Err(format!("its shape is {}", sides())),
        [n, second, third, fourth] if n == batch => match format.or(said) {
            Some(data_format @ DataFormat::ChannelsFirst) => Ok((LayerKind::Channels { height: third, width: fourth, data_format }, second)),
            Some(data_format @ DataFormat::ChannelsLast) => Ok((LayerKind::Channels { height: second, width: third, data_format }, fourth)),
            None => Err(format!(
                "its shape is {}, and the graph does not tell which axis holds units, if it is a feature map at all: say data_format (--data-format) if it is one",
                sides()
            )),
        },
        [n, _, _] if n == batch && format == Some(DataFormat::ChannelsFirst) => Err(format!("its shape is {}, units before places", sides())),
        [n, tokens, units] if n == batch => {
            let (prefix, grid) = grids.of(tokens);
            Ok((LayerKind::Tokens { tokens, prefix, grid }, units))
        }
        [n, units] if n == batch => Ok((LayerKind::Units, units)),
        [_, n, _] if n == batch => {
            Err(format!("its shape is {}, the batch as its second axis (as of torch.nn.MultiheadAttention without batch_first)", sides()))
        }
        _ => Err(format!("its shape is {} for a batch of {batch}, which is not its first axis", sides())),
    }
}

/// What a grid of patches may be.
struct Grids {
    /// Heights and widths of the network's feature maps.
    maps: Vec<(usize, usize)>,
    /// Height and width of its input.
    input: (usize, usize),
    /// The tokens before the patches, where they were said.
    prefix: Option<usize>,
}

impl Grids {
    /// How many of a layer's tokens come before the patches, and the rows and columns of those: as few as leave the size of a feature map, as that of a convolution
    /// that made the patches, or else of square patches that tile the input. Without a grid nothing comes before it but what was said.
    fn of(&self, tokens: usize) -> (usize, Option<(usize, usize)>) {
        if tokens == 1 && self.prefix.is_none() {
            // A class token that was taken out.
            return (1, None);
        }
        let prefixes = self.prefix.map_or(0..=MOST_PREFIX_TOKENS, |prefix| prefix..=prefix);
        let found = prefixes.filter(|prefix| *prefix < tokens).find_map(|prefix| Some((prefix, Some(self.grid(tokens - prefix)?))));
        found.unwrap_or((self.prefix.unwrap_or(0).min(tokens), None))
    }

    fn grid(&self, patches: usize) -> Option<(usize, usize)> {
        let (height, width) = self.input;
        // A patch that does not fit in whole is left out, or filled up.
        let tiled = (1..=height.max(width)).flat_map(|side| [(height / side, width / side), (height.div_ceil(side), width.div_ceil(side))]);
        self.maps.iter().copied().chain(tiled).find(|(rows, columns)| rows * columns == patches)
    }
}

/// The layers and units that a caller asks for: names looked up, all units where none are named, each in its range.
pub(crate) fn resolve(described: &Described, asked: &[proto::LayerUnits]) -> Result<Vec<(LayerInfo, Vec<u32>)>, Fault> {
    const MOST_LAYERS: usize = 1000;
    if asked.is_empty() || asked.len() > MOST_LAYERS {
        return Err(Fault::field("layers", format!("{} layers; 1 to {MOST_LAYERS} can be asked for", asked.len())));
    }
    let mut resolved: Vec<(LayerInfo, Vec<u32>)> = Vec::with_capacity(asked.len());
    for asked in asked {
        let found = described.network.layer(&asked.layer)?;
        let Some(info) = described.layer(&found.value) else { return Err(no_layer(described, &asked.layer, &found.value)?.into()) };
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

/// Why a value of the network is no layer, and which is near it.
fn no_layer(described: &Described, asked: &str, value: &str) -> Result<Error, Error> {
    let why = described.refused.get(value).map_or("the network does not make it", String::as_str);
    let near = described.network.around(value)?.into_iter().find_map(|value| described.layer(value));
    let near = near.map_or_else(String::new, |layer| format!("; the nearest layer is {}", layer.name));
    Ok(Error::Graph(format!("the units of {asked:?} can't be told apart: {why}{near}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_of_patches_follows_the_input_and_the_feature_maps() {
        let grids = |input, maps: &[(usize, usize)], prefix| Grids { maps: maps.to_vec(), input, prefix };
        let square = grids((224, 224), &[], None);
        for (tokens, prefix, grid) in [
            // ViT, DeiT with its distillation token, DINOv2 with registers, Swin and SigLIP without any, Swin's last stage.
            (197, 1, Some((14, 14))),
            (198, 2, Some((14, 14))),
            (261, 5, Some((16, 16))),
            (196, 0, Some((14, 14))),
            (3136, 0, Some((56, 56))),
            (49, 0, Some((7, 7))),
            (1, 1, None),
            (1000, 0, None),
        ] {
            assert_eq!(square.of(tokens), (prefix, grid), "{tokens} tokens");
        }
        assert_eq!(grids((384, 128), &[], None).of(193), (1, Some((24, 8))));
        assert_eq!(grids((128, 384), &[], None).of(192), (0, Some((8, 24))));
        assert_eq!(grids((225, 300), &[], None).of(15 * 19), (0, Some((15, 19))), "a patch that does not fit in whole is filled up");
        assert_eq!(grids((64, 64), &[(5, 9)], None).of(46), (1, Some((5, 9))), "patches that overlap, of a convolution");
        assert_eq!(grids((224, 224), &[], Some(4)).of(200), (4, Some((14, 14))));
        assert_eq!(grids((224, 224), &[], Some(3)).of(200), (3, None));
    }
}
