//! The activation service over gRPC, on the sketch suite's networks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use dnd_activation::{Activation, ActivationArgs, add_to};
use dnd_mesh::{
    Slot,
    blobs::{self, Blobs},
    fault,
    server::{InProcess, Services},
};
use dnd_onnx::{
    folder::read_json,
    pictures::{PictureLimits, PreprocessorConfig, decode},
    runtime::EngineArgs,
};
use dnd_proto::v1::{
    self as proto, ActivatePicture, ActivateRequest, ActivateSetup, CropRequest, DescribeTargetRequest, LayerUnits, ListShardsRequest, ListedPicture,
    PictureList, ProbeRequest, ProbeTotal, ProbedUnit, ProbingSet, ProbingShard, ProbingSource, ReadPicturesRequest, SkippedPicture, Summary, Target,
    activate_request, activate_response, activation_service_client::ActivationServiceClient, crop_response, probe_response::Event, probing_source::Source,
    read_pictures_response,
};
use dnd_testing::{pictures, sketch, write_pictures};
use futures::{StreamExt as _, stream};
use prost::Message as _;
use tonic::{Code, Status, transport::Channel};

struct Service {
    client: ActivationServiceClient<Channel>,
    blobs: Arc<Blobs>,
    _server: InProcess,
}

fn start(batch: usize, sessions: usize, map_memory: usize) -> Service {
    let blobs = Arc::new(Blobs::temporary().unwrap());
    let engine = EngineArgs::sized(batch, sessions);
    let limits = ActivationArgs { map_memory, program: Some(env!("CARGO_BIN_EXE_dnd-activation").into()), ..ActivationArgs::default() };
    let activation = Activation::new(engine, limits, Arc::clone(&blobs));
    let server = InProcess::start(blobs::add_to(add_to(Services::default(), Slot::filled(activation)), Arc::clone(&blobs)));
    Service { client: ActivationServiceClient::new(server.channel()), blobs, _server: server }
}

fn target(name: &str) -> Target {
    let path = sketch(&format!("targets/{name}/{name}.onnx"));
    let config: PreprocessorConfig = read_json(&path.with_file_name("preprocessor_config.json")).unwrap();
    Target { uri: format!("file:{}", path.display()), preprocessing: Some(config.preprocessing().unwrap()), ..Default::default() }
}

fn set(folder: &Path) -> ProbingSet {
    ProbingSet { sources: vec![ProbingSource { source: Some(Source::Uri(format!("file:{}", folder.display()))) }] }
}

fn layer(name: &str, units: &[u32]) -> LayerUnits {
    LayerUnits { layer: name.to_owned(), units: units.to_vec() }
}

#[derive(Debug, Default, PartialEq)]
struct Probed {
    units: Vec<ProbedUnit>,
    skipped: Vec<SkippedPicture>,
    total: ProbeTotal,
}

async fn probe(service: &mut Service, set: ProbingSet, layers: Vec<LayerUnits>, summary: Summary) -> Probed {
    run(service, ProbeRequest { probing_set: Some(set), layers, summary: summary.into(), ..Default::default() }).await.unwrap()
}

/// A pass over the planted network that keeps five pictures a unit.
async fn run(service: &mut Service, request: ProbeRequest) -> Result<Probed, Status> {
    let request = ProbeRequest { target: Some(target("planted")), top: Some(5), ..request };
    let mut events = service.client.probe(request).await?.into_inner();
    let mut probed = Probed::default();
    let mut done = 0;
    while let Some(response) = events.message().await? {
        match response.event.unwrap() {
            Event::Unit(unit) => probed.units.push(unit),
            Event::Skipped(skipped) => probed.skipped.push(skipped),
            Event::Progress(progress) => {
                assert!(progress.done >= done && progress.done <= progress.pictures);
                done = progress.done;
            }
            Event::Total(total) => probed.total = total,
        }
    }
    probed.skipped.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(probed)
}

async fn shards(service: &mut Service, set: ProbingSet, pictures: u32) -> Vec<ProbingShard> {
    let request = ListShardsRequest { probing_set: Some(set), pictures_per_shard: Some(pictures) };
    let listed = service.client.list_shards(request).await.unwrap().into_inner();
    listed.map(|listed| listed.unwrap().shard.unwrap()).collect().await
}

