//! The daemons that this command speaks to, and what a person should do when one does not answer.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use xpm_control::client::{Client, ClientError};
use xpm_control::error_line;
use xpm_control::settings::Settings;
use xpm_control::token::Token;
use xpm_control::urls::{ParseUrlsError, Urls};
use xpm_protocol::api::{ErrorKind, allocator, blk};

use crate::patience::Patience;
use crate::setup::{self, Setup};

/// Where the daemons are.
#[derive(Debug, Clone)]
pub(crate) struct Daemons {
    allocator: String,
    blk: PathBuf,
    fs: PathBuf,
    token_file: Option<PathBuf>,
    patience: Patience,
}

impl Daemons {
    pub(crate) fn new(setup: &Setup) -> Daemons {
        Daemons {
            allocator: setup.allocator.clone(),
            blk: setup.blk.clone(),
            fs: setup.fs.clone(),
            token_file: setup.token_file.clone(),
            patience: Patience::new(setup.patience),
        }
    }

    /// By settings alone, for completions.
    pub(crate) fn of_settings(settings: Settings) -> Daemons {
        Daemons {
            allocator: settings
                .allocator
                .map_or_else(|| setup::ALLOCATOR.to_owned(), |urls| urls.to_string()),
            blk: std::env::var_os("XPM_BLK").map_or("/run/xpm/blk.sock".into(), PathBuf::from),
            fs: std::env::var_os("XPM_FS").map_or("/run/xpm/fs.sock".into(), PathBuf::from),
            token_file: settings.token_file,
            patience: Patience::none(),
        }
    }

    /// The same, but an allocator that refuses connections is not asked again.
    pub(crate) fn impatient(&self) -> Daemons {
        Daemons { patience: Patience::none(), ..self.clone() }
    }

    /// The allocator. Nothing is sent yet.
    pub(crate) fn allocator(&self) -> Result<Daemon, Failure> {
        self.allocator_at(&self.allocator)
    }

    /// An appliance, by the URL that the allocator says. Nothing is sent yet.
    pub(crate) fn appliance(&self, url: &str) -> Result<Daemon, Failure> {
        let client = self
            .token()
            .and_then(|token| Client::new(url, token).map_err(|error| Failure::other(error.to_string())))?;
        Daemon::new(Ok(client), Who::Appliance(url.to_owned()), Patience::none())
    }

    fn token(&self) -> Result<Option<Token>, Failure> {
        match &self.token_file {
            None => Ok(None),
            Some(path) => Token::load(path).map(Some).map_err(|error| Failure::other(error_line(&error))),
        }
    }

    /// Each allocator by itself. Nothing is sent yet.
    pub(crate) fn each_allocator(&self) -> Result<Vec<Daemon>, Failure> {
        self.allocator.split(',').map(|url| self.allocator_at(url.trim())).collect()
    }

    fn allocator_at(&self, urls: &str) -> Result<Daemon, Failure> {
        let token = self.token()?;
        let client = urls.parse().and_then(|urls: Urls| Ok(Client::one_of(&urls, token)?));
        let client = client.map(|client| client.with_patience(LEADER_LIMIT));
        Daemon::new(client, Who::Allocator(urls.to_owned()), self.patience.clone())
    }

    /// The xpm-blk of this host. Nothing is sent yet.
    pub(crate) fn blk(&self) -> Result<Daemon, Failure> {
        of_this_host(&self.blk, Who::Blk)
    }

    /// The xpm-fs of this host. Nothing is sent yet.
    pub(crate) fn fs(&self) -> Result<Daemon, Failure> {
        of_this_host(&self.fs, Who::Fs)
    }
}

/// The xpm-swapd of this host. Nothing is sent yet.
pub(crate) fn swapd(socket: &Path) -> Result<Daemon, Failure> {
    of_this_host(socket, Who::Swapd)
}

fn of_this_host(socket: &Path, who: fn(PathBuf) -> Who) -> Result<Daemon, Failure> {
    let path = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    let client = Client::new(&format!("unix:{}", path.display()), None);
    Daemon::new(client.map_err(Into::into), who(socket.to_owned()), Patience::none())
}

/// The control interface of one daemon.
#[derive(Clone)]
pub(crate) struct Daemon {
    client: Client,
    who: Who,
    patience: Patience,
}

/// How long an order may take: a large allocation waits for memory to be cleared.
const ORDER_LIMIT: Duration = Duration::from_secs(120);

/// How long an order waits where there are several allocators and none leads.
const LEADER_LIMIT: Duration = Duration::from_secs(6);

