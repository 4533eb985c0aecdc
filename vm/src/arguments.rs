//! QEMU's command line: refuses arguments of the user that cannot work, and adds the arguments that external RAM
//! needs.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use xpm_protocol::Name;

use crate::Error;
use crate::disk::Disk;
use crate::memory::{MemoryFile, Sizes};
use crate::place::Place;

/// Id of the RAM's backend.
pub const RAM: &str = "xpm-ram";
/// Id of the backend of memory that can be plugged.
pub const PLUGGED: &str = "xpm-plugged";
/// Id of the virtio-mem device.
pub const VIRTIO_MEM: &str = "xpm-mem";
/// Ids of disks start with this, and a number follows.
pub const DISK: &str = "xpm-disk";

/// The way in which QEMU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The guest boots.
    Boot,
    /// QEMU waits for the state of a machine, and does not run the machine by itself.
    Incoming,
}

/// Refuses arguments that contradict those that will be added. Returns warnings about arguments that prevent a
/// migration.
///
/// # Errors
/// The first argument that cannot be used, with the reason.
pub fn check(arguments: &[OsString]) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    for (index, word) in arguments.iter().enumerate() {
        let Some(option) = option_of(word) else { continue };
        let value = arguments.get(index + 1).map(|value| value.to_string_lossy()).unwrap_or_default();
        if let Some(reason) = conflict(&option, &value) {
            let value = if value.starts_with('-') { "" } else { &value };
            return Err(Error::Usage(format!(
                "QEMU's argument `-{option} {value}` cannot be given: {reason}"
            )));
        }
        warnings.extend(obstacle(&option, &value));
    }
    Ok(warnings)
}

/// The name of an option; QEMU accepts one dash or two.
fn option_of(word: &OsStr) -> Option<String> {
    let text = word.to_str()?;
    let name = text.strip_prefix("--").or_else(|| text.strip_prefix('-'))?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// Why an option cannot be used.
fn conflict(option: &str, value: &str) -> Option<&'static str> {
    let has_key = |key: &str| value.split(',').any(|part| part.split('=').next() == Some(key));
    let device = || value.split(',').next().unwrap_or_default();
    let on = |key: &str| value.split(',').any(|part| part == key || part == format!("{key}=on"));
    match option {
        "m" => Some("the RAM's size is --memory, and --max what it can grow to"),
        "mem-path" | "mem-prealloc" => {
            Some("the RAM is the file that this command adds, and is not filled ahead")
        }
        "object" if value.contains("memory-backend-") => {
            Some("RAM of another backend would not be external, and would not move with the machine")
        }
        "machine" | "M" if has_key("memory-backend") => Some("the RAM is the file that this command adds"),
        "numa" if has_key("memdev") || has_key("mem") => {
            Some("a node with a memory of its own would not be external; leave memdev out")
        }
        "incoming" => Some("use `xpm vm receive` or `xpm vm resume`"),
        "daemonize" => {
            Some("this command stays with the machine; start it as a service to have it in the background")
        }
        "overcommit" if on("mem-lock") => Some("locked memory is all local, and more than --local"),
        "realtime" if on("mlock") => Some("locked memory is all local, and more than --local"),
        "device" if device().starts_with("vfio-") => Some(
            "a passed-through device pins RAM, which Linux 6.5 and later refuses for RAM that is a file; such a machine can use \
             external memory as swap",
        ),
        _ => None,
    }
}

/// Why a machine with this option cannot move.
fn obstacle(option: &str, value: &str) -> Option<String> {
    let text = match option {
        "device" if value.starts_with("vhost-user-blk") || value.starts_with("vhost-user-scsi") => {
            "QEMU cannot migrate its vhost-user disk; a disk by NBD can move"
        }
        "device" if value.starts_with("vhost-user-fs") => "QEMU cannot migrate its shared directory",
        _ => return None,
    };
    Some(format!("`-{option} {value}`: this machine will not move to another host: {text}"))
}

/// The added arguments. They follow the user's, so that their devices do not take addresses that the user's devices
/// had before.
pub fn added(
    place: &Place,
    files: &[MemoryFile],
    disks: &[Disk],
    sizes: Sizes,
    start: Start,
) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| words.extend([OsString::from(option), value]);
    let ids = [RAM, PLUGGED];
    for (id, file) in ids.iter().zip(files) {
        let more = if *id == PLUGGED { ",reserve=off" } else { "" };
        add(
            "-object",
            joined(&[
                OsStr::new(&format!(
                    "memory-backend-file,id={id},size={},share=on,prealloc=off,discard-data=off",
                    file.size.0
                )),
                OsStr::new(more),
                OsStr::new(",mem-path="),
                &escaped(&file.path),
            ]),
        );
    }
    add("-machine", format!("memory-backend={RAM}").into());
    let kib = |bytes: u64| format!("{}K", bytes >> 10);
    let maximum = sizes.maximum.map(|maximum| format!(",maxmem={}", kib(maximum.0))).unwrap_or_default();
    add("-m", format!("size={}{maximum}", kib(sizes.memory.0)).into());
    if sizes.maximum.is_some() {
        add("-device", format!("virtio-mem-pci,id={VIRTIO_MEM},memdev={PLUGGED},requested-size=0").into());
    }
    for (index, disk) in disks.iter().enumerate() {
        let (id, name) = (format!("{DISK}{index}"), &disk.name);
        let start =
            format!("driver=nbd,node-name={id},export={name},discard=unmap,server.type=unix,server.path=");
        add("-blockdev", joined(&[OsStr::new(&start), &escaped(&disk.socket)]));
        // Without a geometry QEMU reads the first sector when it starts, which would wait for ever where this host only
        // stands by. Guests address a disk by sectors; these are the numbers that every large disk tells.
        let geometry = "cyls=16383,heads=16,secs=63";
        let serial = serial(name);
        add("-device", format!("virtio-blk-pci,drive={id},id={id}-device,serial={serial},{geometry}").into());
    }
    for (id, path) in [("xpm-drive", place.drive()), ("xpm-look", place.look())] {
        let start = format!("socket,id={id},server=on,wait=off,path=");
        add("-chardev", joined(&[OsStr::new(&start), &escaped(&path)]));
        add("-mon", format!("chardev={id},mode=control").into());
    }
    if start == Start::Incoming {
        add("-incoming", "defer".into());
        words.push("-S".into());
    }
    words
}

