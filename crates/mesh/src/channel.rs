//! Channels to services: over TCP, or inside the process over memory.

use std::{io, net::IpAddr, time::Duration};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, net::TcpStream, sync::mpsc};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tower::{Service, service_fn};

use crate::{
    Fault,
    args::TlsArgs,
    tls::{self, ClientTls},
};

/// Bytes that a connection in memory holds before its writer waits.
const DUPLEX_BYTES: usize = 256 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams share a connection's window: one that its caller does not read for a while must not hold up the others, so only streams' own windows count.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// How a client makes its connections.
#[derive(Clone, Default)]
pub struct Dial {
    tls: Option<ClientTls>,
    insecure: bool,
}

impl Dial {
    /// Reads the certificates. Blocking.
    ///
    /// # Errors
    ///
    /// If a file can't be read, or holds something else.
    pub fn open(args: &TlsArgs) -> Result<Self, Fault> {
        let tls = ClientTls::open(args).map_err(|problem| Fault::new(Code::FailedPrecondition, "CREDENTIALS", problem))?;
        Ok(Self { tls, insecure: args.insecure })
    }

    /// Connects to `url`, such as `http://localhost:50051`; an address without a scheme is taken as `https://` where there is a CA, else as `http://`.
    pub async fn connect(&self, url: &str) -> Result<Channel, Fault> {
        let nobody = |error: tonic::transport::Error| {
            tls::client_fault(&error)
                .unwrap_or_else(|| Fault::new(Code::Unavailable, "NOBODY_THERE", format!("nobody answers at {url}: {}", innermost(&error))))
        };
        let endpoint = self.endpoint(url)?;
        let connector = self.connector(endpoint.uri().host().unwrap_or_default());
        endpoint.connect_with_connector(connector).await.map_err(nobody)
    }

    /// A channel to `url` that connects with its first call, and again after a loss.
    pub fn lazy(&self, url: &str) -> Result<Channel, Fault> {
        let endpoint = self.endpoint(url)?;
        let connector = self.connector(endpoint.uri().host().unwrap_or_default());
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    fn endpoint(&self, url: &str) -> Result<Endpoint, Fault> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let full = if url.contains("://") { url.to_owned() } else { format!("{scheme}://{url}") };
        let invalid =
            |why: String| Fault::new(Code::InvalidArgument, "INVALID_ENDPOINT", format!("{url}: {why}; an endpoint looks like http://localhost:50051"));
        let endpoint = Endpoint::from_shared(full).map_err(|e| invalid(e.to_string()))?;
        let host = endpoint.uri().host().unwrap_or_default();
        if host.is_empty() {
            return Err(invalid("no host".to_owned()));
        }
        match endpoint.uri().scheme_str() {
            Some("https") if self.tls.is_none() => {
                return Err(invalid("https needs a CA that the server's certificate is of: say which with --tls-ca".to_owned()));
            }
            Some("http") if !self.insecure && !is_this_machine(host) => {
                let message = format!("{url}: what is said over http can be read on its way: use https and --tls-ca, or say --insecure");
                return Err(Fault::new(Code::InvalidArgument, "INSECURE", message));
            }
            Some("http" | "https") => {}
            _ => return Err(invalid("neither http nor https".to_owned())),
        }
        Ok(endpoint.initial_connection_window_size(CONNECTION_WINDOW).connect_timeout(CONNECT_TIMEOUT).http2_keep_alive_interval(Duration::from_secs(30)))
    }

    /// Makes connections to a server of that name, in TLS for `https`.
    fn connector(
        &self,
        name: &str,
    ) -> impl Service<Uri, Response = TokioIo<Either<TcpStream, Box<TlsStream<TcpStream>>>>, Error = io::Error, Future: Send> + Clone + Send + 'static {
        let (tls, name) = (self.tls.clone(), name.trim_matches(['[', ']']).to_owned());
        service_fn(move |uri: Uri| {
            let (tls, name) = (tls.clone(), name.clone());
            async move {
                let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
                let tls = tls.filter(|_| uri.scheme_str() == Some("https"));
                let port = uri.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
                let stream = TcpStream::connect((host, port)).await?;
                // A connection that can't have it is slower, not wrong.
                let _ = stream.set_nodelay(true);
                Ok(TokioIo::new(match tls {
                    Some(tls) => Either::Right(Box::new(tls.handshake(&name, stream).await?)),
                    None => Either::Left(stream),
                }))
            }
        })
    }
}

/// Whether what is sent to a host stays on this machine.
fn is_this_machine(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// The connecting end of a network inside the process.
#[derive(Debug, Clone)]
pub struct Dialer(mpsc::Sender<io::Result<DuplexStream>>);

/// The accepting end: a stream of connections for [`crate::server::serve_on`].
pub type Accepted = tokio_stream::wrappers::ReceiverStream<io::Result<DuplexStream>>;

/// A network inside the process: the same servers and the same messages, no ports.
pub fn in_memory() -> (Dialer, Accepted) {
    let (sender, receiver) = mpsc::channel(16);
    (Dialer(sender), receiver.into())
}

impl Dialer {
    /// A channel to the server at the accepting end. It connects with its first call.
    pub fn channel(&self) -> Channel {
        let dialer = self.0.clone();
        let connector = service_fn(move |_| {
            let dialer = dialer.clone();
            async move {
                let (here, there) = tokio::io::duplex(DUPLEX_BYTES);
                dialer.send(Ok(there)).await.map_err(|_| io::Error::other("the server in this process has stopped"))?;
                Ok::<_, io::Error>(TokioIo::new(here))
            }
        });
        Endpoint::from_static("http://in-memory").initial_connection_window_size(CONNECTION_WINDOW).connect_with_connector_lazy(connector)
    }
}
