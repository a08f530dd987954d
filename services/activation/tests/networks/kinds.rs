//! Kinds of layers: where a value's units are, and where in the picture each is.

use dnd_proto::v1::{DataFormat, DescribeTargetResponse, Layer, LayerKind, LayerUnits, TargetOptions, TokenSummary};
use tonic::Status;

use super::*;

/// Height and width of these networks' input: not a square, so that rows and columns can't be taken for one another.
const SIZE: (u32, u32) = (4, 6);
const AXES: [i64; 2] = [4, 6];

fn network(nodes: Vec<NodeProto>, weights: Vec<TensorProto>, output: &str) -> Net {
    Net { nodes, weights, ..Net::new(value("pixels", &[None, Some(3), Some(AXES[0]), Some(AXES[1])]), SIZE, output) }
}

async fn describe(client: &mut ActivationServiceClient<Channel>, target: &Target, asked: &[&str]) -> Result<DescribeTargetResponse, Status> {
    let asked = asked.iter().map(|name| LayerUnits { layer: (*name).to_owned(), units: Vec::new() }).collect();
    Ok(client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked }).await?.into_inner())
}

fn named<'d>(described: &'d DescribeTargetResponse, name: &str) -> &'d Layer {
    described.layers.iter().find(|layer| layer.name == name).unwrap_or_else(|| panic!("no {name} among {:?}", described.layers))
}

/// Holds each unit's maps against its channel of the pictures.
fn assert_maps(units: &[ProbedUnit], values: &HashMap<String, [Vec<f32>; 3]>) {
    for (channel, unit) in units.iter().enumerate() {
        for top in &unit.top {
            let map = top.map.as_ref().unwrap();
            assert_eq!((map.height, map.width), SIZE);
            assert_eq!(map.values, values[&top.path][channel], "unit {channel} on {}", top.path);
        }
    }
}

#[tokio::test]
async fn a_network_of_tensorflow_gets_pictures_with_channels_last_and_its_units_are_the_last_axis() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![
        node("Relu", &["pixels"], "last", vec![]),
        node("Transpose", &["last"], "first", vec![ints("perm", &[0, 3, 1, 2])]),
        node("Conv", &["first", "identity"], "conv", vec![]),
        node("Transpose", &["conv"], "back", vec![ints("perm", &[0, 2, 3, 1])]),
        node("Relu", &["back"], "after", vec![]),
    ];
    let input = value("pixels", &[None, Some(AXES[0]), Some(AXES[1]), Some(3)]);
    let network = Net { nodes, weights: vec![identity("identity", &[3, 3, 1, 1])], ..Net::new(input, SIZE, "after") };
    let target = network.write(folder.path());
    let (set, values) = pictures_of(folder.path(), 9, SIZE);
    let described = describe(&mut client, &target, &[]).await.unwrap();
    for (name, format) in [("last", DataFormat::ChannelsLast), ("conv", DataFormat::ChannelsFirst), ("after", DataFormat::ChannelsLast)] {
        let layer = named(&described, name);
        assert_eq!((layer.kind(), layer.data_format(), layer.units), (LayerKind::Channels, format, 3), "{name}");
        assert_eq!(layer.map, [SIZE.0, SIZE.1]);
        let units = probe(&mut client, &target, &set, name, TokenSummary::Unspecified).await.unwrap();
        assert_activations(&units, &values, mean);
        assert_maps(&units, &values);
    }
}

