//! The configuration of xpm-blk and of xpm-fs: a TOML file, and the command line over it. `docs/config.md`
//! describes every key.

use std::path::{Path, PathBuf};
use std::thread::available_parallelism;
use std::time::Duration;

use serde::Deserialize;
use xpm_control::config::ConfigError;
use xpm_control::urls::Urls;
use xpm_protocol::api::blk::{AttachDevice, Form, Hold, TransportKind};
use xpm_protocol::units::{ByteSize, Span};

use crate::frontend::{Shape, vhost_user};
use crate::program::Program;

/// Most bytes that the kernel reads ahead.
const READ_AHEAD_MAX: u64 = 16 << 20;
/// Fewest and most requests in flight on one queue.
const DEPTHS: std::ops::RangeInclusive<u16> = 1..=1024;
/// Fewest and most queues of one device.
const QUEUES: std::ops::RangeInclusive<u16> = 1..=64;

/// Default depth of one queue of a file, and default memory for the queue's buffers in bytes.
const FILE_DEPTH: u16 = 32;
const FILE_BUFFER_LEN: u64 = 4 << 20;

/// Shortest and longest `hang-limit`, in seconds.
const HANG_LIMITS: std::ops::RangeInclusive<u64> = 3..=3600;

/// The configuration, including all defaults.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// The daemon that the configuration is for.
    #[serde(skip)]
    pub program: Program,
    /// Base URLs of the allocators.
    pub allocator: Urls,
    /// The control socket; by default the daemon's own below /run/xpm.
    pub control: Option<PathBuf>,
    /// The state directory, which keeps this client's id and the maps of shown allocations across restarts;
    /// by default the daemon's own below /var/lib/xpm.
    pub state: Option<PathBuf>,
    /// File with the allocator's token, of mode 0600.
    pub token_file: Option<PathBuf>,
    /// How long I/O is held while an appliance cannot be reached.
    pub hold: Hold,
    /// Queues of a ublk device; by default one for each core, at most 4.
    pub queues: Option<u16>,
    /// Requests in flight on one queue; 1 to 1024.
    pub depth: u16,
    /// Memory for the buffers of one queue, which is locked.
    pub buffer: ByteSize,
    /// Longest busy wait of a queue's thread after work; 0s: none.
    pub spin: Span,
    /// Threads that serve the forms `nbd` and `nbd-socket`; by default one for each core, at most 4.
    pub threads: Option<u16>,
    /// Transports that are used only if a device asks for one of them.
    pub forbid_transports: Vec<TransportKind>,
    /// Time limit for connecting to the appliances when a device is attached.
    pub connect_limit: Span,
    /// How long an appliance has to answer that it does not know an allocation, while no allocator answers,
    /// before I/O to it fails.
    pub refusal_limit: Span,
    /// How long the process waits for the users of its devices after the first SIGTERM, before a
    /// second one makes it end in spite of them.
    pub stop_limit: Span,
    /// Whether to keep a second process ready that takes over when this one dies; by default where the
    /// kernel's ublk devices can outlive their server.
    pub standby: Option<bool>,
    /// Memory that a standby holds and returns to the kernel when it takes over.
    pub standby_reserve: ByteSize,
    /// How long a thread of the data plane, the serving process or the standby may be silent before it is
    /// killed and another one takes over; in whole seconds.
    pub hang_limit: Span,
    /// Changed pages of one file that the kernel keeps before their writers wait: as much as the links write
    /// within the time that a moving virtual machine may be paused.
    pub dirty_budget: ByteSize,
    /// Whether to show devices that can carry swap although the process is not safe for it.
    pub allow_unsafe_swap: bool,
    /// Whether to accept guest memory of a vhost-user front end that can shrink while it is used.
    pub allow_unsealed: bool,
    /// Whether to show an allocation at a TCP address that other machines reach, where any client can read
    /// and write it.
    pub insecure: bool,
    /// Devices that are attached at start.
    pub device: Vec<AttachDevice>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            allocator: "http://127.0.0.1:7700".parse().expect("it is a URL"),
            program: Program::Blk,
            control: None,
            state: None,
            token_file: None,
            hold: Hold::Forever,
            queues: None,
            depth: 128,
            buffer: ByteSize(16 << 20),
            spin: Span(Duration::from_micros(50)),
            threads: None,
            forbid_transports: Vec::new(),
            connect_limit: Span(Duration::from_secs(10)),
            refusal_limit: Span(xpm_client_core::volume::REFUSAL_LIMIT),
            stop_limit: Span(Duration::from_secs(30)),
            standby: None,
            standby_reserve: ByteSize(32 << 20),
            hang_limit: Span(Duration::from_secs(20)),
            dirty_budget: ByteSize(64 << 20),
            allow_unsafe_swap: false,
            allow_unsealed: false,
            insecure: false,
            device: Vec::new(),
        }
    }
}

