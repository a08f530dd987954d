//! Small networks as timm and transformers make them and PyTorch exports them, against what their modules give in PyTorch. `tests/parity/targets.py --small`
//! made the folder `exported`.

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Expected {
    network: String,
    /// The layer, as a person asks for it.
    asked: String,
    /// Rows and columns; empty without space.
    map: Vec<u32>,
    half: bool,
    /// By the way of reading, g of the first units on each picture.
    g: HashMap<String, Vec<Vec<f32>>>,
}

#[tokio::test]
async fn layers_of_exported_networks_have_their_modules_names_and_activations() {
    let (mut client, _server) = service();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/networks/exported");
    let all: Vec<Expected> = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let set = ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(format!("file:{}", folder.join("pictures").display()))) }] };
    assert!(all.len() > 10);
    for Expected { network, asked, map, half, g } in all {
        let what = format!("{network} {asked}");
        // How pictures are prepared stands beside the network.
        let target = Target { uri: format!("file:{}", folder.join(&network).join("network.onnx").display()), ..Default::default() };
        let layers = vec![LayerUnits { layer: asked.clone(), units: vec![] }];
        let request = DescribeTargetRequest { target: Some(target.clone()), asked: layers };
        let described = client.describe_target(request).await.unwrap_or_else(|e| panic!("{what}: {e}")).into_inner();
        let found = &described.found[0].layer;
        assert!(found.ends_with(&asked), "{what}: {found}");
        for (way, expected) in g {
            let (summary, token_summary) = summary_of(&way);
            let units = probe_by(&mut client, &target, &set, &asked, summary, token_summary).await.unwrap_or_else(|e| panic!("{what} {way}: {e}"));
            let most = expected.iter().flatten().fold(0.0_f32, |most, g| most.max(g.abs()));
            for (unit, probed) in units.iter().enumerate().take(expected[0].len()) {
                assert_eq!(probed.top.len(), expected.len());
                for top in &probed.top {
                    let expected = expected[top.index as usize][unit];
                    let within = most * if half { 1e-2 } else { 1e-4 };
                    assert!((top.activation - expected).abs() <= within, "{what} {way}: unit {unit} on {}: {} and {expected}", top.path, top.activation);
                    let of = top.map.as_ref().map(|map| vec![map.height, map.width]).unwrap_or_default();
                    assert_eq!(of, if way == "class mean" { vec![] } else { map.clone() }, "{what} {way}");
                }
            }
        }
    }
}

fn summary_of(way: &str) -> (Summary, TokenSummary) {
    let summary = if way.ends_with("max") { Summary::Max } else { Summary::Mean };
    (summary, if way.starts_with("patch_mean") { TokenSummary::PatchMean } else { TokenSummary::Class })
}
