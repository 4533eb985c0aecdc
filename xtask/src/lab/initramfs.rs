//! The guest's initramfs: busybox, the modules that the host's root needs, and `tests/lab/init`.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use crate::util;

/// The modules that are needed to mount the host's root.
const MODULES: [&str; 3] = ["9p", "9pnet_virtio", "overlay"];
/// Further modules of a guest that keeps its files on a disk.
const DISK_MODULES: [&str; 2] = ["virtio_blk", "ext4"];
/// ext4 needs this one without saying so in `modules.dep`, where CRC32C is a module at all: in Linux 6.12, no longer
/// in 7.3.
const CRC32C: &str = "crc32c_generic";

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// Writes the initramfs for a kernel to `file`.
pub(crate) fn build(kernel: &Kernel, file: &Path) -> Result<()> {
    let out = fs::File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    let mut archive = Archive { out: io::BufWriter::new(out), inode: 0 };
    for directory in ["bin", "dev", "proc", "sys", "host", "overlay", "root", "modules"] {
        archive.add(directory, DIRECTORY, (0, 0), &[])?;
    }
    archive.add("dev/console", CONSOLE, (5, 1), &[])?;
    archive.add("bin/busybox", EXECUTABLE, (0, 0), &busybox()?)?;
    let init = util::repository().join("tests/lab/init");
    archive.add("init", EXECUTABLE, (0, 0), &fs::read(&init).with_context(|| init.display().to_string())?)?;
    add_modules(&mut archive, kernel)?;
    archive.finish()
}

/// busybox, which must not need shared libraries: there are none in the initramfs.
fn busybox() -> Result<Vec<u8>> {
    let file = util::find_program("busybox").context("busybox is missing; install busybox-static")?;
    let program = fs::read(&file)?;
    ensure!(
        !needs_interpreter(&program),
        "{} needs shared libraries; install busybox-static in its place",
        file.display()
    );
    Ok(program)
}

/// Whether a 64-bit ELF file asks for a dynamic linker: has a program header of type PT_INTERP
/// (elf(5)). False for anything else.
fn needs_interpreter(program: &[u8]) -> bool {
    const PT_INTERP: usize = 3;
    let number = |at: usize, len: usize| {
        let bytes = program.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0_usize, |sum, byte| (sum << 8) | usize::from(*byte)))
    };
    let table = || Some((number(32, 8)?, number(54, 2)?, number(56, 2)?));
    let Some((start, entry_len, count)) = table() else { return false };
    (0..count).any(|index| number(start.saturating_add(index * entry_len), 4) == Some(PT_INTERP))
}

/// Adds the modules, decompressed, and the files `modules/order` and `modules/order-disk` that list them.
fn add_modules(archive: &mut Archive, kernel: &Kernel) -> Result<()> {
    let first = kernel.module_order(&MODULES)?;
    let crc32c: &[&str] = if kernel.has_module(CRC32C)? { &[CRC32C] } else { &[] };
    let mut disk = kernel.module_order(&[crc32c, &DISK_MODULES].concat())?;
    disk.retain(|path| !first.contains(path));
    for (list, paths) in [("order", first), ("order-disk", disk)] {
        let mut order = String::new();
        for path in paths {
            let name = path.rsplit('/').next().unwrap_or(&path).trim_end_matches(".xz").to_owned();
            let module = read_module(&kernel.modules().join(kernel.release()).join(&path))?;
            archive.add(&format!("modules/{name}"), EXECUTABLE, (0, 0), &module)?;
            order.push_str(&name);
            order.push('\n');
        }
        archive.add(&format!("modules/{list}"), EXECUTABLE, (0, 0), order.as_bytes())?;
    }
    Ok(())
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|suffix| suffix != "xz") {
        return fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output = util::command("xz").arg("-dc").arg(file).output().context("cannot run xz")?;
    ensure!(output.status.success(), "xz cannot unpack {}", file.display());
    Ok(output.stdout)
}

/// A writer of the "newc" form of cpio, the one that the kernel reads (the kernel's
/// Documentation/driver-api/early-userspace/buffer-format.rst).
struct Archive {
    out: io::BufWriter<fs::File>,
    inode: u32,
}

impl Archive {
    /// Adds one entry. `device` is major and minor number, for device nodes.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.inode += 1;
        let header = header(self.inode, mode, device, name, content.len())?;
        self.out.write_all(&header)?;
        self.out.write_all(content)?;
        self.out.write_all(padding(content.len()))?;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(())
    }
}

/// Header and name of one entry, padded.
fn header(inode: u32, mode: u32, device: (u32, u32), name: &str, len: usize) -> Result<Vec<u8>> {
    let len = u32::try_from(len).context("a file of the initramfs is 4 GiB or larger")?;
    let name_len = u32::try_from(name.len() + 1)?;
    // Inode, mode, user, group, links, time, size, device, device of the node, name, checksum.
    let fields = [inode, mode, 0, 0, 1, 0, len, 0, 0, device.0, device.1, name_len, 0];
    let mut header = b"070701".to_vec();
    for field in fields {
        header.extend(format!("{field:08x}").bytes());
    }
    header.extend(name.bytes());
    header.push(0);
    header.extend(padding(header.len()));
    Ok(header)
}

/// Zeros that fill up to a multiple of four.
fn padding(len: usize) -> &'static [u8] {
    &[0; 3][..len.next_multiple_of(4) - len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_form_of_newc() {
        let bytes = header(7, EXECUTABLE, (5, 1), "init", 10).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("07070100000007000081ed"), "{text}");
        assert_eq!(&text[54..62], "0000000a", "size");
        assert_eq!(&text[78..94], "0000000500000001", "device");
        assert_eq!(&text[94..102], "00000005", "length of the name");
        assert_eq!(&text[110..], "init\0\0", "name, padded to four");
    }

    #[test]
    fn static_programs_are_told_from_dynamic_ones() {
        let mut program = vec![0; 64 + 56];
        program[32] = 64;
        program[54] = 56;
        program[56] = 1;
        program[64] = 1;
        assert!(!needs_interpreter(&program));
        program[64] = 3;
        assert!(needs_interpreter(&program));
        program[33] = 0xff;
        assert!(!needs_interpreter(&program), "a table outside of the file");
    }

    #[test]
    fn padding_fills_up() {
        assert_eq!([0, 1, 2, 3, 4].map(|len| padding(len).len()), [0, 3, 2, 1, 0]);
    }
}
