//! Options of the command line and of the configuration file.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, Subcommand};
use serde::Deserialize;
use xpm_control::client::Client;
use xpm_control::listen::Place;
use xpm_control::token::Token;
use xpm_protocol::{Name, Span};

use crate::etcd::Address;
use crate::service::Settings;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Time between heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// The same with several allocators: shorter, so that a new leader soon knows the appliances.
const HEARTBEAT_OF_SEVERAL: Duration = Duration::from_secs(1);
/// Default time of grace of an allocation that gives way.
const RECLAIM_GRACE: Duration = Duration::from_secs(300);
/// Default time between two checks of an appliance's grants.
const RECONCILE: Duration = Duration::from_secs(60);
/// Default time for which garbage is kept.
const GARBAGE_GRACE: Duration = Duration::from_secs(3600);
/// Default interval at which etcd's history is compacted.
const COMPACT_EVERY: Duration = Duration::from_secs(300);
/// Default time for which decisions are kept.
const KEEP_DECISIONS: Duration = Duration::from_secs(400 * 24 * 3600);

/// The allocator of xpm: knows the memory appliances, decides which of them serve an allocation,
/// and remembers.
#[derive(Debug, Parser)]
#[command(name = "xpm-allocator", version, max_term_width = 100)]
pub struct Options {
    /// Address to listen at: ADDRESS:PORT or unix:/PATH [default: 127.0.0.1:7700]
    #[arg(long, value_name = "PLACE")]
    listen: Option<Place>,
    /// Directory of the metadata [default: /var/lib/xpm-allocator]
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "store")]
    data: Option<PathBuf>,
    /// Keep the metadata in etcd instead, which several allocators share, one of them as leader:
    /// etcd://HOST:PORT[,HOST:PORT...][/PREFIX]
    #[arg(long, value_name = "ETCD")]
    store: Option<Address>,
    /// With --store: URL by which clients and appliances reach this allocator [default: http:// and the address that
    /// it listens at]
    #[arg(long, value_name = "URL")]
    advertise: Option<String>,
    /// File with the token that every request must carry, and that is sent to appliances
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Listen for other machines without a token: whoever reaches the port can give orders
    #[arg(long)]
    insecure: bool,
    /// Time between heartbeats of an appliance; after three intervals without one it counts as silent [default: 5s,
    /// with --store 1s]
    #[arg(long, value_name = "DURATION")]
    heartbeat: Option<Span>,
    /// How long appliances keep reserved memory while an allocation is made [default: 60s]
    #[arg(long, value_name = "DURATION")]
    reserve_ttl: Option<Span>,
    /// Time of grace of an allocation that gives way to a request of a higher priority, until its memory is freed
    /// [default: 5m]
    #[arg(long, value_name = "DURATION")]
    reclaim_grace: Option<Span>,
    /// How long decisions are kept for `xpm alloc explain` [default: 400days]
    #[arg(long, value_name = "DURATION")]
    keep_decisions: Option<Span>,
    /// Time between two checks of each appliance's grants [default: 60s]
    #[arg(long, value_name = "DURATION")]
    reconcile: Option<Span>,
    /// How long memory that an appliance has granted and no record knows is kept before it is freed [default: 1h]
    #[arg(long, value_name = "DURATION")]
    garbage_grace: Option<Span>,
    /// With --store: interval at which etcd's history is compacted, for the whole etcd cluster [default: 5m]
    #[arg(long, value_name = "DURATION")]
    compact_every: Option<Span>,
    /// Announce this allocator by multicast DNS to appliances of this group that look for an allocator
    /// (`xpm-appliance --discover`)
    #[arg(long, value_name = "GROUP", num_args = 0..=1, require_equals = true, default_missing_value = "default")]
    announce: Option<Name>,
    /// Configuration file (TOML); options of the command line take precedence
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    task: Option<Task>,
}

