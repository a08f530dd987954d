//! Pictures by digest.

use axum::{
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use dnd_mesh::{Fault, blobs, fault};
use dnd_proto::v1::{GetPicturesRequest, get_pictures_response::Result as Got};
use image::ImageFormat;

use crate::{
    Gateway,
    api::{Caller, Path},
    problem::Problem,
};

/// A picture: what its digest names never changes, so a browser asks for it once.
pub(crate) async fn picture(State(mut gateway): State<Gateway>, caller: Caller, Path(digest): Path<String>, headers: HeaderMap) -> Result<Response, Problem> {
    blobs::check_digests(std::slice::from_ref(&digest))?;
    let tag = format!("\"{digest}\"");
    let kept = [(header::CACHE_CONTROL, "private, max-age=31536000, immutable".to_owned()), (header::ETAG, tag.clone())];
    if headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.to_str().is_ok_and(|known| known.contains(&tag))) {
        return Ok((StatusCode::NOT_MODIFIED, kept).into_response());
    }
    let mut pictures = gateway.pictures.get_pictures(caller.asks(GetPicturesRequest { digests: vec![digest] })).await?.into_inner();
    match pictures.message().await?.and_then(|picture| picture.result) {
        Some(Got::Picture(bytes)) => Ok((kept, shown(bytes)).into_response()),
        Some(Got::Status(status)) => Err(fault::item_status(&status).into()),
        None => Err(Fault::internal("the orchestrator gave no answer about the picture").into()),
    }
}

/// The bytes, as a picture if they are one that browsers show; anything else, which an upload may be, is only ever saved.
fn shown(bytes: Bytes) -> Response {
    let kind = match image::guess_format(&bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::Gif | ImageFormat::WebP | ImageFormat::Bmp)) => format.to_mime_type(),
        _ => "application/octet-stream",
    };
    let mut response = bytes.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; sandbox"));
    if kind == "application/octet-stream" {
        headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    }
    response
}
