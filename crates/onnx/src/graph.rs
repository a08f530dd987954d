//! Graph surgery: any intermediate value of a network's file as an output, and nothing computed that is not needed for it.

mod axes;
mod check;
mod input;
mod weigh;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Component, Path, PathBuf},
};

use dnd_method::parameters::Summary;
use prost::Message as _;
use serde::{Deserialize, Serialize};

pub use axes::DataFormat;
pub use input::{Fixed, Given, Input};

use crate::{
    Error,
    format::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto, attribute_proto::AttributeType,
        tensor_proto::DataType,
    },
};

/// Where a dynamo export keeps the module that a node came from.
const SCOPES: &str = "pkg.torch.onnx.name_scopes";
/// Names that an error offers.
const NEAREST: usize = 5;
/// Bytes of a file at most: the format's messages can't be larger. Larger networks keep their weights in files of their own.
const MOST_BYTES: u64 = i32::MAX as u64;

/// Bytes at most that a file's messages take in memory beside what they hold: a graph of the most nodes that one may have, with some attributes each.
const MOST_OVERHEAD: u64 = 512 << 20;

/// A network's file, read.
#[derive(Debug)]
pub struct Network {
    model: ModelProto,
    folder: PathBuf,
}

/// A layer that may be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The module path if the export kept it, else the value's name.
    pub name: String,
    /// The value of the graph.
    pub value: String,
    /// The operator that makes it.
    pub operator: String,
}

/// A value to give out as 32-bit floats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The value of the graph.
    pub value: String,
    /// What brings it to 32-bit floats.
    pub to_float: ToFloat,
    /// Reduced over the last two of its four axes; none gives the value as it is.
    pub reduce: Option<Summary>,
}

/// What brings a value to 32-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToFloat {
    /// Nothing: it is of them, or is given as it is.
    AsIs,
    /// A cast, from other floats.
    Cast,
    /// Its scale and zero point, from the integers of a quantised network.
    Dequantize,
}

impl Wanted {
    /// A value as the graph has it.
    pub fn as_is(value: &str) -> Self {
        Self { value: value.to_owned(), to_float: ToFloat::AsIs, reduce: None }
    }

    /// The name of the output that gives it.
    pub fn output(&self) -> String {
        if self.reduce.is_some() { format!("{}/dnd_summary", self.value) } else { self.float() }
    }

    fn float(&self) -> String {
        if self.to_float == ToFloat::AsIs { self.value.clone() } else { format!("{}/dnd_float", self.value) }
    }
}

