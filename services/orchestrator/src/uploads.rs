//! What callers upload here, and the activation service needs.

use dnd_mesh::{
    Fault,
    blobs::{self, Blobs},
};
use dnd_proto::v1::{PictureList, ProbingSet, Target, probing_source};
use prost::Message as _;
use tonic::Code;

use crate::models::{Models, passed_on};

/// The reason of a fault about something that was not uploaded.
pub(crate) const NOT_UPLOADED: &str = "NOT_UPLOADED";

/// Passes on to the activation service what was uploaded here and is not there: the target, picture lists, and their pictures.
pub(crate) async fn pass_on(models: &Models, store: &Blobs, target: &Target, set: Option<&ProbingSet>) -> Result<(), Fault> {
    let mut digests = Vec::new();
    if target.uri.is_empty() {
        if !store.has(&target.digest).await.map_err(blobs::storage)? {
            return Err(not_uploaded(&format!("the target {:?}", target.digest)));
        }
        digests.push(target.digest.clone());
    }
    for source in set.map(|set| &set.sources).into_iter().flatten() {
        let Some(probing_source::Source::ListDigest(list)) = &source.source else { continue };
        let bytes = store.get(list).await.map_err(blobs::storage)?.ok_or_else(|| not_uploaded(&format!("the picture list {list:?}")))?;
        let pictures =
            PictureList::decode(bytes).map_err(|e| Fault::field("probing_set.sources.list_digest", format!("{list} is no PictureList: {e}")))?.pictures;
        digests.push(list.clone());
        digests.extend(pictures.into_iter().map(|picture| picture.digest));
    }
    if digests.is_empty() {
        return Ok(());
    }
    let path = |digest: String| async move { store.path(&digest).await };
    let passed = blobs::upload(models.uploads.clone(), digests, path).await;
    passed.map_err(|fault| passed_on("activation", &fault.into()))
}

/// Something that a request names by its digest is not here.
pub(crate) fn not_uploaded(what: &str) -> Fault {
    Fault::new(Code::FailedPrecondition, NOT_UPLOADED, format!("{what} was not uploaded"))
}
