//! The configuration: the command line, a TOML file, the defaults, and the values that follow from them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Parser};
use serde::{Deserialize, Deserializer};
use xpm_control::listen::Place;
use xpm_control::urls::Urls;
use xpm_protocol::policy::{Label, Labels};
use xpm_protocol::units::{ByteSize, REGION_LEN_DEFAULT, REGION_LEN_MIN, Span, is_region_len};
use xpm_protocol::{LinkSpeed, Name};

use crate::arena::Backing;
use crate::ledger::Stock;

/// Default directory of the sockets.
const RUN_DIR: &str = "/run/xpm-appliance";
/// Default directory of the state.
const STATE_DIR: &str = "/var/lib/xpm-appliance";
/// Default port of the control interface.
const CONTROL_PORT: u16 = 7701;
/// Port of the NBD protocol (IANA).
const NBD_PORT: u16 = 10809;
/// Longest busy poll by default.
const SPIN_DEFAULT: Duration = Duration::from_micros(50);
/// Longest useful busy poll: a longer one wastes a core.
const SPIN_MAX: Duration = Duration::from_millis(10);
/// Most loop threads.
const THREADS_MAX: usize = 1024;
/// Least memory that is kept ready, if the appliance lends as much, in bytes.
const READY_MIN: u64 = 1 << 30;

/// Lends this machine's memory to other machines.
///
/// An allocator gives the memory to clients in regions, as exports of the NBD protocol over TCP and unix
/// sockets, and to clients on this machine also as shared memory. Lent memory survives a restart by systemd,
/// and is lost when the unit is stopped: stop the unit only when `xpm appliance list` shows no regions on it.
#[derive(Debug, Clone, Parser)]
#[command(name = "xpm-appliance", version)]
pub struct Cli {
    /// Reads settings from this TOML file. Its keys are the long options without the leading dashes; options
    /// on the command line win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    settings: Settings,
}

