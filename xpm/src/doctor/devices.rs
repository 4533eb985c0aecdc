//! Whether the devices that this host has are safe.

use xpm_control::proc::Swap;
use xpm_protocol::api::blk::{Device, DeviceState, Form, LinkState, Standby, StandbyState, Status};

use super::machine::{BlockSettings, Machine};
use super::{Check, Verdict};
use crate::connect::{Daemons, Failure};
use crate::{age, blk, status};

const DAEMON: &str = "xpm-blk";

/// The state of this host's devices, from xpm-blk and the kernel.
pub(super) struct Host {
    /// xpm-blk's own account; none when it does not run here.
    blk: Result<Option<(Status, Vec<Device>)>, String>,
    /// Settings of the kernel devices among them, by path.
    settings: Vec<(String, BlockSettings)>,
    swaps: Vec<Swap>,
    /// Whether this machine has an RDMA device.
    rdma_here: bool,
}

impl Host {
    /// Asks xpm-blk and reads the settings of its devices.
    pub(super) async fn read(daemons: &Daemons, machine: &Machine, rdma_here: bool) -> Host {
        let blk = match ask(daemons).await {
            Ok(answer) => Ok(Some(answer)),
            Err(failure) if failure.is_not_there() => Ok(None),
            Err(failure) => Err(failure.to_string()),
        };
        let devices = blk.iter().flatten().flat_map(|(_, devices)| devices);
        let settings = devices
            .filter_map(|device| Some((device.path.clone(), BlockSettings::read(&device.path)?)))
            .collect();
        Host { blk, settings, swaps: machine.swaps.clone(), rdma_here }
    }

    fn is_swap(&self, device: &Device) -> bool {
        status::is_swap(device) || self.swaps.iter().any(|swap| swap.path == device.path)
    }

    fn settings(&self, device: &Device) -> Option<&BlockSettings> {
        self.settings.iter().find(|(path, _)| *path == device.path).map(|(_, settings)| settings)
    }
}

async fn ask(daemons: &Daemons) -> Result<(Status, Vec<Device>), Failure> {
    let blk = daemons.blk()?;
    Ok((blk.blk_status().await?, blk.devices().await?))
}

/// Every check of xpm-blk and its devices.
pub(super) fn checks(host: &Host) -> Vec<Check> {
    match &host.blk {
        Ok(Some((status, devices))) => {
            let mut checks = daemon(host, status, devices);
            checks.extend(devices.iter().flat_map(|device| of_device(host, device)));
            checks
        }
        Ok(None) => {
            orphans(host, Check::ok(DAEMON, "daemon", "does not run on this host, which then has no devices"))
        }
        Err(failure) => orphans(host, Check::warn(DAEMON, "daemon", failure.clone())),
    }
}

/// Without xpm-blk's account, a swap that looks like one of its devices is named.
fn orphans(host: &Host, daemon: Check) -> Vec<Check> {
    let like_ours = |swap: &&Swap| swap.path.starts_with("/dev/ublkb") || swap.path.starts_with("/dev/nbd");
    let orphan = |swap: &Swap| {
        Check::warn(
            DAEMON,
            &swap.path,
            "is swap, and xpm-blk does not answer: if it served that device, swapped memory waits",
        )
        .mend(format!(
            "systemctl start xpm-blk; if the device is not xpm's, nothing; else swapoff {}",
            swap.path
        ))
    };
    std::iter::once(daemon).chain(host.swaps.iter().filter(like_ours).map(orphan)).collect()
}