/// A task that the program does instead of serving.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Task {
    /// Put a backup (`xpm backup`) into an empty data directory or etcd, and exit
    ///
    /// The restored metadata do not know allocations that were made since the backup, nor moves and hand-overs since
    /// then. The allocator notices that as soon as it hears an appliance, and changes nothing until `recover` was run.
    Restore {
        /// The backup
        file: PathBuf,
        /// Take the backup as valid, whatever happened since: memory that it does not know counts as garbage and is
        /// freed
        #[arg(long)]
        accept_loss: bool,
    },
    /// Rebuild the metadata from what appliances and clients know, and exit
    ///
    /// Existing metadata, damaged or outdated, are replaced: documents stay, and a copy of the file is kept. Nothing
    /// in use is disturbed. Appliances report which allocation each grant belongs to; the state directories of
    /// xpm-blk (or copies of them) contain the keys of allocations in use. If keys are missing, the owner is asked
    /// for them once the allocator runs; without an owner, new keys are made when the allocation is attached next.
    Recover {
        /// Control interface of an appliance; can be given several times
        #[arg(long = "from-network", value_name = "URL", required = true, num_args = 1..)]
        appliances: Vec<String>,
        /// State directory of an xpm-blk, such as /var/lib/xpm-blk; can be given several times
        #[arg(long, value_name = "DIRECTORY")]
        client_state: Vec<PathBuf>,
        /// Go on although an appliance does not answer. Allocations that only this appliance knows are not recovered,
        /// and count as garbage when it is back
        #[arg(long)]
        partial: bool,
    },
    /// Move the metadata from --data to etcd, or from --store to a directory, and exit
    ///
    /// The new place has to be empty, and no allocator may run on either place. The old place stays unchanged.
    Migrate {
        /// Destination: `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]` or a directory
        #[arg(long, value_name = "PLACE")]
        to: String,
    },
}

/// The configuration file: the same options, each named like its flag.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileOptions {
    listen: Option<Place>,
    data: Option<PathBuf>,
    store: Option<Address>,
    advertise: Option<String>,
    token_file: Option<PathBuf>,
    insecure: Option<bool>,
    heartbeat: Option<Span>,
    reserve_ttl: Option<Span>,
    reclaim_grace: Option<Span>,
    keep_decisions: Option<Span>,
    reconcile: Option<Span>,
    garbage_grace: Option<Span>,
    compact_every: Option<Span>,
    announce: Option<Name>,
}

/// The effective configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Address to listen at.
    pub listen: Place,
    /// Place of the metadata.
    pub storage: Storage,
    /// File with the token.
    pub token_file: Option<PathBuf>,
    /// Whether other machines may be served without a token.
    pub insecure: bool,
    /// Time between heartbeats; 100 ms to 1 h.
    pub heartbeat: Duration,
    /// How long reservations are kept; 30 s to 1 h, so that no appliance undoes a reservation
    /// while the allocator may still commit it.
    pub reserve_ttl: Duration,
    /// Time of grace of an allocation that gives way, until its memory is freed.
    pub reclaim_grace: Duration,
    /// How long decisions are kept; at least a day.
    pub keep_decisions: Duration,
    /// Time between two checks of an appliance's grants; 1 s to 1 h.
    pub reconcile: Duration,
    /// How long memory that no record knows is kept.
    pub garbage_grace: Duration,
    /// With etcd, the interval at which its history is compacted; 1 s to 1 h.
    pub compact_every: Duration,
    /// Group of appliances to which the allocator announces itself.
    pub announce: Option<Name>,
    /// A task to do instead of serving.
    pub task: Option<Task>,
}

/// Place of the metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// In a file of this directory.
    Data(PathBuf),
    /// In etcd, shared by several allocators.
    Etcd {
        /// Address of etcd.
        address: Address,
        /// URL by which others reach this allocator, if it is not the address that it listens at.
        advertise: Option<String>,
    },
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Storage::Data(directory) => write!(f, "{}", directory.display()),
            Storage::Etcd { address, .. } => write!(f, "{address}"),
        }
    }
}