/// How long an answer may take that waits for something to happen.
const LATER_LIMIT: Duration = Duration::from_secs(30);

impl Daemon {
    fn new(client: Result<Client, ParseUrlsError>, who: Who, patience: Patience) -> Result<Daemon, Failure> {
        match client {
            Ok(client) => Ok(Daemon { client, who, patience }),
            Err(error) => Err(Failure::other(format!("{error}; {}", who.how_to_name()))),
        }
    }

    /// URL of the daemon that answered last, or is asked next.
    pub(crate) fn url(&self) -> &str {
        self.client.base()
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.fetch(path).await.map_err(|error| self.failure(&error))
    }

    async fn fetch<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.patience.ask(&self.who, || self.client.get(path)).await
    }

    /// Gets what every daemon of this kind has: who says that it is not there is of another kind.
    async fn get_own<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.fetch(path).await.map_err(|error| match &error {
            ClientError::Refused(body) if body.kind == ErrorKind::NotFound => Failure::other(format!(
                "{} is another program, or of another version: {}; check the address",
                self.who, body.error
            )),
            _ => self.failure(&error),
        })
    }

    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, Failure> {
        let order = self.client.clone().with_limit(ORDER_LIMIT);
        let made = self.patience.ask(&self.who, || order.post(path, body)).await;
        made.map_err(|error| self.order_failure(&error))
    }

    pub(crate) async fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, Failure> {
        let order = self.client.clone().with_limit(ORDER_LIMIT);
        let made = self.patience.ask(&self.who, || order.put(path, body)).await;
        made.map_err(|error| self.order_failure(&error))
    }

    /// Asks for something that is not there yet, and waits until it is, or for half a minute.
    pub(crate) async fn get_later<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let patient = self.client.clone().with_limit(LATER_LIMIT);
        let got = self.patience.ask(&self.who, || patient.get(path)).await;
        got.map_err(|error| self.failure(&error))
    }

    /// For orders that take as long as somebody else needs.
    pub(crate) async fn post_later<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        limit: Duration,
    ) -> Result<T, Failure> {
        let order = self.client.clone().with_limit(limit);
        let made = self.patience.ask(&self.who, || order.post(path, body)).await;
        made.map_err(|error| self.order_failure(&error))
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(), Failure> {
        let order = self.client.clone().with_limit(ORDER_LIMIT);
        let made = self.patience.ask(&self.who, || order.delete(path)).await;
        made.map_err(|error| self.order_failure(&error))
    }

    fn failure(&self, error: &ClientError) -> Failure {
        let who = &self.who;
        match error {
            ClientError::Refused(body) if body.kind == ErrorKind::Unauthorized => Failure {
                kind: Some(body.kind),
                ..Failure::other(format!(
                    "{who} refused the token: {}; name the file with its token by --token-file, XPM_TOKEN_FILE or `token-file` \
                     in /etc/xpm/xpm.toml",
                    body.error
                ))
            },
            ClientError::Refused(body) => {
                Failure { kind: Some(body.kind), ..Failure::other(body.error.clone()) }
            }
            ClientError::Unreachable { source, .. } => Failure {
                kind: None,
                unreachable: true,
                not_there: who.is_not_there(source),
                line: format!("cannot reach {who}: {source}; {}", who.how_to_start()),
            },
            ClientError::TimedOut => Failure::other(format!(
                "{who} did not answer in time: it hangs, or a firewall is in between; look at its log"
            )),
            ClientError::Lost { source, .. } => Failure::other(format!(
                "{who} closed the connection before its answer came ({}); look at its log",
                error_line(source)
            )),
            ClientError::NotXpm(what) => Failure::other(format!(
                "{who} does not answer as this version of xpm ({}) expects: {what}; check the address, and run the same \
                 version on both sides",
                env!("CARGO_PKG_VERSION")
            )),
        }
    }

    /// After some failures it is not known whether an order was carried out; the person is told.
    fn order_failure(&self, error: &ClientError) -> Failure {
        let failure = self.failure(error);
        match error {
            ClientError::TimedOut | ClientError::Lost { .. } => Failure::other(format!(
                "{failure}, and see with `{}` whether the order was carried out",
                self.who.how_to_look()
            )),
            _ => failure,
        }
    }
}

/// Which daemon is asked.
#[derive(Debug, Clone)]
pub(crate) enum Who {
    Appliance(String),
    Allocator(String),
    Blk(PathBuf),
    Fs(PathBuf),
    Swapd(PathBuf),
}

