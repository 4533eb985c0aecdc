//! The configuration of xpm-swapd: a TOML file, and the command line over it. `docs/config.md`
//! describes every key.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use xpm_control::config::ConfigError;
use xpm_control::urls::Urls;
use xpm_protocol::api::blk::{Form, Hold, TransportKind};
use xpm_protocol::policy::{Amount, Labels};
use xpm_protocol::units::{ByteSize, Span, is_region_len};
use xpm_protocol::{Name, Percent};

use crate::policy::{AREA_LEN_MIN, Rules};

/// The default path of the configuration.
pub const PATH_DEFAULT: &str = "/etc/xpm/swapd.toml";

/// Highest priority that swapon(2) takes.
const PRIORITY_MAX: u16 = 32_767;
/// Highest sensible pressure threshold: time of a stall in one window of a second.
const PRESSURE_MAX: Duration = Duration::from_millis(900);

/// The configuration, including all defaults.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Base URLs of the allocators.
    pub allocator: Urls,
    /// File with the allocator's token, of mode 0600.
    pub token_file: Option<PathBuf>,
    /// The control socket of xpm-blk.
    pub blk: PathBuf,
    /// This daemon's control socket.
    pub control: PathBuf,
    /// The state directory, which is kept across restarts.
    pub state: PathBuf,
    /// Swap that exists from the start.
    pub base: ByteSize,
    /// Upper limit of swap.
    pub maximum: ByteSize,
    /// Priority against other swap.
    pub priority: u16,
    /// Time between two checks of the machine's memory.
    pub look: Span,
    /// Control groups that are excluded from swap.
    pub protect: Vec<String>,
    /// The conditions and steps of growing.
    pub grow: GrowConfig,
    /// The conditions of shrinking.
    pub shrink: ShrinkConfig,
    /// The parameters of areas.
    pub device: DeviceConfig,
    /// The last resort.
    pub fallback: Option<FallbackConfig>,
    /// Settings of the kernel.
    pub tune: TuneConfig,
}

/// The conditions and steps of growing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct GrowConfig {
    /// Grow when less swap than this is free.
    pub free_below: Amount,
    /// Grow when tasks waited this long for memory within a second and less than `pressure_free_below` is
    /// free; 0s disables this.
    pub pressure: Span,
    /// See `pressure`.
    pub pressure_free_below: Amount,
    /// The first step; each further one is twice as large, until memory was calm.
    pub step: ByteSize,
    /// The largest step.
    pub step_max: ByteSize,
}

/// The conditions of shrinking.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ShrinkConfig {
    /// Shrink after memory was calm for this long.
    pub after: Span,
    /// Memory that has to stay available when swapped-out pages come back.
    pub margin: Amount,
}

/// The parameters of areas.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct DeviceConfig {
    /// The form in which allocations are shown.
    #[serde(rename = "as")]
    pub form: Form,
    /// Number of regions to stripe over.
    pub stripe: Option<u32>,
    /// Stripe unit.
    pub stripe_unit: Option<ByteSize>,
    /// Size of a region.
    pub region_size: Option<ByteSize>,
    /// The account that allocations are charged to.
    pub account: Option<Name>,
    /// The strategy.
    pub strategy: Option<Name>,
    /// The client; by default this host's name.
    pub client: Option<Name>,
    /// Labels for the conditions of rules.
    pub labels: Labels,
    /// Transport to the appliances.
    pub transport: Option<TransportKind>,
    /// How long I/O is held while an appliance cannot be reached.
    pub hold: Hold,
    /// Whether to free memory of pages that are no longer swapped out.
    pub discard: bool,
}

/// A local file or partition as the last resort.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FallbackConfig {
    /// The file or partition.
    pub path: PathBuf,
    /// Its priority, lower than that of external memory.
    #[serde(default)]
    pub priority: u16,
    /// The size of the file to create if it does not exist.
    #[serde(default)]
    pub size: Option<ByteSize>,
}

/// Settings of the kernel that affect swap over a network.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct TuneConfig {
    /// The treatment of the settings.
    pub mode: Tune,
    /// `vm.page-cluster`: pages that are read at once, as a power of two; 0 to 10.
    pub page_cluster: Option<u8>,
    /// `vm.watermark_scale_factor`: how early memory is freed in the background; 1 to 3000.
    pub watermark_scale_factor: Option<u16>,
    /// Whether zswap compresses pages before they go over the network.
    pub zswap: Option<bool>,
}

/// The treatment of settings of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tune {
    /// `xpm swap status` shows deviations.
    Advise,
    /// The settings are written, and restored when they are no longer configured.
    Set,
    /// The settings are ignored.
    Off,
}

impl Default for Config {
    fn default() -> Config {
        let names = [
            "init.scope",
            "ssh.service",
            "xpm-blk.service",
            "xpm-swapd.service",
            "xpm-appliance.service",
            "xpm-allocator.service",
        ];
        Config {
            allocator: "http://127.0.0.1:7700".parse().expect("it is a URL"),
            token_file: None,
            blk: "/run/xpm/blk.sock".into(),
            control: "/run/xpm/swapd.sock".into(),
            state: "/var/lib/xpm-swapd".into(),
            base: ByteSize(0),
            maximum: ByteSize(0),
            priority: 100,
            look: Span(Duration::from_secs(1)),
            protect: names.map(ToOwned::to_owned).to_vec(),
            grow: GrowConfig::default(),
            shrink: ShrinkConfig::default(),
            device: DeviceConfig::default(),
            fallback: None,
            tune: TuneConfig::default(),
        }
    }
}