/// The settings, on the command line or in the file.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Lends this much memory, for example 2GiB. Required.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,

    /// Lends huge pages instead of base pages. They must have been set aside before
    /// (vm.nr_hugepages), and memory that clients trim is not returned to this machine.
    #[arg(long)]
    huge: bool,

    /// Takes the memory from `memfd` (the default) or from `file:PATH`: a DAX device, or a file that no other
    /// process uses. Memory of a file is not shared with clients on this machine.
    #[arg(long, value_name = "memfd|file:PATH", value_parser = parse_backing)]
    #[serde(deserialize_with = "deserialize_backing")]
    backing: Option<Backing>,

    /// Does not lock the memory, so that this machine may swap it out.
    #[arg(long)]
    no_lock: bool,

    /// Takes orders at this address, ADDRESS:PORT or unix:/PATH. Other addresses than this machine's
    /// own need a token. [default: 127.0.0.1:7701]
    #[arg(long, value_name = "PLACE")]
    listen: Option<Place>,

    /// Serves regions by NBD at this TCP address; can be given several times, for several networks or for IPv4
    /// and IPv6. Any address may be used: a region is reached only with the key of its grant. The data is not
    /// encrypted. [default: 127.0.0.1:10809]
    #[arg(long, value_name = "ADDRESS:PORT")]
    #[serde(deserialize_with = "one_or_several")]
    nbd: Vec<SocketAddr>,

    /// Serves regions by RDMA: `auto` (the default) at port 10810 of every address that belongs to an RDMA
    /// device, or at this address, or `off`. A region is reached only with the key of its grant. The data is
    /// not encrypted.
    #[arg(long, value_name = "auto|off|ADDRESS:PORT", value_parser = parse_rdma)]
    #[serde(deserialize_with = "deserialize_rdma")]
    rdma: Option<Rdma>,

    /// Serves regions by NBD at this unix socket. [default: nbd.sock in --run-dir]
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,

    /// Passes the memory of regions to clients on this machine at this unix socket. [default: shm.sock in
    /// --run-dir]
    #[arg(long, value_name = "PATH")]
    shm: Option<PathBuf>,

    /// Creates the unix sockets in this directory. [default: /run/xpm-appliance]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,

    /// Keeps the appliance's id in this directory. [default: /var/lib/xpm-appliance]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Registers with the allocator at this URL, for example http://10.0.0.1:7700. With several allocators,
    /// of which one leads: the URLs of all of them, separated by commas.
    #[arg(long, value_name = "URL[,URL...]")]
    allocator: Option<Urls>,
    /// Looks for allocators of this group that announce themselves on this network (`xpm-allocator
    /// --announce`), and registers with them. The token is sent to any host that answers: use this on trusted
    /// networks only.
    #[arg(long, value_name = "GROUP", num_args = 0..=1, require_equals = true, default_missing_value = "default", conflicts_with = "allocator")]
    discover: Option<Name>,

    /// Tells clients and the allocator to reach this machine by this name or address; can be given several
    /// times, the best first. Clients try each one 250 ms after the previous one, and resolve names anew each
    /// time. The default is the address from which this machine reaches the allocator.
    #[arg(long, value_name = "HOST|IP[:PORT]")]
    #[serde(deserialize_with = "one_or_several")]
    advertise: Vec<String>,

    /// Sets the name of the appliance. [default: the host's name]
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,

    /// Adds a label that strategies can ask for, such as rack=r1; can be given several times. The labels
    /// `site`, `row`, `rack` and `host` give the machine's location.
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<Label>,

    /// Sets the speed of the link, for example 25Gbps. By default the kernel is asked.
    #[arg(long, value_name = "SPEED")]
    link_speed: Option<LinkSpeed>,

    /// Keeps regions of this size ready, a power of two from 16MiB to 64GiB. Other sizes are made
    /// when they are asked for. [default: 256MiB, or less where --memory is less than four of them]
    #[arg(long, value_name = "SIZE")]
    region_size: Option<ByteSize>,

    /// Keeps this much free memory ready: cleared, faulted in and locked. More makes large allocations
    /// faster; less leaves more to this machine while no client uses the memory. [default: an eighth of
    /// --memory, at least 1GiB, at most --memory]
    #[arg(long, value_name = "SIZE")]
    ready: Option<ByteSize>,

    /// Serves connections with this many threads. [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Lets a thread that has just worked poll for more work for this long before it sleeps; 0s leaves more
    /// processor time to other programs, a longer time is faster. [default: 50us]
    #[arg(long, value_name = "TIME")]
    spin: Option<Span>,

    /// Reads the token of the control plane from this file (mode 0600): orders must carry it, and it is sent
    /// to the allocator.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Takes orders without a token, also from other machines.
    #[arg(long)]
    insecure: bool,
}

/// Where RDMA is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rdma {
    /// At all RDMA addresses of this host, if there are any.
    Auto,
    /// Nowhere.
    Off,
    /// At this address; failing to listen there is an error.
    At(SocketAddr),
}

/// The complete, checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Lent memory in all, in bytes.
    pub capacity: u64,
    /// The storage of the memory.
    pub backing: Backing,
    /// Whether the memory is locked.
    pub lock: bool,
    /// The memory that is kept ready.
    pub stock: Stock,
    /// The control interface.
    pub listen: Place,
    /// NBD over TCP; at least one.
    pub nbd: Vec<SocketAddr>,
    /// RDMA.
    pub rdma: Rdma,
    /// NBD over a unix socket.
    pub unix: PathBuf,
    /// Unix socket that passes memory.
    pub shm: PathBuf,
    /// The state directory.
    pub state: PathBuf,
    /// Base URLs of the allocators.
    pub allocator: Option<Urls>,
    /// Group of the allocators to look for on the network.
    pub discover: Option<Name>,
    /// Names and addresses of this host for others, the best first.
    pub advertise: Vec<String>,
    /// The appliance's name.
    pub name: Name,
    /// Its labels, as set by the operator.
    pub labels: Labels,
    /// Speed of its link, if the operator set it.
    pub link_speed: Option<LinkSpeed>,
    /// Loop threads.
    pub threads: usize,
    /// Longest busy poll.
    pub spin: Duration,
    /// The token's file.
    pub token_file: Option<PathBuf>,
    /// Whether orders are accepted without a token.
    pub insecure: bool,
}

