//! ONNX networks written node by node.

use dnd_onnx::format::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_proto::DataType,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};
use prost::Message as _;

/// A node with one output and no attributes.
pub fn node(operator: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(operator.to_owned()),
        input: inputs.iter().map(|name| (*name).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    }
}

/// A list of int64.
pub fn ints(name: &str, values: &[i64]) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(DataType::Int64 as i32),
        dims: vec![values.len() as i64],
        int64_data: values.to_vec(),
        ..Default::default()
    }
}

/// A tensor of float32.
pub fn floats(name: &str, dims: &[i64], values: Vec<f32>) -> TensorProto {
    TensorProto { name: Some(name.to_owned()), data_type: Some(DataType::Float as i32), dims: dims.to_vec(), float_data: values, ..Default::default() }
}

/// An input or output, each side of a size or of any.
pub fn value(name: &str, kind: DataType, shape: &[Option<i64>]) -> ValueInfoProto {
    let dim = shape
        .iter()
        .map(|size| Dimension { value: Some(size.map_or(dimension::Value::DimParam("n".to_owned()), dimension::Value::DimValue)), ..Default::default() });
    let tensor = type_proto::Tensor { elem_type: Some(kind as i32), shape: Some(TensorShapeProto { dim: dim.collect() }) };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}

/// A network of these nodes over `pixels`, any number of pictures of 4 x 4 pixels, as a file.
pub fn network(nodes: Vec<NodeProto>, weights: Vec<TensorProto>, output: &str) -> Vec<u8> {
    let graph = GraphProto {
        name: Some("by hand".to_owned()),
        node: nodes,
        initializer: weights,
        input: vec![value("pixels", DataType::Float, &[None, Some(3), Some(4), Some(4)])],
        output: vec![ValueInfoProto { name: Some(output.to_owned()), ..Default::default() }],
        ..Default::default()
    };
    let opset = OperatorSetIdProto { version: Some(17), ..Default::default() };
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset], ..Default::default() }.encode_to_vec()
}

/// A network that repeats its pictures `times` in both directions: 192 bytes of each, times the square of that, which no shape in the file says.
pub fn large(times: i64) -> Vec<u8> {
    network(vec![node("Tile", &["pixels", "repeats"], "tiled")], vec![ints("repeats", &[1, 1, times, times])], "tiled")
}

/// A network that never ends where a pixel of a batch is brighter than `above`, from 0 to 1.
pub fn endless(above: f32) -> Vec<u8> {
    let any = |name: &str, kind: DataType| {
        let tensor = type_proto::Tensor { elem_type: Some(kind as i32), shape: None };
        let of = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
        ValueInfoProto { name: Some(name.to_owned()), r#type: Some(of), ..Default::default() }
    };
    let body = GraphProto {
        name: Some("body".to_owned()),
        node: vec![node("Identity", &["goes_on_inside"], "again"), node("Relu", &["carried"], "kept")],
        input: vec![value("step", DataType::Int64, &[]), value("goes_on_inside", DataType::Bool, &[]), any("carried", DataType::Float)],
        output: vec![any("again", DataType::Bool), any("kept", DataType::Float)],
        ..Default::default()
    };
    let body = AttributeProto { name: Some("body".to_owned()), r#type: Some(AttributeType::Graph as i32), g: Some(body), ..Default::default() };
    let keep = AttributeProto { name: Some("keepdims".to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(0), ..Default::default() };
    let nodes = vec![
        NodeProto { attribute: vec![keep], ..node("ReduceMax", &["pixels"], "brightest") },
        node("Greater", &["brightest", "above"], "goes_on"),
        NodeProto { attribute: vec![body], ..node("Loop", &["", "goes_on", "pixels"], "looped") },
    ];
    network(nodes, vec![floats("above", &[], vec![above])], "looped")
}