impl Config {
    /// Reads a file. Blocks.
    ///
    /// # Errors
    /// The file, the line, and the allowed values.
    pub fn load(program: Program, path: &Path) -> Result<Config, ConfigError> {
        let config: Config = xpm_control::config::load(path)?;
        Ok(Config { program, ..config })
    }

    /// Reads the file at [`Program::config_path`] if there is one. Blocks.
    ///
    /// # Errors
    /// Like [`Config::load`], but not when the file is missing.
    pub fn load_default(program: Program) -> Result<Config, ConfigError> {
        match Config::load(program, Path::new(program.config_path())) {
            Err(ConfigError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(Config { program, ..Config::default() })
            }
            result => result,
        }
    }

    /// Checks the conditions that the file's syntax does not.
    ///
    /// # Errors
    /// One line: the key, its value, and the allowed values.
    pub fn check(&self) -> Result<(), String> {
        if let Some(name) = self.first_named_twice() {
            return Err(format!("`device`: {name} is listed twice; list each allocation once"));
        }
        self.queues.map_or(Ok(()), |queues| check_queues("queues", queues))?;
        self.threads.map_or(Ok(()), |threads| check_queues("threads", threads))?;
        check_depth("depth", self.depth)?;
        if !(1 << 20..=1 << 30).contains(&self.buffer.0) {
            return Err(format!("`buffer` is {}; it can be 1MiB to 1GiB", self.buffer));
        }
        if self.spin.0 > Duration::from_millis(10) {
            return Err(format!("`spin` is {}; it can be 0s to 10ms", self.spin));
        }
        if !HANG_LIMITS.contains(&self.hang_limit.0.as_secs()) {
            return Err(format!("`hang-limit` is {}; it can be 3s to 1h", self.hang_limit));
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&self.refusal_limit.0) {
            return Err(format!("`refusal-limit` is {}; it can be 1s to 1h", self.refusal_limit));
        }
        if self.standby_reserve.0 > 4 << 30 {
            return Err(format!("`standby-reserve` is {}; it can be 0B to 4GiB", self.standby_reserve));
        }
        if !(1 << 20..=1 << 40).contains(&self.dirty_budget.0) {
            return Err(format!("`dirty-budget` is {}; it can be 1MiB to 1TiB", self.dirty_budget));
        }
        for (key, path) in [("control", self.control()), ("state", self.state())] {
            if !path.is_absolute() {
                return Err(format!("`{key}` is {}; give an absolute path", path.display()));
            }
        }
        self.device.iter().try_for_each(|device| {
            check_device(device).map_err(|error| format!("device {}: {error}", device.name))
        })
    }

    fn first_named_twice(&self) -> Option<&str> {
        let names: Vec<&str> = self.device.iter().map(|device| device.name.as_str()).collect();
        (1..names.len()).find(|&place| names[..place].contains(&names[place])).map(|place| names[place])
    }

    /// Path of the control socket.
    pub fn control(&self) -> PathBuf {
        self.control.clone().unwrap_or_else(|| self.program.control())
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.state.clone().unwrap_or_else(|| self.program.state())
    }

    /// The parameters of a requested device.
    pub fn shape(&self, device: &AttachDevice, number: Option<u32>) -> Shape {
        let queues = match device.form {
            Form::Ublk => self.queues.unwrap_or_else(|| cores().min(4)),
            // The kernel has one queue of requests for a mount, and all threads read from it.
            Form::File(_) | Form::Tree(_) | Form::InTree(_) => self.queues.unwrap_or_else(|| cores().min(2)),
            // See the reasons at `frontend::kernel_nbd`.
            Form::Nbd | Form::NbdDirect | Form::NbdSocket(_) => 1,
            Form::VhostUser(_) => vhost_user::QUEUES_DEFAULT,
        };
        // Page faults are small, and the kernel writes back sequentially: more buffers would only be locked
        // without benefit.
        let (depth, buffer_len) = match device.form {
            Form::File(_) | Form::Tree(_) | Form::InTree(_) => {
                (self.depth.min(FILE_DEPTH), self.buffer.0.min(FILE_BUFFER_LEN))
            }
            _ => (self.depth, self.buffer.0),
        };
        Shape {
            queues: device.queues.unwrap_or(queues),
            depth: device.depth.unwrap_or(depth),
            spin: self.spin(),
            buffer_len,
            number,
            name: device.name.clone(),
            block_size: device.block_size.or(device.form.block_size_of_before()),
        }
    }

    /// Longest busy wait of a thread: none on a machine with one core, where it would only keep other threads
    /// from running.
    pub fn spin(&self) -> Duration {
        if cores() == 1 { Duration::ZERO } else { self.spin.0 }
    }

    /// Consecutive checks, one per second, without a sign of life after which a thread or process counts as
    /// hung.
    pub(crate) fn silence_max(&self) -> u32 {
        self.hang_limit.0.as_secs() as u32
    }

    /// Threads that serve NBD sockets.
    pub fn threads(&self) -> u16 {
        self.threads.unwrap_or_else(|| cores().min(4))
    }
}