fn daemon(host: &Host, status: &Status, devices: &[Device]) -> Vec<Check> {
    let running =
        format!("version {}, process {}, up for {}", status.version, status.pid, age::short(status.uptime.0));
    let verdict = unsafe_item_verdict(host, devices);
    let items = status.safety.iter().map(|item| match item.ok {
        true => Check::ok(DAEMON, &item.item, item.found.clone()),
        false => Check {
            remedy: item.remedy.clone(),
            ..Check::new(DAEMON, &item.item, verdict, item.found.clone())
        },
    });
    let standby = status.standby.as_ref().map(|standby| of_standby(standby, host, devices));
    let owed = status.owed.iter().map(|owed| {
        let found = format!(
            "`{}` is detached here, and the allocator does not know yet: {}",
            owed.allocation, owed.reason
        );
        Check::warn(DAEMON, "owed", found)
            .mend("xpm-blk tells it when it answers: see that the allocator runs")
    });
    std::iter::once(Check::ok(DAEMON, "daemon", running)).chain(items).chain(standby).chain(owed).collect()
}

/// While there is none, ublk devices wait for the next process when the daemon dies, which may find no memory to start.
fn of_standby(standby: &Standby, host: &Host, devices: &[Device]) -> Check {
    const ITEM: &str = "standby";
    let needed = devices.iter().any(|device| host.is_swap(device) && device.form == Form::Ublk);
    match (standby.state, standby.pid) {
        (StandbyState::Ready, Some(pid)) => {
            Check::ok(DAEMON, ITEM, format!("process {pid} is ready, with {} locked", standby.locked))
        }
        (StandbyState::Ready | StandbyState::Starting, _) if needed => Check::warn(
            DAEMON,
            ITEM,
            "not ready yet: if the daemon dies now, swap waits for the next one to start",
        )
        .mend("look again in a moment; if it stays so, see the log of xpm-blk"),
        (StandbyState::Ready | StandbyState::Starting, _) => Check::ok(DAEMON, ITEM, "is being started"),
        (StandbyState::Off, _) if needed => {
            Check::warn(DAEMON, ITEM, "none: if the daemon dies, swap waits for the next one to start")
                .mend("set `standby = true` in /etc/xpm/blk.toml and start xpm-blk anew")
        }
        (StandbyState::Off, _) if devices.iter().any(|device| device.form == Form::Ublk) => {
            Check::warn(DAEMON, ITEM, "none: if the daemon dies, ublk devices wait for the next one to start")
                .mend("set `standby = true` in /etc/xpm/blk.toml and start xpm-blk anew")
        }
        (StandbyState::Off, _) => Check::ok(DAEMON, ITEM, "none, and nothing here needs one"),
    }
}

/// A safety item that does not hold is a danger once swap goes through the process: nbd-direct
/// leaves it out, and a file system survives a daemon that waits for memory.
fn unsafe_item_verdict(host: &Host, devices: &[Device]) -> Verdict {
    let through_daemon = |device: &Device| host.is_swap(device) && device.form != Form::NbdDirect;
    if devices.iter().any(through_daemon) { Verdict::Critical } else { Verdict::Warning }
}

fn of_device(host: &Host, device: &Device) -> Vec<Check> {
    let group = format!("Device {} ({} as {})", device.path, device.name, device.form);
    let mut checks =
        vec![state(&group, host, device), transport(&group, host, device), users(&group, host, device)];
    if let Some(settings) = host.settings(device) {
        checks.push(scheduler(&group, device, settings));
        checks.push(rotational(&group, device, settings));
        checks.push(discard(&group, host, device, settings));
    }
    checks
}

fn state(group: &str, host: &Host, device: &Device) -> Check {
    let in_use = !device.users.is_empty() || host.is_swap(device);
    match device.state {
        DeviceState::Live => Check::ok(group, "state", "live"),
        DeviceState::Holding => {
            Check::warn(group, "state", "holding: I/O to an appliance that is out of reach waits")
                .mend(format!("see `xpm blk show {}`; bring the appliance back", device.name))
        }
        DeviceState::Lost => {
            let verdict = if in_use { Verdict::Critical } else { Verdict::Warning };
            let mend = format!("stop what uses it, then xpm blk detach --force {}", device.name);
            Check::new(group, "state", verdict, "lost: an appliance gave up its memory, I/O to it fails")
                .mend(mend)
        }
    }
}

