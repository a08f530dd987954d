//! What exports differ in: versions, number types, quantisation, inputs, subgraphs, external data.

use dnd_mesh::fault;
use dnd_onnx::{
    graph::{Given, Network, Wanted},
    runtime::session_of,
};
use dnd_proto::v1::{FixedInput, TargetOptions};
use dnd_testing::sketch;
use ort::value::Tensor;

use super::*;

const SQUARE: [Option<i64>; 4] = [None, Some(3), Some(4), Some(4)];

fn network(nodes: Vec<NodeProto>, weights: Vec<TensorProto>, output: &str) -> Net {
    Net { nodes, weights, ..Net::new(value("pixels", &SQUARE), (SIDE, SIDE), output) }
}

fn typed(element: DataType, of: ValueInfoProto) -> ValueInfoProto {
    let mut of = of;
    if let Some(type_proto::Value::TensorType(tensor)) = of.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        tensor.elem_type = Some(element as i32);
    }
    of
}

async fn refusal(client: &mut ActivationServiceClient<Channel>, target: &Target, asked: &str) -> String {
    let asked = vec![LayerUnits { layer: asked.to_owned(), units: vec![] }];
    client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked }).await.unwrap_err().message().to_owned()
}

#[tokio::test]
async fn a_network_of_the_model_zoo_with_its_weights_as_inputs_and_one_picture_a_run_is_cut_anywhere() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![
        node("Conv", &["pixels", "kernel", "bias"], "conv", vec![]),
        node("Relu", &["conv"], "relu", vec![]),
        node("GlobalAveragePool", &["relu"], "pool", vec![]),
        node("Reshape", &["pool", "one_row"], "row", vec![]),
        node("Gemm", &["row", "matrix", "bias"], "logits", vec![]),
    ];
    let weights = vec![identity("kernel", &[3, 3, 1, 1]), floats("bias", &[3], vec![0.0; 3]), identity("matrix", &[3, 3]), int_tensor("one_row", &[1, 3])];
    let mut inputs = vec![value("pixels", &[Some(1), Some(3), Some(4), Some(4)])];
    inputs.extend(weights.iter().map(|weight| {
        let element = DataType::try_from(weight.data_type()).unwrap();
        typed(element, value(weight.name(), &weight.dims.iter().copied().map(Some).collect::<Vec<_>>()))
    }));
    let target = Net { opset: 7, ir_version: 3, inputs, ..network(nodes, weights, "logits") }.write(folder.path());
    let (set, values) = probing_set(folder.path(), 7);
    for layer in ["conv", "relu", "pool", "row", "logits"] {
        assert_activations(&probe(&mut client, &target, &set, layer, TokenSummary::Unspecified).await.unwrap(), &values, mean);
    }
}

#[tokio::test]
async fn a_network_of_half_floats_takes_pictures_and_gives_activations() {
    let (mut client, _server) = service();
    for (element, within) in [(DataType::Float16, 1e-3), (DataType::Double, 1e-6)] {
        let folder = tempfile::tempdir().unwrap();
        let nodes = vec![node("Add", &["pixels", "pixels"], "twice", vec![]), node("Relu", &["twice"], "relu", vec![])];
        let inputs = vec![typed(element, value("pixels", &SQUARE))];
        let target = Net { inputs, ..network(nodes, vec![], "relu") }.write(folder.path());
        let (set, values) = probing_set(folder.path(), 7);
        let units = probe(&mut client, &target, &set, "twice", TokenSummary::Unspecified).await.unwrap();
        for (channel, unit) in units.iter().enumerate() {
            for top in &unit.top {
                let pixels = &values[&top.path][channel];
                assert!((top.activation - 2.0 * mean(pixels)).abs() < within, "{element:?}");
                let map = &top.map.as_ref().unwrap().values;
                assert!(map.iter().zip(pixels).all(|(value, pixel)| (value - 2.0 * pixel).abs() < 2.0 * within), "{element:?}");
            }
        }
    }
}