impl Network {
    /// Reads an ONNX file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let unreadable =
            |e: std::io::Error| Error::file(path, if e.kind() == std::io::ErrorKind::NotFound { "no such file".to_owned() } else { e.to_string() });
        if fs::metadata(path).map_err(unreadable)?.len() > MOST_BYTES {
            return Err(Error::file(path, "larger than 2 GiB, which no ONNX file can be: save the network with its weights as external data"));
        }
        let bytes = fs::read(path).map_err(unreadable)?;
        let not_onnx = || Error::file(path, "not an ONNX file");
        let weight = weigh::weigh(&bytes).ok_or_else(not_onnx)?;
        let overhead = weight.saturating_sub(bytes.len() as u64);
        if overhead > MOST_OVERHEAD {
            let problem = format!("its nodes and tensors would take {} MiB in memory beside the {} MiB that they hold", overhead >> 20, bytes.len() >> 20);
            return Err(Error::file(path, problem));
        }
        let model = ModelProto::decode(&*bytes).map_err(|_| not_onnx())?;
        if model.graph.as_ref().is_none_or(|graph| graph.node.is_empty() || graph.output.is_empty()) {
            return Err(not_onnx());
        }
        check::check(&model).map_err(|problem| Error::file(path, problem))?;
        Ok(Self { model, folder: path.parent().unwrap_or(Path::new("")).to_owned() })
    }

    fn graph(&self) -> Result<&GraphProto, Error> {
        self.model.graph.as_ref().ok_or_else(|| Error::Graph("the file holds no graph".to_owned()))
    }

    /// The folder of the file, where its external data lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Every value that a node of the main graph makes, by value name, in the graph's order; module paths as names where the export kept them.
    pub fn layers(&self) -> Result<Vec<Layer>, Error> {
        let graph = self.graph()?;
        let modules = module_outputs(graph);
        // Several modules may end in one value (layer4, layer4.1 and layer4.1.relu): the outermost has its name.
        let mut by_value: HashMap<&str, &str> = HashMap::new();
        for (path, value) in &modules {
            let name = by_value.entry(value).or_insert(path);
            if path.len() < name.len() {
                *name = path;
            }
        }
        let layers = graph.node.iter().filter(|node| node.op_type() != "Constant").flat_map(|node| {
            node.output.iter().filter(|value| !value.is_empty()).map(|value| Layer {
                name: by_value.get(value.as_str()).map_or_else(|| value.clone(), |path| (*path).to_owned()),
                value: value.clone(),
                operator: node.op_type().to_owned(),
            })
        });
        Ok(layers.collect())
    }

    /// The layer that a caller means: a value name, a module path, or a unique suffix of either.
    pub fn layer(&self, asked: &str) -> Result<Layer, Error> {
        let layers = self.layers()?;
        let modules = module_outputs(self.graph()?);
        let at = |value: &str| layers.iter().find(|layer| layer.value == value).cloned();
        // A path that was asked for is the name that results use.
        let module = |path: &str| modules.get(path).and_then(|value| at(value)).map(|layer| Layer { name: path.to_owned(), ..layer });
        if let Some(layer) = module(asked).or_else(|| at(asked)) {
            return Ok(layer);
        }
        let mut found: Vec<Layer> = modules.keys().filter(|path| ends(path, asked)).filter_map(|path| module(path)).collect();
        found.extend(layers.iter().filter(|layer| ends(&layer.value, asked)).cloned());
        found.sort_by(|a, b| (&a.value, a.name.len()).cmp(&(&b.value, b.name.len())));
        found.dedup_by(|a, b| a.value == b.value);
        match found.len() {
            1 => Ok(found.swap_remove(0)),
            0 => Err(self.not_found(asked, modules.keys().map(String::as_str).chain(layers.iter().map(|layer| layer.value.as_str())))?),
            _ => Err(Error::AmbiguousLayer { layer: asked.to_owned(), candidates: found.into_iter().take(NEAREST).map(|l| l.name).collect() }),
        }
    }

    /// Why a name is no layer's: it is one inside of a node's subgraph, or unlike all these.
    fn not_found<'a>(&self, asked: &str, names: impl Iterator<Item = &'a str>) -> Result<Error, Error> {
        for node in &self.graph()?.node {
            let mut inner = Vec::new();
            subgraphs(node).for_each(|graph| values_inside(graph, &mut inner));
            if let Some(value) = inner.into_iter().find(|value| value == asked || ends(value, asked)) {
                let output = node.output.first().map_or("", String::as_str);
                return Ok(Error::Graph(format!(
                    "{value} is inside of a subgraph of the {} {output:?}, and may be made many times in a run, or never; what that node gives, {output:?}, can be asked for",
                    node.op_type()
                )));
            }
        }
        Ok(Error::UnknownLayer { layer: asked.to_owned(), nearest: nearest(asked, names) })
    }

    /// Whether a value is of a quantised network's integers, and the graph has their scale and zero point.
    pub fn is_quantized(&self, value: &str) -> Result<bool, Error> {
        Ok(quantization(self.graph()?, value).is_some())
    }

    /// The values that are made of a value, in the graph's order, and then those that it is made of, the last first: where a layer may be in its stead.
    pub fn around(&self, value: &str) -> Result<Vec<&str>, Error> {
        let graph = self.graph()?;
        let mut found: Vec<&str> = Vec::new();
        let mut after: HashSet<&str> = HashSet::from([value]);
        for node in graph.node.iter().filter(|node| !node.output.iter().any(|output| output == value)) {
            if node.input.iter().any(|input| after.contains(input.as_str())) {
                after.extend(node.output.iter().map(String::as_str));
                found.extend(node.output.iter().map(String::as_str));
            }
        }
        let mut before: HashSet<&str> = HashSet::from([value]);
        for node in graph.node.iter().rev() {
            if node.output.iter().any(|output| before.contains(output.as_str())) {
                before.extend(node.input.iter().map(String::as_str));
                found.extend(node.output.iter().map(String::as_str).filter(|output| *output != value));
            }
        }
        Ok(found)
    }

    /// The network as far as the wanted values need it, with those as its outputs in their order, and with pictures of 32-bit floats, channels first, as
    /// its one input, [`Input::fed`]. The encoded model keeps the names of its external data files, which lie in [`Self::folder`].
    pub fn cut(&self, input: &Input, wanted: &[Wanted]) -> Result<Vec<u8>, Error> {
        let mut model = self.model.clone();
        let opset = model.opset_import.iter().filter(|o| matches!(o.domain(), "" | "ai.onnx")).map(OperatorSetIdProto::version).max().unwrap_or(1);
        let graph = model.graph.as_mut().ok_or_else(|| Error::Graph("the file holds no graph".to_owned()))?;
        let weights: HashSet<String> = graph.initializer.iter().map(|tensor| tensor.name().to_owned()).collect();
        input.adapt(graph);
        let mut made = HashSet::new();
        for want in wanted {
            if want.to_float != ToFloat::AsIs && made.insert(want.float()) {
                add_float(graph, want)?;
            }
            if let Some(summary) = want.reduce {
                add_reduction(graph, want, summary, opset);
            }
        }
        let outputs: Vec<String> = wanted.iter().map(Wanted::output).collect();
        keep_what_leads_to(graph, &outputs);
        // Weights may be declared as inputs; one without its weight would have to be given.
        let kept: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        graph.input.retain(|input| !weights.contains(input.name()) || kept.contains(input.name()));
        graph.output = outputs.into_iter().map(|name| ValueInfoProto { name: Some(name), ..Default::default() }).collect();
        Ok(model.encode_to_vec())
    }

    /// Files of external data that the network's tensors name, relative to [`Self::folder`], which their names may not lead out of, and how many bytes each has at
    /// least. One may be a link, as in the caches of model hubs: where that may lead is for whoever opens it to say.
    pub fn external_files(&self) -> Result<BTreeMap<PathBuf, u64>, Error> {
        let mut tensors = Vec::new();
        tensors_of(self.graph()?, &mut tensors);
        self.model.functions.iter().for_each(|function| tensors_of_nodes(&function.node, &mut tensors));
        let mut files = BTreeMap::new();
        for tensor in tensors {
            let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key() == key).map(|entry| entry.value());
            let Some(location) = entry("location") else { continue };
            let file = PathBuf::from(location);
            if !file.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(Error::Graph(format!("external data in {location:?}, which is not inside of the network's folder")));
            }
            let number = |key: &str| entry(key).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
            let least = files.entry(file).or_insert(0_u64);
            *least = (*least).max(number("offset").saturating_add(number("length")));
        }
        Ok(files)
    }
}

