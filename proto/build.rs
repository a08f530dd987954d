//! Compiles `dnd/v1/*.proto` with a compiler written in Rust: no protoc needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

type BoxError = Box<dyn std::error::Error>;

fn main() -> Result<(), BoxError> {
    println!("cargo:rerun-if-changed=dnd");
    println!("cargo:rerun-if-changed=google");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut files: Vec<PathBuf> = fs::read_dir("dnd/v1")?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    let descriptors = protox::compile(&files, ["."])?;
    let encoded = descriptors.encode_to_vec();
    fs::write(out.join("descriptors.bin"), &encoded)?;

    tonic_prost_build::configure()
        .bytes(".dnd.v1")
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .extern_path(".google.protobuf.Timestamp", "::pbjson_types::Timestamp")
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)?;

    // Every message as canonical protobuf JSON, zero values written out: a unit 0 is there to be seen.
    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .extern_path(".google.protobuf", "::pbjson_types")
        .emit_fields()
        .preserve_proto_field_names()
        .exclude([
            ".dnd.v1.GetPicturesResponse",
            ".dnd.v1.ReadPicturesResponse",
            ".dnd.v1.CropResponse",
            ".dnd.v1.ActivateResponse",
            ".dnd.v1.CaptionResponse",
            ".dnd.v1.SimplifyResponse",
            ".dnd.v1.SummarizeResponse",
            ".dnd.v1.GenerateResponse",
            ".dnd.v1.EmbedImagesResponse",
            ".dnd.v1.EmbedTextsResponse",
        ])
        .build(&[".dnd.v1"])?;
    Ok(())
}
