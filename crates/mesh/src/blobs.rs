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
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, transport::Channel};

use crate::{Fault, server::Services};

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
    /// Deletes the folder with the store, where it is the store's own.
    _own: Option<TempDir>,
}

impl Blobs {
    /// A store in a folder, which is made if it is not there.
    pub fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned(), _own: None })
    }

    /// A store that lives as long as the value, in the system's folder for temporary files.
    pub fn temporary() -> io::Result<Self> {
        let own = tempfile::Builder::new().prefix("dnd-").tempdir()?;
        Ok(Self { folder: own.path().to_owned(), _own: Some(own) })
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

    /// Takes a piece of an upload; says whether the blob is whole with it.
    async fn take(&self, piece: &UploadRequest, field: &str) -> Result<bool, Fault> {
        let UploadRequest { digest, size, offset, data } = piece;
        if !is_digest(digest) {
            return Err(Fault::field(format!("{field}.digest"), format!("{digest:?} is not a lower-case hex SHA-256")));
        }
        if data.len() > PIECE_BYTES {
            return Err(Fault::field(format!("{field}.data"), format!("a piece of {} bytes; at most {PIECE_BYTES} go in one message", data.len())));
        }
        if self.path(digest).is_some() {
            return Ok(true);
        }
        let received = self.received(digest).await;
        if *offset != received {
            return Err(Fault::new(
                Code::FailedPrecondition,
                "UPLOAD_OFFSET",
                format!("{digest}: {received} bytes have arrived, so the next piece starts there, not at {offset}; CheckUploads says where to go on"),
            ));
        }
        let whole = received + data.len() as u64;
        if whole > *size {
            return Err(Fault::field(format!("{field}.size"), format!("{digest}: {whole} bytes have arrived of a blob of {size}")));
        }
        let path = self.arriving(digest);
        let write = async {
            let mut file = OpenOptions::new().create(true).append(true).open(&path).await?;
            file.write_all(data).await?;
            file.flush().await
        };
        write.await.map_err(storage)?;
        if whole < *size {
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
pub async fn upload(mut service: UploadServiceClient<Channel>, mut digests: Vec<String>, path: impl Fn(&str) -> Option<PathBuf>) -> Result<(), Fault> {
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
            .map(|blob| path(&blob.digest).ok_or_else(|| Fault::internal(format!("{} is not here to be uploaded", blob.digest))))
            .collect::<Result<Vec<_>, _>>()?;
        let (sender, pieces) = mpsc::channel(4);
        let send = async move {
            for (MissingBlob { digest, received }, file) in missing.into_iter().zip(files) {
                send_file(&sender, digest, received, &file).await?;
            }
            Ok(())
        };
        let (sent, taken) = tokio::join!(send, service.upload(ReceiverStream::new(pieces)));
        taken.map_err(|status| Fault::relayed(&status))?;
        sent.map_err(storage)?;
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
            let whole = self.0.take(&piece, "upload").await?;
            arrived.blobs += u32::from(whole);
            arrived.bytes += piece.data.len() as u64;
        }
        Ok(Response::new(arrived))
    }
}
