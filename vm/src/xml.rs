//! XML for libvirt: the parts of a domain that make its RAM external.

use std::fmt::Write as _;
use std::path::Path;

use xpm_protocol::{ByteSize, Name};

use crate::place::Place;

/// The parameters of the XML.
#[derive(Debug, Clone)]
pub struct Domain<'a> {
    /// The machine's name.
    pub name: &'a Name,
    /// Size of its RAM.
    pub memory: ByteSize,
    /// Limit of its local memory.
    pub local: Option<ByteSize>,
    /// Memory for QEMU itself, beside the RAM.
    pub overhead: ByteSize,
    /// Place of the monitors' sockets.
    pub place: &'a Place,
    /// The directory in which libvirt makes files of RAM.
    pub backing_directory: &'a Path,
    /// The program that starts QEMU.
    pub emulator: &'a Path,
}

/// A domain with these parts. Settings that are needed outside the domain are described in comments.
pub fn domain(domain: &Domain<'_>) -> String {
    let mut text = String::new();
    let kib = |size: ByteSize| size.0 >> 10;
    let _ = write!(
        text,
        "<!-- In /etc/libvirt/qemu.conf, then restart libvirtd:
       memory_backing_dir = \"{directory}\"
     {emulator} is an executable file with these two lines. It keeps QEMU from asking for huge pages, with
     which each access to a page that is not cached reads megabytes:
       #!/bin/sh
       exec xpm vm exec -- qemu-system-x86_64 \"$@\"
     The directory {sockets} must be there, and QEMU's user must be allowed to make sockets in it. -->
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='KiB'>{memory}</memory>
  <memoryBacking>
    <source type='file'/>
    <access mode='shared'/>
    <allocation mode='ondemand'/>
  </memoryBacking>
",
        directory = escaped(&domain.backing_directory.display().to_string()),
        emulator = escaped(&domain.emulator.display().to_string()),
        sockets = escaped(&domain.place.path().display().to_string()),
        name = domain.name,
        memory = kib(domain.memory),
    );
    if let Some(local) = domain.local {
        let limit = kib(ByteSize(local.0 + domain.overhead.0));
        let _ = write!(text, "  <memtune>\n    <hard_limit unit='KiB'>{limit}</hard_limit>\n  </memtune>\n");
    }
    let _ = write!(
        text,
        "  <devices>\n    <emulator>{}</emulator>\n  </devices>\n  <qemu:commandline>\n",
        escaped(&domain.emulator.display().to_string())
    );
    let socket = format!("socket,id=xpm-drive,server=on,wait=off,path={}", domain.place.drive().display());
    for word in ["-chardev", &socket, "-mon", "chardev=xpm-drive,mode=control"] {
        let _ = writeln!(text, "    <qemu:arg value='{}'/>", escaped(word));
    }
    text.push_str("  </qemu:commandline>\n</domain>\n");
    text
}

/// A text with escapes for XML: for an attribute, an element, or a comment.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&apos;")
        .replace("--", "-&#45;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_xml_has_all_parts() {
        let name = "vm1".parse().unwrap();
        let place = Place::below(Path::new("/run/xpm/vm"), &name);
        let text = domain(&Domain {
            name: &name,
            memory: ByteSize(8 << 30),
            local: Some(ByteSize(2 << 30)),
            overhead: ByteSize(256 << 20),
            place: &place,
            backing_directory: Path::new("/a&b"),
            emulator: Path::new("/usr/local/bin/qemu-external"),
        });
        for part in [
            "<memory unit='KiB'>8388608</memory>",
            "<source type='file'/>\n    <access mode='shared'/>",
            "<hard_limit unit='KiB'>2359296</hard_limit>",
            "<emulator>/usr/local/bin/qemu-external</emulator>",
            "path=/run/xpm/vm/vm1/drive.qmp'/>",
            "memory_backing_dir = \"/a&amp;b\"",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn a_path_cannot_break_out_of_a_text() {
        assert_eq!(escaped("/a'/><!-- b -->"), "/a&apos;/&gt;&lt;!-&#45; b -&#45;&gt;");
    }
}