/// Checks the conditions on a request for a device that its types do not.
///
/// # Errors
/// One line: the field, its value, and the allowed values.
pub fn check_device(device: &AttachDevice) -> Result<(), String> {
    device.queues.map_or(Ok(()), |queues| check_queues("queues", queues))?;
    device.depth.map_or(Ok(()), |depth| check_depth("depth", depth))?;
    match device.read_ahead {
        Some(len) if len.0 > READ_AHEAD_MAX => {
            Err(format!("`read-ahead` is {len}; it can be 0B to {}", ByteSize(READ_AHEAD_MAX)))
        }
        Some(_) if !matches!(device.form, Form::File(_) | Form::Tree(_)) => Err(format!(
            "`read-ahead` is of files and trees: leave it out for {}, where the disk's setting of the kernel counts",
            device.form
        )),
        _ => Ok(()),
    }
}

fn check_queues(key: &str, queues: u16) -> Result<(), String> {
    match QUEUES.contains(&queues) {
        true => Ok(()),
        false => Err(format!("`{key}` is {queues}; it can be {} to {}", QUEUES.start(), QUEUES.end())),
    }
}

fn check_depth(key: &str, depth: u16) -> Result<(), String> {
    match DEPTHS.contains(&depth) {
        true => Ok(()),
        false => Err(format!("`{key}` is {depth}; it can be {} to {}", DEPTHS.start(), DEPTHS.end())),
    }
}

fn cores() -> u16 {
    available_parallelism().map_or(1, |cores| cores.get().try_into().unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        xpm_control::config::parse(Path::new("blk.toml"), text)
    }

    #[test]
    fn every_key() {
        let config = parse(
            r#"
            allocator = "http://10.0.0.1:7700"
            control = "/run/a.sock"
            state = "/var/a"
            token-file = "/etc/xpm/token"
            hold = "5m"
            queues = 2
            depth = 64
            buffer = "8MiB"
            spin = "20us"
            threads = 1
            forbid-transports = ["rdma"]
            connect-limit = "3s"
            refusal-limit = "1m"
            stop-limit = "1m"
            standby = true
            standby-reserve = "16MiB"
            hang-limit = "10s"
            dirty-budget = "128MiB"
            allow-unsafe-swap = true
            allow-unsealed = true
            insecure = true
            [[device]]
            name = "pool"
            as = "ublk"
            depth = 32
            [[device]]
            name = "vm"
            as = "vhost-user=/run/xpm/vm.sock"
            [[device]]
            name = "share"
            as = "nbd-socket=127.0.0.1:10809"
            hold = "forever"
            transport = "nbd-tcp"
            "#,
        )
        .unwrap();
        config.check().unwrap();
        assert_eq!(config.device.len(), 3);
        assert_eq!(config.forbid_transports, [TransportKind::Rdma]);
        let shape = config.shape(&config.device[0], Some(3));
        assert_eq!((shape.queues, shape.depth, shape.buffer_len, shape.number), (2, 32, 8 << 20, Some(3)));
        assert_eq!(config.shape(&config.device[2], None).depth, 64);
    }

    #[test]
    fn an_empty_file_is_a_valid_configuration() {
        let config = parse("").unwrap();
        assert_eq!(config, Config::default());
        config.check().unwrap();
    }

    #[test]
    fn errors_name_the_place_and_the_remedy() {
        let error = xpm_control::error_line(&parse("depth = 1\nqueus = 2\n").unwrap_err());
        assert!(
            error.contains("blk.toml:2") && error.contains("queus") && error.contains("queues"),
            "{error}"
        );
        let error = xpm_control::error_line(&parse("hold = \"soon\"").unwrap_err());
        assert!(error.contains("blk.toml:1") && error.contains("forever"), "{error}");
        for (text, parts) in [
            ("depth = 0", ["`depth`", "1 to 1024"]),
            ("queues = 65", ["`queues`", "1 to 64"]),
            ("buffer = 5", ["`buffer`", "1MiB to 1GiB"]),
            ("spin = \"1s\"", ["`spin`", "10ms"]),
            ("state = \"here\"", ["`state`", "absolute"]),
            ("refusal-limit = \"2h\"", ["`refusal-limit`", "1s to 1h"]),
            ("hang-limit = \"2s\"", ["`hang-limit`", "3s to 1h"]),
            ("standby-reserve = \"5GiB\"", ["`standby-reserve`", "4GiB"]),
            ("dirty-budget = \"1KiB\"", ["`dirty-budget`", "1MiB"]),
            ("[[device]]\nname = \"a\"\nas = \"ublk\"\ndepth = 5000", ["device a", "1 to 1024"]),
            ("[[device]]\nname=\"a\"\nas=\"ublk\"\n[[device]]\nname=\"a\"\nas=\"nbd\"", ["a", "twice"]),
        ] {
            let error = parse(text).unwrap().check().unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,200}") {
            let _ = parse(&text).map(|config| config.check());
        }
    }
}