impl Cli {
    /// Reads the file, if there is one, and determines all values. Blocks.
    ///
    /// # Errors
    /// One line: the setting, the defect, and the remedy.
    pub fn settle(self) -> anyhow::Result<Config> {
        let settings = match &self.config {
            Some(path) => self.settings.over(xpm_control::config::load(path)?),
            None => self.settings,
        };
        settings.settle()
    }
}

impl Settings {
    /// These settings, completed by those of `file`.
    fn over(self, file: Settings) -> Settings {
        Settings {
            memory: self.memory.or(file.memory),
            huge: self.huge || file.huge,
            backing: self.backing.or(file.backing),
            no_lock: self.no_lock || file.no_lock,
            listen: self.listen.or(file.listen),
            nbd: if self.nbd.is_empty() { file.nbd } else { self.nbd },
            rdma: self.rdma.or(file.rdma),
            unix: self.unix.or(file.unix),
            shm: self.shm.or(file.shm),
            run_dir: self.run_dir.or(file.run_dir),
            state: self.state.or(file.state),
            discover: if self.allocator.is_some() { None } else { self.discover.or(file.discover) },
            allocator: self.allocator.or(file.allocator),
            advertise: if self.advertise.is_empty() { file.advertise } else { self.advertise },
            name: self.name.or(file.name),
            label: if self.label.is_empty() { file.label } else { self.label },
            link_speed: self.link_speed.or(file.link_speed),
            region_size: self.region_size.or(file.region_size),
            ready: self.ready.or(file.ready),
            threads: self.threads.or(file.threads),
            spin: self.spin.or(file.spin),
            token_file: self.token_file.or(file.token_file),
            insecure: self.insecure || file.insecure,
        }
    }