impl Who {
    fn how_to_start(&self) -> &'static str {
        match self {
            Who::Appliance(_) => "start xpm-appliance there",
            Who::Allocator(_) => {
                "start xpm-allocator, or name another with --allocator, XPM_ALLOCATOR or `allocator` in /etc/xpm/xpm.toml"
            }
            Who::Swapd(_) => {
                "start it (`systemctl start xpm-swapd`), or name its control socket with --swapd or XPM_SWAPD; its socket \
                 is for root only"
            }
            Who::Fs(_) => {
                "start it (`systemctl start xpm-fs`), or name its control socket with --fs or XPM_FS; its socket is for \
                 root only"
            }
            Who::Blk(_) => {
                "start it (`systemctl start xpm-blk`), or name its control socket with --blk or XPM_BLK; its socket is for \
                 root only"
            }
        }
    }

    fn how_to_name(&self) -> &'static str {
        match self {
            Who::Appliance(_) => "the allocator says so",
            Who::Allocator(_) => "it came from --allocator, XPM_ALLOCATOR or `allocator` in the settings",
            Who::Blk(_) => "it came from --blk or XPM_BLK",
            Who::Fs(_) => "it came from --fs or XPM_FS",
            Who::Swapd(_) => "it came from --swapd or XPM_SWAPD",
        }
    }

    fn how_to_look(&self) -> &'static str {
        match self {
            Who::Appliance(_) => "xpm appliance list",
            Who::Allocator(_) => "xpm alloc list",
            Who::Blk(_) => "xpm blk list",
            Who::Fs(_) => "xpm fs list",
            Who::Swapd(_) => "xpm swap status",
        }
    }

    /// Whether the error says that this host has no such daemon, rather than a broken one.
    fn is_not_there(&self, error: &io::Error) -> bool {
        matches!(self, Who::Blk(_) | Who::Fs(_))
            && matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Appliance(url) => write!(f, "the appliance at {url}"),
            Who::Allocator(url) => write!(f, "the allocator at {url}"),
            Who::Blk(socket) => write!(f, "xpm-blk at {}", socket.display()),
            Who::Fs(socket) => write!(f, "xpm-fs at {}", socket.display()),
            Who::Swapd(socket) => write!(f, "xpm-swapd at {}", socket.display()),
        }
    }
}

/// Why a daemon gave no answer that can be used, in one line with what to do.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    line: String,
    not_there: bool,
    kind: Option<ErrorKind>,
    unreachable: bool,
}

impl Failure {
    fn other(line: String) -> Failure {
        Failure { line, not_there: false, kind: None, unreachable: false }
    }

    /// Its kind in one word, for programs.
    pub(crate) fn word(&self) -> String {
        match self.kind {
            Some(kind) => serde_json::to_value(kind).ok().and_then(|word| Some(word.as_str()?.to_owned())),
            None if self.unreachable => Some("unreachable".to_owned()),
            None => None,
        }
        .unwrap_or_else(|| "failed".to_owned())
    }

    /// Whether the daemon answered with a refusal of this kind.
    pub(crate) fn is(&self, kind: ErrorKind) -> bool {
        self.kind == Some(kind)
    }

    /// Whether no daemon took the order: none could be reached at all, or none leads.
    pub(crate) fn has_no_leader(&self) -> bool {
        self.unreachable || self.is(ErrorKind::NotLeader)
    }

    /// Whether it may be otherwise in a moment: the daemon did not answer, ends, or does not lead.
    pub(crate) fn may_pass(&self) -> bool {
        self.kind.is_none() || self.is(ErrorKind::NotLeader) || self.is(ErrorKind::Unavailable)
    }

    /// Whether the daemon simply does not run on this host, which is no fault by itself.
    pub(crate) fn is_not_there(&self) -> bool {
        self.not_there
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl std::error::Error for Failure {}

/// Requests of the allocator and xpm-blk by what they ask for, so that paths stand in one place.
impl Daemon {
    pub(crate) async fn allocator_status(&self) -> Result<allocator::Status, Failure> {
        self.get_own("/v1/status").await
    }

    pub(crate) async fn appliances(&self) -> Result<Vec<allocator::Appliance>, Failure> {
        self.get_own("/v1/appliances").await
    }

    pub(crate) async fn allocations(&self) -> Result<Vec<allocator::Allocation>, Failure> {
        self.get_own("/v1/allocations").await
    }

    pub(crate) async fn blk_status(&self) -> Result<blk::Status, Failure> {
        self.get_own("/v1/status").await
    }

    pub(crate) async fn devices(&self) -> Result<Vec<blk::Device>, Failure> {
        self.get_own("/v1/devices").await
    }
}
