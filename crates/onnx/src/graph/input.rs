//! What a network takes: one picture, and the values that its other inputs always have.

use std::collections::HashSet;

use dnd_proto::v1 as proto;

use super::{DataFormat, Network, int, ints, node};
use crate::{
    Error,
    format::{
        GraphProto, TensorProto, TypeProto, ValueInfoProto,
        tensor_proto::DataType,
        tensor_shape_proto::dimension,
        type_proto::{self, Tensor},
    },
};

/// The longest side of a network's input.
const LONGEST_SIDE: u32 = 16_384;
/// Pictures of a batch that a graph fixes at most.
const MOST_PICTURES: i64 = 1024;

/// What a caller says of a network's inputs.
#[derive(Debug, Clone, Default)]
pub struct Given {
    /// The values of all inputs but the picture.
    pub fixed: Vec<Fixed>,
    /// The order of the picture's axes, where the graph does not tell it; channels first by default.
    pub data_format: Option<DataFormat>,
}

impl From<&proto::TargetOptions> for Given {
    fn from(said: &proto::TargetOptions) -> Self {
        let data_format = match said.data_format() {
            proto::DataFormat::Unspecified => None,
            proto::DataFormat::ChannelsFirst => Some(DataFormat::ChannelsFirst),
            proto::DataFormat::ChannelsLast => Some(DataFormat::ChannelsLast),
        };
        let fixed = |input: &proto::FixedInput| Fixed {
            name: input.name.clone(),
            values: input.values.clone(),
            shape: input.shape.iter().copied().map(i64::from).collect(),
        };
        Self { fixed: said.fixed_inputs.iter().map(fixed).collect(), data_format }
    }
}

/// A value that an input has in every run.
#[derive(Debug, Clone, PartialEq)]
pub struct Fixed {
    /// The input's name.
    pub name: String,
    /// The last axis fastest; one value fills the whole shape.
    pub values: Vec<f64>,
    /// Empty for what the graph declares, with 1 for axes of any length.
    pub shape: Vec<i64>,
}

/// A network's inputs: the picture, and the fixed values of the others.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// The picture's name in the graph.
    pub name: String,
    /// Height and width, where the graph says them.
    pub size: Option<(u32, u32)>,
    /// The batch size, where the graph fixes it.
    pub batch: Option<usize>,
    /// The order of its axes.
    pub data_format: DataFormat,
    element: DataType,
    fixed: Vec<(Fixed, DataType)>,
}

impl Network {
    /// The one picture that the network takes, all its other inputs being given.
    pub fn input(&self, given: &Given) -> Result<Input, Error> {
        let graph = self.graph()?;
        // Up to version 3 of the format weights are declared as inputs, too.
        let initialised: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
        let inputs: Vec<&ValueInfoProto> = graph.input.iter().filter(|input| !initialised.contains(input.name())).collect();
        let fix = |said: &Fixed| match inputs.iter().find(|input| input.name() == said.name) {
            Some(input) => filled(input, said),
            None => Err(Error::Graph(format!("fixed_inputs: no input {:?}; the network's inputs are {}", said.name, list(&inputs)))),
        };
        let fixed = given.fixed.iter().map(fix).collect::<Result<_, _>>()?;
        let open: Vec<&ValueInfoProto> = inputs.into_iter().filter(|input| given.fixed.iter().all(|said| said.name != input.name())).collect();
        let [input] = open[..] else {
            return Err(Error::Graph(format!(
                "the network takes {} inputs: {}; one of them can be the picture, N x 3 x height x width: give the others their values in fixed_inputs \
                 (--fixed-input NAME=VALUE)",
                open.len(),
                list(&open)
            )));
        };
        let wrong = |problem: &str| Error::Graph(format!("the input {}: {problem}", describe(input)));
        let element = tensor_of(input).map(element_of).ok_or_else(|| wrong("a picture is given as a tensor"))?;
        if !matches!(element, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double) {
            return Err(wrong("pictures are given as floats; export the network with a float input"));
        }
        let usual = given.data_format.unwrap_or(DataFormat::ChannelsFirst);
        let (batch, size, data_format) = match sides(input).as_deref() {
            None => (None, None, usual),
            Some(&[batch, second, third, fourth]) => {
                let data_format = match (given.data_format, second, fourth) {
                    (Some(said), _, _) => said,
                    (None, Some(3), _) | (None, None, None) => DataFormat::ChannelsFirst,
                    (None, _, None | Some(3)) => DataFormat::ChannelsLast,
                    (None, _, Some(_)) => DataFormat::ChannelsFirst,
                };
                let (channels, height, width) = match data_format {
                    DataFormat::ChannelsFirst => (second, third, fourth),
                    DataFormat::ChannelsLast => (fourth, second, third),
                };
                if channels.is_some_and(|n| n != 3) {
                    return Err(wrong("pictures are given as N x 3 x height x width, or as N x height x width x 3"));
                }
                let side = |side: i64| u32::try_from(side).ok().filter(|side| *side <= LONGEST_SIDE);
                let size = height.zip(width).map(|(height, width)| side(height).zip(side(width)));
                let too_large = format!("sides are at most {LONGEST_SIDE}, and a batch {MOST_PICTURES} pictures");
                if batch.is_some_and(|batch| batch > MOST_PICTURES) || size == Some(None) {
                    return Err(wrong(&too_large));
                }
                (batch, size.flatten(), data_format)
            }
            Some(_) => return Err(wrong("pictures are given as N x 3 x height x width, or as N x height x width x 3")),
        };
        Ok(Input { name: input.name().to_owned(), size, batch: batch.map(|n| n as usize), data_format, element, fixed })
    }
}

