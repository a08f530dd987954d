//! Pictures and networks that were made to hurt, from a generator with a seed.

use std::io::Cursor;

use dnd_onnx::format::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, ValueInfoProto,
    attribute_proto::AttributeType,
    tensor_proto::{DataLocation, DataType},
};
use fastrand::Rng;
use image::{ImageFormat, RgbImage};
use prost::Message as _;

use crate::by_hand::{self, ints, node};

fn whole(rng: &mut Rng, format: ImageFormat) -> Vec<u8> {
    let (width, height) = (rng.u32(1..80), rng.u32(1..80));
    let picture = RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8]));
    let mut bytes = Vec::new();
    picture.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
    bytes
}

/// A PNG chunk with its checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
    chunk.extend(kind);
    chunk.extend(data);
    chunk.extend(crc(&chunk[4..]).to_be_bytes());
    chunk
}

fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()));
    !bytes.iter().fold(!0, step)
}

fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([16, 6, 0, 0, 0]);
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header)].concat()
}

/// A picture that was made to hurt, and what it is.
pub fn picture(rng: &mut Rng) -> (&'static str, Vec<u8>) {
    const FORMATS: [ImageFormat; 7] =
        [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP, ImageFormat::Pnm];
    let format = FORMATS[rng.usize(..FORMATS.len())];
    let huge = || [u32::MAX, 1 << 30, 70_000, 8_001];
    match rng.u8(..9) {
        0 => {
            let mut bytes = whole(rng, format);
            bytes.truncate(rng.usize(..bytes.len()));
            ("truncated", bytes)
        }
        1 => {
            let mut bytes = whole(rng, format);
            for _ in 0..rng.usize(1..20) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(..);
            }
            ("bytes changed", bytes)
        }
        2 => {
            // The beginning of one format, the rest of another.
            let other = FORMATS[rng.usize(..FORMATS.len())];
            let (mut first, second) = (whole(rng, format), whole(rng, other));
            first.truncate(rng.usize(4..=first.len().min(40)));
            ("wrong header", [first, second].concat())
        }
        3 => ("huge PNG", [png_header(huge()[rng.usize(..4)], huge()[rng.usize(..4)]), chunk(b"IDAT", &[0; 64])].concat()),
        4 => {
            let mut bmp = whole(rng, ImageFormat::Bmp);
            let (width, height) = (huge()[rng.usize(..4)], huge()[rng.usize(..4)]);
            bmp[18..22].copy_from_slice(&width.to_le_bytes());
            bmp[22..26].copy_from_slice(&height.to_le_bytes());
            ("huge BMP", bmp)
        }
        5 => ("huge PNM", format!("P{} {} {} {}\n", rng.u8(1..7), huge()[rng.usize(..4)], huge()[rng.usize(..4)], rng.u32(..)).into_bytes()),
        6 => {
            // Metadata upon metadata: a text of zeros that was packed tightly, many times.
            let png = whole(rng, ImageFormat::Png);
            let bomb = chunk(b"iCCP", &[b"x\0\0".to_vec(), zeros_packed(1 << rng.u32(10..24))].concat());
            let texts: Vec<u8> = (0..rng.usize(1..2000)).flat_map(|_| chunk(b"tEXt", b"a\0b")).collect();
            ("metadata", [&png[..33], &bomb, &texts, &png[33..]].concat())
        }
        7 => {
            // A JPEG whose one scan is said again and again.
            let jpeg = whole(rng, ImageFormat::Jpeg);
            let scan = jpeg.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
            let end = jpeg.len() - 2;
            ("scans", [&jpeg[..scan], &jpeg[scan..end].repeat(rng.usize(65..2000)), &jpeg[end..]].concat())
        }
        _ => ("noise", std::iter::repeat_with(|| rng.u8(..)).take(3000).collect()),
    }
}

/// So many zeros, in zlib's format: blocks that repeat one byte by the longest match there is.
fn zeros_packed(count: usize) -> Vec<u8> {
    // Stored blocks would not be small: the fixed code has a zero (8 bits) and a length of 258 (8 bits) at the distance of 1 (5 bits).
    let mut bits: Vec<bool> = vec![true, true, false];
    let code = |bits: &mut Vec<bool>, value: u32, length: u32| bits.extend((0..length).rev().map(|bit| value >> bit & 1 == 1));
    code(&mut bits, 0x30, 8);
    for _ in 0..count / 258 {
        code(&mut bits, 0b1100_0101, 8);
        code(&mut bits, 0, 5);
    }
    code(&mut bits, 0, 7);
    let bytes = bits.chunks(8).map(|bits| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit)));
    [0x78, 0x01].into_iter().chain(bytes).collect()
}

fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    by_hand::value(name, DataType::Float, &dims.iter().copied().map(Some).collect::<Vec<_>>())
}