/// Whether a name ends in what was asked for, from the beginning of a part on.
fn ends(name: &str, asked: &str) -> bool {
    name.strip_suffix(asked).is_some_and(|rest| rest.ends_with(['.', '/', ':']))
}

fn subgraphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs))
}

/// The values that the nodes of a subgraph make, those of its own subgraphs too; and the modules that they came from.
fn values_inside(graph: &GraphProto, found: &mut Vec<String>) {
    found.extend(module_outputs(graph).into_keys());
    for node in &graph.node {
        found.extend(node.output.iter().filter(|value| !value.is_empty()).cloned());
        subgraphs(node).for_each(|inner| values_inside(inner, found));
    }
}

/// Every tensor of a graph: weights, constants, and those of its subgraphs.
fn tensors_of<'g>(graph: &'g GraphProto, found: &mut Vec<&'g TensorProto>) {
    found.extend(&graph.initializer);
    found.extend(graph.sparse_initializer.iter().flat_map(|tensor| tensor.values.iter().chain(&tensor.indices)));
    tensors_of_nodes(&graph.node, found);
}

fn tensors_of_nodes<'g>(nodes: &'g [NodeProto], found: &mut Vec<&'g TensorProto>) {
    for node in nodes {
        for attribute in &node.attribute {
            found.extend(attribute.t.iter().chain(&attribute.tensors));
            let sparse = attribute.sparse_tensor.iter().chain(&attribute.sparse_tensors);
            found.extend(sparse.flat_map(|tensor| tensor.values.iter().chain(&tensor.indices)));
        }
        subgraphs(node).for_each(|inner| tensors_of(inner, found));
    }
}

