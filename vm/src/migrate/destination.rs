//! The destination of a migration: `xpm vm receive`.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, UnixStream};
use tokio::process::ChildStdin;
use tokio::sync::{Semaphore, mpsc};
use xpm_control::listen::Place as Listen;
use xpm_control::token::Token;
use xpm_protocol::Name;

use crate::Error;
use crate::hot;
use crate::machine::{Guarded, version_text};
use crate::migrate::tunnel;
use crate::migrate::wire::{Answer, Conn, OPEN_LIMIT, Offer, Opening, Order, Purpose, STEP_LIMIT, VERSION};
use crate::ownership::Heirs;
use crate::place::Stage;
use crate::qmp::Qmp;
use crate::verbs::Way;

/// Most connections that have not stated their purpose yet.
const OPENING_MAX: usize = 16;
/// How long the source can ask for the outcome of an attempt that failed late.
const LINGER: Duration = Duration::from_secs(15);

/// The listener at which machines arrive.
pub struct Door {
    visits: mpsc::Receiver<Visit>,
    address: SocketAddr,
}

/// A connection that showed the token and stated its purpose.
struct Visit {
    conn: Conn,
    purpose: Purpose,
}

impl Door {
    /// Starts to listen.
    ///
    /// # Errors
    /// When the address cannot be used, or other hosts can reach it and there is no token.
    pub async fn open(at: SocketAddr, token: Option<Token>) -> Result<Door, Error> {
        let exposed = Listen::Tcp(at).check_exposure(token.is_some(), false);
        exposed.map_err(|error| {
            // The daemons' error text names an option that this command does not have.
            Error::Usage(error.to_string().replace(", or accept it with --insecure", ""))
        })?;
        let cannot = |why: std::io::Error| Error::Machine(format!("cannot listen at {at}: {why}"));
        let listener = TcpListener::bind(at).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let (sender, visits) = mpsc::channel(OPENING_MAX);
        tokio::spawn(accept(listener, token, sender));
        Ok(Door { visits, address })
    }