async fn activations(service: &mut Service, pictures: &[Bytes], layers: Vec<LayerUnits>, summary: Summary) -> Vec<Option<Vec<f32>>> {
    let setup = ActivateSetup { target: Some(target("planted")), layers, summary: summary.into(), ..Default::default() };
    let setup = ActivateRequest { message: Some(activate_request::Message::Setup(setup)) };
    let items: Vec<ActivateRequest> = (0..)
        .zip(pictures)
        .map(|(item_id, picture)| ActivateRequest { message: Some(activate_request::Message::Picture(ActivatePicture { item_id, picture: picture.clone() })) })
        .collect();
    let mut answers = service.client.activate(stream::iter([setup]).chain(stream::iter(items))).await.unwrap().into_inner();
    let mut results = vec![None; pictures.len()];
    while let Some(answer) = answers.message().await.unwrap() {
        if let Some(activate_response::Result::Activations(activations)) = answer.result {
            results[answer.item_id as usize] = Some(activations.values);
        }
    }
    results
}

#[tokio::test]
async fn a_pass_finds_what_running_every_picture_finds() {
    let pictures = pictures(90, 3);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let bytes: Vec<Bytes> = pictures.iter().map(|(_, bytes)| bytes.clone()).collect();
    let layers = vec![layer("colour", &[0, 4, 11]), layer("mixture", &[2, 17])];
    let mut service = start(8, 2, 64);
    for summary in [Summary::Mean, Summary::Max] {
        let probed = probe(&mut service, set(folder.path()), layers.clone(), summary).await;
        let all = activations(&mut service, &bytes, layers.clone(), summary).await;
        assert_eq!((probed.total.pictures, probed.units.len()), (90, 5));
        for (place, unit) in probed.units.iter().enumerate() {
            let of = |picture: usize| all[picture].as_ref().unwrap()[place];
            let mut order: Vec<usize> = (0..pictures.len()).collect();
            order.sort_by(|a, b| of(*b).total_cmp(&of(*a)).then(pictures[*a].0.cmp(&pictures[*b].0)));
            let expected: Vec<(&str, f32)> = order.iter().take(5).map(|picture| (pictures[*picture].0.as_str(), of(*picture))).collect();
            let found: Vec<(&str, f32)> = unit.top.iter().map(|top| (top.path.as_str(), top.activation)).collect();
            assert_eq!(found, expected, "{} {}", unit.layer, unit.unit);
            let values = || (0..pictures.len()).map(of);
            assert_eq!((unit.lowest, unit.highest), (values().fold(f32::INFINITY, f32::min), values().fold(f32::NEG_INFINITY, f32::max)));
            for top in &unit.top {
                let map = top.map.as_ref().unwrap();
                let g = match summary {
                    Summary::Max => map.values.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                    _ => map.values.iter().sum::<f32>() / map.values.len() as f32,
                };
                assert!(
                    (g - top.activation).abs() <= 1e-5 * top.activation.abs().max(1e-3),
                    "the map is the one that the activation is of: {g} {}",
                    top.activation
                );
            }
        }
        assert!(probed.units[2].dead, "unit 11 of the colours answers all pictures alike");
        assert!(!probed.units[0].dead);
    }
}

#[tokio::test]
async fn a_pass_depends_on_neither_batches_nor_sessions_nor_memory_nor_where_the_pictures_lie() {
    let pictures = pictures(60, 5);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let layers = vec![layer("pattern", &[]), layer("mixture", &[0, 1])];
    let plain = probe(&mut start(1, 1, 64), set(folder.path()), layers.clone(), Summary::Mean).await;
    assert_eq!(plain, probe(&mut start(8, 2, 64), set(folder.path()), layers.clone(), Summary::Mean).await);

    let mut tight = start(4, 2, 0);
    let rerun = probe(&mut tight, set(folder.path()), layers.clone(), Summary::Mean).await;
    assert!(rerun.total.rerun > 0, "without memory for maps pictures are run again");
    assert_eq!(rerun.units, plain.units);

    let mut listed = PictureList::default();
    for (path, bytes) in &pictures {
        listed.pictures.push(ListedPicture { path: path.clone(), digest: tight.blobs.put(bytes.clone()).await.unwrap() });
    }
    let list_digest = tight.blobs.put(listed.encode_to_vec().into()).await.unwrap();
    let uploaded = ProbingSet { sources: vec![ProbingSource { source: Some(Source::ListDigest(list_digest)) }] };
    assert_eq!(probe(&mut tight, uploaded, layers.clone(), Summary::Mean).await.units, plain.units);

    let tar_file = tempfile::Builder::new().suffix(".tar").tempfile().unwrap();
    let mut archive = tar::Builder::new(tar_file.reopen().unwrap());
    archive.append_dir_all(".", folder.path()).unwrap();
    archive.finish().unwrap();
    assert_eq!(probe(&mut tight, set(tar_file.path()), layers, Summary::Mean).await.units, plain.units);
}

