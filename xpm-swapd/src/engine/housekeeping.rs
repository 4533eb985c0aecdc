//! Regular work besides areas: settings of the kernel, control groups that are excluded from swap, and the
//! last resort.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use xpm_protocol::api::swapd::Setting;

use super::Daemon;
use super::make::blocking;
use crate::config::{Config, Tune, TuneConfig};
use crate::error::Error;
use crate::fallback;
use crate::state::{Changed, Made};

/// Interval of checking everything.
const HOUSEKEEPING_EVERY: Duration = Duration::from_secs(30);

const CGROUPS: &str = "/sys/fs/cgroup";
const SWAP_MAX: &str = "memory.swap.max";

/// A configured setting.
struct Wanted {
    path: PathBuf,
    value: String,
    set: bool,
    note: String,
}

impl Daemon {
    /// Starts the housekeeping beside the loop, when it is due.
    pub(super) fn begin_housekeeping(self: &Arc<Daemon>) {
        let mut live = self.live();
        let due = live.kept_house.is_none_or(|kept| kept.elapsed() >= HOUSEKEEPING_EVERY);
        if !due || live.keeping_house {
            return;
        }
        live.keeping_house = true;
        drop(live);
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            daemon.keep_house().await;
            let mut live = daemon.live();
            (live.kept_house, live.keeping_house) = (Some(Instant::now()), false);
        });
    }

    async fn keep_house(&self) {
        match self.keep_settings() {
            Ok(settings) => {
                self.live().settings = settings;
                self.well("settings");
            }
            Err(error) => self.trouble("settings", &error.to_string(), Some(HOUSEKEEPING_EVERY)),
        }
        self.keep_fallback().await;
    }

    /// Writes the configured settings, and restores those that are no longer configured.
    fn keep_settings(&self) -> Result<Vec<Setting>, Error> {
        let wanted = wanted(&self.config);
        let kept = self.store.get().settings;
        for (path, changed) in &kept {
            if wanted.iter().any(|one| one.set && one.path == *path) {
                continue;
            }
            // A setting that another program changed meanwhile, or that is gone with its control group, is
            // left alone.
            if read(path).as_deref() == Some(changed.wrote.as_str()) {
                tracing::info!("{} is put back to {}", path.display(), changed.before);
                if let Err(error) = fs::write(path, &changed.before) {
                    tracing::warn!("{}: {error}", path.display());
                }
            }
            self.store.change(|state| state.settings.remove(path).map(drop))?;
        }
        wanted.into_iter().map(|one| self.keep_setting(one, &kept)).collect()
    }

    fn keep_setting(&self, wanted: Wanted, kept: &BTreeMap<PathBuf, Changed>) -> Result<Setting, Error> {
        let Wanted { path, value, set, mut note } = wanted;
        let mut found = read(&path);
        if let Some(before) = found.clone().filter(|found| set && *found != value) {
            // The old value is recorded first, so that it can be restored after any failure.
            if !kept.contains_key(&path) {
                let changed = Changed { before: before.clone(), wrote: value.clone() };
                self.store.change(|state| state.settings.insert(path.clone(), changed).map(drop))?;
            }
            match fs::write(&path, &value) {
                Ok(()) => tracing::info!("{} is set from {before} to {value}", path.display()),
                Err(error) => note = format!("{note}; it cannot be set: {error}"),
            }
            found = read(&path);
        }
        if found.is_none() {
            note = format!("{note}; it is not there");
        }
        let ok = found.as_ref() == Some(&value);
        Ok(Setting { path: path.display().to_string(), found, wanted: value, ok, note })
    }

    async fn keep_fallback(&self) {
        const WHAT: &str = "fallback";
        let Some(wanted) = self.config.fallback.clone() else { return };
        if self.store.get().rest.is_some() {
            return;
        }
        let made = self.store.get().fallback.filter(|made| made.path == wanted.path);
        let known = made.as_ref().map(|made| made.id);
        let path = wanted.path.clone();
        let priority = self.config.priority;
        let kept = blocking(move || fallback::keep(&wanted, priority, known)).await;
        let kept = kept.and_then(|id| match id {
            Some(id) if known != Some(id) => {
                self.store.change(|state| state.fallback = Some(Made { path: path.clone(), id }))
            }
            _ => Ok(()),
        });
        match kept {
            Ok(()) => self.well(WHAT),
            Err(error) => self.trouble(WHAT, &error.to_string(), Some(HOUSEKEEPING_EVERY)),
        }
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn wanted(config: &Config) -> Vec<Wanted> {
    // Groups of the default list that do not exist here need no protection.
    let by_default = config.protect == Config::default().protect;
    let groups = config.protect.iter().filter(|group| !by_default || cgroup(group).is_dir());
    let groups = groups.map(|group| Wanted {
        path: cgroup(group).join(SWAP_MAX),
        value: "0".to_owned(),
        set: true,
        note: format!("{group} is kept out of swap"),
    });
    groups.chain(tuned(&config.tune)).collect()
}

fn tuned(tune: &TuneConfig) -> Vec<Wanted> {
    let set = match tune.mode {
        Tune::Off => return Vec::new(),
        Tune::Advise => false,
        Tune::Set => true,
    };
    let one = |path: &str, value: Option<String>, note: &str| {
        Some(Wanted { path: path.into(), value: value?, set, note: note.to_owned() })
    };
    let number = |value: Option<u16>| value.map(|value| value.to_string());
    let settings = [
        one(
            "/proc/sys/vm/page-cluster",
            number(tune.page_cluster.map(u16::from)),
            "pages that one read from swap brings, as a power of two: one round trip for all of them",
        ),
        one(
            "/proc/sys/vm/watermark_scale_factor",
            number(tune.watermark_scale_factor),
            "how early memory is freed in the background, so that programs need not wait for the network",
        ),
        one(
            "/sys/module/zswap/parameters/enabled",
            tune.zswap.map(|on| if on { "Y" } else { "N" }.to_owned()),
            "whether pages are compressed in memory before they go over the network",
        ),
    ];
    settings.into_iter().flatten().collect()
}

/// The directory of a control group, which is a path below the root or a unit of systemd.
fn cgroup(name: &str) -> PathBuf {
    let root = Path::new(CGROUPS);
    let below = name.trim_start_matches('/');
    let at_root = root.join(below);
    let service = root.join("system.slice").join(below);
    if !below.contains('/') && !at_root.is_dir() && service.is_dir() { service } else { at_root }
}