impl Options {
    /// Reads the configuration file, if one is named, and merges it with the command line.
    pub fn resolve(self) -> anyhow::Result<Config> {
        let file = match &self.config {
            Some(path) => xpm_control::config::load::<FileOptions>(path)?,
            None => FileOptions::default(),
        };
        // `data` or `store` on the command line replaces both in the file.
        let (data, store) = match (self.data, self.store) {
            (None, None) => (file.data, file.store),
            said => said,
        };
        let listen = self.listen.or(file.listen).unwrap_or_else(|| Place::Tcp(([127, 0, 0, 1], 7700).into()));
        let advertise = self.advertise.or(file.advertise);
        let storage = storage(data, store, advertise.as_deref(), &listen)?;
        let heartbeat = if matches!(storage, Storage::Data(_)) { HEARTBEAT } else { HEARTBEAT_OF_SEVERAL };
        let config = Config {
            listen,
            storage,
            token_file: self.token_file.or(file.token_file),
            insecure: self.insecure || file.insecure.unwrap_or(false),
            heartbeat: self.heartbeat.or(file.heartbeat).map_or(heartbeat, |span| span.0),
            reserve_ttl: self.reserve_ttl.or(file.reserve_ttl).map_or(Duration::from_secs(60), |span| span.0),
            reclaim_grace: self.reclaim_grace.or(file.reclaim_grace).map_or(RECLAIM_GRACE, |span| span.0),
            keep_decisions: self.keep_decisions.or(file.keep_decisions).map_or(KEEP_DECISIONS, |span| span.0),
            reconcile: self.reconcile.or(file.reconcile).map_or(RECONCILE, |span| span.0),
            garbage_grace: self.garbage_grace.or(file.garbage_grace).map_or(GARBAGE_GRACE, |span| span.0),
            compact_every: self.compact_every.or(file.compact_every).map_or(COMPACT_EVERY, |span| span.0),
            announce: self.announce.or(file.announce),
            task: self.task,
        };
        ensure!(
            config.keep_decisions >= DAY,
            "keep-decisions is at least 1day, not {}",
            Span(config.keep_decisions)
        );
        check_range("compact-every", config.compact_every, Duration::from_secs(1))?;
        check_range("reconcile", config.reconcile, Duration::from_secs(1))?;
        check_range("heartbeat", config.heartbeat, Duration::from_millis(100))?;
        check_range("reserve-ttl", config.reserve_ttl, Duration::from_secs(30))?;
        Ok(config)
    }
}

fn storage(
    data: Option<PathBuf>,
    store: Option<Address>,
    advertise: Option<&str>,
    listen: &Place,
) -> anyhow::Result<Storage> {
    let Some(address) = store else {
        ensure!(advertise.is_none(), "--advertise is for several allocators: give --store, too, or neither");
        return Ok(Storage::Data(data.unwrap_or_else(|| "/var/lib/xpm-allocator".into())));
    };
    ensure!(data.is_none(), "the metadata is either in a directory or in etcd: give --data or --store");
    let client = advertise.map(|url| Client::new(url, None)).transpose().context("--advertise")?;
    let advertise = client.map(|client| client.base().to_owned());
    let anywhere = matches!(listen, Place::Tcp(address) if address.ip().is_unspecified());
    ensure!(
        advertise.is_some() || !anywhere,
        "others cannot reach this allocator at {listen}: give --advertise http://HOST:PORT with its address"
    );
    Ok(Storage::Etcd { address, advertise })
}

fn check_range(name: &str, value: Duration, least: Duration) -> anyhow::Result<()> {
    let most = Duration::from_secs(3600);
    if !(least..=most).contains(&value) {
        bail!("{name} is {} to {}, not {}", Span(least), Span(most), Span(value));
    }
    Ok(())
}

