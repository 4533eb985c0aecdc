//! `cargo xtask demo`: the whole of xpm on this machine, with real daemons and a real workload.

mod account;
mod child;
mod filesystem;
mod fio;
mod interrupt;
mod load;
mod machine;
mod site;
mod socket;
mod swap;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};

use self::fio::Target;
use self::interrupt::Interrupt;
use self::site::{APPLIANCES, NAME, Site, Undo};
use crate::util;

const MIB: u64 = 1 << 20;
/// Smallest allocation that the demo can show striping with.
const SIZE_MIN_MIB: u64 = 64;

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Size of the allocation in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(SIZE_MIN_MIB..=1 << 20))]
    size: u64,
    /// The form of the device: ublk, nbd or nbd-socket. [default: the best that this kernel has]
    #[arg(long = "as", value_name = "FORM")]
    form: Option<Form>,
    /// Uses the programs of this directory and builds none.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

/// What the demo attaches the allocation as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Ublk,
    Nbd,
    NbdSocket,
}

impl FromStr for Form {
    type Err = String;

    fn from_str(text: &str) -> Result<Form, String> {
        match text {
            "ublk" => Ok(Form::Ublk),
            "nbd" => Ok(Form::Nbd),
            "nbd-socket" => Ok(Form::NbdSocket),
            _ => Err(format!("`{text}` is no form: ublk, nbd or nbd-socket")),
        }
    }
}

/// The attached device.
struct Device {
    form: Form,
    /// Node or socket.
    path: String,
}

/// Runs the demo; false when a check failed or somebody interrupted it.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let site = Site::new(interrupt.clone(), args.size * MIB, args.programs.clone())?;
    println!("xpm demo: {APPLIANCES} appliances lend memory, and this machine uses it as one block device.");
    let result = tell(&site, args);
    let checks = site.account.checks();
    if result.is_err() && !interrupt.is_set() {
        site.keep_logs();
    }
    drop(site);
    match result {
        Ok(()) => println!("\ndemo: all {checks} checks passed"),
        Err(_) if interrupt.is_set() => eprintln!("\ndemo: interrupted; everything is cleaned up"),
        Err(ref error) => eprintln!("\ndemo: {error:#}"),
    }
    Ok(result.is_ok())
}

fn tell(site: &Site, args: &Args) -> Result<()> {
    has_room(site)?;
    if args.programs.is_none() {
        site.build()?;
    }
    let form = choose(site, args.form)?;
    site.account.step(
        "Start an allocator, three appliances and xpm-blk",
        "Each would run on a machine of its own: appliances lend memory, the allocator decides who gets which, xpm-blk \
         turns it into block devices.",
    );
    site.start(form != Form::NbdSocket)?;
    site.account.output(&site.xpm(&["appliance", "list"])?);
    site.account.check(true, "three appliances registered with the allocator")?;
    allocate(site)?;
    let device = attach(site, form)?;
    use_it(site, &device)?;
    take_down(site, &device)?;
    machine::workload(site)
}

/// The appliances' memory and the programs' have to fit into this machine.
fn has_room(site: &Site) -> Result<()> {
    let available = util::available_memory()?;
    let needed = site.size * 2 + 256 * MIB;
    if available < needed {
        bail!(
            "the demo needs {} MiB of free memory and this machine has {} MiB; try a smaller --size MIB",
            needed / MIB,
            available / MIB
        );
    }
    Ok(())
}

