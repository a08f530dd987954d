//! What a pass finds in layers of a fixed batch, tokens, values that are not finite, and weights in a file of their own.

use super::*;

#[tokio::test]
async fn a_fixed_batch_and_an_older_operator_set_change_nothing() {
    let (mut client, _server) = service();
    for (opset, batch) in [(7, None), (13, None), (18, None), (23, None), (13, Some(4)), (18, Some(1))] {
        let folder = tempfile::tempdir().unwrap();
        let target = write(folder.path(), opset, batch, vec![node("Relu", &["pixels"], "map", vec![])], vec![], "map");
        let (set, values) = probing_set(folder.path(), 10);
        let units = probe(&mut client, &target, &set, "map", TokenSummary::Unspecified).await.unwrap();
        assert_activations(&units, &values, mean);
        assert_eq!(units[0].top[0].map.as_ref().unwrap().values.len(), 16);
    }
}

/// Tokens of a grid of patches, a pixel each; before them, if asked for, a class token that is the largest of them in each dimension.
fn transformer(folder: &Path, with_class: bool) -> Target {
    let mut nodes = vec![
        node("Reshape", &["pixels", "flat"], "rows", vec![]),
        node("Transpose", &["rows"], "patches", vec![ints("perm", &[0, 2, 1])]),
        node("ReduceMax", &["patches"], "class", vec![ints("axes", &[1]), int("keepdims", 1)]),
        node("Concat", &["class", "patches"], "tokens", vec![int("axis", 1)]),
    ];
    nodes.truncate(if with_class { 4 } else { 2 });
    let output = if with_class { "tokens" } else { "patches" };
    write(folder, 13, None, nodes, vec![int_tensor("flat", &[0, 3, -1])], output)
}

#[tokio::test]
async fn a_transformers_units_are_read_at_the_class_token_or_over_the_patches() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = transformer(folder.path(), true);
    let (set, values) = probing_set(folder.path(), 12);
    let described = client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked: vec![] }).await.unwrap().into_inner();
    let tokens = described.layers.iter().find(|layer| layer.name == "tokens").unwrap();
    assert_eq!((tokens.kind(), tokens.units), (LayerKind::Tokens, 3));

    let class = probe(&mut client, &target, &set, "tokens", TokenSummary::Class).await.unwrap();
    assert_activations(&class, &values, max);
    assert!(class[0].top[0].map.is_none(), "a class token has no place in the picture");

    let patches = probe(&mut client, &target, &set, "tokens", TokenSummary::PatchMean).await.unwrap();
    assert_activations(&patches, &values, mean);
    for top in &patches[1].top {
        let map = top.map.as_ref().unwrap();
        assert_eq!((map.height, map.width), (SIDE, SIDE));
        assert_eq!(map.values, values[&top.path][1], "the patches in their places, without the class token");
    }
}

#[tokio::test]
async fn a_grid_without_a_class_token_has_no_class_to_read() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = transformer(folder.path(), false);
    let (set, values) = probing_set(folder.path(), 5);
    let status = probe(&mut client, &target, &set, "patches", TokenSummary::Class).await.unwrap_err();
    assert!(status.message().contains("without a class token") && status.message().contains("patch_mean"), "{}", status.message());
    assert_activations(&probe(&mut client, &target, &set, "patches", TokenSummary::PatchMean).await.unwrap(), &values, mean);
}

#[tokio::test]
async fn activations_that_are_not_finite_are_counted_and_never_among_the_top() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let target = write(folder.path(), 13, None, vec![node("Log", &["pixels"], "log", vec![])], vec![], "log");
    // Picture 0 is black but for a pixel, and its blue all but black: the logarithms' means are infinite in red and green.
    let (set, values) = probing_set(folder.path(), 8);
    let units = probe(&mut client, &target, &set, "log", TokenSummary::Unspecified).await.unwrap();
    assert_eq!(units.iter().map(|unit| unit.not_finite).collect::<Vec<_>>(), [1, 1, 1]);
    for (channel, unit) in units.iter().enumerate() {
        assert_eq!(unit.top.len(), 7);
        assert!(unit.top.iter().all(|top| top.path != "00.png" && top.activation.is_finite()));
        assert!(unit.lowest.is_finite() && unit.highest.is_finite() && !unit.dead);
        let first = &unit.top[0];
        let logs: Vec<f32> = values[&first.path][channel].iter().map(|value| value.ln()).collect();
        assert!((first.activation - mean(&logs)).abs() < 1e-4);
    }
}

/// A network whose units are the channels times weights that lie in a file of their own.
fn with_external_weights(folder: &Path, weights: [f32; 3], location: &str) -> Target {
    fs::write(folder.join("weights.bin"), weights.iter().flat_map(|weight| weight.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let entry = StringStringEntryProto { key: Some("location".to_owned()), value: Some(location.to_owned()) };
    let tensor = TensorProto {
        float_data: vec![],
        external_data: vec![entry],
        data_location: Some(DataLocation::External as i32),
        ..floats("weights", &[1, 3, 1, 1], weights.to_vec())
    };
    write(folder, 13, None, vec![node("Mul", &["pixels", "weights"], "weighted", vec![])], vec![tensor], "weighted")
}

#[tokio::test]
async fn weights_in_a_file_of_their_own_are_a_part_of_the_network() {
    let (mut client, _server) = service();
    let folder: TempDir = tempfile::tempdir().unwrap();
    let (set, values) = probing_set(folder.path(), 6);
    let mut before: Option<Target> = None;
    for weights in [[1.0, 2.0, 3.0], [5.0, 0.5, 0.25]] {
        let target = with_external_weights(folder.path(), weights, "weights.bin");
        let described = client.describe_target(DescribeTargetRequest { target: Some(target.clone()), asked: vec![] }).await.unwrap().into_inner();
        let target = Target { digest: described.digest, ..target };
        if let Some(before) = before.replace(target.clone()) {
            let status = probe(&mut client, &before, &set, "weighted", TokenSummary::Unspecified).await.unwrap_err();
            assert!(status.message().contains("has the digest"), "other weights are another network: {}", status.message());
        }
        let units = probe(&mut client, &target, &set, "weighted", TokenSummary::Unspecified).await.unwrap();
        for (channel, unit) in units.iter().enumerate() {
            let expected = mean(&values[&unit.top[0].path][channel]) * weights[channel];
            assert!((unit.top[0].activation - expected).abs() < 1e-4, "weights that changed are read again: {} and {expected}", unit.top[0].activation);
        }
    }
    // As in the caches of model hubs, where the files of a network are links.
    let elsewhere = tempfile::tempdir().unwrap();
    fs::rename(folder.path().join("weights.bin"), elsewhere.path().join("blob")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("blob"), folder.path().join("weights.bin")).unwrap();
    let target = before.unwrap();
    probe(&mut client, &target, &set, "weighted", TokenSummary::Unspecified).await.unwrap();
    let (mut strict, _server) = service_with(EngineArgs::one_session(), ActivationArgs { roots: vec![folder.path().to_owned()], ..Default::default() });
    let status = probe(&mut strict, &target, &set, "weighted", TokenSummary::Unspecified).await.unwrap_err();
    assert!(status.message().contains("weights.bin") && status.message().contains("reads for others"), "{}", status.message());
    fs::remove_file(folder.path().join("weights.bin")).unwrap();

    let outside = with_external_weights(folder.path(), [1.0; 3], "../weights.bin");
    let status = probe(&mut client, &outside, &set, "weighted", TokenSummary::Unspecified).await.unwrap_err();
    assert!(status.message().contains("../weights.bin"), "{}", status.message());
}
