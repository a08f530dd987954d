//! The pages: files that the program carries.

use axum::{
    Router,
    body::Body,
    extract::Path,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use dnd_mesh::blobs;
use rust_embed::RustEmbed;

use crate::{Gateway, problem};

/// In a debug build they are read from the source tree, so that a change shows when a page is loaded again.
#[derive(RustEmbed)]
#[folder = "pages/"]
struct Files;

/// The pages' addresses. All are the same document, whose script shows what the address names.
const PAGES: [&str; 10] = [
    "/",
    "/new",
    "/jobs/{job}",
    "/jobs/{job}/network",
    "/jobs/{job}/units/{layer}/{unit}",
    "/compare",
    "/studies",
    "/studies/new",
    "/studies/{study}",
    "/studies/{study}/rate",
];

pub(crate) fn routes() -> Router<Gateway> {
    let pages = PAGES.into_iter().fold(Router::new(), |router, page| router.route(page, get(|headers| async move { file("index.html", &headers).await })));
    pages
        .route("/api", get(|headers| async move { file("api.html", &headers).await }))
        .route("/pages/{*file}", get(|Path(name): Path<String>, headers: HeaderMap| async move { file(&name, &headers).await }))
}

async fn file(name: &str, headers: &HeaderMap) -> Response {
    let Some(file) = Files::get(name) else { return problem::no_such_page().await.into_response() };
    let tag = format!("\"{}\"", blobs::hex(&file.metadata.sha256_hash()));
    // Asked for anew each time, and sent only if it has changed: pages and scripts of two versions never meet.
    let kept = [(header::CACHE_CONTROL, "no-cache".to_owned()), (header::ETAG, tag.clone())];
    if headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, kept).into_response();
    }
    let kind = format!("{}; charset=utf-8", file.metadata.mimetype());
    (kept, [(header::CONTENT_TYPE, kind)], Body::from(file.data)).into_response()
}
