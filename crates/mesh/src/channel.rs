//! Channels to services: over TCP, or inside the process over memory.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

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
    auth::Bearer,
    balance::{Balanced, Watch},
    tls::{self, ClientTls},
};

/// Bytes that a connection in memory holds before its writer waits.
const DUPLEX_BYTES: usize = 256 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams share a connection's window: one that its caller does not read for a while must not hold up the others, so only streams' own windows count.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// How a client makes its connections, and the token that its calls show.
#[derive(Clone, Default)]
pub struct Dial {
    tls: Option<ClientTls>,
    insecure: bool,
    bearer: Bearer,
}

impl Dial {
    /// Reads the certificates, and the token if there is a file of one. Blocking.
    ///
    /// # Errors
    ///
    /// If a file can't be read, or holds something else.
    pub fn open(args: &TlsArgs, token_file: Option<&Path>) -> Result<Self, Fault> {
        let wrong = |problem: String| Fault::new(Code::FailedPrecondition, "CREDENTIALS", problem);
        Ok(Self { tls: ClientTls::open(args).map_err(wrong)?, insecure: args.insecure, bearer: Bearer::open(token_file).map_err(wrong)? })
    }

    /// A channel to `url`, such as `http://localhost:50051`, or to several with commas between them, once it has been found that somebody is there; an address
    /// without a scheme is taken as `https://` where there is a CA, else as `http://`.
    pub async fn connect(&self, url: &str) -> Result<Balanced, Fault> {
        let channel = self.lazy(url)?;
        channel.connect().await?;
        Ok(channel)
    }

    /// As [`Self::connect`], but it connects with its first call.
    pub fn lazy(&self, url: &str) -> Result<Balanced, Fault> {
        self.watched(url, Watch::default())
    }

    /// As [`Self::lazy`], with replicas watched as is said.
    pub fn watched(&self, url: &str, watch: Watch) -> Result<Balanced, Fault> {
        let names = url.split(',').map(|url| self.name(url.trim())).collect::<Result<_, _>>()?;
        Ok(Balanced::new(names, watch, self.bearer.clone()))
    }

    fn name(&self, url: &str) -> Result<Name, Fault> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let full = if url.contains("://") { url.to_owned() } else { format!("{scheme}://{url}") };
        let invalid =
            |why: String| Fault::new(Code::InvalidArgument, "INVALID_ENDPOINT", format!("{url}: {why}; an endpoint looks like http://localhost:50051"));
        let uri: Uri = full.parse().map_err(|e: http::uri::InvalidUri| invalid(e.to_string()))?;
        let host = uri.host().unwrap_or_default();
        if host.is_empty() {
            return Err(invalid("no host".to_owned()));
        }
        let tls = match uri.scheme_str() {
            Some("https") => {
                let no_ca = || invalid("https needs a CA that the server's certificate is of: say which with --tls-ca".to_owned());
                Some(self.tls.clone().ok_or_else(no_ca)?)
            }
            Some("http") if self.insecure || is_this_machine(host) => None,
            Some("http") => {
                let message = format!("{url}: what is said over http can be read on its way: use https and --tls-ca, or say --insecure");
                return Err(Fault::new(Code::InvalidArgument, "INSECURE", message));
            }
            _ => return Err(invalid("neither http nor https".to_owned())),
        };
        Ok(Name { uri, tls })
    }
}

/// Whether what is sent to a host stays on this machine.
fn is_this_machine(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// What one endpoint names, and what is spoken there.
#[derive(Clone)]
pub(crate) struct Name {
    uri: Uri,
    tls: Option<ClientTls>,
}

impl Name {
    pub(crate) fn host(&self) -> &str {
        self.uri.host().unwrap_or_default().trim_matches(['[', ']'])
    }

    pub(crate) fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(if self.tls.is_some() { 443 } else { 80 })
    }

    /// How one of its addresses is spoken with; it is connected to by [`Self::connector`].
    pub(crate) fn endpoint(&self, address: SocketAddr, watch: Watch) -> Result<Endpoint, Fault> {
        let endpoint = Endpoint::from_shared(format!("{}://{address}", self.uri.scheme_str().unwrap_or("http"))).map_err(|error| nobody(self, &error))?;
        Ok(endpoint
            .origin(self.uri.clone())
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(watch.ping)
            .keep_alive_timeout(watch.ping_timeout))
    }

    /// Connects to an address, in TLS to a server of this name where that is spoken.
    pub(crate) fn connector(&self, address: SocketAddr) -> impl Service<Uri, Response = Io, Error = io::Error, Future: Send> + Send + 'static {
        let name = self.clone();
        service_fn(move |_| {
            let name = name.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                // A connection that can't have it is slower, not wrong.
                let _ = stream.set_nodelay(true);
                Ok(TokioIo::new(match &name.tls {
                    Some(tls) => Either::Right(Box::new(tls.handshake(name.host(), stream).await?)),
                    None => Either::Left(stream),
                }))
            }
        })
    }
}

type Io = TokioIo<Either<TcpStream, Box<TlsStream<TcpStream>>>>;

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

/// Why nobody is there.
pub(crate) fn nobody(name: &Name, error: &(dyn std::error::Error + 'static)) -> Fault {
    let nobody =
        || Fault::new(Code::Unavailable, "NOBODY_THERE", format!("nobody answers at {}: {}", name.uri.to_string().trim_end_matches('/'), innermost(error)));
    tls::client_fault(error).unwrap_or_else(nobody)
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