impl Config {
    /// Reads the token file, if one is named.
    pub fn token(&self) -> anyhow::Result<Option<Token>> {
        self.token_file.as_deref().map(Token::load).transpose().context("no usable token")
    }

    /// The settings of the service.
    pub fn settings(&self) -> Settings {
        Settings {
            interval: self.heartbeat,
            reserve_ttl: self.reserve_ttl,
            reclaim_grace: self.reclaim_grace,
            keep_decisions: self.keep_decisions,
            reconcile: self.reconcile,
            garbage_grace: self.garbage_grace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(arguments: &[&str]) -> anyhow::Result<Config> {
        Options::try_parse_from([&["xpm-allocator"], arguments].concat())?.resolve()
    }

    fn with_file(text: &str, arguments: &[&str]) -> anyhow::Result<Config> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("allocator.toml");
        std::fs::write(&path, text).unwrap();
        resolve(&[&["--config", path.to_str().unwrap()], arguments].concat())
    }

    #[test]
    fn defaults() {
        let config = resolve(&[]).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:7700");
        assert_eq!(config.storage, Storage::Data("/var/lib/xpm-allocator".into()));
        assert_eq!((config.heartbeat.as_secs(), config.reserve_ttl.as_secs()), (5, 60));
        assert!(!config.insecure);
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let text = "listen = '0.0.0.0:1'\ninsecure = true\nheartbeat = '1s'\nreserve-ttl = '2m'\n";
        let config = with_file(text, &["--heartbeat", "2s"]).unwrap();
        assert_eq!(config.listen.to_string(), "0.0.0.0:1");
        assert!(config.insecure);
        assert_eq!((config.heartbeat.as_secs(), config.reserve_ttl.as_secs()), (2, 120));
    }

    #[test]
    fn etcd_replaces_the_directory() {
        let config = resolve(&["--store", "etcd://a:1,b:2"]).unwrap();
        let address: Address = "etcd://a:1,b:2/xpm".parse().unwrap();
        assert_eq!(config.storage, Storage::Etcd { address, advertise: None });
        assert_eq!(config.heartbeat.as_secs(), 1);
        let config =
            with_file("data = '/x'\n", &["--store", "etcd://a:1", "--advertise", "http://c:1/"]).unwrap();
        assert!(matches!(config.storage, Storage::Etcd { advertise: Some(url), .. } if url == "http://c:1"));
        let config = with_file("store = 'etcd://a:1'\n", &["--data", "/x"]).unwrap();
        assert_eq!(config.storage, Storage::Data("/x".into()));
        for (text, arguments, part) in [
            ("store = 'etcd://a:1'\nlisten = '0.0.0.0:1'", &[][..], "--advertise"),
            ("store = 'etcd://a:1'\ndata = '/x'", &[], "--data or --store"),
            ("store = 'a:1'", &[], "etcd://HOST:PORT"),
            ("advertise = 'http://a:1'", &[], "--store"),
            ("store = 'etcd://a:1'\nadvertise = 'a:1'", &[], "http://HOST:PORT"),
        ] {
            let line = format!("{:#}", with_file(text, arguments).unwrap_err());
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn mistakes_are_reported() {
        for (text, part) in [
            ("listn = 'a'", "listn"),
            ("heartbeat = 5", ":1:"),
            ("heartbeat = '1ms'", "100ms"),
            ("reserve-ttl = '1s'", "30s"),
        ] {
            let line = format!("{:#}", with_file(text, &[]).unwrap_err());
            assert!(line.contains(part), "{line}");
        }
        assert!(resolve(&["--listen", "nowhere"]).unwrap_err().to_string().contains("ADDRESS:PORT"));
        assert!(
            format!("{:#}", resolve(&["--config", "/nonexistent"]).unwrap_err()).contains("/nonexistent")
        );
    }
}
