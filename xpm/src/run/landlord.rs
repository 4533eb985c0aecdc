//! The holder of the external memory: one process at a time, the first that asks for it. When that process has ended,
//! the memory is for the next one, with keys of another epoch, so that nothing of the earlier one can reach it.

use std::io::{self, IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Notify};
use xpm_control::random;
use xpm_control::token::Token;
use xpm_protocol::ClientId;
use xpm_protocol::api::allocator::{Attach, Map};
use xpm_protocol::api::run::{Account, FELL, MEMORY, NO, Place, Run, YES};

use crate::connect::Daemon;
use crate::output;

/// Longest line that a process sends.
const LINE_MAX: u64 = 4096;
/// How long the one who asks waits for the one who has the memory to end.
const ENDING: Duration = Duration::from_millis(100);
/// How long a process has for its first line.
const FIRST_MAX: Duration = Duration::from_secs(2);

/// The message that grants the memory.
pub(super) struct Terms {
    pub(super) allocator: Daemon,
    /// As the owner of the allocation; each process is a client of its own.
    pub(super) attach: Attach,
    /// Of the first process.
    pub(super) run: Run,
}

/// The process that has the memory.
struct Holder {
    id: i32,
    /// None where the kernel gave none.
    process: Option<OwnedFd>,
}

struct State {
    run: Run,
    /// No process has used the keys yet.
    fresh: bool,
    holder: Option<Holder>,
    /// No further process gets it.
    ended: bool,
    accounts: Vec<(i32, Account)>,
}

/// Gives the memory to one process at a time.
pub(super) struct Landlord {
    place: Place,
    secret: Token,
    allocator: Daemon,
    attach: Attach,
    state: Mutex<State>,
    changed: Notify,
}

impl Landlord {
    /// Begins to listen.
    pub(super) fn start(terms: Terms) -> anyhow::Result<Arc<Landlord>> {
        let socket = format!("xpm-run-{:032x}", random::u128()?);
        let text = format!("{:032x}{:032x}", random::u128()?, random::u128()?);
        let secret = Token::new(&text).context("a secret has no letters")?;
        let threshold = terms.run.threshold.0;
        let listener = StdListener::bind_addr(&SocketAddr::from_abstract_name(&socket)?)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .context("cannot listen to the program")?;
        let listener = UnixListener::from_std(listener).context("cannot listen to the program")?;
        let Terms { allocator, attach, run } = terms;
        let landlord = Arc::new(Landlord {
            place: Place { socket, secret: text, threshold },
            secret,
            allocator,
            attach,
            state: Mutex::new(State { run, fresh: true, holder: None, ended: false, accounts: Vec::new() }),
            changed: Notify::new(),
        });
        tokio::spawn(landlord.clone().listen(listener));
        Ok(landlord)
    }