fn allocate(site: &Site) -> Result<()> {
    site.account.step(
        "Allocate memory under a name",
        "Striped: neighbouring 64 KiB lie on different appliances, so that large requests use all of them.",
    );
    let stripe = APPLIANCES.to_string();
    let said = site.xpm(&["alloc", "create", NAME, "--size", &size_word(site.size), "--stripe", &stripe])?;
    site.account.output(&said);
    let allocation = site.ask(&["alloc", "show", NAME])?;
    let mut places: Vec<&str> = allocation["regions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|one| one["appliance"].as_str())
        .collect();
    places.sort_unstable();
    places.dedup();
    site.account.check(places.len() == usize::from(APPLIANCES), "its regions lie on all three appliances")
}

fn attach(site: &Site, form: Form) -> Result<Device> {
    site.account.step("Attach it as a block device", "");
    let place = match form {
        Form::Ublk => "ublk".to_owned(),
        Form::Nbd => "nbd".to_owned(),
        Form::NbdSocket => format!("nbd-socket={}", site.dir().join("demo.sock").display()),
    };
    site.done(Undo::Detach);
    let path = site.xpm(&["blk", "attach", NAME, "--as", &place])?.trim().to_owned();
    site.account.output(&path);
    let live = || Ok(site.ask(&["blk", "show", NAME])?["state"] == "live");
    site.wait_until("the device did not become live", live)?;
    site.account.output(&site.xpm(&["blk", "show", NAME])?);
    site.account.check(true, &format!("{path} is live"))?;
    Ok(Device { form, path })
}

/// The form that was asked for, or the fastest that this kernel has by `xpm doctor`'s account.
fn choose(site: &Site, wanted: Option<Form>) -> Result<Form> {
    let root = rustix::process::geteuid().is_root();
    if root && wanted != Some(Form::NbdSocket) {
        // Where a driver is only installed, it is loaded, as an operator would.
        for module in ["ublk_drv", "nbd"] {
            let _ = site.runner.clean_up(util::command("modprobe").args(["-q", module]));
        }
    }
    if let Some(form) = wanted {
        return Ok(form);
    }
    site.account.step("See what this machine is fit for", "");
    let finished = site.xpm_finish(&["doctor", "--json"])?;
    let report: serde_json::Value =
        serde_json::from_str(&finished.out).context("xpm doctor printed no JSON")?;
    let checks = report["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = |item: &str| checks.iter().find(|check| check["item"] == item);
    for item in ["ublk", "nbd"] {
        let said = found(item).and_then(|check| check["found"].as_str()).unwrap_or("no answer");
        site.account.note(&format!("{item}: {said}"));
    }
    let usable = |item: &str| root && found(item).is_some_and(|check| check["severity"] == "ok");
    let (form, why) = match (usable("ublk"), usable("nbd")) {
        (true, _) => (Form::Ublk, "so the device is a ublk device, with a file system and swap on it"),
        (false, true) => {
            (Form::Nbd, "so the device is one of the kernel's nbd driver, with a file system and swap on it")
        }
        (false, false) if root => (Form::NbdSocket, "so the device is an NBD socket, for NBD clients"),
        (false, false) => (Form::NbdSocket, "without root the device is an NBD socket, for NBD clients"),
    };
    site.account.note(why);
    Ok(form)
}

fn use_it(site: &Site, device: &Device) -> Result<()> {
    if device.form == Form::NbdSocket {
        return socket::workload(site, &format!("nbd+unix:///?socket={}", device.path));
    }
    let target = Target::File(device.path.clone());
    load::survive_the_allocator(site, &target)?;
    load::figures(site, &target)?;
    load::give_back(site, &target)?;
    filesystem::workload(site, device)?;
    swap::workload(site, device)
}

fn take_down(site: &Site, device: &Device) -> Result<()> {
    site.account.step("Detach and delete", "The memory is cleared before it is lent again.");
    site.xpm(&["blk", "detach", NAME])?;
    site.undone(&Undo::Detach);
    let gone = device.form != Form::NbdSocket || !std::path::Path::new(&device.path).exists();
    site.account.check(gone, "the device is gone")?;
    site.xpm(&["alloc", "delete", NAME])?;
    site.wait_until("the appliances kept the memory", || site.all_free())?;
    site.account.output(&site.xpm(&["appliance", "list"])?);
    site.account.check(true, "all memory is free again")
}

/// A size as people write it.
fn size_word(bytes: u64) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 30) => format!("{}GiB", bytes >> 30),
        bytes => format!("{}MiB", bytes / MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!(size_word(1 << 30), "1GiB");
        assert_eq!(size_word(96 * MIB), "96MiB");
        assert_eq!("nbd".parse::<Form>(), Ok(Form::Nbd));
        assert!("nbd-direct".parse::<Form>().is_err());
    }
}