#[tokio::test]
async fn values_of_a_quantised_network_are_read_by_their_scale() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let bytes = |name: &str, values: &[i32], dims: &[i64]| TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(DataType::Uint8 as i32),
        dims: dims.to_vec(),
        int32_data: values.to_vec(),
        ..Default::default()
    };
    let nodes = vec![
        node("QuantizeLinear", &["pixels", "scale", "zero"], "quantized", vec![]),
        node("QLinearConv", &["quantized", "scale", "zero", "kernel", "one", "zero", "half_scale", "offset"], "qconv", vec![]),
        node("MaxPool", &["qconv"], "qpool", vec![ints("kernel_shape", &[1, 1])]),
        node("DequantizeLinear", &["qpool", "half_scale", "offset"], "floats", vec![]),
        node("ConvInteger", &["quantized", "kernel", "zero"], "integers", vec![]),
        node("Cast", &["integers"], "cast", vec![int("to", DataType::Float as i64)]),
        node("Add", &["floats", "cast"], "sum", vec![]),
    ];
    let weights = vec![
        floats("scale", &[], vec![1.0 / 255.0]),
        floats("one", &[], vec![1.0]),
        // A bright pixel does not fit in: it is cut off at (255 - 5) / 510.
        floats("half_scale", &[], vec![1.0 / 510.0]),
        bytes("zero", &[0], &[]),
        bytes("offset", &[5], &[]),
        bytes("kernel", &[1, 0, 0, 0, 1, 0, 0, 0, 1], &[3, 3, 1, 1]),
    ];
    let target = network(nodes, weights, "sum").write(folder.path());
    let (set, values) = probing_set(folder.path(), 6);
    assert_activations(&probe(&mut client, &target, &set, "quantized", TokenSummary::Unspecified).await.unwrap(), &values, mean);
    let cut_off = |values: &[f32]| mean(&values.iter().map(|value| value.min(250.0 / 510.0)).collect::<Vec<_>>());
    for layer in ["qconv", "qpool", "floats"] {
        assert_activations(&probe(&mut client, &target, &set, layer, TokenSummary::Unspecified).await.unwrap(), &values, cut_off);
    }
    let refused = refusal(&mut client, &target, "integers").await;
    assert!(refused.contains("i32, not floats") && refused.ends_with("the nearest layer is cast"), "{refused}");
}

#[tokio::test]
async fn inputs_beside_the_picture_have_fixed_values() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![
        node("Mul", &["pixels", "scale"], "scaled", vec![]),
        node("Cast", &["training"], "flag", vec![int("to", DataType::Float as i64)]),
        node("Add", &["scaled", "flag"], "sum", vec![]),
    ];
    let inputs = vec![value("scale", &[None, Some(3), Some(1), Some(1)]), value("pixels", &SQUARE), typed(DataType::Bool, value("training", &[]))];
    let target = Net { inputs, ..network(nodes, vec![], "sum") }.write(folder.path());
    let refused = refusal(&mut client, &target, "sum").await;
    for said in ["3 inputs", "scale (float, ? x 3 x 1 x 1)", "pixels (float, ? x 3 x 4 x 4)", "training (bool, one number)", "fixed_inputs"] {
        assert!(refused.contains(said), "{refused}");
    }
    let fixed = |name: &str, values: &[f64]| FixedInput { name: name.to_owned(), values: values.to_vec(), shape: vec![] };
    let with = |fixed_inputs: Vec<FixedInput>| Target { options: Some(TargetOptions { fixed_inputs, ..Default::default() }), ..target.clone() };
    let given = with(vec![fixed("scale", &[2.0, 3.0, 4.0]), fixed("training", &[1.0])]);
    let (set, values) = probing_set(folder.path(), 5);
    let units = probe(&mut client, &given, &set, "sum", TokenSummary::Unspecified).await.unwrap();
    for (channel, unit) in units.iter().enumerate() {
        for top in &unit.top {
            let expected = (2.0 + channel as f32) * mean(&values[&top.path][channel]) + 1.0;
            assert!((top.activation - expected).abs() < 1e-5, "{} and {expected}", top.activation);
        }
    }
    let other = with(vec![fixed("scale", &[2.0]), fixed("training", &[0.0])]);
    let units = probe(&mut client, &other, &set, "scaled", TokenSummary::Unspecified).await.unwrap();
    assert_activations(&units, &values, |pixels| 2.0 * mean(pixels));
    for (wrong, said) in [
        (vec![fixed("scale", &[1.0, 2.0]), fixed("training", &[0.0])], "2 values for the shape [1, 3, 1, 1]"),
        (vec![fixed("scael", &[1.0])], "no input \"scael\""),
    ] {
        let refused = refusal(&mut client, &with(wrong), "sum").await;
        assert!(refused.contains(said), "{refused}");
    }
}

