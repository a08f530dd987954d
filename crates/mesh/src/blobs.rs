//! Blobs by digest: uploads, and the pictures that a job makes.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use dnd_proto::v1::{
    CheckUploadsRequest, CheckUploadsResponse, MissingBlob, UploadRequest, UploadResponse,
    upload_service_client::UploadServiceClient,
    upload_service_server::{UploadService, UploadServiceServer},
};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::{
    fs::{self, File, OpenOptions},
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
    sync::{Mutex, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{Fault, balance::Balanced, server::Services};

/// Bytes of one piece of an upload at most.
pub const PIECE_BYTES: usize = 1 << 20;
/// Digests that one call may name.
const MAX_DIGESTS: usize = 10_000;

/// Lower-case hex SHA-256.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether `text` is a lower-case hex SHA-256, and so a name that is safe in a path.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A folder of blobs, each named by its digest. What is there is whole; what is arriving is beside it under another name.
#[derive(Debug)]
pub struct Blobs {
    folder: PathBuf,
    /// One upload of a blob is taken at a time; which lock is its digest's choice.
    locks: [Mutex<()>; 16],
    /// Deletes the folder with the store, where it is the store's own.
    _own: Option<TempDir>,
}

impl Blobs {
    /// A store in a folder, which is made if it is not there.
    pub fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned(), locks: Default::default(), _own: None })
    }

    /// A store that lives as long as the value, in the system's folder for temporary files.
    pub fn temporary() -> io::Result<Self> {
        let own = tempfile::Builder::new().prefix("dnd-").tempdir()?;
        Ok(Self { folder: own.path().to_owned(), locks: Default::default(), _own: Some(own) })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a whole blob lies, if it is there.
    pub fn path(&self, digest: &str) -> Option<PathBuf> {
        let path = self.folder.join(digest);
        (is_digest(digest) && path.is_file()).then_some(path)
    }

    /// A blob's bytes, if it is there.
    pub async fn get(&self, digest: &str) -> io::Result<Option<Bytes>> {
        match self.path(digest) {
            Some(path) => fs::read(path).await.map(|bytes| Some(bytes.into())),
            None => Ok(None),
        }
    }

    /// Keeps a blob and gives its digest.
    pub async fn put(&self, bytes: Bytes) -> io::Result<String> {
        let folder = self.folder.clone();
        let written = tokio::task::spawn_blocking(move || {
            let digest = digest(&bytes);
            let place = folder.join(&digest);
            if !place.is_file() {
                // Beside its place first: what is there is whole.
                let mut file = tempfile::NamedTempFile::new_in(&folder)?;
                file.write_all(&bytes)?;
                file.persist(place)?;
            }
            Ok(digest)
        });
        written.await.map_err(io::Error::other)?
    }

    fn arriving(&self, digest: &str) -> PathBuf {
        self.folder.join(format!("{digest}.part"))
    }

    /// How many bytes of a blob that is not whole have arrived.
    async fn received(&self, digest: &str) -> u64 {
        fs::metadata(self.arriving(digest)).await.map_or(0, |meta| meta.len())
    }

    /// Takes a piece of an upload; says whether the blob is whole with it. Several callers may upload one blob at a time: what has arrived already is passed
    /// over.
    async fn take(&self, piece: &UploadRequest) -> Result<bool, Fault> {
        let UploadRequest { digest, size, offset, data } = piece;
        if !is_digest(digest) {
            return Err(Fault::field("digest", format!("{digest:?} is not a lower-case hex SHA-256")));
        }
        if data.len() > PIECE_BYTES {
            return Err(Fault::field("data", format!("a piece of {} bytes; at most {PIECE_BYTES} go in one message", data.len())));
        }
        let end = offset.saturating_add(data.len() as u64);
        if end > *size {
            return Err(Fault::field("size", format!("{digest}: a piece ends at {end}, beyond the {size} bytes of the blob")));
        }
        let _alone = self.locks[usize::from(digest.as_bytes()[0]) % self.locks.len()].lock().await;
        if self.path(digest).is_some() {
            return Ok(true);
        }
        let path = self.arriving(digest);
        let mut received = self.received(digest).await;
        if received > *size {
            // Begun as a blob of another size, which it can't have been.
            fs::remove_file(&path).await.map_err(storage)?;
            received = 0;
        }
        if *offset > received {
            return Err(Fault::new(
                Code::FailedPrecondition,
                "UPLOAD_OFFSET",
                format!("{digest}: {received} bytes have arrived, so the next piece starts there, not at {offset}; CheckUploads says where to go on"),
            ));
        }
        let new = data.get((received - offset) as usize..).unwrap_or_default();
        let write = async {
            let mut file = OpenOptions::new().create(true).append(true).open(&path).await?;
            file.write_all(new).await?;
            file.flush().await
        };
        write.await.map_err(storage)?;
        if received + (new.len() as u64) < *size {
            return Ok(false);
        }
        let found = digest_of(&path).await.map_err(storage)?;
        if found != *digest {
            fs::remove_file(&path).await.map_err(storage)?;
            return Err(Fault::new(
                Code::DataLoss,
                "DIGEST_MISMATCH",
                format!("what arrived as {digest} has the digest {found}; it was thrown away, upload it again"),
            ));
        }
        fs::rename(&path, self.folder.join(digest)).await.map_err(storage)?;
        Ok(true)
    }
}

