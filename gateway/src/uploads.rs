//! Uploads: files by digest, in one go or from where an earlier one stopped, or as a form; and the list that makes a probing set of pictures.

use axum::{
    Json,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode, header},
};
use bytes::BytesMut;
use dnd_mesh::{
    Fault,
    blobs::{self, PIECE_BYTES},
};
use dnd_proto::v1::{CheckUploadsRequest, ListedPicture, PictureList, UploadRequest};
use futures::{Stream, StreamExt as _, stream};
use multer::{Field, Multipart};
use prost::Message as _;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
};
use tonic::Code;

use crate::{
    Gateway,
    api::{Caller, Message, Path},
    problem::Problem,
};

/// How much of a file is there.
#[derive(Serialize)]
pub(crate) struct Arrived {
    /// Whether all of it is.
    complete: bool,
    /// Bytes of it that have arrived, where the rest is to be sent from; not there if it is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    received: Option<u64>,
}

pub(crate) async fn check(State(mut gateway): State<Gateway>, caller: Caller, Path(digest): Path<String>) -> Result<Json<Arrived>, Problem> {
    let missing = gateway.uploads.check_uploads(caller.asks(CheckUploadsRequest { digests: vec![digest] })).await?.into_inner().missing;
    let received = missing.first().map(|blob| blob.received);
    Ok(Json(Arrived { complete: received.is_none(), received }))
}

/// Takes a file, or with `Content-Range: bytes 1000-1999/2000` the part of it that an upload which was broken off lacks.
pub(crate) async fn put(
    State(mut gateway): State<Gateway>,
    caller: Caller,
    Path(digest): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Arrived>, Problem> {
    let (offset, size) = range(&headers)?;
    if size > gateway.max_upload_bytes {
        return Err(too_large(size, gateway.max_upload_bytes));
    }
    let whole = gateway.uploads.upload(caller.asks(pieces(digest, offset, size, body))).await?.into_inner().blobs > 0;
    Ok(Json(Arrived { complete: whole, received: None }))
}

fn too_large(size: u64, most: u64) -> Problem {
    let fault = Fault::new(Code::OutOfRange, "TOO_LARGE", format!("{size} bytes; a file may have {most} at most"));
    Problem::from(fault).with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

/// Takes the files of a form, and gives their names and digests.
pub(crate) async fn form(State(mut gateway): State<Gateway>, caller: Caller, headers: HeaderMap, body: Body) -> Result<Json<PictureList>, Problem> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let boundary = multer::parse_boundary(kind);
    let boundary = boundary.map_err(|_| Fault::field("content-type", format!("{kind:?}; a form of files is multipart/form-data with a boundary")))?;
    let mut form = Multipart::new(body.into_data_stream(), boundary);
    let mut pictures = Vec::new();
    while let Some(field) = form.next_field().await.map_err(|error| broken(&error))? {
        let Some(path) = field.file_name().map(str::to_owned) else { continue };
        let (file, digest, size) = spooled(field, gateway.max_upload_bytes).await?;
        gateway.uploads.upload(caller.asks(pieces(digest.clone(), 0, size, Body::from_stream(read(file))))).await?;
        pictures.push(ListedPicture { path, digest });
    }
    Ok(Json(PictureList { pictures }))
}

fn broken(error: &multer::Error) -> Problem {
    Fault::new(Code::InvalidArgument, "INVALID_BODY", format!("the form: {error}")).into()
}

/// A file of a form, on the disk: its name in the mesh is known only when all of it is there. It goes with the value.
async fn spooled(mut field: Field<'_>, most: u64) -> Result<(File, String, u64), Problem> {
    let storage = |error: std::io::Error| Problem::from(blobs::storage(error));
    let made = tokio::task::spawn_blocking(tempfile::tempfile).await;
    let mut file = File::from_std(made.map_err(std::io::Error::other).and_then(|made| made).map_err(storage)?);
    let (mut hash, mut size) = (Sha256::new(), 0);
    while let Some(some) = field.chunk().await.map_err(|error| broken(&error))? {
        size += some.len() as u64;
        if size > most {
            return Err(too_large(size, most));
        }
        hash.update(&some);
        file.write_all(&some).await.map_err(storage)?;
    }
    file.flush().await.map_err(storage)?;
    file.rewind().await.map_err(storage)?;
    Ok((file, blobs::hex(&hash.finalize()), size))
}

fn read(file: File) -> impl Stream<Item = std::io::Result<Bytes>> {
    stream::try_unfold(file, |mut file| async {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        let read = file.read_buf(&mut piece).await?;
        Ok((read > 0).then(|| (piece.freeze(), file)))
    })
}

/// Where in the file the body stands, and the file's bytes.
fn range(headers: &HeaderMap) -> Result<(u64, u64), Problem> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(range) = text(header::CONTENT_RANGE) {
        let parsed = range.strip_prefix("bytes ").and_then(|range| range.split_once('/')).and_then(|(span, size)| {
            let (first, _) = span.split_once('-')?;
            Some((first.parse().ok()?, size.parse().ok()?))
        });
        return parsed.ok_or_else(|| Fault::field("content-range", format!("{range:?}; it looks like bytes 1000-1999/2000")).into());
    }
    let size = text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
    let size = size.ok_or_else(|| {
        let fault = Fault::field("content-length", "not there; it says how many bytes the file has");
        Problem::from(fault).with_status(StatusCode::LENGTH_REQUIRED)
    })?;
    Ok((0, size))
}

/// A body in pieces of the size that the mesh takes; a file without bytes is one piece, too. A body that breaks off ends the pieces, and what came of it stays.
fn pieces(digest: String, offset: u64, size: u64, body: Body) -> impl Stream<Item = UploadRequest> {
    let start = (body.into_data_stream(), BytesMut::new(), offset, true);
    stream::unfold(start, move |(mut body, mut held, offset, first)| {
        let digest = digest.clone();
        async move {
            while held.len() < PIECE_BYTES {
                match body.next().await {
                    Some(Ok(some)) => held.extend_from_slice(&some),
                    Some(Err(_)) | None => break,
                }
            }
            if held.is_empty() && !first {
                return None;
            }
            let data = held.split_to(held.len().min(PIECE_BYTES)).freeze();
            let next = offset + data.len() as u64;
            Some((UploadRequest { digest, size, offset, data }, (body, held, next, false)))
        }
    })
}

/// The name of a probing set of uploaded pictures.
#[derive(Serialize)]
pub(crate) struct Listed {
    /// For a source's `list_digest`.
    list_digest: String,
}

/// Makes a probing set of pictures that were uploaded.
pub(crate) async fn probing_set(State(mut gateway): State<Gateway>, caller: Caller, Message(mut list): Message<PictureList>) -> Result<Json<Listed>, Problem> {
    list.pictures.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    let list = Bytes::from(list.encode_to_vec());
    let list_digest = blobs::digest(&list);
    let size = list.len() as u64;
    gateway.uploads.upload(caller.asks(pieces(list_digest.clone(), 0, size, Body::from(list)))).await?;
    Ok(Json(Listed { list_digest }))
}
