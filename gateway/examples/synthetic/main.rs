//! The gateway over an orchestrator that makes everything up: for work on the pages, and for their tests.
//!
//!     cargo run -p dnd-gateway --example synthetic -- 127.0.0.1:8090 26000

mod fake;

use std::env;

use dnd_gateway::{GatewayArgs, MAX_UPLOAD_MIB, serve};
use dnd_mesh::args::TlsArgs;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = env::args().skip(1);
    let listen = args.next().unwrap_or_else(|| "127.0.0.1:8090".to_owned()).parse()?;
    let units = args.next().map_or(Ok(26_000), |units| units.parse())?;
    let port_file = args.next().map(Into::into);
    let mesh = fake::start(units)?;
    let args = GatewayArgs { listen, admin: None, grace: 1, port_file, tls: TlsArgs::default(), max_upload_mib: MAX_UPLOAD_MIB };
    serve(&args, mesh.channel().into()).await?;
    Ok(())
}