impl Default for GrowConfig {
    fn default() -> GrowConfig {
        GrowConfig {
            free_below: share("25%"),
            pressure: Span(Duration::from_millis(100)),
            pressure_free_below: share("50%"),
            step: ByteSize(1 << 30),
            step_max: ByteSize(16 << 30),
        }
    }
}

impl Default for ShrinkConfig {
    fn default() -> ShrinkConfig {
        ShrinkConfig { after: Span(Duration::from_secs(600)), margin: share("10%") }
    }
}

impl Default for DeviceConfig {
    fn default() -> DeviceConfig {
        DeviceConfig {
            form: Form::Ublk,
            stripe: None,
            stripe_unit: None,
            region_size: None,
            account: None,
            strategy: None,
            client: None,
            labels: Labels::new(),
            transport: None,
            hold: Hold::Forever,
            discard: true,
        }
    }
}

impl Default for TuneConfig {
    fn default() -> TuneConfig {
        TuneConfig {
            mode: Tune::Advise,
            page_cluster: Some(3),
            watermark_scale_factor: Some(100),
            zswap: None,
        }
    }
}

fn share(text: &str) -> Amount {
    Amount::Share(text.parse::<Percent>().expect("it is a share"))
}

impl Config {
    /// Reads a file. Blocks.
    ///
    /// # Errors
    /// The file, the line, and the allowed values.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        xpm_control::config::load(path)
    }

    /// Checks the conditions that the file's syntax does not.
    ///
    /// # Errors
    /// One line: the key, its value, and the allowed values.
    pub fn check(&self) -> Result<(), String> {
        self.check_sizes()?;
        self.check_device()?;
        self.check_rest()
    }

    fn check_sizes(&self) -> Result<(), String> {
        let least = ByteSize(AREA_LEN_MIN);
        if self.maximum < least {
            return Err(format!(
                "`maximum` is {}; say how much swap this machine may have at most, {least} or more",
                self.maximum
            ));
        }
        if self.base > self.maximum {
            return Err(format!(
                "`base` is {} and `maximum` {}; the base cannot be more",
                self.base, self.maximum
            ));
        }
        if self.base.0 > 0 && self.base < least {
            return Err(format!("`base` is {}; it can be 0, or {least} and more", self.base));
        }
        if self.grow.step < least || self.grow.step > self.grow.step_max {
            return Err(format!(
                "`grow.step` is {}; it can be {least} up to `grow.step-max`, which is {}",
                self.grow.step, self.grow.step_max
            ));
        }
        Ok(())
    }

    fn check_device(&self) -> Result<(), String> {
        let device = &self.device;
        if !matches!(device.form, Form::Ublk | Form::Nbd | Form::NbdDirect) {
            return Err(format!("`device.as` is {}; swap can be on ublk, nbd or nbd-direct", device.form));
        }
        if let Some(size) = device.region_size.filter(|size| !is_region_len(size.0)) {
            return Err(format!(
                "`device.region-size` is {size}; a region is a power of two from 16MiB to 64GiB"
            ));
        }
        match device.stripe {
            Some(stripe) if device.form == Form::NbdDirect && stripe > 1 => Err(format!(
                "`device.stripe` is {stripe}; an nbd-direct device lies on one appliance: leave it out, or take ublk"
            )),
            Some(stripe) if !(1..=1024).contains(&stripe) => {
                Err(format!("`device.stripe` is {stripe}; it can be 1 to 1024"))
            }
            None if device.stripe_unit.is_some() => {
                Err("`device.stripe-unit` is given without `device.stripe`".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn check_rest(&self) -> Result<(), String> {
        if self.priority > PRIORITY_MAX {
            return Err(format!("`priority` is {}; it can be 0 to {PRIORITY_MAX}", self.priority));
        }
        if self.grow.pressure.0 > PRESSURE_MAX {
            return Err(format!(
                "`grow.pressure` is {}; it is the time of a stall within a second, 0s to 900ms",
                self.grow.pressure
            ));
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(60)).contains(&self.look.0) {
            return Err(format!("`look` is {}; it can be 100ms to 1m", self.look));
        }
        if self.shrink.after.0 < self.look.0 {
            return Err(format!("`shrink.after` is {}; it cannot be shorter than `look`", self.shrink.after));
        }
        let places = [("blk", &self.blk), ("control", &self.control), ("state", &self.state)];
        let fallback = self.fallback.iter().map(|fallback| ("fallback.path", &fallback.path));
        for (key, path) in places.into_iter().chain(fallback) {
            if !path.is_absolute() {
                return Err(format!("`{key}` is {}; give an absolute path", path.display()));
            }
        }
        self.check_fallback()?;
        self.check_tune()
    }

    fn check_fallback(&self) -> Result<(), String> {
        let Some(fallback) = &self.fallback else { return Ok(()) };
        if fallback.priority >= self.priority {
            return Err(format!(
                "`fallback.priority` is {} and `priority` {}; the last resort has to have the lower one",
                fallback.priority, self.priority
            ));
        }
        match fallback.size {
            Some(size) if size.0 < 1 << 20 => {
                Err(format!("`fallback.size` is {size}; it can be 1MiB or more"))
            }
            _ => Ok(()),
        }
    }

    fn check_tune(&self) -> Result<(), String> {
        match (self.tune.page_cluster, self.tune.watermark_scale_factor) {
            (Some(pages), _) if pages > 10 => {
                Err(format!("`tune.page-cluster` is {pages}; it can be 0 to 10"))
            }
            (_, Some(factor)) if !(1..=3000).contains(&factor) => {
                Err(format!("`tune.watermark-scale-factor` is {factor}; it can be 1 to 3000"))
            }
            _ => Ok(()),
        }
    }

    /// The rules of the policy.
    pub fn rules(&self) -> Rules {
        Rules {
            base: self.base.0,
            maximum: self.maximum.0,
            free_below: self.grow.free_below,
            pressure_free_below: self.grow.pressure_free_below,
            step: self.grow.step.0,
            step_max: self.grow.step_max.0,
            shrink_after: self.shrink.after.0,
            margin: self.shrink.margin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        xpm_control::config::parse(Path::new("swapd.toml"), text)
    }

    #[test]
    fn every_key() {
        let config = parse(
            r#"
            allocator = ["http://10.0.0.1:7700", "http://10.0.0.2:7700"]
            token-file = "/etc/xpm/token"
            blk = "/run/a.sock"
            control = "/run/b.sock"
            state = "/var/a"
            base = "4GiB"
            maximum = "64GiB"
            priority = 50
            look = "2s"
            protect = ["ssh.service"]
            [grow]
            free-below = "512MiB"
            pressure = "200ms"
            pressure-free-below = "40%"
            step = "2GiB"
            step-max = "8GiB"
            [shrink]
            after = "5m"
            margin = "1GiB"
            [device]
            as = "nbd"
            stripe = 2
            stripe-unit = "128KiB"
            region-size = "1GiB"
            account = "web"
            strategy = "swap"
            client = "web1"
            labels = { use = "swap" }
            transport = "nbd-tcp"
            hold = "5m"
            discard = false
            [fallback]
            path = "/swapfile"
            priority = 10
            size = "2GiB"
            [tune]
            mode = "set"
            page-cluster = 4
            watermark-scale-factor = 200
            zswap = true
            "#,
        )
        .unwrap();
        config.check().unwrap();
        assert_eq!(config.tune.mode, Tune::Set);
        assert_eq!(config.rules().step_max, 8 << 30);
        assert_eq!(config.fallback.unwrap().priority, 10);
    }

    #[test]
    fn a_maximum_is_enough() {
        parse("maximum = \"1GiB\"").unwrap().check().unwrap();
        let error = parse("").unwrap().check().unwrap_err();
        assert!(error.contains("`maximum`"), "{error}");
    }

    #[test]
    fn errors_name_the_place_and_the_remedy() {
        let error = xpm_control::error_line(&parse("maximum = \"1GiB\"\n[grow]\nstepp = 1\n").unwrap_err());
        assert!(
            error.contains("swapd.toml:3") && error.contains("stepp") && error.contains("step-max"),
            "{error}"
        );
        for (text, parts) in [
            ("base = \"2GiB\"", ["`base`", "maximum"]),
            ("base = \"1MiB\"", ["`base`", "16MiB"]),
            ("priority = 40000", ["`priority`", "32767"]),
            ("state = \"here\"", ["`state`", "absolute"]),
            ("look = \"1ms\"", ["`look`", "100ms"]),
            ("[grow]\nstep = \"1MiB\"", ["`grow.step`", "16MiB"]),
            ("[grow]\npressure = \"1s\"", ["`grow.pressure`", "900ms"]),
            ("[shrink]\nafter = \"1ms\"", ["`shrink.after`", "look"]),
            ("[device]\nas = \"nbd-socket=/a\"", ["`device.as`", "ublk"]),
            ("[device]\nas = \"nbd-direct\"\nstripe = 2", ["`device.stripe`", "one appliance"]),
            ("[device]\nregion-size = 5", ["`device.region-size`", "power of two"]),
            ("[device]\nstripe-unit = \"64KiB\"", ["`device.stripe-unit`", "device.stripe"]),
            ("[fallback]\npath = \"/a\"\npriority = 100", ["`fallback.priority`", "lower"]),
            ("[fallback]\npath = \"a\"", ["`fallback.path`", "absolute"]),
            ("[tune]\npage-cluster = 11", ["`tune.page-cluster`", "0 to 10"]),
            ("[tune]\nwatermark-scale-factor = 0", ["`tune.watermark-scale-factor`", "3000"]),
        ] {
            let error = parse(&format!("maximum = \"1GiB\"\n{text}")).unwrap().check().unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }
}
