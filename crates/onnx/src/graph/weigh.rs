//! What a network takes once it is read. Two bytes of a file may stand for a node that takes hundreds in memory, so this is found out without reading it.

use prost::encoding::{WireType, decode_key, decode_varint};

use crate::format::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, StringStringEntryProto, TensorProto, TrainingInfoProto, TypeProto,
    ValueInfoProto,
};

/// Messages in messages, as deep as they are read.
const DEEPEST: usize = 100;

/// How a kind of message lies in memory.
struct Form {
    bytes: usize,
    /// The fields that hold messages that are looked into.
    inner: &'static [(u32, &'static Form)],
    /// The fields that hold much in few bytes, and how many bytes in memory one of them stands for at most: numbers one after the other, and small messages in
    /// each other.
    dense: &'static [(u32, u64)],
}

const NUMBERS: u64 = 8;
const MESSAGES: u64 = 32;

impl Form {
    const fn of<M>(inner: &'static [(u32, &'static Form)], dense: &'static [(u32, u64)]) -> Self {
        Self { bytes: size_of::<M>(), inner, dense }
    }
}

static MODEL: Form = Form::of::<ModelProto>(&[(7, &GRAPH), (8, &ENTRY), (14, &ENTRY), (20, &TRAINING), (25, &FUNCTION)], &[(26, MESSAGES)]);
static TRAINING: Form = Form::of::<TrainingInfoProto>(&[(1, &GRAPH), (2, &GRAPH), (3, &ENTRY), (4, &ENTRY)], &[]);
static FUNCTION: Form = Form::of::<FunctionProto>(&[(7, &NODE), (9, &ENTRY), (11, &ATTRIBUTE), (12, &VALUE), (14, &ENTRY)], &[]);
static GRAPH: Form =
    Form::of::<GraphProto>(&[(1, &NODE), (5, &TENSOR), (11, &VALUE), (12, &VALUE), (13, &VALUE), (15, &SPARSE), (16, &ENTRY)], &[(14, MESSAGES)]);
static NODE: Form = Form::of::<NodeProto>(&[(5, &ATTRIBUTE), (9, &ENTRY)], &[(10, MESSAGES)]);
static ATTRIBUTE: Form = Form::of::<AttributeProto>(
    &[(5, &TENSOR), (6, &GRAPH), (10, &TENSOR), (11, &GRAPH), (14, &TYPE), (15, &TYPE), (22, &SPARSE), (23, &SPARSE)],
    &[(8, NUMBERS)],
);
static TENSOR: Form = Form::of::<TensorProto>(&[(13, &ENTRY), (16, &ENTRY)], &[(1, NUMBERS), (5, NUMBERS), (7, NUMBERS), (11, NUMBERS)]);
static SPARSE: Form = Form::of::<SparseTensorProto>(&[(1, &TENSOR), (2, &TENSOR)], &[(3, NUMBERS)]);
static VALUE: Form = Form::of::<ValueInfoProto>(&[(2, &TYPE), (4, &ENTRY)], &[]);
static TYPE: Form = Form::of::<TypeProto>(&[], &[(1, MESSAGES), (4, MESSAGES), (5, MESSAGES), (8, MESSAGES), (9, MESSAGES)]);
static ENTRY: Form = Form::of::<StringStringEntryProto>(&[], &[]);

/// About the bytes that a network takes once its file is read; none if it is no file of messages.
pub(super) fn weigh(file: &[u8]) -> Option<u64> {
    below(&MODEL, file, DEEPEST)
}

fn below(form: &Form, mut bytes: &[u8], deep: usize) -> Option<u64> {
    let mut weight = form.bytes as u64;
    while !bytes.is_empty() {
        let (field, kind) = decode_key(&mut bytes).ok()?;
        weight += match kind {
            WireType::Varint => decode_varint(&mut bytes).ok().map(|_| NUMBERS)?,
            WireType::ThirtyTwoBit => bytes.split_off(..4)?.len() as u64,
            WireType::SixtyFourBit => bytes.split_off(..8)?.len() as u64,
            WireType::LengthDelimited => {
                let length = decode_varint(&mut bytes).ok()?;
                let content = bytes.split_off(..usize::try_from(length).ok()?)?;
                match form.inner.iter().find(|(inner, _)| *inner == field) {
                    Some((_, inner)) => below(inner, content, deep.checked_sub(1)?)?,
                    None => {
                        let each = form.dense.iter().find(|(dense, _)| *dense == field).map_or(1, |(_, each)| *each);
                        size_of::<TypeProto>() as u64 + length * each
                    }
                }
            }
            // Groups, which the format does not have.
            WireType::StartGroup | WireType::EndGroup => return None,
        };
    }
    Some(weight)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_few_bytes_that_become_much_are_told_from_many_that_stay_what_they_are() {
        let nodes = ModelProto { graph: Some(GraphProto { node: vec![NodeProto::default(); 10_000], ..Default::default() }), ..Default::default() };
        let nodes = nodes.encode_to_vec();
        assert!(nodes.len() < 30_000 && weigh(&nodes).unwrap() >= 10_000 * size_of::<NodeProto>() as u64);

        let weights = TensorProto { raw_data: Some(vec![1; 1_000_000]), ..Default::default() };
        let graph = GraphProto { initializer: vec![weights], ..Default::default() };
        let weights = ModelProto { graph: Some(graph), ..Default::default() }.encode_to_vec();
        assert!((1_000_000..1_010_000).contains(&weigh(&weights).unwrap()));

        let mut attribute = AttributeProto { ints: vec![1; 5000], ..Default::default() };
        attribute.tensors = vec![TensorProto { int64_data: vec![1; 10_000], ..Default::default() }];
        let inner = GraphProto { node: vec![NodeProto { attribute: vec![attribute], ..Default::default() }], ..Default::default() };
        let outer = AttributeProto { g: Some(inner), ..Default::default() };
        let graph = GraphProto { node: vec![NodeProto { attribute: vec![outer], ..Default::default() }], ..Default::default() };
        let deep = ModelProto { graph: Some(graph), ..Default::default() }.encode_to_vec();
        assert!((120_000..130_000).contains(&weigh(&deep).unwrap()), "{:?}", weigh(&deep));

        assert_eq!(weigh(&weights[..weights.len() - 1]), None, "it breaks off");
        assert_eq!(weigh(b"no messages"), None);
    }
}
