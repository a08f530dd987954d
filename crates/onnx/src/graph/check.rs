//! What is looked at in a network before anything else is done with it: it may come from anyone.

use std::collections::{HashMap, HashSet};

use super::{subgraphs, tensors_of, tensors_of_nodes};
use crate::format::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, tensor_proto::DataType};

/// Nodes at most, those of subgraphs and functions too.
const MOST_NODES: usize = 200_000;
/// Values of one tensor at most.
const MOST_VALUES: u64 = 1 << 31;

/// Why a network can't be used, if it can't.
pub(super) fn check(model: &ModelProto) -> Result<(), String> {
    let Some(graph) = &model.graph else { return Err("the file holds no graph".to_owned()) };
    let mut nodes = Vec::new();
    nodes_of(&graph.node, &mut nodes);
    model.functions.iter().for_each(|function| nodes_of(&function.node, &mut nodes));
    if nodes.len() > MOST_NODES {
        return Err(format!("{} nodes; a network may have {MOST_NODES}", nodes.len()));
    }
    let functions: HashSet<&str> = model.functions.iter().map(|function| function.domain()).collect();
    if let Some(node) = nodes.iter().find(|node| !is_standard(node.domain()) && !functions.contains(node.domain())) {
        return Err(format!("the operator {} of {:?} needs a library of its own, which is not loaded", node.op_type(), node.domain()));
    }
    let mut tensors = Vec::new();
    tensors_of(graph, &mut tensors);
    model.functions.iter().for_each(|function| tensors_of_nodes(&function.node, &mut tensors));
    tensors.into_iter().try_for_each(check_tensor)?;
    let weights = graph.initializer.iter().map(|tensor| (tensor.name(), tensor));
    let constants = graph.node.iter().filter_map(|node| Some((node.output.first()?.as_str(), constant(&node.attribute)?)));
    let known: HashMap<&str, &TensorProto> = weights.chain(constants).collect();
    for node in nodes {
        let shape = match node.op_type() {
            "ConstantOfShape" => node.input.first(),
            "Expand" | "Reshape" => node.input.get(1),
            _ => None,
        };
        let shape = shape.and_then(|name| known.get(name.as_str())).map(|tensor| integers(tensor)).unwrap_or_default();
        if values(&shape).is_none() {
            return Err(format!("{} {:?} makes a value of the shape {shape:?}, larger than {MOST_VALUES} values", node.op_type(), node.name()));
        }
    }
    check_order(graph)
}

/// The domains whose operators ONNX Runtime itself has.
fn is_standard(domain: &str) -> bool {
    matches!(domain, "" | "ai.onnx" | "ai.onnx.ml" | "ai.onnx.preview" | "com.microsoft")
}

fn nodes_of<'g>(nodes: &'g [NodeProto], found: &mut Vec<&'g NodeProto>) {
    for node in nodes {
        found.push(node);
        subgraphs(node).for_each(|inner| nodes_of(&inner.node, found));
    }
}

/// How many values a shape has, sides of unknown length counted as 1; none if they are more than a tensor may have.
fn values(shape: &[i64]) -> Option<u64> {
    let sides = shape.iter().map(|side| u64::try_from(*side).unwrap_or(1));
    sides.clone().try_fold(1_u64, u64::checked_mul).or_else(|| sides.clone().any(|side| side == 0).then_some(0)).filter(|values| *values <= MOST_VALUES)
}

fn check_tensor(tensor: &TensorProto) -> Result<(), String> {
    let wrong = |problem: String| Err(format!("the tensor {:?} of the shape {:?} {problem}", tensor.name(), tensor.dims));
    if tensor.dims.iter().any(|side| *side < 0) {
        return wrong("has a side of negative length".to_owned());
    }
    let Some(count) = values(&tensor.dims) else { return wrong(format!("has more than {MOST_VALUES} values")) };
    let raw = tensor.raw_data.as_ref().map_or(0, |raw| raw.len() as u64);
    match bytes_of_a_value(tensor.data_type()) {
        Some(each) if raw > 0 && raw != count * each => wrong(format!("has {raw} bytes, and would have {}", count * each)),
        _ => Ok(()),
    }
}

fn bytes_of_a_value(element: i32) -> Option<u64> {
    use DataType as Element;
    match Element::try_from(element).ok()? {
        Element::Float | Element::Int32 | Element::Uint32 => Some(4),
        Element::Uint8 | Element::Int8 | Element::Bool => Some(1),
        Element::Uint16 | Element::Int16 | Element::Float16 | Element::Bfloat16 => Some(2),
        Element::Int64 | Element::Double | Element::Uint64 | Element::Complex64 => Some(8),
        Element::Complex128 => Some(16),
        _ => None,
    }
}

fn constant(attributes: &[AttributeProto]) -> Option<&TensorProto> {
    attributes.iter().find(|attribute| attribute.name() == "value")?.t.as_ref()
}

/// The values of a tensor of 64-bit integers.
fn integers(tensor: &TensorProto) -> Vec<i64> {
    if !tensor.int64_data.is_empty() {
        return tensor.int64_data.clone();
    }
    let raw = tensor.raw_data.as_deref().unwrap_or_default();
    if tensor.data_type() != DataType::Int64 as i32 {
        return Vec::new();
    }
    raw.chunks_exact(8).filter_map(|bytes| Some(i64::from_le_bytes(bytes.try_into().ok()?))).collect()
}

/// A graph's nodes are in an order in which each has what it needs, as the format wants it: so nothing goes in a circle.
fn check_order(graph: &GraphProto) -> Result<(), String> {
    let mut known: HashSet<&str> = graph.input.iter().map(|input| input.name()).collect();
    known.extend(graph.initializer.iter().map(TensorProto::name));
    known.extend(graph.sparse_initializer.iter().filter_map(|tensor| tensor.values.as_ref()).map(TensorProto::name));
    for node in &graph.node {
        if let Some(missing) = node.input.iter().find(|input| !input.is_empty() && !known.contains(input.as_str())) {
            let later = graph.node.iter().any(|node| node.output.contains(missing));
            let why = if later { "which is made only later: its nodes go in a circle, or are not in order" } else { "which nothing makes" };
            return Err(format!("{} {:?} needs {missing:?}, {why}", node.op_type(), node.name()));
        }
        for output in node.output.iter().filter(|output| !output.is_empty()) {
            if !known.insert(output) {
                return Err(format!("{output:?} is made twice"));
            }
        }
    }
    match graph.output.iter().find(|output| !known.contains(output.name())) {
        Some(output) => Err(format!("nothing makes the output {:?}", output.name())),
        None => Ok(()),
    }
}