/// A small network that can be used: picture -> Relu -> GlobalAveragePool.
pub fn good_network() -> ModelProto {
    let graph = GraphProto {
        name: Some("g".to_owned()),
        node: vec![node("Relu", &["picture"], "relu"), node("GlobalAveragePool", &["relu"], "pooled")],
        input: vec![value("picture", &[1, 3, 8, 8])],
        output: vec![ValueInfoProto { name: Some("pooled".to_owned()), ..value("pooled", &[1, 3, 1, 1]) }],
        ..Default::default()
    };
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { version: Some(17), ..Default::default() }],
        graph: Some(graph),
        ..Default::default()
    }
}

/// A network that was made to hurt, and what it is; beside its folder lies a file `outside`.
pub fn network(rng: &mut Rng) -> (&'static str, Vec<u8>) {
    let mut model = good_network();
    let graph = model.graph.as_mut().unwrap();
    let what = match rng.u8(..15) {
        0 => {
            let length = rng.usize(1..50);
            for i in 0..length {
                graph.node.push(node("Identity", &[&format!("circle{}", (i + 1) % length)], &format!("circle{i}")));
            }
            "circle"
        }
        1 => {
            graph.node.insert(0, node("Conv", &["picture", "no such weight"], "conv"));
            "missing tensor"
        }
        2 => {
            let dims = [[i64::MAX, 2], [1 << 40, 1 << 40], [-1, 3], [0, i64::MAX]][rng.usize(..4)];
            graph.initializer.push(TensorProto { dims: dims.to_vec(), raw_data: Some(vec![0; 16]), ..ints("w", &[]) });
            graph.node.push(node("Identity", &["w"], "absurd"));
            "absurd shape of a weight"
        }
        3 => {
            let side = [i64::MAX, 1 << 33, 1 << 20, 0, -5][rng.usize(..5)];
            let dims = [[1, 3, side, side], [side, 3, 8, 8], [1, side, 8, 8]][rng.usize(..3)];
            graph.input[0] = value("picture", &dims);
            "absurd input"
        }
        4 => {
            graph.initializer.push(ints("huge", &[1 << 20, 1 << 20]));
            graph.node.push(node("ConstantOfShape", &["huge"], "filled"));
            "filled"
        }
        5 => {
            graph.initializer.push(ints("huge", &[1 << 16, 1 << 20, 8, 8]));
            graph.node.push(node("Expand", &["relu", "huge"], "expanded"));
            "expanded"
        }
        6 | 7 => {
            let places = ["/etc/passwd", "../outside", "a/../../outside", "./../outside", "", "missing"];
            let location = places[rng.usize(..places.len())];
            let entry = |key: &str, value: &str| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value.to_owned()) };
            graph.initializer.push(TensorProto {
                dims: vec![1, 3, 1, 1],
                data_type: Some(DataType::Float as i32),
                data_location: Some(DataLocation::External as i32),
                external_data: vec![entry("location", location), entry("offset", "0"), entry("length", "12")],
                name: Some("outside".to_owned()),
                ..Default::default()
            });
            graph.node.push(node("Add", &["relu", "outside"], "added"));
            graph.output = vec![ValueInfoProto { name: Some("added".to_owned()), ..Default::default() }];
            "external data"
        }
        8 => {
            graph.node.push(NodeProto { domain: Some("my.operators".to_owned()), ..node("Mine", &["relu"], "mine") });
            "operator of its own"
        }
        9 => {
            for i in 0..rng.usize(30..120) {
                let inner = GraphProto { name: Some("inner".to_owned()), node: std::mem::take(&mut graph.node), ..Default::default() };
                let branch =
                    AttributeProto { name: Some("then_branch".to_owned()), r#type: Some(AttributeType::Graph as i32), g: Some(inner), ..Default::default() };
                graph.node = vec![NodeProto { attribute: vec![branch], ..node("If", &["picture"], &format!("deep{i}")) }];
            }
            "deep"
        }
        10 => {
            graph.node.push(node("Relu", &["picture"], "relu"));
            "made twice"
        }
        11 => {
            let bytes = model.encode_to_vec();
            return ("truncated", bytes[..rng.usize(..bytes.len())].to_vec());
        }
        12 => {
            let mut bytes = model.encode_to_vec();
            for _ in 0..rng.usize(1..6) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(..);
            }
            return ("bytes changed", bytes);
        }
        13 => {
            // Nodes that take two bytes in the file, and hundreds in memory: a message's fields may be merged from many places of a file.
            let mut bytes = model.encode_to_vec();
            let nodes = [0x0a, 0x00].repeat(rng.usize(5_000_000..8_000_000));
            prost::encoding::bytes::encode(7, &nodes, &mut bytes);
            return ("empty nodes", bytes);
        }
        _ => {
            // A long chain, as deep as a recursion over it would be.
            graph.node.clear();
            graph.node.push(node("Identity", &["picture"], "chain0"));
            for i in 1..rng.usize(1000..4000) {
                graph.node.push(node("Identity", &[&format!("chain{}", i - 1)], &format!("chain{i}")));
            }
            graph.output = vec![ValueInfoProto { name: graph.node.last().unwrap().output.first().cloned(), ..Default::default() }];
            "chain"
        }
    };
    (what, model.encode_to_vec())
}