fn graph(attribute: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto { name: Some(attribute.to_owned()), r#type: Some(AttributeType::Graph as i32), g: Some(graph), ..Default::default() }
}

fn named(names: &[&str]) -> Vec<ValueInfoProto> {
    names.iter().map(|name| ValueInfoProto { name: Some((*name).to_owned()), ..Default::default() }).collect()
}

/// Adds `base`, a value from outside, to the picture three times, in an If in a Loop.
fn looped(base: Vec<NodeProto>) -> (Vec<NodeProto>, Vec<TensorProto>) {
    let branch = |of: NodeProto| GraphProto { name: Some("branch".to_owned()), output: named(&[&of.output[0]]), node: vec![of], ..Default::default() };
    let condition = vec![
        graph("then_branch", branch(node("Add", &["sum", "base"], "more", vec![]))),
        graph("else_branch", branch(node("Identity", &["sum"], "same", vec![]))),
    ];
    let body = GraphProto {
        name: Some("body".to_owned()),
        node: vec![node("Identity", &["on"], "on_out", vec![]), node("If", &["on"], "sum_out", condition)],
        input: vec![typed(DataType::Int64, value("i", &[])), typed(DataType::Bool, value("on", &[])), value("sum", &SQUARE)],
        output: vec![typed(DataType::Bool, value("on_out", &[])), value("sum_out", &SQUARE)],
        ..Default::default()
    };
    let mut nodes = base;
    nodes.push(node("Loop", &["three", "yes", "pixels"], "looped", vec![graph("body", body)]));
    nodes.push(node("Neg", &["looped"], "unneeded", vec![]));
    let yes = TensorProto { name: Some("yes".to_owned()), data_type: Some(DataType::Bool as i32), int32_data: vec![1], ..Default::default() };
    (nodes, vec![TensorProto { dims: vec![], ..int_tensor("three", &[3]) }, yes])
}

#[tokio::test]
async fn what_a_loop_and_a_condition_in_it_take_from_outside_is_kept() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let (nodes, weights) = looped(vec![node("Relu", &["pixels"], "base", vec![])]);
    let target = network(nodes, weights, "unneeded").write(folder.path());
    let (set, values) = probing_set(folder.path(), 5);
    let options = TargetOptions { data_format: dnd_proto::v1::DataFormat::ChannelsFirst.into(), ..Default::default() };
    let target = Target { options: Some(options), ..target };
    let units = probe(&mut client, &target, &set, "looped", TokenSummary::Unspecified).await.unwrap();
    assert_activations(&units, &values, |pixels| 4.0 * mean(pixels));
    let refused = refusal(&mut client, &target, "more").await;
    assert!(refused.contains("more is inside of a subgraph of the Loop \"looped\""), "{refused}");
}

fn external(name: &str, dims: &[i64], place: &[(&str, &str)]) -> TensorProto {
    let entry = |(key, value): &(&str, &str)| StringStringEntryProto { key: Some((*key).to_owned()), value: Some((*value).to_owned()) };
    TensorProto { external_data: place.iter().map(entry).collect(), data_location: Some(DataLocation::External as i32), ..floats(name, dims, vec![]) }
}

#[tokio::test]
async fn external_data_of_constants_and_of_subgraphs_is_read_and_what_is_missing_of_it_is_named() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = [5.0_f32, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let place = [("location", "net.onnx_data"), ("offset", "4"), ("length", "4")];
    let held = |tensor| AttributeProto { name: Some("value".to_owned()), r#type: Some(AttributeType::Tensor as i32), t: Some(tensor), ..Default::default() };
    let branch = |factor: &str| GraphProto {
        name: Some(factor.to_owned()),
        node: vec![node("Mul", &["pixels", factor], &format!("{factor}_times"), vec![])],
        initializer: vec![external(factor, &[1], &place)],
        output: named(&[&format!("{factor}_times")]),
        ..Default::default()
    };
    let nodes = vec![
        node("Constant", &[], "two", vec![held(external("two", &[1], &place))]),
        node("Mul", &["pixels", "two"], "doubled", vec![]),
        node("If", &["yes"], "chosen", vec![graph("then_branch", branch("then")), graph("else_branch", branch("else"))]),
        node("Add", &["doubled", "chosen"], "both", vec![]),
    ];
    let yes = TensorProto { name: Some("yes".to_owned()), data_type: Some(DataType::Bool as i32), int32_data: vec![1], ..Default::default() };
    let target = network(nodes, vec![yes], "both").write(folder.path());
    let data = folder.path().join("net.onnx_data");
    let refused = refusal(&mut client, &target, "both").await;
    assert!(refused.contains("net.onnx_data: no such file"), "{refused}");
    fs::write(&data, &bytes[..6]).unwrap();
    let refused = refusal(&mut client, &target, "both").await;
    assert!(refused.contains("6 bytes, and the network reads 8"), "{refused}");
    fs::write(&data, &bytes).unwrap();
    let (set, values) = probing_set(folder.path(), 5);
    let units = probe(&mut client, &target, &set, "both", TokenSummary::Unspecified).await.unwrap();
    assert_activations(&units, &values, |pixels| 4.0 * mean(pixels));
}

#[test]
fn a_file_that_is_too_large_for_the_format_says_how_to_save_the_network() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net.onnx");
    fs::File::create(&path).unwrap().set_len(1 << 31).unwrap();
    let network = Network::read(&path).unwrap_err().to_string();
    assert!(network.contains("2 GiB") && network.contains("external data"), "{network}");
}