#[tokio::test]
async fn bad_pictures_are_skipped_with_their_reason_and_equal_ones_count_once() {
    let pictures = pictures(6, 9);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let good = &pictures[0].1;
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("0.png"), good).unwrap();
    std::fs::write(at("empty.png"), b"").unwrap();
    std::fs::write(at("text.png"), b"this is no picture").unwrap();
    std::fs::write(at("cut.png"), &good[..good.len() / 2]).unwrap();
    std::fs::write(at("notes.txt"), b"not looked at").unwrap();
    image::RgbImage::from_pixel(1, 1, image::Rgb([255, 0, 0])).save(at("one.png")).unwrap();
    image::GrayImage::new(12_000, 12_000).save(at("huge.png")).unwrap();
    let probed = probe(&mut start(4, 1, 64), set(folder.path()), vec![layer("colour", &[0])], Summary::Mean).await;
    let skipped: Vec<(&str, &str)> = probed.skipped.iter().map(|s| (s.path.as_str(), s.reason.as_str())).collect();
    let [(cut, _), (empty, why_empty), (huge, why_huge), (text, why_text)] = skipped[..] else { panic!("{skipped:?}") };
    assert_eq!([cut, empty, huge, text], ["cut.png", "empty.png", "huge.png", "text.png"]);
    assert!(why_empty.contains("empty") && why_huge.contains("144000000 pixels") && why_text.contains("not a picture"), "{skipped:?}");
    assert_eq!((probed.total.pictures, probed.total.duplicates, probed.total.skipped), (7, 1, 4));
    let paths: Vec<&str> = probed.units[0].top.iter().map(|top| top.path.as_str()).collect();
    assert!(!paths.contains(&pictures[0].0.as_str()), "of equal pictures the first path counts: {paths:?}");
}

#[tokio::test]
async fn the_shards_of_a_set_are_together_the_set_and_each_is_known_by_its_contents() {
    let pictures = pictures(20, 13);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let at = |name: &str| folder.path().join(name);
    // What is equal or can't be used is so across shards and in one: the first and the last of the set are in shards of their own.
    for name in ["0.png", "z1.png", "z2.png"] {
        std::fs::write(at(name), &pictures[3].1).unwrap();
    }
    for name in ["00.png", "01.png", "y.png"] {
        std::fs::write(at(name), "no picture").unwrap();
    }
    let (mut service, set, layers) = (start(4, 2, 64), set(folder.path()), vec![layer("colour", &[0, 4, 11]), layer("mixture", &[2])]);
    let whole = probe(&mut service, set.clone(), layers.clone(), Summary::Mean).await;
    assert_eq!((whole.total.pictures, whole.total.duplicates, whole.total.skipped), (20, 3, 3));
    let request =
        |shard: &ProbingShard| ProbeRequest { probing_set: Some(set.clone()), layers: layers.clone(), shard: Some(shard.clone()), ..Default::default() };
    for size in [1, 7, 100] {
        let mut together = Probed::default();
        let mut next = 0;
        for shard in shards(&mut service, set.clone(), size).await {
            assert_eq!(shard.first, next);
            next += shard.pictures;
            let probed = run(&mut service, request(&shard)).await.unwrap();
            let (sum, part) = (&mut together.total, probed.total);
            *sum = ProbeTotal {
                pictures: sum.pictures + part.pictures,
                duplicates: sum.duplicates + part.duplicates,
                skipped: sum.skipped + part.skipped,
                rerun: 0,
            };
            together.skipped.extend(probed.skipped);
            if together.units.is_empty() {
                together.units = probed.units;
                continue;
            }
            for (all, unit) in together.units.iter_mut().zip(probed.units) {
                all.top.extend(unit.top);
            }
        }
        assert_eq!(next, 26);
        together.skipped.sort_by(|a, b| a.path.cmp(&b.path));
        assert_eq!((&together.skipped, together.total), (&whole.skipped, whole.total));
        for (all, unit) in together.units.iter_mut().zip(&whole.units) {
            all.top.sort_by(|a, b| b.activation.total_cmp(&a.activation).then(a.index.cmp(&b.index)));
            all.top.truncate(5);
            assert_eq!(all.top, unit.top);
        }
    }

    let before = shards(&mut service, set.clone(), 10).await;
    assert_eq!(before, shards(&mut start(1, 1, 1), set.clone(), 10).await, "whoever lists them");
    std::fs::write(at(&pictures[19].0), &pictures[0].1).unwrap();
    let status = run(&mut service, request(&before[2])).await.unwrap_err();
    assert_eq!(fault::reason_of(&status).as_deref(), Some("PROBING_SET_CHANGED"));
    let after = shards(&mut service, set.clone(), 10).await;
    assert_eq!(before[..2], after[..2], "shards without the changed picture are what they were");
    assert_ne!(before[2].digest, after[2].digest);
    run(&mut service, request(&after[2])).await.unwrap();
    std::fs::remove_file(at("z2.png")).unwrap();
    shards(&mut service, set.clone(), 10).await;
    let status = run(&mut service, request(&after[2])).await.unwrap_err();
    assert_eq!(fault::reason_of(&status).as_deref(), Some("PROBING_SET_CHANGED"), "fewer pictures than the shard has");
}

