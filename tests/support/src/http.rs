use std::net::TcpListener;

use axum::Router;
use tokio::runtime::Runtime;

/// An HTTP server on a free port of this machine, on a thread of its own; it ends with this value.
pub struct HttpServer {
    address: String,
    runtime: Option<Runtime>,
}

impl HttpServer {
    /// Starts serving.
    pub fn start(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        listener.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move { axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), router).await.unwrap() });
        Self { address, runtime: Some(runtime) }
    }

    /// Where it listens, such as `127.0.0.1:40000`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
