//! Serves 512 MiB of this process's memory at a unix socket, and also over TCP if a second argument names an
//! address: the server engine alone, for measuring it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{Memory, MemoryExports};
use xpm_transport::nbd::server::{Server, ServerOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const SIZE: u64 = 512 << 20;
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: memory_server SOCKET [ADDRESS:PORT]")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _guard = runtime.enter();
    let server = Server::start(ServerOptions { buffers_len: 4 << 20, ..ServerOptions::default() })?;
    let memory = Memory::new(SIZE as usize);
    let exports = Arc::new(MemoryExports { memory, size: SIZE, alive: Arc::new(AtomicBool::new(true)) });
    let unix = std::os::unix::net::UnixListener::bind(path)?;
    let _unix = server.listen_unix(unix, exports.clone())?;
    let _tcp = match arguments.next() {
        Some(address) => Some(server.listen_tcp(std::net::TcpListener::bind(address)?, exports)?),
        None => None,
    };
    loop {
        std::thread::park();
    }
}