#[tokio::test]
async fn a_set_without_a_good_picture_is_refused_after_each_was_told() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.png", "b.png"] {
        std::fs::write(folder.path().join(name), name).unwrap();
    }
    let request =
        ProbeRequest { target: Some(target("planted")), probing_set: Some(set(folder.path())), layers: vec![layer("colour", &[0])], ..Default::default() };
    let mut events = start(4, 1, 64).client.probe(request).await.unwrap().into_inner();
    let mut skipped = Vec::new();
    let status = loop {
        match events.message().await {
            Ok(Some(response)) => skipped.extend(response.event.and_then(|event| if let Event::Skipped(skipped) = event { Some(skipped.path) } else { None })),
            Ok(None) => panic!("nothing was wrong"),
            Err(status) => break status,
        }
    };
    skipped.sort();
    assert_eq!((skipped, fault::reason_of(&status).as_deref()), (vec!["a.png".to_owned(), "b.png".to_owned()], Some("NO_GOOD_PICTURES")));
}

#[tokio::test]
async fn a_layer_with_several_names_has_in_each_call_the_one_that_was_asked_for() {
    let pictures = pictures(12, 11);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let mut service = start(4, 1, 64);
    let mut found = Vec::new();
    for name in ["layer4", "layer4.1"] {
        let (target, set, layers) = (Some(target("resnet")), Some(set(folder.path())), vec![layer(name, &[7])]);
        let request = ProbeRequest { target: target.clone(), probing_set: set.clone(), layers: layers.clone(), ..Default::default() };
        let mut events = service.client.probe(request).await.unwrap().into_inner();
        let mut units = Vec::new();
        while let Some(response) = events.message().await.unwrap() {
            units.extend(response.event.and_then(|event| if let Event::Unit(unit) = event { Some(unit) } else { None }));
        }
        let [unit] = &units[..] else { panic!("{units:?}") };
        assert_eq!(unit.layer, name);
        let request = CropRequest { target, probing_set: set, layers, layer: unit.layer.clone(), unit: 7, pictures: unit.top.clone(), ..Default::default() };
        service.client.crop(request).await.unwrap();
        found.push(unit.top.clone());
    }
    assert_eq!(found[0], found[1], "one value under two names");
}

#[tokio::test]
async fn crops_lie_in_their_picture_and_are_run_through_the_network() {
    let pictures = pictures(60, 7);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let mut service = start(4, 2, 64);
    let layers = vec![layer("colour", &[]), layer("pattern", &[5])];
    let probed = probe(&mut service, set(folder.path()), layers.clone(), Summary::Mean).await;
    let unit = probed.units.iter().find(|unit| unit.layer == "pattern").unwrap();
    let request = CropRequest {
        target: Some(target("planted")),
        probing_set: Some(set(folder.path())),
        layers: layers.clone(),
        layer: "pattern".to_owned(),
        unit: 5,
        pictures: unit.top.clone(),
        ..Default::default()
    };
    let mut answers = service.client.crop(request).await.unwrap().into_inner();
    let mut crops = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        let Some(crop_response::Result::Crop(crop)) = answer.result else { panic!("{answer:?}") };
        crops.push((answer.picture, crop));
    }
    assert!(!crops.is_empty());
    let own: Vec<Bytes> = crops.iter().map(|(_, crop)| crop.picture.clone()).collect();
    let ran = activations(&mut service, &own, layers, Summary::Mean).await;
    for ((picture, crop), ran) in crops.iter().zip(ran) {
        let area = crop.r#box.unwrap();
        let decoded = decode(&crop.picture, PictureLimits::default()).unwrap();
        assert_eq!(decoded.dimensions(), (area.right - area.left, area.bottom - area.top));
        let whole = pictures.iter().find(|(path, _)| *path == unit.top[*picture as usize].path).unwrap();
        let whole = decode(&whole.1, PictureLimits::default()).unwrap();
        assert!(area.right <= whole.width() && area.bottom <= whole.height());
        assert_eq!(decoded.get_pixel(0, 0), whole.get_pixel(area.left, area.top), "cut out of the original");
        assert_eq!(crop.digest, blobs::digest(&crop.picture));
        assert_eq!(Some(&crop.activation), ran.unwrap().last());
    }
}