#[tokio::test]
async fn where_units_are_follows_from_the_operators_and_is_asked_for_where_it_does_not() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![
        node("Conv", &["pixels", "identity"], "patches", vec![]),
        // As of a network of Swin's kind: to channels last, to tokens, and back to a map.
        node("Transpose", &["patches"], "map", vec![ints("perm", &[0, 2, 3, 1])]),
        node("Reshape", &["map", "as_tokens"], "tokens", vec![]),
        node("MatMul", &["tokens", "matrix"], "linear", vec![]),
        node("Reshape", &["linear", "as_map"], "again", vec![]),
        node("Relu", &["again"], "relu", vec![]),
        // As of attention: four axes, none of which is one of units.
        node("Reshape", &["linear", "as_heads"], "split", vec![]),
        node("Transpose", &["split"], "heads", vec![ints("perm", &[0, 2, 1, 3])]),
        node("Transpose", &["heads"], "turned", vec![ints("perm", &[0, 1, 3, 2])]),
        node("MatMul", &["heads", "turned"], "attention", vec![]),
    ];
    let weights = vec![
        identity("identity", &[3, 3, 1, 1]),
        identity("matrix", &[3, 3]),
        int_tensor("as_tokens", &[0, 24, 3]),
        int_tensor("as_map", &[0, 4, 6, 3]),
        int_tensor("as_heads", &[0, 24, 3, 1]),
    ];
    let target = network(nodes, weights, "attention").write(folder.path());
    let (set, values) = pictures_of(folder.path(), 7, SIZE);
    let described = describe(&mut client, &target, &[]).await.unwrap();
    let format = |name: &str| (named(&described, name).kind(), named(&described, name).data_format());
    assert_eq!(format("patches"), (LayerKind::Channels, DataFormat::ChannelsFirst));
    for name in ["map", "again", "relu"] {
        assert_eq!(format(name), (LayerKind::Channels, DataFormat::ChannelsLast), "{name}");
    }
    assert_eq!((format("tokens").0, &named(&described, "tokens").map[..]), (LayerKind::Tokens, &[4, 6][..]));
    let units = probe(&mut client, &target, &set, "relu", TokenSummary::Unspecified).await.unwrap();
    assert_activations(&units, &values, mean);
    assert_maps(&units, &values);
    assert_maps(&probe(&mut client, &target, &set, "linear", TokenSummary::PatchMean).await.unwrap(), &values);

    let status = describe(&mut client, &target, &["attention"]).await.unwrap_err();
    for said in ["2 x 3 x 24 x 24", "data_format", "nearest layer is linear"] {
        assert!(status.message().contains(said), "{}", status.message());
    }
    let options = TargetOptions { data_format: DataFormat::ChannelsFirst.into(), ..Default::default() };
    let said = describe(&mut client, &Target { options: Some(options), ..target }, &["attention"]).await.unwrap();
    assert_eq!((said.found[0].units.len(), &named(&said, "attention").map[..]), (3, &[24, 24][..]));
    assert_eq!(named(&said, "relu").data_format(), DataFormat::ChannelsLast, "what the graph tells is not asked for");
}

/// Tokens of the picture's pixels after so many others: the first the largest of the pixels in each dimension, the others far from them all.
fn tokens(prefix: usize) -> Net {
    let mut nodes = vec![
        node("Reshape", &["pixels", "flat"], "rows", vec![]),
        node("Transpose", &["rows"], "patches", vec![ints("perm", &[0, 2, 1])]),
        node("ReduceMax", &["patches"], "class", vec![ints("axes", &[1]), int("keepdims", 1)]),
        node("Mul", &["class", "hundred"], "register", vec![]),
    ];
    let before = ["class"].into_iter().chain(["register"; 8]).take(prefix);
    nodes.push(node("Concat", &before.chain(["patches"]).collect::<Vec<_>>(), "tokens", vec![int("axis", 1)]));
    network(nodes, vec![int_tensor("flat", &[0, 3, -1]), floats("hundred", &[1], vec![100.0])], "tokens")
}

#[tokio::test]
async fn patches_are_told_from_the_tokens_before_them() {
    let (mut client, _server) = service();
    for prefix in [0, 1, 2, 5] {
        let folder = tempfile::tempdir().unwrap();
        let target = tokens(prefix).write(folder.path());
        let (set, values) = pictures_of(folder.path(), 8, SIZE);
        let described = describe(&mut client, &target, &[]).await.unwrap();
        let layer = named(&described, "tokens");
        assert_eq!((layer.kind(), layer.prefix_tokens as usize, &layer.map[..]), (LayerKind::Tokens, prefix, &[4, 6][..]));
        let patches = probe(&mut client, &target, &set, "tokens", TokenSummary::PatchMean).await.unwrap();
        assert_activations(&patches, &values, mean);
        assert_maps(&patches, &values);
        let class = probe(&mut client, &target, &set, "tokens", TokenSummary::Class).await;
        if prefix == 0 {
            let status = class.unwrap_err();
            assert!(status.message().contains("without a class token") && status.message().contains("patch_mean"), "{}", status.message());
        } else {
            let class = class.unwrap();
            assert_activations(&class, &values, max);
            assert!(class[0].top[0].map.is_none());
        }
    }
}