    fn settle(self) -> anyhow::Result<Config> {
        let Some(ByteSize(capacity)) = self.memory else {
            bail!("how much memory may be lent is not set: give --memory SIZE, for example --memory 2GiB");
        };
        let region_len = region_len(capacity, self.region_size)?;
        let listen = self.listen.unwrap_or(Place::Tcp((Ipv4Addr::LOCALHOST, CONTROL_PORT).into()));
        listen.check_exposure(self.token_file.is_some(), self.insecure)?;
        let run_dir = self.run_dir.unwrap_or_else(|| RUN_DIR.into());
        let spin = self.spin.map_or(SPIN_DEFAULT, |span| span.0);
        ensure!(spin <= SPIN_MAX, "--spin {} is too long: at most 10ms", Span(spin));
        let threads = match self.threads {
            Some(threads) => threads,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        ensure!((1..=THREADS_MAX).contains(&threads), "--threads {threads}: give 1 to {THREADS_MAX}");
        Ok(Config {
            capacity,
            backing: backing(self.backing, self.huge)?,
            lock: !self.no_lock,
            stock: stock(capacity, region_len, self.ready)?,
            listen,
            nbd: match self.nbd {
                none if none.is_empty() => vec![(Ipv4Addr::LOCALHOST, NBD_PORT).into()],
                several => several,
            },
            rdma: self.rdma.unwrap_or(Rdma::Auto),
            unix: absolute(&self.unix.unwrap_or_else(|| run_dir.join("nbd.sock")))?,
            shm: absolute(&self.shm.unwrap_or_else(|| run_dir.join("shm.sock")))?,
            state: self.state.unwrap_or_else(|| STATE_DIR.into()),
            allocator: self.allocator,
            discover: self.discover,
            advertise: self.advertise,
            name: self.name.map_or_else(host_name, Ok)?,
            labels: self.label.into_iter().collect(),
            link_speed: self.link_speed,
            threads,
            spin,
            token_file: self.token_file,
            insecure: self.insecure,
        })
    }
}

fn region_len(capacity: u64, asked: Option<ByteSize>) -> anyhow::Result<u64> {
    ensure!(capacity > 0, "--memory 0 lends nothing: give at least {}", ByteSize(REGION_LEN_MIN));
    ensure!(
        capacity >= REGION_LEN_MIN,
        "--memory {} is less than the smallest region: give at least {}",
        ByteSize(capacity),
        ByteSize(REGION_LEN_MIN)
    );
    match asked {
        Some(ByteSize(len)) => {
            ensure!(is_region_len(len), "--region-size {len} is no power of two from 16MiB to 64GiB");
            ensure!(
                len <= capacity,
                "--region-size {} is more than --memory {}: lower it",
                ByteSize(len),
                ByteSize(capacity)
            );
            Ok(len)
        }
        None => Ok(largest_power_of_two(capacity / 4).clamp(REGION_LEN_MIN, REGION_LEN_DEFAULT)),
    }
}

fn largest_power_of_two(up_to: u64) -> u64 {
    up_to.checked_ilog2().map_or(0, |log| 1 << log)
}

fn stock(capacity: u64, region_len: u64, asked: Option<ByteSize>) -> anyhow::Result<Stock> {
    let ready = match asked {
        Some(ByteSize(ready)) => {
            ensure!(ready <= capacity, "--ready {} is more than --memory: lower it", ByteSize(ready));
            ready
        }
        None => (capacity / 8).max(READY_MIN).min(capacity),
    };
    Ok(Stock { region_len, target: ready - ready % region_len })
}

fn backing(asked: Option<Backing>, huge: bool) -> anyhow::Result<Backing> {
    match (asked, huge) {
        (None | Some(Backing::Memfd), false) => Ok(Backing::Memfd),
        (None | Some(Backing::Memfd), true) => Ok(Backing::HugeMemfd),
        (Some(Backing::File(_)), true) => bail!("--huge and --backing file: exclude each other: choose one"),
        (Some(other), _) => Ok(other),
    }
}

/// Clients receive the path, and have working directories of their own.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))
}

/// The host's name up to its first dot.
fn host_name() -> anyhow::Result<Name> {
    let host = xpm_control::host::host_name().context("cannot find this host's name: give --name NAME")?;
    let short = host.split('.').next().unwrap_or_default();
    short.parse().with_context(|| format!("this host is called `{host}`: give the appliance a --name NAME"))
}

fn parse_backing(text: &str) -> Result<Backing, String> {
    match text.strip_prefix("file:") {
        Some("") => Err("after file: comes the path of a file or a DAX device".into()),
        Some(path) => Ok(Backing::File(path.into())),
        None if text == "memfd" => Ok(Backing::Memfd),
        None => Err("write memfd or file:PATH".into()),
    }
}

fn deserialize_backing<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Backing>, D::Error> {
    parse_backing(&String::deserialize(deserializer)?).map(Some).map_err(serde::de::Error::custom)
}

/// One value or a list of values, as the file may have.
fn one_or_several<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a text, or a list of texts")]
    enum Written {
        One(String),
        Several(Vec<String>),
    }
    let texts = match Written::deserialize(deserializer)? {
        Written::One(text) => vec![text],
        Written::Several(texts) => texts,
    };
    let parsed = texts.iter().map(|text| {
        text.parse().map_err(|error| serde::de::Error::custom(format_args!("`{text}`: {error}")))
    });
    parsed.collect()
}

fn parse_rdma(text: &str) -> Result<Rdma, String> {
    match text {
        "auto" => Ok(Rdma::Auto),
        "off" => Ok(Rdma::Off),
        _ => text.parse().map(Rdma::At).map_err(|_| "write auto, off or ADDRESS:PORT".into()),
    }
}

fn deserialize_rdma<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Rdma>, D::Error> {
    parse_rdma(&String::deserialize(deserializer)?).map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests;