#[tokio::test]
async fn originals_are_given_as_they_are_and_a_changed_one_is_not() {
    let pictures = pictures(8, 2);
    let folder = tempfile::tempdir().unwrap();
    write_pictures(folder.path(), &pictures);
    let mut service = start(4, 1, 64);
    let top = probe(&mut service, set(folder.path()), vec![layer("colour", &[0])], Summary::Mean).await.units.remove(0).top;
    std::fs::write(folder.path().join(&top[1].path), b"something else").unwrap();
    std::fs::remove_file(folder.path().join(&top[2].path)).unwrap();
    let request = ReadPicturesRequest { probing_set: Some(set(folder.path())), pictures: top.clone() };
    let mut answers = service.client.read_pictures(request).await.unwrap().into_inner();
    let mut codes = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        codes.push(match answer.result.unwrap() {
            read_pictures_response::Result::Data(data) => {
                let original = pictures.iter().find(|(path, _)| *path == top[answer.picture as usize].path).unwrap();
                assert_eq!(data, original.1);
                Code::Ok
            }
            read_pictures_response::Result::Status(status) => Code::from_i32(status.code),
        });
    }
    assert_eq!(codes, [Code::Ok, Code::FailedPrecondition, Code::NotFound, Code::Ok, Code::Ok]);
}

#[tokio::test]
async fn layers_are_named_as_people_name_them() {
    let mut service = start(1, 1, 1);
    let mut found = async |name: &str, asked: &[&str]| {
        let asked = asked.iter().map(|asked| layer(asked, &[])).collect();
        service.client.describe_target(DescribeTargetRequest { target: Some(target(name)), asked }).await.map(|response| response.into_inner())
    };
    let planted = found("planted", &["colour", "mixture"]).await.unwrap();
    let units: Vec<(&str, usize)> = planted.found.iter().map(|layer| (layer.layer.as_str(), layer.units.len())).collect();
    assert_eq!(units, [("colour", 12), ("mixture", 24)]);
    let resnet = found("resnet", &["layer4", "layer4.0", "fc"]).await.unwrap();
    let names: Vec<&str> = resnet.found.iter().map(|layer| layer.layer.as_str()).collect();
    assert_eq!(names, ["layer4", "layer4.0", "fc"]);
    let fc = resnet.layers.iter().find(|layer| layer.name == "fc").unwrap();
    assert_eq!((fc.kind(), fc.map.len()), (proto::LayerKind::Units, 0));

    let status = found("resnet", &["layr4"]).await.unwrap_err();
    assert_eq!((status.code(), fault::reason_of(&status).as_deref()), (Code::InvalidArgument, Some("UNKNOWN_LAYER")));
    assert!(status.message().contains("layer4"), "{}", status.message());
    let status = found("resnet", &["0.bn1"]).await.unwrap_err();
    assert_eq!(fault::reason_of(&status).as_deref(), Some("AMBIGUOUS_LAYER"), "{}", status.message());
    let request = DescribeTargetRequest { target: Some(target("planted")), asked: vec![layer("colour", &[3, 12])] };
    let status = service.client.describe_target(request).await.unwrap_err();
    assert_eq!(fault::reason_of(&status).as_deref(), Some("UNIT_OUT_OF_RANGE"));
    assert!(status.message().contains("unit 12") && status.message().contains("0 to 11"), "{}", status.message());
}

#[tokio::test]
async fn a_target_that_is_not_there_or_no_network_is_refused() {
    let mut service = start(1, 1, 1);
    let mut describe =
        async |target: Target| service.client.describe_target(DescribeTargetRequest { target: Some(target), asked: Vec::new() }).await.unwrap_err();
    let status = describe(Target { uri: "file:/nowhere/net.onnx".into(), ..Default::default() }).await;
    assert!(status.message().contains("/nowhere/net.onnx") && status.message().contains("no such file"), "{}", status.message());
    let text = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(text.path(), "no network").unwrap();
    let status = describe(Target { uri: format!("file:{}", text.path().display()), ..Default::default() }).await;
    assert!(status.message().contains("not an ONNX file"), "{}", status.message());
    let status = describe(Target { digest: "0".repeat(64), ..Default::default() }).await;
    assert_eq!(fault::reason_of(&status).as_deref(), Some("NOT_UPLOADED"));
    let status = describe(Target { digest: "0".repeat(64), ..target("planted") }).await;
    assert!(status.message().contains("has the digest"), "{}", status.message());
}