#[tokio::test]
async fn how_many_tokens_come_first_may_be_said() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = tokens(3).write(folder.path());
    let said = |prefix| Target { options: Some(TargetOptions { prefix_tokens: Some(prefix), ..Default::default() }), ..target.clone() };
    assert_eq!(named(&describe(&mut client, &said(3), &[]).await.unwrap(), "tokens").map, [4, 6]);
    let (set, _) = pictures_of(folder.path(), 3, SIZE);
    assert!(named(&describe(&mut client, &said(2), &[]).await.unwrap(), "tokens").map.is_empty(), "25 patches are no grid of 2 to 3");
    let status = probe(&mut client, &said(2), &set, "tokens", TokenSummary::PatchMean).await.unwrap_err();
    assert!(status.message().contains("27 tokens") && status.message().contains("prefix_tokens"), "{}", status.message());
}

#[tokio::test]
async fn a_class_token_that_was_taken_out_is_read_as_one_and_has_no_patches() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = tokens(1).write(folder.path());
    let (set, values) = pictures_of(folder.path(), 6, SIZE);
    assert_activations(&probe(&mut client, &target, &set, "class", TokenSummary::Class).await.unwrap(), &values, max);
    let status = probe(&mut client, &target, &set, "class", TokenSummary::PatchMean).await.unwrap_err();
    assert!(status.message().contains("token_summary class"), "{}", status.message());
}

#[tokio::test]
async fn values_whose_units_are_elsewhere_are_refused_with_the_nearest_layer() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let mut network = tokens(1);
    network.nodes.extend([
        node("Transpose", &["tokens"], "second", vec![ints("perm", &[1, 0, 2])]),
        node("Mul", &["second", "hundred"], "louder", vec![]),
        node("Transpose", &["louder"], "first", vec![ints("perm", &[1, 0, 2])]),
    ]);
    network.output = "first".to_owned();
    let target = network.write(folder.path());
    for (asked, why, near) in [("louder", "25 x 2 x 3, the batch as its second axis", "first"), ("rows", "2 x 3 x 24, units before places", "patches")] {
        let status = describe(&mut client, &target, &[asked]).await.unwrap_err();
        assert!(status.message().contains(why) && status.message().ends_with(&format!("the nearest layer is {near}")), "{}", status.message());
    }
}

#[tokio::test]
async fn units_of_a_fully_connected_layer_are_its_values() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![
        node("GlobalAveragePool", &["pixels"], "pooled", vec![]),
        node("Flatten", &["pooled"], "flat", vec![]),
        node("Gemm", &["flat", "matrix"], "logits", vec![]),
    ];
    let target = network(nodes, vec![identity("matrix", &[3, 3])], "logits").write(folder.path());
    let (set, values) = pictures_of(folder.path(), 6, SIZE);
    assert_eq!(named(&describe(&mut client, &target, &[]).await.unwrap(), "logits").kind(), LayerKind::Units);
    let units = probe(&mut client, &target, &set, "logits", TokenSummary::Unspecified).await.unwrap();
    assert_activations(&units, &values, mean);
    assert!(units[0].top[0].map.is_none());
}

#[tokio::test]
async fn activations_of_a_map_with_channels_last_do_not_depend_on_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let size = (56, 40);
    let input = value("pixels", &[None, Some(56), Some(40), Some(3)]);
    let nodes = vec![node("Sin", &["pixels"], "sine", vec![])];
    let target = Net { nodes, ..Net::new(input, size, "sine") }.write(folder.path());
    let (set, _) = pictures_of(folder.path(), 9, size);
    let mut found = Vec::new();
    for batch in [1, 4] {
        let (mut client, _server) = service_of(batch, 1);
        found.push(probe(&mut client, &target, &set, "sine", TokenSummary::Unspecified).await.unwrap());
    }
    assert_eq!(found[0], found[1]);
}
