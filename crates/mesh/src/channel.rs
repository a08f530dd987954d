//! Channels to services: over TCP, or inside the process over memory.

use std::{io, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use crate::Fault;

/// Bytes that a connection in memory holds before its writer waits.
const DUPLEX_BYTES: usize = 256 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams share a connection's window: one that its caller does not read for a while must not hold up the others, so only streams' own windows count.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Connects to `url`, such as `http://localhost:50051`; an address without a scheme is taken as `http://`.
pub async fn connect(url: &str) -> Result<Channel, Fault> {
    let nobody = |error: tonic::transport::Error| Fault::new(Code::Unavailable, "NOBODY_THERE", format!("nobody answers at {url}: {}", innermost(&error)));
    endpoint(url)?.connect().await.map_err(nobody)
}

/// A channel to `url` that connects with its first call, and again after a loss.
pub fn lazy(url: &str) -> Result<Channel, Fault> {
    endpoint(url).map(|endpoint| endpoint.connect_lazy())
}

fn endpoint(url: &str) -> Result<Endpoint, Fault> {
    let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let invalid = |why: String| Fault::new(Code::InvalidArgument, "INVALID_ENDPOINT", format!("{url}: {why}; an endpoint looks like http://localhost:50051"));
    let endpoint = Endpoint::from_shared(full).map_err(|e| invalid(e.to_string()))?;
    if endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(invalid("no host".to_owned()));
    }
    Ok(endpoint
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30)))
}

fn innermost(error: &dyn std::error::Error) -> String {
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
