//! How pictures are prepared: as the request says, else as a file beside the network does.

use dnd_proto::v1::DescribeTargetResponse;
use tonic::Status;

use super::*;

async fn described(
    client: &mut ActivationServiceClient<Channel>,
    folder: &Path,
    preprocessing: Option<Preprocessing>,
) -> Result<DescribeTargetResponse, Status> {
    let target = write(folder, 17, None, vec![node("Relu", &["pixels"], "map", vec![])], vec![], "map");
    let target = Target { preprocessing, ..target };
    Ok(client.describe_target(DescribeTargetRequest { target: Some(target), asked: vec![] }).await?.into_inner())
}

const TIMM: &str = r#"{"architecture": "x", "pretrained_cfg": {"input_size": [3, 4, 4], "crop_pct": 0.5, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}}"#;
const TRANSFORMERS: &str = r#"{"size": {"height": 4, "width": 4}, "resample": 2, "image_mean": [0.25, 0.5, 0.75], "image_std": [0.5, 0.5, 0.5]}"#;

#[tokio::test]
async fn a_file_beside_the_network_says_how_pictures_are_prepared_unless_the_request_does() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    let usual = described(&mut client, folder.path(), None).await.unwrap();
    assert_eq!((usual.preprocessing_source.as_str(), usual.preprocessing.unwrap().shortest_edge), ("what is usual for ImageNet networks", 5));

    fs::write(folder.path().join("config.json"), TIMM).unwrap();
    let timm = described(&mut client, folder.path(), None).await.unwrap();
    assert_eq!(timm.preprocessing_source, "config.json beside the network");
    let preprocessing = timm.preprocessing.unwrap();
    assert_eq!((preprocessing.shortest_edge, &preprocessing.std[..]), (8, &[0.25, 0.5, 0.5][..]));

    fs::write(folder.path().join("preprocessor_config.json"), TRANSFORMERS).unwrap();
    let transformers = described(&mut client, folder.path(), None).await.unwrap();
    assert_eq!(transformers.preprocessing_source, "preprocessor_config.json beside the network");
    assert_eq!(transformers.preprocessing.unwrap().mean, [0.25, 0.5, 0.75]);

    // And pictures are prepared so.
    let target = write(folder.path(), 17, None, vec![node("Identity", &["pixels"], "map", vec![])], vec![], "map");
    let (set, values) = probing_set(folder.path(), 4);
    let units = probe(&mut client, &Target { preprocessing: None, ..target }, &set, "map", TokenSummary::Unspecified).await.unwrap();
    let first = &units[2].top[0];
    assert!((first.activation - (mean(&values[&first.path][2]) - 0.75) / 0.5).abs() < 1e-5);

    let said = Preprocessing { height: SIDE, width: SIDE, mean: vec![0.0; 3], std: vec![1.0; 3], ..Default::default() };
    let said = described(&mut client, folder.path(), Some(said)).await.unwrap();
    assert_eq!((said.preprocessing_source.as_str(), said.preprocessing.unwrap().mean), ("the request", vec![0.0; 3]));
}

#[tokio::test]
async fn a_file_beside_the_network_that_can_not_be_its_own_is_refused() {
    let (mut client, _server) = service();
    for (text, said) in [
        (TIMM.replace("[3, 4, 4]", "[3, 8, 8]"), "8 x 8 (config.json beside the network), but the network takes pictures of 4 x 4"),
        (TIMM.replace("bilinear", "hamming"), "hamming"),
        ("{".to_owned(), "config.json"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), text).unwrap();
        let status = described(&mut client, folder.path(), None).await.unwrap_err();
        assert!(status.message().contains(said), "{}", status.message());
    }
}

#[tokio::test]
async fn a_mean_that_can_hardly_be_right_is_warned_of() {
    let (mut client, _server) = service();
    let folder = tempfile::tempdir().unwrap();
    assert!(described(&mut client, folder.path(), None).await.unwrap().warnings.is_empty());
    fs::write(folder.path().join("preprocessor_config.json"), TRANSFORMERS.replace("[0.25, 0.5, 0.75]", "[123.7, 116.3, 103.5]")).unwrap();
    let warnings = described(&mut client, folder.path(), None).await.unwrap().warnings;
    assert!(warnings.len() == 1 && warnings[0].contains("mean") && warnings[0].contains("123.7"), "{warnings:?}");
}