    /// The address at which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Accepts connections and reads the purpose of each.
async fn accept(listener: TcpListener, token: Option<Token>, visits: mpsc::Sender<Visit>) {
    let places = Arc::new(Semaphore::new(OPENING_MAX));
    loop {
        let Ok(permit) = places.clone().acquire_owned().await else { return };
        let Ok((stream, peer)) = listener.accept().await else {
            // For example, no descriptors are left; some may be free soon.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (token, visits) = (token.clone(), visits.clone());
        tokio::spawn(async move {
            let mut conn = Conn::new(stream, peer);
            let Ok(opening) = conn.receive::<Opening>(OPEN_LIMIT).await else { return };
            drop(permit);
            match refusal(&opening, token.as_ref()) {
                Some(why) => drop(conn.send(&Answer::Refused { why }).await),
                None => drop(visits.send(Visit { conn, purpose: opening.purpose }).await),
            }
        });
    }
}

fn refusal(opening: &Opening, token: Option<&Token>) -> Option<String> {
    let shown = opening.token.as_deref().unwrap_or_default();
    if token.is_some_and(|token| !token.matches(shown.as_bytes())) {
        return Some("the token is not the one of this host: give --token-file".to_owned());
    }
    (opening.version != VERSION).then(|| {
        format!(
            "it speaks version {} of the messages and this host {VERSION}: install the same xpm",
            opening.version
        )
    })
}

/// Waits for a machine and takes it over. `heirs` are the clients of this host that stand by. `waiting` is called
/// once, when a machine can arrive. Returns when the machine is here; later questions of the source about the machine
/// are answered for as long as the runtime lives.
///
/// # Errors
/// When an attempt failed. Then the machine is not here and never will be, and its QEMU here has ended.
pub async fn receive(
    guarded: Guarded,
    mut qmp: Qmp,
    mut door: Door,
    heirs: Heirs,
    waiting: impl FnOnce(SocketAddr),
) -> Result<Guarded, Error> {
    waiting(door.address);
    let mut guarded = guarded;
    let (control, offer) = match door.offer(&guarded, &qmp).await {
        Ok(begun) => begun,
        Err(error) => {
            guarded.end();
            return Err(error);
        }
    };
    let session = offer.session.clone();
    let mut arrival =
        Arrival { qmp: &mut qmp, heirs, control, door, session, may_be_ordered: false, asking: Vec::new() };
    let came = arrival.advance(&mut guarded).await;
    let Arrival { mut control, mut door, session, may_be_ordered, mut asking, .. } = arrival;
    match came {
        Ok(()) => {
            // If this answer is lost, the source asks.
            let _ = control.send(&Answer::Running).await;
            match guarded.start_fetching() {
                Ok(input) => drop(tokio::spawn(pass_on(control, input))),
                Err(error) => guarded
                    .warnings
                    .push(format!("pages are fetched only when the guest needs them: {error}")),
            }
            tokio::spawn(
                async move { while answer(&mut door, &session, &Answer::Running).await.is_some() {} },
            );
            Ok(guarded)
        }
        Err(error) => {
            // QEMU ends first; only then the source is told that it has ended.
            guarded.end();
            let never = Answer::Never { why: format!("the destination failed: {error}") };
            let _ = control.send(&never).await;
            let mut is_told = false;
            for conn in &mut asking {
                is_told |= conn.send(&never).await.is_ok();
            }
            // A source that received the answer says so. A source that did not may ask, because it does not go on
            // without an answer.
            if may_be_ordered && !is_told && control.receive::<Order>(STEP_LIMIT).await.is_err() {
                let _ = tokio::time::timeout(LINGER, answer(&mut door, &session, &never)).await;
            }
            Err(Error::Machine(format!("the machine did not arrive: {error}")))
        }
    }
}

/// Passes the lists of pages that the source had cached on to the process that fetches them. Its input ends when the
/// source has sent all, or sends something else.
async fn pass_on(mut control: Conn, mut input: ChildStdin) {
    for _ in 0..hot::MESSAGES_MAX {
        let Ok(Order::Hot(runs)) = control.receive::<Order>(STEP_LIMIT).await else { return };
        let Ok(line) = serde_json::to_string(&runs) else { return };
        if input.write_all(format!("{line}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Waits until the source was told how the attempt ended. None if no source can ask any more.
async fn answer(door: &mut Door, session: &str, outcome: &Answer) -> Option<()> {
    loop {
        let mut visit = door.visits.recv().await?;
        let reply = match &visit.purpose {
            Purpose::Ask { session: asked } if asked == session => match visit.conn.send(outcome).await {
                Ok(()) => return Some(()),
                Err(_) => continue,
            },
            Purpose::Ask { .. } => {
                Answer::Never { why: "this host knows nothing of that attempt".to_owned() }
            }
            Purpose::Move(_) | Purpose::State { .. } => {
                Answer::Refused { why: "no machine is waited for here any more".to_owned() }
            }
        };
        let _ = visit.conn.send(&reply).await;
    }
}

impl Door {
    /// Waits for the offer of a machine that can be accepted.
    async fn offer(&mut self, guarded: &Guarded, qmp: &Qmp) -> Result<(Conn, Offer), Error> {
        loop {
            let visit = tokio::select! {
                visit = self.visits.recv() => visit,
                () = guarded.ended() => return Err(Error::Machine("QEMU ended before a machine came".to_owned())),
            };
            let Some(Visit { mut conn, purpose }) = visit else {
                return Err(Error::Machine("this command listens no more".to_owned()));
            };
            let why = match purpose {
                Purpose::Move(offer) => match mismatch(&offer, guarded, qmp) {
                    None => return Ok((conn, offer)),
                    Some(why) => Answer::Refused { why },
                },
                Purpose::State { .. } => Answer::Refused { why: "that attempt is not known here".to_owned() },
                Purpose::Ask { .. } => Answer::Never { why: "that attempt is not known here".to_owned() },
            };
            let _ = conn.send(&why).await;
        }
    }
}

/// Why a machine cannot be accepted.
fn mismatch(offer: &Offer, guarded: &Guarded, qmp: &Qmp) -> Option<String> {
    let machine = &guarded.machine;
    if offer.name != machine.name {
        return Some(format!("machine `{}` is waited for here, not `{}`", machine.name, offer.name));
    }
    if (offer.size, offer.maximum) != (machine.size, machine.maximum) {
        let text = |size, maximum: Option<_>| match maximum {
            Some(maximum) => format!("--memory {size} --max {maximum}"),
            None => format!("--memory {size}"),
        };
        return Some(format!(
            "it has {}, and here {} was given",
            text(offer.size, offer.maximum),
            text(machine.size, machine.maximum)
        ));
    }
    let disks: Vec<&Name> = machine.disks.iter().map(|disk| &disk.name).collect();
    if !offer.disks.iter().eq(disks.iter().copied()) {
        let text = |names: &[&Name]| match names {
            [] => "no --disk".to_owned(),
            names => names.iter().map(|name| format!("--disk {name}")).collect::<Vec<_>>().join(" "),
        };
        let there: Vec<&Name> = offer.disks.iter().collect();
        return Some(format!("it has {}, and here is {}", text(&there), text(&disks)));
    }
    let (there, here) = (offer.qemu, qmp.version());
    ((there.0, there.1) > (here.0, here.1)).then(|| {
        format!("it comes from QEMU {}, and here is the older {}", version_text(there), version_text(here))
    })
}

/// An attempt under way.
///
/// ```text
///   (offer) ──▶ Ready is sent ──▶ state arrives ──▶ Loaded is sent ──▶ ordered ──▶ runs
///                     │                 │                  │
///                     └─────────────────┴──────────────────┘
///                                       ▼
///       the control connection ends, or the source gives up or asks, or QEMU fails:
///       QEMU is killed; the machine never runs here
/// ```
struct Arrival<'a> {
    qmp: &'a mut Qmp,
    heirs: Heirs,
    control: Conn,
    door: Door,
    session: String,
    /// The source may have sent its order, and so may have to ask for the outcome.
    may_be_ordered: bool,
    /// Connections that wait for the outcome.
    asking: Vec<Conn>,
}

impl Arrival<'_> {
    async fn advance(&mut self, guarded: &mut Guarded) -> Result<(), Error> {
        let socket = guarded.place.state();
        self.qmp.set_way(Way::Move, false).await?;
        self.qmp.migrate_from(&socket).await?;
        let Heirs { ram: heir, disks: disk_heir } = self.heirs;
        self.control.send(&Answer::Ready { heir, disk_heir }).await?;

        let state = self.state().await?;
        let qemu = UnixStream::connect(&socket).await.map_err(Error::io("connect to QEMU at", &socket))?;
        let (network, early) = state.into_stream();
        let _carried = tokio::spawn(async move { tunnel::carry(qemu, network, &early).await });
        let Arrival { qmp, control, door, session, asking, .. } = self;
        unless_given_up(control, door, session, asking, async { qmp.migration_is("completed").await })
            .await?;
        self.may_be_ordered = true;
        self.control.send(&Answer::Loaded).await?;

        let paused = match self.order().await? {
            Order::Run { paused } => paused,
            Order::GiveUp => return Err(given_up()),
            Order::Hot(_) => return Err(Error::Peer("the source sent a list out of turn".to_owned())),
        };
        // From here on the end of the connection changes nothing.
        guarded.set_stage(Stage::Here)?;
        if paused {
            return Ok(());
        }
        Ok(self.qmp.cont().await?)
    }

    /// Waits for the connection that brings the state.
    async fn state(&mut self) -> Result<Conn, Error> {
        let Arrival { control, door, session, asking, .. } = self;
        let limit = tokio::time::sleep(STEP_LIMIT);
        tokio::pin!(limit);
        loop {
            let visit = tokio::select! {
                order = control.receive::<Order>(STEP_LIMIT) => { order?; return Err(given_up()); }
                visit = door.visits.recv() => visit,
                () = &mut limit => return Err(Error::Peer(format!("no state came within {STEP_LIMIT:?}"))),
            };
            match visit {
                Some(Visit { conn, purpose: Purpose::State { session: shown } }) if shown == *session => {
                    return Ok(conn);
                }
                Some(visit) => visited(visit, session, asking).await?,
                None => return Err(Error::Machine("this command listens no more".to_owned())),
            }
        }
    }

    /// Waits for the source's order.
    async fn order(&mut self) -> Result<Order, Error> {
        loop {
            tokio::select! {
                order = self.control.receive::<Order>(STEP_LIMIT) => return order,
                visit = self.door.visits.recv() => match visit {
                    Some(visit) => visited(visit, &self.session, &mut self.asking).await?,
                    None => return Err(Error::Machine("this command listens no more".to_owned())),
                },
            }
        }
    }
}

/// Runs `work`, unless the source gives up or is gone.
async fn unless_given_up<T>(
    control: &mut Conn,
    door: &mut Door,
    session: &str,
    asking: &mut Vec<Conn>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            order = control.receive::<Order>(STEP_LIMIT) => { order?; return Err(given_up()); }
            visit = door.visits.recv() => match visit {
                Some(visit) => visited(visit, session, asking).await?,
                None => return Err(Error::Machine("this command listens no more".to_owned())),
            },
        }
    }
}

/// Handles a connection that comes while a machine arrives. A question about this attempt shows that the source has
/// lost the control connection and goes on without this host.
async fn visited(mut visit: Visit, session: &str, asking: &mut Vec<Conn>) -> Result<(), Error> {
    let reply = match &visit.purpose {
        Purpose::Ask { session: asked } if asked == session => {
            asking.push(visit.conn);
            return Err(given_up());
        }
        Purpose::Ask { .. } => Answer::Never { why: "that attempt is not known here".to_owned() },
        Purpose::Move(_) => Answer::Refused { why: "another attempt is under way".to_owned() },
        Purpose::State { .. } => Answer::Refused { why: "that attempt is not known here".to_owned() },
    };
    let _ = visit.conn.send(&reply).await;
    Ok(())
}

fn given_up() -> Error {
    Error::Peer("the source gave up".to_owned())
}
