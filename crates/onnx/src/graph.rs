//! Graph surgery: any intermediate value of a network's file as an output, and nothing computed that is not needed for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    path::{Component, Path, PathBuf},
};

use dnd_method::parameters::Summary;
use prost::Message as _;

use crate::{
    Error,
    format::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto, attribute_proto::AttributeType, tensor_proto,
        tensor_shape_proto::dimension, type_proto,
    },
};

/// Where a dynamo export keeps the module that a node came from.
const SCOPES: &str = "pkg.torch.onnx.name_scopes";
/// Names that an error offers.
const NEAREST: usize = 5;

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

/// What a network takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// Height and width, where the graph says them.
    pub size: Option<(u32, u32)>,
    /// The batch size, where the graph fixes it.
    pub batch: Option<usize>,
}

/// A value to give out, and how to reduce it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The value of the graph.
    pub value: String,
    /// Over its last two axes; none gives the value as it is.
    pub reduce: Option<Summary>,
}

impl Network {
    /// Reads an ONNX file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let bytes =
            fs::read(path).map_err(|e| Error::file(path, if e.kind() == std::io::ErrorKind::NotFound { "no such file".to_owned() } else { e.to_string() }))?;
        let not_onnx = || Error::file(path, "not an ONNX file");
        let model = ModelProto::decode(&*bytes).map_err(|_| not_onnx())?;
        if model.graph.as_ref().is_none_or(|graph| graph.node.is_empty() || graph.output.is_empty()) {
            return Err(not_onnx());
        }
        Ok(Self { model, folder: path.parent().unwrap_or(Path::new("")).to_owned() })
    }

    fn graph(&self) -> Result<&GraphProto, Error> {
        self.model.graph.as_ref().ok_or_else(|| Error::Graph("the file holds no graph".to_owned()))
    }

    /// The folder of the file, where its external data lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The one picture that the network takes.
    pub fn input(&self) -> Result<Input, Error> {
        let graph = self.graph()?;
        let initialised: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        let inputs: Vec<&ValueInfoProto> = graph.input.iter().filter(|input| !initialised.contains(input.name())).collect();
        let [input] = inputs[..] else {
            let names: Vec<_> = inputs.iter().map(|i| i.name()).collect();
            return Err(Error::Graph(format!(
                "the network takes {} inputs ({}); one picture, N x 3 x height x width, can be given",
                names.len(),
                names.join(", ")
            )));
        };
        let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
            return Err(Error::Graph(format!("the input {} is no tensor", input.name())));
        };
        if tensor.elem_type() != tensor_proto::DataType::Float as i32 {
            return Err(Error::Graph(format!("the input {} is not of 32-bit floats, which are what pictures are given as", input.name())));
        }
        let sides: Option<Vec<Option<i64>>> = tensor.shape.as_ref().map(|shape| {
            let known = |value: &dimension::Value| match value {
                dimension::Value::DimValue(n) if *n > 0 => Some(*n),
                _ => None,
            };
            shape.dim.iter().map(|dim| dim.value.as_ref().and_then(known)).collect()
        });
        match sides.as_deref() {
            Some([batch, None | Some(3), height, width]) => {
                Ok(Input { name: input.name().to_owned(), size: height.zip(*width).map(|(h, w)| (h as u32, w as u32)), batch: batch.map(|n| n as usize) })
            }
            None => Ok(Input { name: input.name().to_owned(), size: None, batch: None }),
            Some(shape) => {
                let text: Vec<_> = shape.iter().map(|d| d.map_or("?".to_owned(), |n| n.to_string())).collect();
                Err(Error::Graph(format!("the input {} has the shape {}; pictures are given as N x 3 x height x width", input.name(), text.join(" x "))))
            }
        }
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
        let ends = |name: &str| name.strip_suffix(asked).is_some_and(|rest| rest.ends_with(['.', '/', ':']));
        let mut found: Vec<Layer> = modules.keys().filter(|path| ends(path)).filter_map(|path| module(path)).collect();
        found.extend(layers.iter().filter(|layer| ends(&layer.value)).cloned());
        found.sort_by(|a, b| (&a.value, a.name.len()).cmp(&(&b.value, b.name.len())));
        found.dedup_by(|a, b| a.value == b.value);
        match found.len() {
            1 => Ok(found.swap_remove(0)),
            0 => Err(Error::UnknownLayer {
                layer: asked.to_owned(),
                nearest: nearest(asked, modules.keys().map(String::as_str).chain(layers.iter().map(|l| l.value.as_str()))),
            }),
            _ => Err(Error::AmbiguousLayer { layer: asked.to_owned(), candidates: found.into_iter().take(NEAREST).map(|l| l.name).collect() }),
        }
    }

    /// The network as far as the wanted values need it, with those as its outputs in their order; a reduced value's output has the name of
    /// [`reduced`]. The encoded model keeps the names of its external data files, which lie in [`Self::folder`].
    pub fn cut(&self, wanted: &[Wanted]) -> Result<Vec<u8>, Error> {
        let mut model = self.model.clone();
        let opset = model.opset_import.iter().filter(|o| matches!(o.domain(), "" | "ai.onnx")).map(OperatorSetIdProto::version).max().unwrap_or(1);
        let graph = model.graph.as_mut().ok_or_else(|| Error::Graph("the file holds no graph".to_owned()))?;
        for want in wanted {
            if let Some(summary) = want.reduce {
                add_reduction(graph, &want.value, summary, opset);
            }
        }
        let outputs: Vec<String> = wanted.iter().map(|want| if want.reduce.is_some() { reduced(&want.value) } else { want.value.clone() }).collect();
        keep_what_leads_to(graph, &outputs);
        graph.output = outputs.into_iter().map(|name| ValueInfoProto { name: Some(name), ..Default::default() }).collect();
        Ok(model.encode_to_vec())
    }

    /// Files of external data that the network's tensors name, relative to [`Self::folder`], which they may not lead out of.
    pub fn external_files(&self) -> Result<BTreeSet<PathBuf>, Error> {
        let entries = self.graph()?.initializer.iter().flat_map(|tensor| &tensor.external_data);
        entries
            .filter(|entry| entry.key() == "location")
            .map(|entry| {
                let file = PathBuf::from(entry.value());
                let inside = file.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
                if inside { Ok(file) } else { Err(Error::Graph(format!("external data in {:?}, which is not inside of the network's folder", entry.value()))) }
            })
            .collect()
    }
}