/// The value that each module gives: the output of the last node whose scopes hold the module. Operations, the scopes' last entries, count
/// for their own name only.
fn module_outputs(graph: &GraphProto) -> BTreeMap<String, &str> {
    let mut outputs = BTreeMap::new();
    for node in &graph.node {
        let Some(value) = node.output.first().filter(|value| !value.is_empty()) else { continue };
        let scopes = match node.metadata_props.iter().find(|p| p.key() == SCOPES) {
            Some(scopes) => parse_list(scopes.value()),
            None => scopes_of_name(node.name()),
        };
        let modules = scopes.len().saturating_sub(1);
        for path in scopes.into_iter().take(modules).filter(|path| !path.is_empty()) {
            outputs.insert(path, value.as_str());
        }
    }
    outputs
}

/// The module paths in the name that a TorchScript export gives a node: `/layer4/layer4.2/conv3/Conv` is of layer4, layer4.2, layer4.2.conv3, and the operation.
fn scopes_of_name(name: &str) -> Vec<String> {
    let Some(parts) = name.strip_prefix('/') else { return Vec::new() };
    let mut scopes: Vec<String> = Vec::new();
    let mut path: Vec<&str> = Vec::new();
    for part in parts.split('/') {
        // A container's child has its container's name before its own.
        if path.last().is_some_and(|last| part.strip_prefix(last).is_some_and(|rest| rest.starts_with('.'))) {
            path.pop();
        }
        path.push(part);
        scopes.push(path.join("."));
    }
    scopes
}

/// The strings of a Python list's repr, `['', 'layer4', "layer4.2"]`.
fn parse_list(text: &str) -> Vec<String> {
    let mut strings = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(['\'', '"']) {
        let quote = &rest[start..=start];
        let inside = &rest[start + 1..];
        let Some(end) = inside.find(quote) else { break };
        strings.push(inside[..end].to_owned());
        rest = &inside[end + 1..];
    }
    strings
}

fn nearest<'a>(asked: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut scored: Vec<(f64, &str)> = names.map(|name| (strsim::jaro_winkler(&asked.to_lowercase(), &name.to_lowercase()), name)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(NEAREST).map(|(_, name)| name.to_owned()).collect()
}

/// A node of the standard operators.
fn node(operator: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        name: Some(output.to_owned()),
        op_type: Some(operator.to_owned()),
        input: inputs.iter().map(|name| (*name).to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute: attributes,
        ..Default::default()
    }
}

fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(i), ..Default::default() }
}

fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(AttributeType::Ints as i32), ints: ints.to_vec(), ..Default::default() }
}

fn add_float(graph: &mut GraphProto, want: &Wanted) -> Result<(), Error> {
    let made = match want.to_float {
        ToFloat::AsIs => return Ok(()),
        ToFloat::Cast => node("Cast", &[&want.value], &want.float(), vec![int("to", DataType::Float as i64)]),
        ToFloat::Dequantize => {
            let (scale, zero) = quantization(graph, &want.value).ok_or_else(|| Error::Graph(format!("{} has no scale", want.value)))?;
            let inputs: Vec<&str> = [want.value.as_str(), scale].into_iter().chain(zero).collect();
            node("DequantizeLinear", &inputs, &want.float(), Vec::new())
        }
    };
    graph.node.push(made);
    Ok(())
}

/// The values that hold a quantised value's scale and zero point: what its node wrote it with, or that of what its node only moved or picked.
fn quantization<'g>(graph: &'g GraphProto, value: &'g str) -> Option<(&'g str, Option<&'g str>)> {
    let mut value = value;
    // Each step goes to an earlier node.
    for _ in &graph.node {
        let node = graph.node.iter().find(|node| node.output.iter().any(|output| output == value))?;
        let scale = match node.op_type() {
            "QuantizeLinear" => 1,
            "QLinearConv" | "QLinearMatMul" | "QLinearAdd" | "QLinearMul" => 6,
            "QGemm" => 7,
            "QLinearSigmoid" | "QLinearLeakyRelu" | "QLinearSoftmax" | "QLinearAveragePool" | "QLinearGlobalAveragePool" | "QLinearReduceMean" => 3,
            "QLinearConcat" => 0,
            "Identity" | "MaxPool" | "Reshape" | "Flatten" | "Transpose" | "Squeeze" | "Unsqueeze" | "Slice" | "Gather" | "Split" | "DepthToSpace"
            | "SpaceToDepth" => {
                value = node.input.first()?;
                continue;
            }
            _ => return None,
        };
        let named = |place: usize| node.input.get(place).map(String::as_str).filter(|name| !name.is_empty());
        return Some((named(scale)?, named(scale + 1)));
    }
    None
}