/// The serial number by which a guest finds the disk (`/dev/disk/by-id/virtio-SERIAL`): the start of the allocation's
/// name.
fn serial(name: &Name) -> &str {
    // Names are ASCII.
    let name = name.as_str();
    &name[..name.len().min(20)]
}

fn joined(parts: &[&OsStr]) -> OsString {
    parts.iter().copied().collect()
}

/// A path as an item of a list separated by commas.
fn escaped(path: &Path) -> OsString {
    match path.to_str() {
        Some(text) => text.replace(',', ",,").into(),
        // QEMU accepts any bytes, but refuses a path like this if it contains a comma.
        None => path.as_os_str().to_owned(),
    }
}

/// The version in the output of `QEMU --version`.
pub(crate) fn parse_version(text: &str) -> Option<(u64, u64)> {
    let version = text.split_once("version ")?.1;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xpm_protocol::ByteSize;

    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn arguments_that_contradict_are_refused_with_the_reason() {
        let cases = [
            ("-m 4G", "--memory"),
            ("--m 4G", "--memory"),
            ("-nographic -mem-path /dev/hugepages", "the file that this command adds"),
            ("-object memory-backend-ram,id=a,size=1G", "would not be external"),
            (r#"-object {"qom-type":"memory-backend-ram","id":"a"}"#, "would not be external"),
            ("-machine q35,memory-backend=a", "the file that this command adds"),
            ("-M q35,memory-backend=a", "the file that this command adds"),
            ("-numa node,memdev=a", "leave memdev out"),
            ("-incoming defer", "xpm vm receive"),
            ("-daemonize", "as a service"),
            ("-overcommit mem-lock=on", "locked memory"),
            ("-device vfio-pci,host=01:00.0", "pins RAM"),
        ];
        for (line, reason) in cases {
            let error = check(&words(line)).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("cannot be given"), "{line}: {error}");
        }
        let fine = "-machine q35,accel=kvm -cpu host -smp 4 -object rng-random,id=r -overcommit mem-lock=off -numa node";
        assert!(check(&words(fine)).unwrap().is_empty());
    }

    #[test]
    fn disks_that_cannot_move_are_noticed() {
        let warnings = check(&words("-device vhost-user-blk-pci,chardev=c -device virtio-net-pci")).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("vhost-user disk"), "{warnings:?}");
    }

    #[test]
    fn the_added_arguments_follow_from_the_terms() {
        let place = Place::below("/run/x".as_ref(), &"vm1".parse().unwrap());
        let sizes = Sizes { memory: ByteSize(1 << 30), maximum: Some(ByteSize(3 << 30)) };
        let files = [
            MemoryFile { path: "/a,b/ram".into(), size: ByteSize(1 << 30) },
            MemoryFile { path: "/a,b/ram.plugged".into(), size: ByteSize(2 << 30) },
        ];
        let disks = [Disk { name: "data".parse().unwrap(), socket: "/a,b/data.sock".into() }];
        let line: Vec<String> = added(&place, &files, &disks, sizes, Start::Incoming)
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        let line = line.join(" ");
        for part in [
            "memory-backend-file,id=xpm-ram,size=1073741824,share=on,prealloc=off,discard-data=off,mem-path=/a,,b/ram ",
            "id=xpm-plugged,size=2147483648,share=on,prealloc=off,discard-data=off,reserve=off,mem-path=",
            "-machine memory-backend=xpm-ram -m size=1048576K,maxmem=3145728K",
            "-device virtio-mem-pci,id=xpm-mem,memdev=xpm-plugged,requested-size=0",
            "-blockdev driver=nbd,node-name=xpm-disk0,export=data,discard=unmap,server.type=unix,server.path=/a,,b/data.sock ",
            "-device virtio-blk-pci,drive=xpm-disk0,id=xpm-disk0-device,serial=data,cyls=16383",
            "path=/run/x/vm1/drive.qmp",
            "-incoming defer -S",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        let plain = added(&place, &files[..1], &[], Sizes { maximum: None, ..sizes }, Start::Boot);
        assert!(!plain.iter().any(|word| word == "-incoming" || word == "-device"));
    }

    #[test]
    fn versions_of_qemu_are_parsed() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b2)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (x)"), Some((10, 0)));
        assert_eq!(parse_version("no such thing"), None);
    }

    proptest! {
        #[test]
        fn any_arguments_are_read(line in "[-a-z,= ]{0,40}") {
            let _ = check(&words(&line));
            let _ = parse_version(&line);
        }
    }
}
