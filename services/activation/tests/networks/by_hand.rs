//! ONNX networks written node by node.

use dnd_testing::by_hand;
pub(crate) use dnd_testing::by_hand::{floats, ints as int_tensor};

use super::*;

pub(crate) fn node(operator: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto { attribute: attributes, ..by_hand::node(operator, inputs, output) }
}

pub(crate) fn value(name: &str, shape: &[Option<i64>]) -> ValueInfoProto {
    by_hand::value(name, DataType::Float, shape)
}

pub(crate) fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(AttributeType::Ints as i32), ints: ints.to_vec(), ..Default::default() }
}

pub(crate) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(AttributeType::Int as i32), i: Some(value), ..Default::default() }
}

/// Weights of a convolution, or with two axes of a product, that give each channel as it is.
pub(crate) fn identity(name: &str, dims: &[i64]) -> TensorProto {
    floats(name, dims, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
}

/// A network by hand.
#[derive(Clone)]
pub(crate) struct Net {
    pub(crate) opset: i64,
    pub(crate) ir_version: i64,
    pub(crate) inputs: Vec<ValueInfoProto>,
    pub(crate) nodes: Vec<NodeProto>,
    pub(crate) weights: Vec<TensorProto>,
    pub(crate) output: String,
    /// Height and width of its input.
    pub(crate) size: (u32, u32),
}

impl Net {
    pub(crate) fn new(input: ValueInfoProto, size: (u32, u32), output: &str) -> Self {
        Self { opset: 17, ir_version: 8, inputs: vec![input], nodes: vec![], weights: vec![], output: output.to_owned(), size }
    }

    /// Writes it into a folder.
    pub(crate) fn write(&self, folder: &Path) -> Target {
        let domains = ["", "com.microsoft"]
            .map(|domain| OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(if domain.is_empty() { self.opset } else { 1 }) });
        let graph = GraphProto {
            name: Some("by hand".to_owned()),
            node: self.nodes.clone(),
            initializer: self.weights.clone(),
            input: self.inputs.clone(),
            output: vec![ValueInfoProto { name: Some(self.output.clone()), ..Default::default() }],
            ..Default::default()
        };
        let model = ModelProto { ir_version: Some(self.ir_version), graph: Some(graph), opset_import: domains.to_vec(), ..Default::default() };
        let path = folder.join("net.onnx");
        fs::write(&path, model.encode_to_vec()).unwrap();
        let (height, width) = self.size;
        let preprocessing =
            Preprocessing { resize_mode: ResizeMode::Squash.into(), height, width, mean: vec![0.0; 3], std: vec![1.0; 3], ..Default::default() };
        Target { uri: format!("file:{}", path.display()), preprocessing: Some(preprocessing), ..Default::default() }
    }
}

/// Writes a network of these nodes into a folder. Its input is `pixels` (batch, 3, SIDE, SIDE).
pub(crate) fn write(folder: &Path, opset: i64, batch: Option<i64>, nodes: Vec<NodeProto>, weights: Vec<TensorProto>, output: &str) -> Target {
    let side = Some(i64::from(SIDE));
    Net { opset, nodes, weights, ..Net::new(value("pixels", &[batch, Some(3), side, side]), (SIDE, SIDE), output) }.write(folder)
}