fn add_reduction(graph: &mut GraphProto, want: &Wanted, summary: Summary, opset: i64) {
    const SPACE: [i64; 2] = [2, 3];
    let output = want.output();
    let operator = match summary {
        Summary::Mean => "ReduceMean",
        Summary::Max => "ReduceMax",
    };
    let mut made = node(operator, &[&want.float()], &output, vec![int("keepdims", 0)]);
    // The axes became an input with opset 18.
    if opset >= 18 {
        let axes = format!("{output}/axes");
        graph.initializer.push(TensorProto {
            name: Some(axes.clone()),
            data_type: Some(DataType::Int64 as i32),
            dims: vec![2],
            int64_data: SPACE.to_vec(),
            ..Default::default()
        });
        made.input.push(axes);
    } else {
        made.attribute.push(ints("axes", &SPACE));
    }
    graph.node.push(made);
}

/// Drops nodes and initializers that no output needs. Values that a subgraph captures from outside count as inputs of the node that holds it.
fn keep_what_leads_to(graph: &mut GraphProto, outputs: &[String]) {
    let mut needed: HashSet<String> = outputs.iter().cloned().collect();
    let mut nodes = Vec::with_capacity(graph.node.len());
    // A graph's nodes are in topological order: one pass from the last to the first finds all.
    for node in std::mem::take(&mut graph.node).into_iter().rev() {
        if node.output.iter().any(|value| needed.contains(value)) {
            needed.extend(node.input.iter().cloned());
            subgraphs(&node).for_each(|inner| captured(inner, &mut needed));
            nodes.push(node);
        }
    }
    nodes.reverse();
    graph.node = nodes;
    graph.initializer.retain(|tensor| needed.contains(tensor.name()));
    graph.sparse_initializer.retain(|tensor| tensor.values.as_ref().is_some_and(|values| needed.contains(values.name())));
    graph.value_info.retain(|info| needed.contains(info.name()));
}