/// The name of a reduced value's output.
pub fn reduced(value: &str) -> String {
    format!("{value}/dnd_summary")
}

/// The value that each module gives: the output of the last node whose scopes hold the module. Operations, the scopes' last entries, count
/// for their own name only.
fn module_outputs(graph: &GraphProto) -> BTreeMap<String, &str> {
    let mut outputs = BTreeMap::new();
    for node in &graph.node {
        let Some(value) = node.output.first().filter(|value| !value.is_empty()) else { continue };
        let Some(scopes) = node.metadata_props.iter().find(|p| p.key() == SCOPES).map(|p| parse_list(p.value())) else { continue };
        let modules = scopes.len().saturating_sub(1);
        for path in scopes.into_iter().take(modules).filter(|path| !path.is_empty()) {
            outputs.insert(path, value.as_str());
        }
    }
    outputs
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

fn add_reduction(graph: &mut GraphProto, value: &str, summary: Summary, opset: i64) {
    let output = reduced(value);
    let operator = match summary {
        Summary::Mean => "ReduceMean",
        Summary::Max => "ReduceMax",
    };
    let keep = AttributeProto { name: Some("keepdims".to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(0), ..Default::default() };
    let mut node = NodeProto {
        name: Some(output.clone()),
        op_type: Some(operator.to_owned()),
        input: vec![value.to_owned()],
        output: vec![output.clone()],
        attribute: vec![keep],
        ..Default::default()
    };
    // The axes became an input with opset 18.
    if opset >= 18 {
        let axes = format!("{output}/axes");
        graph.initializer.push(TensorProto {
            name: Some(axes.clone()),
            data_type: Some(tensor_proto::DataType::Int64 as i32),
            dims: vec![2],
            int64_data: vec![-2, -1],
            ..Default::default()
        });
        node.input.push(axes);
    } else {
        node.attribute.push(AttributeProto {
            name: Some("axes".to_owned()),
            r#type: Some(AttributeType::Ints as i32),
            ints: vec![-2, -1],
            ..Default::default()
        });
    }
    graph.node.push(node);
}

/// Drops nodes and initializers that no output needs. Values that a subgraph captures from outside count as inputs of the node that holds it.
fn keep_what_leads_to(graph: &mut GraphProto, outputs: &[String]) {
    let mut needed: HashSet<String> = outputs.iter().cloned().collect();
    let mut nodes = Vec::with_capacity(graph.node.len());
    // A graph's nodes are in topological order: one pass from the last to the first finds all.
    for node in std::mem::take(&mut graph.node).into_iter().rev() {
        if node.output.iter().any(|value| needed.contains(value)) {
            needed.extend(node.input.iter().cloned());
            for attribute in &node.attribute {
                attribute.g.iter().chain(&attribute.graphs).for_each(|inner| captured(inner, &mut needed));
            }
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
        for attribute in &node.attribute {
            attribute.g.iter().chain(&attribute.graphs).for_each(|inner| captured(inner, needed));
        }
    }
    needed.extend(graph.output.iter().map(|output| output.name().to_owned()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::StringStringEntryProto;

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
            output: vec![ValueInfoProto { name: Some("/head/Gemm_output_0".to_owned()), ..Default::default() }],
            ..Default::default()
        };
        Network {
            model: ModelProto { graph: Some(graph), opset_import: vec![OperatorSetIdProto { version: Some(18), ..Default::default() }], ..Default::default() },
            folder: PathBuf::new(),
        }
    }

    fn cut(wanted: &[Wanted]) -> GraphProto {
        ModelProto::decode(&*network().cut(wanted).unwrap()).unwrap().graph.unwrap()
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
        let side = cut(&[Wanted { value: "/side/Sigmoid_output_0".to_owned(), reduce: None }]);
        let operators = |graph: &GraphProto| graph.node.iter().map(|node| node.op_type().to_owned()).collect::<Vec<_>>();
        assert_eq!(operators(&side), ["Conv", "Sigmoid"]);
        let weights: Vec<&str> = side.initializer.iter().map(TensorProto::name).collect();
        assert_eq!(weights, ["weight"]);
        let conditional = cut(&[Wanted { value: "/head/If_output_0".to_owned(), reduce: None }]);
        assert_eq!(operators(&conditional), ["Conv", "Relu", "If"]);
    }

    #[test]
    fn a_reduced_value_is_an_output_of_its_own_beside_the_value() {
        let value = "/layer1/layer1.0/Relu_output_0".to_owned();
        let wanted = [Wanted { value: value.clone(), reduce: Some(Summary::Mean) }, Wanted { value: value.clone(), reduce: None }];
        let graph = cut(&wanted);
        let outputs: Vec<&str> = graph.output.iter().map(ValueInfoProto::name).collect();
        assert_eq!(outputs, [&reduced(&value), &value]);
        let last = graph.node.last().unwrap();
        assert_eq!((last.op_type(), last.input.len()), ("ReduceMean", 2), "axes are an input from opset 18 on");
    }

    #[test]
    fn external_data_stays_inside_of_the_folder() {
        let with = |location: &str| {
            let mut network = network();
            let entry = StringStringEntryProto { key: Some("location".to_owned()), value: Some(location.to_owned()) };
            network.model.graph.as_mut().unwrap().initializer[0].external_data.push(entry);
            network.external_files()
        };
        assert_eq!(with("net.onnx.data").unwrap(), BTreeSet::from([PathBuf::from("net.onnx.data")]));
        for outside in ["/etc/passwd", "../weights", "a/../../b"] {
            assert!(with(outside).is_err(), "{outside}");
        }
    }

    #[test]
    fn a_python_list_is_read_whatever_its_quotes() {
        assert_eq!(parse_list("['', 'layer4', \"it's\", 'x']"), ["", "layer4", "it's", "x"]);
        assert!(parse_list("[]").is_empty() && parse_list("['open").is_empty());
    }
}
