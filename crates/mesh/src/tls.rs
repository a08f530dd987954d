//! TLS between services: who listens shows a certificate and asks for one, who calls does the same.
//!
//! tonic's own TLS reads its files once; certificates of a cluster live for hours. So connections are made and taken here, with what the files hold at the time.

use std::{
    error::Error as StdError,
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector, client,
    rustls::{
        self, ClientConfig, RootCertStore, ServerConfig,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
        server::WebPkiClientVerifier,
    },
    server,
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::either::Either;
use tonic::{Code, transport::server::Connected};
use tracing::{debug, warn};

use crate::{Fault, args::TlsArgs, auth::refused, channel, reloaded::Reloaded};

/// Handshakes that go on at a time; further connections wait.
const HANDSHAKES: usize = 64;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The protocol of gRPC, as TLS calls it.
const H2: &[u8] = b"h2";
const HTTP_1: &[u8] = b"http/1.1";

/// Whether a client may come without a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificate {
    /// It may not.
    Required,
    /// It may: its calls show tokens.
    Optional,
}

/// Takes connections: with TLS, or as they are.
#[derive(Clone)]
pub struct Acceptor(Option<Arc<Reloaded<ServerConfig>>>);

impl Acceptor {
    /// Reads the certificate, the key, and the CA that clients' certificates are of. Without certificate and key connections are taken in the clear.
    ///
    /// # Errors
    ///
    /// If a file can't be read, or holds something else.
    pub fn open(args: &TlsArgs, clients: ClientCertificate) -> Result<Self, String> {
        let (Some(cert), Some(key)) = (&args.tls_cert, &args.tls_key) else { return Ok(Self(None)) };
        let files: Vec<_> = [cert, key].into_iter().chain(&args.tls_ca).cloned().collect();
        let names = files.clone();
        let make = move |contents: &[Vec<u8>]| {
            let (chain, key) = identity(&names, contents)?;
            let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
            let builder = match contents.get(2) {
                None => builder.with_no_client_auth(),
                Some(ca) => {
                    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(&names[2], ca)?), provider());
                    let verifier = if clients == ClientCertificate::Optional { verifier.allow_unauthenticated() } else { verifier };
                    builder.with_client_cert_verifier(verifier.build().map_err(|e| format!("{}: {e}", names[2].display()))?)
                }
            };
            let mut config = builder.with_single_cert(chain, key).map_err(|e| format!("{} and {}: {e}", names[0].display(), names[1].display()))?;
            // What browsers and their like fall back to, of which the gateway takes both.
            config.alpn_protocols = vec![H2.to_vec(), HTTP_1.to_vec()];
            Ok(config)
        };
        Ok(Self(Some(Arc::new(Reloaded::open(files, make)?))))
    }

    /// Looks at the files for each connection.
    #[cfg(test)]
    pub(crate) fn always(self) -> Self {
        Self(self.0.map(|tls| Arc::new(Arc::into_inner(tls).unwrap().always())))
    }

    /// The connections that come in. One that fails its handshake is logged, counted and dropped; no other waits for it.
    pub fn incoming(self, listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> {
        TcpListenerStream::new(listener)
            .map(move |accepted| {
                let tls = self.0.clone();
                async move {
                    match accepted {
                        Ok(stream) => take(tls, stream).await.map(Ok),
                        Err(error) => Some(Err(error)),
                    }
                }
            })
            .buffer_unordered(HANDSHAKES)
            .filter_map(std::future::ready)
    }
}

async fn take(tls: Option<Arc<Reloaded<ServerConfig>>>, stream: TcpStream) -> Option<Connection> {
    let address = stream.peer_addr().ok();
    // A connection that can't have it is slower, not wrong.
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return Some(Connection { stream: Either::Left(stream), peer: Peer { address, names: Arc::default() } }) };
    let handshake = TlsAcceptor::from(tls.current().await).accept(stream);
    let error = match timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => {
            let names = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names).unwrap_or_default();
            return Some(Connection { stream: Either::Right(Box::new(stream)), peer: Peer { address, names: names.into() } });
        }
        Ok(Err(error)) => error,
        Err(_) => io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"),
    };
    if error.kind() == io::ErrorKind::UnexpectedEof || error.kind() == io::ErrorKind::ConnectionReset {
        // Who only looks whether the port is open.
        debug!(?address, "a connection ended before its TLS handshake");
        return None;
    }
    let reason = match tls_error(&error) {
        Some(rustls::Error::NoCertificatesPresented) => "NO_CLIENT_CERTIFICATE",
        Some(rustls::Error::InvalidCertificate(_)) => "CLIENT_CERTIFICATE",
        _ => "TLS_HANDSHAKE",
    };
    refused(reason);
    warn!(?address, reason, "refused a connection: {error}");
    None
}

