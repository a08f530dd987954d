//! Which axis of a value holds its channels. ONNX does not say it: it follows from the operators that the value passes.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{Input, Network};
use crate::{Error, format::NodeProto};

/// The order of the axes of a picture, a feature map, or a row of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DataFormat {
    /// (N, C, height, width) or (N, C, length).
    ChannelsFirst,
    /// (N, height, width, C) or (N, length, C).
    ChannelsLast,
}

use DataFormat::{ChannelsFirst, ChannelsLast};

/// Values whose format is known.
type Known<'g> = HashMap<&'g str, DataFormat>;

impl Network {
    /// The formats of those values of three and four axes whose operators tell them, given all values' shapes in a run on that input.
    pub fn data_formats(&self, input: &Input, shapes: &HashMap<String, Vec<usize>>) -> Result<HashMap<String, DataFormat>, Error> {
        let graph = self.graph()?;
        let weights = graph.initializer.iter().map(|tensor| (tensor.name(), tensor.dims.len()));
        let ranks: HashMap<&str, usize> = weights.chain(shapes.iter().map(|(name, shape)| (name.as_str(), shape.len()))).collect();
        let shape = |name: &str| shapes.get(name).map(Vec::as_slice).filter(|shape| matches!(shape.len(), 3 | 4));
        let mut known: Known = HashMap::from([(input.name.as_str(), input.data_format)]);
        for node in &graph.node {
            if let Some(format) = told(node, &ranks) {
                for value in node.input.first().into_iter().chain(node.output.first()).filter(|value| shape(value).is_some()) {
                    known.entry(value).or_insert(format);
                }
            }
        }
        // From what is known forwards and backwards, until nothing is learnt any more.
        loop {
            let before = known.len();
            for node in graph.node.iter().chain(graph.node.iter().rev()) {
                pass(node, &shape, &mut known);
            }
            if known.len() == before {
                break;
            }
        }
        Ok(known.into_iter().filter(|(name, _)| shapes.contains_key(*name)).map(|(name, format)| (name.to_owned(), format)).collect())
    }
}

/// What an operator says by itself of its first input and its first output.
fn told(node: &NodeProto, ranks: &HashMap<&str, usize>) -> Option<DataFormat> {
    let matrix = |place: usize| node.input.get(place).and_then(|name| ranks.get(name.as_str())) == Some(&2);
    match node.op_type() {
        // Operators on feature maps have the channels as their second axis, but for two of ONNX Runtime's own that may say otherwise.
        "QLinearAveragePool" | "QLinearGlobalAveragePool" if flag(node, "channels_last") => Some(ChannelsLast),
        "Conv"
        | "ConvInteger"
        | "ConvTranspose"
        | "QLinearConv"
        | "FusedConv"
        | "MaxPool"
        | "AveragePool"
        | "LpPool"
        | "GlobalAveragePool"
        | "GlobalMaxPool"
        | "GlobalLpPool"
        | "QLinearAveragePool"
        | "QLinearGlobalAveragePool"
        | "BatchNormalization"
        | "InstanceNormalization"
        | "GroupNormalization"
        | "LRN"
        | "DepthToSpace"
        | "SpaceToDepth" => Some(ChannelsFirst),
        // These work on the last axis.
        "LayerNormalization" | "SimplifiedLayerNormalization" | "SkipLayerNormalization" | "RMSNormalization" if over_last_axis(node, ranks) => {
            Some(ChannelsLast)
        }
        "MatMul" | "MatMulInteger" if matrix(1) => Some(ChannelsLast),
        "QLinearMatMul" if matrix(3) => Some(ChannelsLast),
        _ => None,
    }
}

fn flag(node: &NodeProto, name: &str) -> bool {
    node.attribute.iter().any(|attribute| attribute.name() == name && attribute.i() == 1)
}

/// Whether a normalization is over the last axis alone.
fn over_last_axis(node: &NodeProto, ranks: &HashMap<&str, usize>) -> bool {
    let rank = node.input.first().and_then(|name| ranks.get(name.as_str())).map(|rank| *rank as i64);
    node.attribute.iter().find(|attribute| attribute.name() == "axis").is_none_or(|axis| axis.i() == -1 || rank == Some(axis.i() + 1))
}

/// Carries what is known of a node's input or output over to the other.
fn pass<'g, 's>(node: &'g NodeProto, shape: &impl Fn(&str) -> Option<&'s [usize]>, known: &mut Known<'g>) {
    let (Some(input), Some(output)) = (node.input.first(), node.output.first()) else { return };
    let (input, output) = (input.as_str(), output.as_str());
    match node.op_type() {
        "Transpose" => {
            let perm = node.attribute.iter().find(|attribute| attribute.name() == "perm").map(|perm| perm.ints.as_slice());
            let turned = |from: DataFormat, back: bool| match (perm?, from, back) {
                ([0, 2, 3, 1], ChannelsFirst, false) | ([0, 3, 1, 2], ChannelsFirst, true) | ([0, 2, 1], ChannelsFirst, _) => Some(ChannelsLast),
                ([0, 3, 1, 2], ChannelsLast, false) | ([0, 2, 3, 1], ChannelsLast, true) | ([0, 2, 1], ChannelsLast, _) => Some(ChannelsFirst),
                _ => None,
            };
            between(input, output, known, turned);
        }
        // A row of patches is laid out as a grid, or a grid as a row: the channels stay what they are.
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => {
            let (Some(from), Some(to)) = (shape(input), shape(output)) else { return };
            let same = |format| match format {
                ChannelsFirst => from[..2] == to[..2],
                ChannelsLast => from[0] == to[0] && from.last() == to.last(),
            };
            between(input, output, known, |format, _| same(format).then_some(format));
        }
        // What a product or a lookup does to axes is its operands' business.
        "MatMul" | "MatMulInteger" | "QLinearMatMul" | "Gemm" | "Einsum" | "Gather" | "GatherND" => {}
        // Of these the others are weights.
        "Conv" | "ConvInteger" | "ConvTranspose" | "QLinearConv" | "FusedConv" => {}
        // All else keeps the axes of what has as many.
        _ => {
            let rank = shape(output).map(<[usize]>::len);
            let values =
                || node.input.iter().chain(&node.output).map(String::as_str).filter(|value| rank.is_some() && shape(value).map(<[usize]>::len) == rank);
            let Some(format) = values().find_map(|value| known.get(value).copied()) else { return };
            for value in values() {
                known.entry(value).or_insert(format);
            }
        }
    }
}

/// `carry` gives the format of the other end of a node; its second argument says that it is the input that is looked for.
fn between<'g>(input: &'g str, output: &'g str, known: &mut Known<'g>, carry: impl Fn(DataFormat, bool) -> Option<DataFormat>) {
    match (known.get(input).copied(), known.get(output).copied()) {
        (Some(from), None) => carry(from, false).map(|format| known.insert(output, format)),
        (None, Some(to)) => carry(to, true).map(|format| known.insert(input, format)),
        _ => None,
    };
}