fn captured(graph: &GraphProto, needed: &mut HashSet<String>) {
    for node in &graph.node {
        needed.extend(node.input.iter().cloned());
        subgraphs(node).for_each(|inner| captured(inner, needed));
    }
    needed.extend(graph.output.iter().map(|output| output.name().to_owned()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{StringStringEntryProto, TypeProto, type_proto};

    fn node(operator: &str, inputs: &[&str], output: &str, scopes: Option<&str>) -> NodeProto {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let scopes = scopes.map(|scopes| StringStringEntryProto { key: Some(SCOPES.to_owned()), value: Some(scopes.to_owned()) });
        NodeProto {
            op_type: Some(operator.to_owned()),
            input: strings(inputs),
            output: strings(&[output]),
            metadata_props: scopes.into_iter().collect(),
            ..Default::default()
        }
    }

    /// a -> b -> c -> out, with a side branch from a, and an If that captures b.
    fn network() -> Network {
        let inner = GraphProto { node: vec![node("Neg", &["/layer1/layer1.0/Relu_output_0"], "inside", None)], ..Default::default() };
        let branch = AttributeProto { name: Some("then_branch".to_owned()), g: Some(inner), ..Default::default() };
        let mut conditional = node("If", &["condition"], "/head/If_output_0", Some("['', 'head', 'if_1']"));
        conditional.attribute.push(branch);
        let tensor = |name: &str| TensorProto { name: Some(name.to_owned()), ..Default::default() };
        let graph = GraphProto {
            node: vec![
                node("Conv", &["input", "weight"], "/layer1/layer1.0/Conv_output_0", Some("['', 'layer1', 'layer1.0', 'layer1.0.conv', 'conv2d']")),
                node(
                    "Relu",
                    &["/layer1/layer1.0/Conv_output_0"],
                    "/layer1/layer1.0/Relu_output_0",
                    Some("['', 'layer1', 'layer1.0', \"layer1.0.relu\", 'relu']"),
                ),
                node("Sigmoid", &["/layer1/layer1.0/Conv_output_0"], "/side/Sigmoid_output_0", None),
                node("Gemm", &["/layer1/layer1.0/Relu_output_0", "head_weight"], "/head/Gemm_output_0", Some("['', 'head', 'linear']")),
                conditional,
            ],
            initializer: vec![tensor("weight"), tensor("head_weight"), tensor("condition")],
            input: vec![input(DataType::Float)],
            output: vec![ValueInfoProto { name: Some("/head/Gemm_output_0".to_owned()), ..Default::default() }],
            ..Default::default()
        };
        Network {
            model: ModelProto { graph: Some(graph), opset_import: vec![OperatorSetIdProto { version: Some(18), ..Default::default() }], ..Default::default() },
            folder: PathBuf::new(),
        }
    }

    fn input(element: DataType) -> ValueInfoProto {
        let tensor = type_proto::Tensor { elem_type: Some(element as i32), shape: None };
        let kind = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
        ValueInfoProto { name: Some("input".to_owned()), r#type: Some(kind), ..Default::default() }
    }

    fn cut_of(network: &Network, wanted: &[Wanted]) -> GraphProto {
        let input = network.input(&Given::default()).unwrap();
        ModelProto::decode(&*network.cut(&input, wanted).unwrap()).unwrap().graph.unwrap()
    }

    fn cut(wanted: &[Wanted]) -> GraphProto {
        cut_of(&network(), wanted)
    }

    #[test]
    fn layers_have_their_modules_names_and_are_found_by_them_their_values_and_unique_endings() {
        let network = network();
        let names: Vec<String> = network.layers().unwrap().into_iter().map(|layer| layer.name).collect();
        assert_eq!(names, ["layer1.0.conv", "layer1", "/side/Sigmoid_output_0", "/head/Gemm_output_0", "head"], "a module gives what its last node gives");
        let found = |asked: &str| network.layer(asked).map(|layer| (layer.name, layer.value));
        let relu = "/layer1/layer1.0/Relu_output_0".to_owned();
        for name in ["layer1", "layer1.0", "layer1.0.relu"] {
            assert_eq!(found(name).unwrap(), (name.to_owned(), relu.clone()));
        }
        assert_eq!(found("conv").unwrap().0, "layer1.0.conv");
        assert_eq!(found("Sigmoid_output_0").unwrap().1, "/side/Sigmoid_output_0");
        assert_eq!(found("Relu_output_0").unwrap().1, relu);
        let Err(Error::UnknownLayer { nearest, .. }) = found("layr1") else { panic!("found") };
        assert_eq!(nearest[0], "layer1");
        assert!(found("1").is_err(), "a part of a name is no ending of it");
    }

    #[test]
    fn an_ending_that_several_layers_have_is_no_name() {
        let mut network = network();
        let graph = network.model.graph.as_mut().unwrap();
        graph.node.push(node("Relu", &["/head/Gemm_output_0"], "/head/Relu_output_0", None));
        let Err(Error::AmbiguousLayer { candidates, .. }) = network.layer("Relu_output_0") else { panic!("found") };
        assert_eq!(candidates.len(), 2);
    }

    #[test]
    fn what_no_output_needs_is_dropped_and_what_a_subgraph_captures_is_kept() {
        let side = cut(&[Wanted::as_is("/side/Sigmoid_output_0")]);
        let operators = |graph: &GraphProto| graph.node.iter().map(|node| node.op_type().to_owned()).collect::<Vec<_>>();
        assert_eq!(operators(&side), ["Conv", "Sigmoid"]);
        let weights: Vec<&str> = side.initializer.iter().map(TensorProto::name).collect();
        assert_eq!(weights, ["weight"]);
        let conditional = cut(&[Wanted::as_is("/head/If_output_0")]);
        assert_eq!(operators(&conditional), ["Conv", "Relu", "If"]);
    }

    #[test]
    fn a_reduced_value_is_an_output_of_its_own_beside_the_value() {
        let value = Wanted::as_is("/layer1/layer1.0/Relu_output_0");
        let mean = Wanted { reduce: Some(Summary::Mean), ..value.clone() };
        let graph = cut(&[mean.clone(), value.clone()]);
        let outputs: Vec<&str> = graph.output.iter().map(ValueInfoProto::name).collect();
        assert_eq!(outputs, [mean.output(), value.value]);
        let last = graph.node.last().unwrap();
        assert_eq!((last.op_type(), last.input.len()), ("ReduceMean", 2), "axes are an input from opset 18 on");
    }

    #[test]
    fn weights_that_are_declared_as_inputs_go_with_their_nodes() {
        let mut network = network();
        let graph = network.model.graph.as_mut().unwrap();
        let names: Vec<String> = graph.initializer.iter().map(|tensor| tensor.name().to_owned()).collect();
        graph.input.extend(names.into_iter().map(|name| ValueInfoProto { name: Some(name), ..input(DataType::Float) }));
        let side = cut_of(&network, &[Wanted::as_is("/side/Sigmoid_output_0")]);
        assert_eq!(side.input.iter().map(ValueInfoProto::name).collect::<Vec<_>>(), ["input", "weight"]);
    }

    #[test]
    fn a_layer_inside_of_a_subgraph_is_told_from_one_that_is_not_there() {
        for inner in ["inside", "ranch.linear", "branch.linear"] {
            let mut network = network();
            let graph = network.model.graph.as_mut().unwrap();
            let inside = &mut graph.node.last_mut().unwrap().attribute[0].g.as_mut().unwrap().node;
            inside.push(node("Gemm", &["inside"], "/head/branch/linear/Gemm_output_0", Some("['', 'head', 'head.branch', 'head.branch.linear', 'linear']")));
            let error = network.layer(inner).unwrap_err().to_string();
            let there = inner != "ranch.linear";
            assert_eq!(error.contains("inside of a subgraph of the If \"/head/If_output_0\""), there, "{error}");
        }
    }

    #[test]
    fn torchscripts_node_names_are_module_paths() {
        let mut network = network();
        for node in &mut network.model.graph.as_mut().unwrap().node {
            node.metadata_props.clear();
            node.name = node.output[0].strip_suffix("_output_0").map(str::to_owned);
        }
        let found = |asked: &str| network.layer(asked).unwrap();
        assert_eq!(
            (found("layer1.0").value, found("layer1").value),
            ("/layer1/layer1.0/Relu_output_0".to_owned(), "/layer1/layer1.0/Relu_output_0".to_owned())
        );
        assert_eq!(found("head").operator, "If");
        let scopes = scopes_of_name("/layer4/layer4.2/downsample/downsample.0/Conv");
        assert_eq!(scopes, ["layer4", "layer4.2", "layer4.2.downsample", "layer4.2.downsample.0", "layer4.2.downsample.0.Conv"]);
        assert_eq!(scopes_of_name("/vit/encoder/layer.0/attention/Add")[2], "vit.encoder.layer.0");
        assert!(scopes_of_name("node_conv2d").is_empty());
    }

    #[test]
    fn external_data_is_found_wherever_a_tensor_is_and_stays_inside_of_the_folder() {
        let external = |location: &str| {
            let entry = |(key, value): (&str, &str)| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value.to_owned()) };
            TensorProto { external_data: [("location", location), ("offset", "64"), ("length", "16")].map(entry).to_vec(), ..Default::default() }
        };
        let constant = |location: &str| {
            let held = AttributeProto { name: Some("value".to_owned()), t: Some(external(location)), ..Default::default() };
            NodeProto { attribute: vec![held], ..node("Constant", &[], "constant", None) }
        };
        let mut network = network();
        let graph = network.model.graph.as_mut().unwrap();
        graph.initializer.push(external("net.onnx_data"));
        graph.node.push(constant("net.onnx.data"));
        let branch = graph.node.iter_mut().find(|node| node.op_type() == "If").unwrap().attribute[0].g.as_mut().unwrap();
        branch.initializer.push(external("branch/weights"));
        branch.node.push(constant("branch/constants"));
        let files: Vec<(PathBuf, u64)> = network.external_files().unwrap().into_iter().collect();
        assert_eq!(files, ["branch/constants", "branch/weights", "net.onnx.data", "net.onnx_data"].map(|name| (PathBuf::from(name), 80)));
        for outside in ["/etc/passwd", "../weights", "a/../../b"] {
            network.model.graph.as_mut().unwrap().node.push(constant(outside));
            assert!(network.external_files().unwrap_err().to_string().contains(outside));
            network.model.graph.as_mut().unwrap().node.pop();
        }
    }

    #[test]
    fn a_python_list_is_read_whatever_its_quotes() {
        assert_eq!(parse_list("['', 'layer4', \"it's\", 'x']"), ["", "layer4", "it's", "x"]);
        assert!(parse_list("[]").is_empty() && parse_list("['open").is_empty());
    }
}