#[tokio::test]
async fn a_network_that_was_traced_with_one_picture_runs_one_at_a_time() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let nodes = vec![node("Reshape", &["pixels", "one"], "flat", vec![]), node("Relu", &["flat"], "units", vec![])];
    let target = network(nodes, vec![int_tensor("one", &[1, 48])], "units").write(folder.path());
    let (set, values) = probing_set(folder.path(), 9);
    let units = probe(&mut client, &target, &set, "units", TokenSummary::Unspecified).await.unwrap();
    assert_eq!(units.len(), 48);
    for top in &units[20].top {
        assert_eq!(top.activation, values[&top.path][1][4]);
    }
}

#[tokio::test]
async fn activations_of_a_network_that_is_cut_are_bit_equal_to_those_of_the_whole() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let path = sketch("targets/resnet/resnet.onnx");
    let network = Network::read(&path).unwrap();
    let input = network.input(&Given::default()).unwrap();
    let (height, width) = input.size.unwrap();
    let (set, values) = pictures_of(folder.path(), 3, (height, width));
    let preprocessing = Preprocessing { height, width, mean: vec![0.0; 3], std: vec![1.0; 3], ..Default::default() };
    let target = Target { uri: format!("file:{}", path.display()), preprocessing: Some(preprocessing), ..Default::default() };
    for layer in ["bn1", "layer2.0", "layer4"] {
        let value = network.layer(layer).unwrap().value;
        // The file as it is, with one more output.
        let mut whole = ModelProto::decode(&*fs::read(&path).unwrap()).unwrap();
        whole.graph.as_mut().unwrap().output.push(ValueInfoProto { name: Some(value.clone()), ..Default::default() });
        let cut = network.cut(&input, &[Wanted::as_is(&value)]).unwrap();
        assert!(layer == "layer4" || cut.len() < whole.encoded_len() / 2, "what the layer does not need is left out");
        let mut sessions = [whole.encode_to_vec(), cut].map(|model| session_of(&model, folder.path(), &EngineArgs::sized(1, 1)).unwrap());
        let units = probe(&mut client, &target, &set, layer, TokenSummary::Unspecified).await.unwrap();
        for (path, channels) in &values {
            let of = |session: &mut ort::session::Session| {
                let pixels = Tensor::from_array(([1, 3, height as usize, width as usize], channels.concat())).unwrap();
                let outputs = session.run(vec![(input.fed(), pixels)]).unwrap();
                outputs[value.as_str()].try_extract_tensor::<f32>().unwrap().1.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            };
            let [whole, cut] = sessions.each_mut().map(of);
            assert_eq!(whole, cut, "{layer}");
            let each = whole.len() / units.len();
            for (unit, whole) in units.iter().zip(whole.chunks(each)) {
                let map = unit.top.iter().find(|top| top.path == *path).unwrap().map.as_ref().unwrap();
                assert_eq!(map.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), whole, "{layer} unit {}", unit.unit);
            }
        }
    }
}

#[tokio::test]
async fn a_target_without_a_picture_among_its_inputs_is_refused_by_its_input() {
    let (mut client, _server) = service();
    for (input, said) in [
        (value("tokens", &[None, Some(77)]), "tokens (float, ? x 77)"),
        (value("pixels", &[None, Some(1), Some(28), Some(28)]), "pixels (float, ? x 1 x 28 x 28)"),
        (typed(DataType::Uint8, value("pixels", &SQUARE)), "pixels (uint8, ? x 3 x 4 x 4)"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let name = input.name().to_owned();
        let target = Net { inputs: vec![input], ..network(vec![node("Identity", &[&name], "same", vec![])], vec![], "same") }.write(folder.path());
        let status = client.describe_target(DescribeTargetRequest { target: Some(target), asked: vec![] }).await.unwrap_err();
        assert_eq!(fault::reason_of(&status).as_deref(), Some("UNUSABLE_NETWORK"));
        assert!(status.message().contains(said), "{}", status.message());
    }
}