    /// Where processes ask.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    async fn listen(self: Arc<Landlord>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(self.clone().serve(stream))),
                // No descriptor just now.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn serve(self: Arc<Landlord>, stream: UnixStream) {
        let id = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
        let mut stream = BufReader::new(stream);
        let Ok(Some(line)) = tokio::time::timeout(FIRST_MAX, next_line(&mut stream)).await else { return };
        let Some((secret, wanted)) = line.split_once(' ') else { return };
        if !self.secret.matches(secret.as_bytes()) {
            return;
        }
        match wanted.split_once(' ') {
            None if wanted == MEMORY => self.lend(id, stream).await,
            Some((FELL, address)) => output::warn(&format!(
                "process {id} is a child of fork(2) and touched external memory of its parent, at 0x{address}: children do not \
                 get that, so it ends by SIGSEGV; see \"fork\" in docs/mapping.md"
            )),
            _ => {}
        }
    }

    /// Gives the memory to a process until the connection ends.
    async fn lend(&self, id: i32, mut stream: BufReader<UnixStream>) {
        if !self.hand_over(id, stream.get_ref()).await {
            return;
        }
        let mut last = Account::default();
        while let Some(line) = next_line(&mut stream).await {
            let Ok(account) = serde_json::from_str::<Account>(&line) else { continue };
            if let Some(why) = &account.failed {
                let program = &account.program;
                output::warn(&format!("{program} ({id}) goes on without external memory: {why}"));
            }
            last = account;
        }
        let mut state = self.state.lock().await;
        state.holder = None;
        state.accounts.push((id, last));
        self.changed.notify_waiters();
    }

    async fn hand_over(&self, id: i32, stream: &UnixStream) -> bool {
        if self.holder().await.is_some() {
            // It may be the parent of a daemon, which is just ending.
            let _ = tokio::time::timeout(ENDING, self.changed.notified()).await;
        }
        let mut state = self.state.lock().await;
        let free = state.holder.is_none() && !state.ended;
        if free
            && !state.fresh
            && let Err(error) = self.renew(&mut state).await
        {
            output::warn(&format!("process {id} gets no external memory: {error:#}"));
            let _ = send(stream, NO, &[]).await;
            return false;
        }
        if !free {
            let _ = send(stream, NO, &[]).await;
            return false;
        }
        let given = give(stream, &state.run).await;
        if given.is_ok() {
            state.fresh = false;
            let process = Pid::from_raw(id).and_then(|id| pidfd_open(id, PidfdFlags::empty()).ok());
            state.holder = Some(Holder { id, process });
        }
        given.is_ok()
    }

    /// Becomes another owner, which shuts out whatever the last process has on its way.
    async fn renew(&self, state: &mut State) -> anyhow::Result<()> {
        self.disown(state.run.client, &state.run).await;
        let client = ClientId::from_u128(random::u128()?);
        let attach = Attach { client, ..self.attach.clone() };
        let path = format!("/v1/allocations/{}/owner", state.run.map.name);
        let map: Map = self.allocator.put(&path, &attach).await?;
        (state.run.map, state.run.client, state.fresh) = (map, client, true);
        Ok(())
    }

    async fn disown(&self, client: ClientId, run: &Run) {
        // It may not be the owner any more.
        let _ = self.allocator.delete(&format!("/v1/allocations/{}/owner/{client}", run.map.name)).await;
    }

    /// The process that has the memory now.
    pub(super) async fn holder(&self) -> Option<i32> {
        self.state.lock().await.holder.as_ref().map(|holder| holder.id)
    }

    /// Waits until something has changed, or for a moment.
    pub(super) async fn changed(&self) {
        let _ = tokio::time::timeout(Duration::from_millis(500), self.changed.notified()).await;
    }

    /// Passes a signal on to the process that has the memory.
    pub(super) async fn signal(&self, signal: Signal) {
        if let Some(Holder { process: Some(process), .. }) = &self.state.lock().await.holder {
            let _ = pidfd_send_signal(process, signal);
        }
    }

    /// Gives ownership back. The used memory, by process.
    pub(super) async fn end(&self) -> Vec<(i32, Account)> {
        let mut state = self.state.lock().await;
        state.ended = true;
        self.disown(state.run.client, &state.run).await;
        std::mem::take(&mut state.accounts)
    }
}

async fn next_line(stream: &mut BufReader<UnixStream>) -> Option<String> {
    let mut line = String::new();
    let read = stream.take(LINE_MAX).read_line(&mut line).await.ok()?;
    (read > 0 && line.ends_with('\n')).then(|| line.trim_end().to_owned())
}

/// Keys go by a file without a name: neither the environment nor the command line is for these.
async fn give(stream: &UnixStream, run: &Run) -> io::Result<()> {
    let mut file = std::fs::File::from(memfd_create("xpm-run", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(run)?)?;
    let messages = io::stderr();
    send(stream, YES, &[file.as_fd(), messages.as_fd()]).await
}

async fn send(stream: &UnixStream, byte: u8, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            sendmsg(stream, &[IoSlice::new(&[byte])], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        })
        .await
}
