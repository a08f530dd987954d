//! A probing set in shards: what each is, found by reading its pictures and running none.

use std::{collections::HashSet, sync::Arc};

use dnd_mesh::{Fault, blobs, items};
use dnd_proto::v1::{ListShardsRequest, ListShardsResponse, ProbingShard, SkippedPicture};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use tonic::Status;

use super::probe::{Read, read};
use crate::{
    Activation,
    engine::{ProbingSet, blocking},
};

const PICTURES_PER_SHARD: u32 = 4096;
const MOST_PER_SHARD: u32 = 1_000_000;
/// Pictures that are read at a time.
const AT_ONCE: usize = 8;

/// Lists a set anew, and streams its shards as their pictures are read.
pub(super) async fn list(activation: Arc<Activation>, request: ListShardsRequest) -> Result<items::Responses<ListShardsResponse>, Fault> {
    let size = request.pictures_per_shard.unwrap_or(PICTURES_PER_SHARD);
    if !(1..=MOST_PER_SHARD).contains(&size) {
        return Err(Fault::field("pictures_per_shard", format!("{size}; it is 1 to {MOST_PER_SHARD}")));
    }
    let set = activation.fresh_set(request.probing_set).await?;
    let listing = Listing { set, limit: activation.picture_limits().bytes, size: size.into(), next: 0, seen: HashSet::new() };
    let shards = stream::try_unfold(listing, |mut listing| async move { Ok(listing.shard().await?.map(|shard| (shard, listing))) });
    Ok(Box::pin(shards.map_err(|fault: Fault| Status::from(fault))))
}

struct Listing {
    set: Arc<ProbingSet>,
    /// Bytes of a picture at most.
    limit: usize,
    /// Pictures of a shard.
    size: u64,
    /// The first picture that is in no shard yet.
    next: u64,
    /// Digests of the pictures before it.
    seen: HashSet<String>,
}

impl Listing {
    async fn shard(&mut self) -> Result<Option<ListShardsResponse>, Fault> {
        let (first, pictures) = (self.next, self.set.len() as u64);
        let end = pictures.min(first + self.size);
        if first == end {
            return Ok(None);
        }
        let mut reads = stream::iter(first..end)
            .map(|index| {
                let (set, limit) = (Arc::clone(&self.set), self.limit);
                // Of the picture only its digest is kept.
                blocking(move || Ok(read(&set, index, limit)).map(|read| Read { bytes: read.bytes.map(|_| bytes::Bytes::new()), ..read }))
            })
            .buffered(AT_ONCE);
        let (mut contents, mut new, mut repeats) = (Contents::default(), Vec::new(), Vec::new());
        while let Some(read) = reads.next().await {
            let read = read?;
            contents.add(&self.set, &read);
            match read.bytes {
                Ok(_) if self.seen.contains(&read.digest) => repeats.push(read.index),
                Ok(_) => new.push(read.digest),
                Err(_) => {}
            }
        }
        drop(reads);
        self.seen.extend(new);
        self.next = end;
        let shard = ProbingShard { first, pictures: end - first, digest: contents.digest(), repeats };
        let unreadable = if first == 0 { self.set.unreadable() } else { &[] };
        let unreadable = unreadable.iter().map(|(path, reason)| SkippedPicture { path: path.clone(), reason: reason.clone() }).collect();
        Ok(Some(ListShardsResponse { shard: Some(shard), pictures, unreadable }))
    }
}

/// A digest over the paths and contents of pictures, in their order; of one that can't be read, over the reason.
#[derive(Default)]
pub(super) struct Contents(Sha256);

impl Contents {
    pub(super) fn add(&mut self, set: &ProbingSet, read: &Read) {
        let path = set.get(read.index).map(|picture| picture.path.as_bytes()).unwrap_or_default();
        let (kind, content) = match &read.bytes {
            Ok(_) => (b"picture".as_slice(), read.digest.as_bytes()),
            Err(reason) => (b"unreadable".as_slice(), reason.as_bytes()),
        };
        for part in [path, kind, content] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
    }

    pub(super) fn digest(self) -> String {
        blobs::hex(&self.0.finalize())
    }
}
