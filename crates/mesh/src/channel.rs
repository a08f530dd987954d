//! Channels to services: over TCP, or inside the process over memory.

use std::{io, net::SocketAddr, time::Duration};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use crate::{
    Fault,
    balance::{Balanced, Watch},
};

/// Bytes that a connection in memory holds before its writer waits.
const DUPLEX_BYTES: usize = 256 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams share a connection's window: one that its caller does not read for a while must not hold up the others, so only streams' own windows count.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// A channel to `url`, such as `http://localhost:50051`, or to several with commas between them, once it has been found that somebody is there; an address
/// without a scheme is taken as `http://`.
pub async fn connect(url: &str) -> Result<Balanced, Fault> {
    let channel = lazy(url)?;
    channel.connect().await?;
    Ok(channel)
}

/// As [`connect`], but it connects with its first call.
pub fn lazy(url: &str) -> Result<Balanced, Fault> {
    watched(url, Watch::default())
}

/// As [`lazy`], with replicas watched as is said.
pub fn watched(url: &str, watch: Watch) -> Result<Balanced, Fault> {
    let names = url.split(',').map(|url| Name::new(url.trim())).collect::<Result<_, _>>()?;
    Ok(Balanced::new(names, watch))
}

/// What one endpoint names.
#[derive(Debug, Clone)]
pub(crate) struct Name(Uri);

impl Name {
    fn new(url: &str) -> Result<Self, Fault> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let invalid =
            |why: String| Fault::new(Code::InvalidArgument, "INVALID_ENDPOINT", format!("{url}: {why}; an endpoint looks like http://localhost:50051"));
        let uri: Uri = full.parse().map_err(|e: http::uri::InvalidUri| invalid(e.to_string()))?;
        if uri.host().is_none_or(str::is_empty) {
            return Err(invalid("no host".to_owned()));
        }
        Ok(Self(uri))
    }

    pub(crate) fn host(&self) -> &str {
        self.0.host().unwrap_or_default().trim_matches(['[', ']'])
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.port_u16().unwrap_or(if self.0.scheme_str() == Some("https") { 443 } else { 80 })
    }

    /// How one of its addresses is connected to.
    pub(crate) fn endpoint(&self, address: SocketAddr, watch: Watch) -> Result<Endpoint, Fault> {
        let endpoint = Endpoint::from_shared(format!("{}://{address}", self.0.scheme_str().unwrap_or("http"))).map_err(|error| nobody(self, &error))?;
        Ok(endpoint
            .origin(self.0.clone())
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(watch.ping)
            .keep_alive_timeout(watch.ping_timeout))
    }
}

/// Why nobody is there.
pub(crate) fn nobody(name: &Name, error: &dyn std::error::Error) -> Fault {
    Fault::new(Code::Unavailable, "NOBODY_THERE", format!("nobody answers at {}: {}", name.0.to_string().trim_end_matches('/'), innermost(error)))
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
        Endpoint::from_static("http://in-memory").initial_connection_window_size(CONNECTION_WINDOW).connect_with_connector_lazy(service_fn(move |_| {
            let dialer = dialer.clone();
            async move {
                let (here, there) = tokio::io::duplex(DUPLEX_BYTES);
                dialer.send(Ok(there)).await.map_err(|_| io::Error::other("the server in this process has stopped"))?;
                Ok::<_, io::Error>(TokioIo::new(here))
            }
        }))
    }
}