/// The fault for storage that does not work.
pub fn storage(error: io::Error) -> Fault {
    Fault::new(Code::Internal, "STORAGE", format!("the service's storage: {error}"))
}

/// The digest of a file, read piece by piece.
pub async fn digest_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path).await?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read(&mut piece).await? {
            0 => return Ok(hex(&hasher.finalize())),
            read => hasher.update(&piece[..read]),
        }
    }
}

/// Refuses lists of digests that are empty, too long, or hold something else.
pub fn check_digests(digests: &[String]) -> Result<(), Fault> {
    if digests.is_empty() || digests.len() > MAX_DIGESTS {
        return Err(Fault::field("digests", format!("{} digests; 1 to {MAX_DIGESTS} go in one call", digests.len())));
    }
    match digests.iter().position(|d| !is_digest(d)) {
        Some(i) => Err(Fault::field(format!("digests[{i}]"), format!("{:?} is not a lower-case hex SHA-256", digests[i]))),
        None => Ok(()),
    }
}

/// Uploads the named blobs that a service lacks; `path` says where each lies here. A broken upload goes on where it stopped when it is called again.
pub async fn upload(mut service: UploadServiceClient<Balanced>, mut digests: Vec<String>, path: impl Fn(&str) -> Option<PathBuf>) -> Result<(), Fault> {
    digests.sort();
    digests.dedup();
    for some in digests.chunks(MAX_DIGESTS) {
        let missing = service.check_uploads(CheckUploadsRequest { digests: some.to_vec() }).await;
        let missing = missing.map_err(|status| Fault::relayed(&status))?.into_inner().missing;
        if missing.is_empty() {
            continue;
        }
        let files = missing
            .iter()
            .map(|blob| {
                path(&blob.digest).ok_or_else(|| Fault::new(Code::FailedPrecondition, "NOT_UPLOADED", format!("{} is not here to be passed on", blob.digest)))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let (sender, pieces) = mpsc::channel(4);
        let send = async move {
            for (MissingBlob { digest, received }, file) in missing.into_iter().zip(files) {
                send_file(&sender, digest, received, &file)
                    .await
                    .map_err(|e| Fault::new(Code::FailedPrecondition, "UNREADABLE_FILE", format!("{}: {e}", file.display())))?;
            }
            Ok::<_, Fault>(())
        };
        let (sent, taken) = tokio::join!(send, service.upload(ReceiverStream::new(pieces)));
        sent?;
        taken.map_err(|status| Fault::relayed(&status))?;
    }
    Ok(())
}

/// Sends a file piece by piece, from `offset`; ends early if nobody takes the pieces any more.
async fn send_file(sender: &mpsc::Sender<UploadRequest>, digest: String, mut offset: u64, path: &Path) -> io::Result<()> {
    let mut file = File::open(path).await?;
    let size = file.metadata().await?.len();
    file.seek(io::SeekFrom::Start(offset)).await?;
    loop {
        let mut data = vec![0; PIECE_BYTES.min((size - offset.min(size)) as usize)];
        file.read_exact(&mut data).await?;
        let sent = data.len() as u64;
        let piece = UploadRequest { digest: digest.clone(), size, offset, data: data.into() };
        if sender.send(piece).await.is_err() {
            return Ok(());
        }
        offset += sent;
        if offset >= size {
            return Ok(());
        }
    }
}

/// Adds the UploadService of a store.
pub fn add_to(services: Services, blobs: Arc<Blobs>) -> Services {
    services.with(UploadServiceServer::new(Uploads(blobs)).max_decoding_message_size(2 * PIECE_BYTES))
}

#[derive(Debug, Clone)]
struct Uploads(Arc<Blobs>);

#[tonic::async_trait]
impl UploadService for Uploads {
    async fn check_uploads(&self, request: Request<CheckUploadsRequest>) -> Result<Response<CheckUploadsResponse>, Status> {
        let digests = request.into_inner().digests;
        check_digests(&digests)?;
        let mut missing = Vec::new();
        for digest in digests {
            if self.0.path(&digest).is_none() {
                let received = self.0.received(&digest).await;
                missing.push(MissingBlob { digest, received });
            }
        }
        Ok(Response::new(CheckUploadsResponse { missing }))
    }

    async fn upload(&self, request: Request<Streaming<UploadRequest>>) -> Result<Response<UploadResponse>, Status> {
        let mut pieces = request.into_inner();
        let mut arrived = UploadResponse::default();
        while let Some(piece) = pieces.message().await? {
            let whole = self.0.take(&piece).await?;
            arrived.blobs += u32::from(whole);
            arrived.bytes += piece.data.len() as u64;
        }
        Ok(Response::new(arrived))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::InProcess;

    struct Store {
        blobs: Arc<Blobs>,
        client: UploadServiceClient<Balanced>,
        _server: InProcess,
    }

    fn store() -> Store {
        let blobs = Arc::new(Blobs::temporary().unwrap());
        let server = InProcess::start(add_to(Services::default(), Arc::clone(&blobs)));
        Store { blobs, client: UploadServiceClient::new(server.channel().into()), _server: server }
    }

    fn contents() -> Vec<u8> {
        (0..3 * PIECE_BYTES / 2).map(|i| (i * i % 251) as u8).collect()
    }

    fn piece(digest: &str, contents: &[u8], from: usize, to: usize) -> UploadRequest {
        UploadRequest { digest: digest.to_owned(), size: contents.len() as u64, offset: from as u64, data: contents[from..to].to_vec().into() }
    }

    async fn send(store: &Store, pieces: Vec<UploadRequest>) -> Result<UploadResponse, Status> {
        store.client.clone().upload(tokio_stream::iter(pieces)).await.map(Response::into_inner)
    }

    #[tokio::test]
    async fn an_upload_goes_on_where_it_stopped() {
        let store = store();
        let contents = contents();
        let digest = digest(&contents);
        send(&store, vec![piece(&digest, &contents, 0, 1000)]).await.unwrap();
        let missing = store.client.clone().check_uploads(CheckUploadsRequest { digests: vec![digest.clone()] }).await.unwrap().into_inner().missing;
        assert_eq!((missing.len(), missing[0].received), (1, 1000));
        let status = send(&store, vec![piece(&digest, &contents, 5000, 6000)]).await.unwrap_err();
        assert_eq!(crate::fault::reason_of(&status).as_deref(), Some("UPLOAD_OFFSET"));

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &contents).unwrap();
        upload(store.client.clone(), vec![digest.clone()], |_| Some(file.path().to_owned())).await.unwrap();
        assert_eq!(store.blobs.get(&digest).await.unwrap().unwrap(), contents);
        assert!(store.client.clone().check_uploads(CheckUploadsRequest { digests: vec![digest] }).await.unwrap().into_inner().missing.is_empty());
    }

    #[tokio::test]
    async fn several_callers_may_upload_the_same_blobs_at_a_time() {
        let store = store();
        let all: Vec<Vec<u8>> = (0..40u8).map(|i| contents().iter().map(|b| b ^ i).take(1 + 40_000 * usize::from(i)).collect()).collect();
        let folder = tempfile::tempdir().unwrap();
        let digests: Vec<String> = all.iter().map(|contents| digest(contents)).collect();
        for (digest, contents) in digests.iter().zip(&all) {
            std::fs::write(folder.path().join(digest), contents).unwrap();
        }
        let uploads = (0..8).map(|_| upload(store.client.clone(), digests.clone(), |digest| Some(folder.path().join(digest))));
        for uploaded in futures::future::join_all(uploads).await {
            uploaded.unwrap();
        }
        for (digest, contents) in digests.iter().zip(&all) {
            assert_eq!(store.blobs.get(digest).await.unwrap().unwrap(), *contents);
        }
    }

    #[tokio::test]
    async fn what_is_not_what_it_says_is_thrown_away_and_can_be_sent_again() {
        let store = store();
        let contents = contents();
        let digest = digest(&contents);
        let wrong = UploadRequest { digest: digest.clone(), size: 3, offset: 0, data: "abc".into() };
        let status = send(&store, vec![wrong]).await.unwrap_err();
        assert_eq!((status.code(), crate::fault::reason_of(&status).as_deref()), (Code::DataLoss, Some("DIGEST_MISMATCH")));
        assert!(store.blobs.get(&digest).await.unwrap().is_none());
        // Begun with another size, and too long for the right one.
        let long = UploadRequest { digest: digest.clone(), size: 1 << 40, offset: 0, data: contents[..PIECE_BYTES].to_vec().into() };
        let more = UploadRequest { offset: PIECE_BYTES as u64, ..long.clone() };
        send(&store, vec![long, more]).await.unwrap();
        let pieces = vec![piece(&digest, &contents, 0, PIECE_BYTES), piece(&digest, &contents, PIECE_BYTES, contents.len())];
        assert_eq!(send(&store, pieces).await.unwrap().blobs, 1);
        for digest in ["../../etc/passwd", "ABC", ""] {
            let status = send(&store, vec![UploadRequest { digest: digest.to_owned(), size: 1, offset: 0, data: "a".into() }]).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
        }
    }
}