/// By which transport each appliance is reached, and why not by a better one.
fn transport(group: &str, host: &Host, device: &Device) -> Check {
    let item = "transport";
    let up = || device.links.iter().filter(|link| link.state == LinkState::Up);
    let ways: Vec<String> = up()
        .map(|link| {
            let why = link.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
            format!("{} by {}{why}", link.appliance_name, link.transport)
        })
        .collect();
    match up().any(|link| blk::worse_way(link, host.rdma_here).is_some()) {
        true => Check::warn(group, item, ways.join(", "))
            .mend("mend what it says; a better one is tried again by itself, after a minute at the latest"),
        false if ways.is_empty() => Check::ok(group, item, "no appliance is connected"),
        false => Check::ok(group, item, ways.join(", ")),
    }
}

fn users(group: &str, host: &Host, device: &Device) -> Check {
    let swapped = host.swaps.iter().find(|swap| swap.path == device.path);
    let found = match swapped {
        Some(swap) => {
            format!(
                "swap, {} of {} used",
                xpm_protocol::ByteSize(swap.used),
                xpm_protocol::ByteSize(swap.size)
            )
        }
        None if device.users.is_empty() => "nobody".to_owned(),
        None => device.users.join(", "),
    };
    Check::ok(group, "used by", found)
}

fn scheduler(group: &str, device: &Device, settings: &BlockSettings) -> Check {
    match settings.scheduler.as_deref() {
        Some("none") => Check::ok(group, "scheduler", "none"),
        other => Check::warn(group, "scheduler", other.unwrap_or("not readable").to_owned())
            .mend(format!("echo none > /sys/block/{}/queue/scheduler", base(&device.path))),
    }
}

fn rotational(group: &str, device: &Device, settings: &BlockSettings) -> Check {
    match settings.rotational {
        Some(0) => Check::ok(group, "rotational", "0"),
        _ => Check::warn(group, "rotational", "the kernel takes it for a turning disk")
            .mend(format!("echo 0 > /sys/block/{}/queue/rotational", base(&device.path))),
    }
}

