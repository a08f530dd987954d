//! A network between two processes that can be cut.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
};

/// Forwards connections to an address, as long as it is not told otherwise.
pub struct Proxy {
    address: SocketAddr,
    line: Arc<Line>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// Connections end, and new ones with them.
    Cut,
    /// Connections are there, and nothing arrives.
    Silent,
    /// Nobody holds the proxy any more.
    Over,
}

struct Line {
    to: String,
    state: Mutex<(Way, Vec<TcpStream>)>,
    changed: Condvar,
}

impl Proxy {
    /// One that listens on a free port and forwards to `to`.
    pub fn start(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let line = Arc::new(Line { to: to.to_owned(), state: Mutex::new((Way::Open, Vec::new())), changed: Condvar::new() });
        let accepting = Arc::clone(&line);
        thread::spawn(move || {
            for from in listener.incoming().map_while(Result::ok) {
                if accepting.state.lock().unwrap().0 == Way::Over {
                    return;
                }
                let line = Arc::clone(&accepting);
                thread::spawn(move || drop(line.connect(from)));
            }
        });
        Self { address, line }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections, and each new one at once.
    pub fn cut(&self) {
        self.line.set(Way::Cut);
    }

    /// Keeps connections, takes new ones, and forwards nothing until it heals.
    pub fn silence(&self) {
        self.line.set(Way::Silent);
    }

    /// Forwards again, and what was held back first.
    pub fn heal(&self) {
        self.line.set(Way::Open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.line.set(Way::Over);
        // The thread that accepts sees it with the next connection.
        let _ = TcpStream::connect(self.address);
    }
}

impl Line {
    fn set(&self, way: Way) {
        let mut state = self.state.lock().unwrap();
        state.0 = way;
        if matches!(way, Way::Cut | Way::Over) {
            for stream in state.1.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.changed.notify_all();
    }

    /// Waits until something may pass; not after a cut.
    fn pass(&self) -> io::Result<()> {
        let state = self.changed.wait_while(self.state.lock().unwrap(), |state| state.0 == Way::Silent).unwrap();
        if state.0 == Way::Open { Ok(()) } else { Err(io::ErrorKind::ConnectionReset.into()) }
    }

    fn connect(self: Arc<Self>, from: TcpStream) -> io::Result<()> {
        self.pass()?;
        let to = TcpStream::connect(&self.to)?;
        self.state.lock().unwrap().1.extend([from.try_clone()?, to.try_clone()?]);
        let (line, back) = (Arc::clone(&self), (to.try_clone()?, from.try_clone()?));
        thread::spawn(move || line.forward(back.0, back.1));
        self.forward(from, to);
        Ok(())
    }

    fn forward(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = [0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if self.pass().is_err() || to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        for stream in [from, to] {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