impl Input {
    /// The input of a network that was cut for this one: pictures of 32-bit floats, channels first.
    pub fn fed(&self) -> String {
        if self.is_plain() { self.name.clone() } else { format!("{}/dnd_pixels", self.name) }
    }

    fn is_plain(&self) -> bool {
        self.data_format == DataFormat::ChannelsFirst && self.element == DataType::Float
    }

    /// Puts before the graph what brings 32-bit floats, channels first, to the picture's own type and order, and gives the other inputs their values.
    pub(super) fn adapt(&self, graph: &mut GraphProto) {
        let mut nodes = Vec::new();
        for (said, element) in &self.fixed {
            graph.input.retain(|input| input.name() != said.name);
            let values = format!("{}/dnd_fixed", said.name);
            nodes.push(node("Cast", &[&values], &said.name, vec![int("to", *element as i64)]));
            graph.initializer.push(TensorProto {
                name: Some(values),
                data_type: Some(DataType::Double as i32),
                dims: said.shape.clone(),
                double_data: said.values.clone(),
                ..Default::default()
            });
        }
        if !self.is_plain() {
            let fed = self.fed();
            let ordered = format!("{}/dnd_ordered", self.name);
            let perm = match self.data_format {
                DataFormat::ChannelsFirst => [0, 1, 2, 3],
                DataFormat::ChannelsLast => [0, 2, 3, 1],
            };
            nodes.push(node("Transpose", &[&fed], &ordered, vec![ints("perm", &perm)]));
            nodes.push(node("Cast", &[&ordered], &self.name, vec![int("to", self.element as i64)]));
            let float = Tensor { elem_type: Some(DataType::Float as i32), shape: None };
            for input in graph.input.iter_mut().filter(|input| input.name() == self.name) {
                // What the graph says of its picture is still said of the value.
                graph.value_info.push(input.clone());
                *input = ValueInfoProto {
                    name: Some(fed.clone()),
                    r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(float.clone())), ..Default::default() }),
                    ..Default::default()
                };
            }
        }
        graph.node.splice(0..0, nodes);
    }
}

/// A fixed value brought to its input's shape.
fn filled(input: &ValueInfoProto, said: &Fixed) -> Result<(Fixed, DataType), Error> {
    let wrong = |problem: String| Error::Graph(format!("fixed_inputs: {}: {problem}", describe(input)));
    let tensor = tensor_of(input).ok_or_else(|| wrong("only a tensor's values can be given".to_owned()))?;
    let element = element_of(tensor);
    if matches!(element, DataType::String | DataType::Undefined | DataType::Complex64 | DataType::Complex128) {
        return Err(wrong("only numbers can be given".to_owned()));
    }
    let declared = || sides(input).unwrap_or_default().into_iter().map(|side| side.unwrap_or(1)).collect();
    let shape: Vec<i64> = if said.shape.is_empty() { declared() } else { said.shape.clone() };
    const MOST_VALUES: i64 = 1 << 20;
    let count = shape.iter().try_fold(1_i64, |count, side| count.checked_mul(*side)).filter(|count| (1..=MOST_VALUES).contains(count));
    let count = count.ok_or_else(|| wrong(format!("a shape of {shape:?}; 1 to {MOST_VALUES} values can be given")))? as usize;
    let values = match said.values[..] {
        [value] => vec![value; count],
        _ if said.values.len() == count => said.values.clone(),
        _ => return Err(wrong(format!("{} values for the shape {shape:?}, which has {count}; give one, or all, or another shape", said.values.len()))),
    };
    Ok((Fixed { name: said.name.clone(), values, shape }, element))
}

fn tensor_of(input: &ValueInfoProto) -> Option<&Tensor> {
    match input.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        _ => None,
    }
}

fn element_of(tensor: &Tensor) -> DataType {
    DataType::try_from(tensor.elem_type()).unwrap_or(DataType::Undefined)
}

/// The lengths of an input's axes as far as the graph fixes them.
fn sides(input: &ValueInfoProto) -> Option<Vec<Option<i64>>> {
    let known = |value: &dimension::Value| match value {
        dimension::Value::DimValue(n) if *n > 0 => Some(*n),
        _ => None,
    };
    Some(tensor_of(input)?.shape.as_ref()?.dim.iter().map(|dim| dim.value.as_ref().and_then(known)).collect())
}

/// An input as an error names it: `pixel_values (Float, ? x 3 x 224 x 224)`.
fn describe(input: &ValueInfoProto) -> String {
    let Some(tensor) = tensor_of(input) else { return format!("{} (not a tensor)", input.name()) };
    let shape = match sides(input) {
        None => "of any shape".to_owned(),
        Some(sides) if sides.is_empty() => "one number".to_owned(),
        Some(sides) => sides.into_iter().map(|side| side.map_or("?".to_owned(), |n| n.to_string())).collect::<Vec<_>>().join(" x "),
    };
    format!("{} ({}, {shape})", input.name(), element_of(tensor).as_str_name().to_lowercase())
}

fn list(inputs: &[&ValueInfoProto]) -> String {
    inputs.iter().map(|input| describe(input)).collect::<Vec<_>>().join(", ")
}