/// `/proc/swaps` does not show whether a swap was turned on with discard; but then the kernel
/// discards the whole device at once, which counts in its statistics.
fn discard(group: &str, host: &Host, device: &Device, settings: &BlockSettings) -> Check {
    let path = &device.path;
    match (settings.discard_max, settings.discards) {
        (Some(0) | None, _) => Check::warn(
            group,
            "discard",
            "the device does not take discards: memory is never given back while it is attached",
        ),
        (Some(_), Some(0)) if host.is_swap(device) => Check::warn(
            group,
            "discard",
            "none was seen: swapped-out memory that is free again is not given back",
        )
        .mend(format!("swapoff {path} && swapon --discard {path}")),
        (Some(_), Some(seen)) => {
            Check::ok(group, "discard", format!("on, {seen} seen since it was attached"))
        }
        (Some(_), None) => Check::ok(group, "discard", "on"),
    }
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    fn device(form: &str, state: &str, users: &[&str]) -> Device {
        serde_json::from_value(json!({
            "name": "swap0", "as": form, "path": "/dev/ublkb0", "size": 1 << 30, "epoch": 1, "queues": 1, "depth": 128,
            "state": state, "links": [], "users": users, "counters": {}, "in_flight": 0, "age": "1s"
        }))
        .unwrap()
    }

    fn host(device: Device, safe: bool, settings: BlockSettings) -> Host {
        let status = serde_json::from_value(json!({
            "version": "0", "client": "0".repeat(32), "pid": 1, "uptime": "1s", "allocator": "", "devices": 1,
            "safety": [{"item": "mlockall", "ok": safe, "found": "not locked", "remedy": "run as root"}]
        }))
        .unwrap();
        Host {
            settings: vec![(device.path.clone(), settings)],
            blk: Ok(Some((status, vec![device]))),
            swaps: vec![],
            rdma_here: true,
        }
    }

    /// Every check of a device and of xpm-blk.
    pub(in crate::doctor) fn all_that_is_looked_at() -> Vec<Check> {
        checks(&host(device("ublk", "live", &["swap"]), true, good()))
    }

    fn good() -> BlockSettings {
        BlockSettings {
            scheduler: Some("none".into()),
            rotational: Some(0),
            discard_max: Some(4096),
            discards: Some(1),
        }
    }

    fn verdict(host: &Host, item: &str) -> Verdict {
        checks(host).into_iter().find(|check| check.item == item).unwrap().severity
    }

    #[test]
    fn a_standby_is_missed_where_swap_needs_one() {
        let with = |form: &str, standby| {
            let mut host = host(device(form, "live", &["swap"]), true, good());
            if let Ok(Some((status, _))) = &mut host.blk {
                status.standby = serde_json::from_value(standby).unwrap();
            }
            verdict(&host, "standby")
        };
        let (off, starting) =
            (json!({"state": "off", "locked": 0}), json!({"state": "starting", "pid": 7, "locked": 0}));
        assert_eq!(with("ublk", off.clone()), Verdict::Warning);
        assert_eq!(with("ublk", starting), Verdict::Warning);
        assert_eq!(with("nbd-direct", off), Verdict::Ok);
        assert_eq!(with("ublk", json!({"state": "ready", "pid": 7, "locked": 4096})), Verdict::Ok);
    }

    #[test]
    fn an_item_that_does_not_hold_is_unsafe_only_under_swap_through_the_daemon() {
        for (form, users, expected) in [
            ("ublk", &["swap"][..], Verdict::Critical),
            ("nbd", &["swap"][..], Verdict::Critical),
            ("nbd-direct", &["swap"][..], Verdict::Warning),
            ("ublk", &["mounted at /mnt"][..], Verdict::Warning),
            ("ublk", &[][..], Verdict::Warning),
        ] {
            let host = host(device(form, "live", users), false, good());
            assert_eq!(verdict(&host, "mlockall"), expected, "{form} {users:?}");
        }
        assert_eq!(verdict(&host(device("ublk", "live", &["swap"]), true, good()), "mlockall"), Verdict::Ok);
    }

    #[test]
    fn lost_memory_is_unsafe_while_somebody_uses_it() {
        let settings = good;
        assert_eq!(
            verdict(&host(device("ublk", "lost", &["mounted at /a"]), true, settings()), "state"),
            Verdict::Critical
        );
        assert_eq!(verdict(&host(device("ublk", "lost", &[]), true, settings()), "state"), Verdict::Warning);
        assert_eq!(
            verdict(&host(device("ublk", "holding", &["swap"]), true, settings()), "state"),
            Verdict::Warning
        );
    }

    #[test]
    fn settings_of_a_swap_device() {
        let bad = BlockSettings {
            scheduler: Some("mq-deadline".into()),
            rotational: Some(1),
            discard_max: Some(4096),
            discards: Some(0),
        };
        let host = host(device("ublk", "live", &["swap"]), true, bad);
        for item in ["scheduler", "rotational", "discard"] {
            let check = checks(&host).into_iter().find(|check| check.item == item).unwrap();
            assert_eq!(check.severity, Verdict::Warning, "{item}");
            assert!(check.remedy.unwrap().contains("ublkb0"), "{item}");
        }
    }

    #[test]
    fn a_swap_whose_daemon_is_gone_is_named() {
        let swaps = vec![
            Swap { path: "/dev/ublkb0".into(), size: 4096, used: 0, priority: -2 },
            Swap { path: "/dev/sda2".into(), size: 4096, used: 0, priority: -3 },
        ];
        let named = |blk| checks(&Host { blk, settings: vec![], swaps: swaps.clone(), rdma_here: true });
        for checks in [named(Ok(None)), named(Err("cannot reach xpm-blk".into()))] {
            assert_eq!(checks.len(), 2);
            assert_eq!((checks[1].item.as_str(), checks[1].severity), ("/dev/ublkb0", Verdict::Warning));
        }
    }
}