/// The names that a certificate is for: DNS names and URIs.
fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    certificate.valid_dns_names().chain(certificate.valid_uri_names()).map(str::to_owned).collect()
}

/// Who is at the other end of a connection; calls have it among their extensions.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// Its address, where there is one.
    pub address: Option<SocketAddr>,
    /// The names of its certificate, if it has shown one.
    pub names: Arc<[String]>,
}

/// A connection that was taken.
#[derive(Debug)]
pub struct Connection {
    stream: Either<TcpStream, Box<server::TlsStream<TcpStream>>>,
    peer: Peer,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// What a client connects with.
#[derive(Clone)]
pub(crate) struct ClientTls(Arc<Reloaded<ClientConfig>>);

impl ClientTls {
    /// Reads the CA that servers' certificates are of, and the client's own certificate and key, if it has any. None without a CA.
    pub(crate) fn open(args: &TlsArgs) -> Result<Option<Self>, String> {
        let Some(ca) = &args.tls_ca else { return Ok(None) };
        let own = args.tls_cert.iter().chain(&args.tls_key);
        let files: Vec<_> = own.chain([ca]).cloned().collect();
        let names = files.clone();
        let make = move |contents: &[Vec<u8>]| {
            let (Some(name), Some(ca)) = (names.last(), contents.last()) else { return Err("no CA".to_owned()) };
            let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
            let builder = builder.with_root_certificates(roots(name, ca)?);
            let mut config = if names.len() < 3 {
                builder.with_no_client_auth()
            } else {
                let (chain, key) = identity(&names, contents)?;
                builder.with_client_auth_cert(chain, key).map_err(|e| format!("{} and {}: {e}", names[0].display(), names[1].display()))?
            };
            config.alpn_protocols = vec![H2.to_vec()];
            Ok(config)
        };
        Ok(Some(Self(Arc::new(Reloaded::open(files, make)?))))
    }

    /// The TLS end of a connection to a server of that name.
    pub(crate) async fn handshake(&self, name: &str, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let handshake = TlsConnector::from(self.0.current().await).connect(name, stream);
        timeout(HANDSHAKE, handshake).await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))?
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A chain of certificates and its key, of the first two files. What can't be read is not repeated: it may be a key.
fn identity(names: &[impl AsRef<Path>], contents: &[Vec<u8>]) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
    let [cert, key, ..] = contents else { return Err("no certificate and key".to_owned()) };
    let chain = certificates(names[0].as_ref(), cert)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| format!("{}: no private key in PEM", names[1].as_ref().display()))?;
    Ok((chain, key))
}

fn certificates(name: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| format!("{}: not in PEM", name.display()))?;
    if chain.is_empty() { Err(format!("{}: no certificate in PEM", name.display())) } else { Ok(chain) }
}

fn roots(name: &Path, pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(name, pem)? {
        roots.add(certificate).map_err(|e| format!("{}: {e}", name.display()))?;
    }
    Ok(roots)
}

/// The error of TLS behind another.
fn tls_error<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e rustls::Error> {
    if let Some(found) = error.downcast_ref::<rustls::Error>() {
        return Some(found);
    }
    // An io::Error is no source of what it wraps.
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref).map(|inner| inner as &(dyn StdError + 'static));
    inner.or_else(|| error.source()).and_then(tls_error)
}

/// What a client's failed connection, or the first call on it, tells, if TLS ended it.
pub(crate) fn client_fault(error: &(dyn StdError + 'static)) -> Option<Fault> {
    let (reason, message) = match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(problem)) => {
            ("SERVER_CERTIFICATE", format!("the server's certificate is not trusted: {problem}; --tls-ca names the CA that it must be of"))
        }
        Some(rustls::Error::AlertReceived(alert)) => alerted(&format!("{alert:?}")),
        Some(other) => ("TLS_HANDSHAKE", format!("no TLS connection: {other}; is the server one that speaks TLS?")),
        // In TLS 1.3 a server refuses a client after the client's part of the handshake; HTTP/2 then keeps no more of the error than its text.
        None => alerted(channel::innermost(error).strip_prefix("received fatal alert: ")?),
    };
    Some(Fault::new(Code::Unauthenticated, reason, message))
}

/// A server's refusal, by the alert that it sent.
fn alerted(alert: &str) -> (&'static str, String) {
    if alert == "CertificateRequired" {
        ("NO_CLIENT_CERTIFICATE", "the server asks for a certificate: say which with --tls-cert and --tls-key".to_owned())
    } else {
        ("CLIENT_CERTIFICATE", format!("the server does not take this client's certificate ({alert})"))
    }
}
