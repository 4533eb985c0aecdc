//! QEMU's command line, and whether KVM can be used.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::disk::Disk;
use super::kernel::Kernel;
use super::netns::Netns;
use crate::util;

/// How long a guest under KVM may take to reach its first process.
const PROBE_TIME_MAX: Duration = Duration::from_secs(20);
/// A task that waits this long for a device is taken for a deadlock. Emulation on a busy machine
/// is slow; the kernel's own default is 120.
const HUNG_TASK_SECONDS: u32 = 90;

/// Room for the files that a guest with systemd writes.
const ROOT_DISK_LEN: u64 = 2 << 30;
/// Time for the kernel to answer a key.
const KEY_TIME: Duration = Duration::from_secs(4);

/// The accelerator that runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's translator, some ten times slower.
    Tcg,
}

/// The emulated processor. Five-level page tables would only make each emulated page walk longer. And QEMU 7.2 leaves
/// wrong flags behind cmpxchg16b, which the kernel allocates memory with where there is one: an interrupt right there
/// ends the guest with a double fault, once in hours.
const EMULATED: &str = "max,la57=off,cx16=off";

impl Accelerator {
    fn name(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }

    /// Part of the command line; `threads` says what emulated processors run on.
    fn words(self, threads: Threads) -> [&'static str; 4] {
        match (self, threads) {
            (Accelerator::Kvm, _) => ["-accel", "kvm", "-cpu", "host"],
            (Accelerator::Tcg, Threads::One) => ["-accel", "tcg,thread=single", "-cpu", EMULATED],
            (Accelerator::Tcg, Threads::Each) => ["-accel", "tcg,thread=multi", "-cpu", EMULATED],
        }
    }
}

/// The threads that run the processors of an emulated guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All on one thread of the host, in turns of up to 100 ms. Safe: with a thread each, QEMU before 8.1 can run a
    /// translation of code that the kernel is just patching (a static key), and the guest ends with "int3: 0000" once
    /// in hundreds of boots (<https://bugzilla.redhat.com/show_bug.cgi?id=2216496>).
    One,
    /// Each on its own. For measurements: a program that spins until another processor has done something would
    /// measure the length of the turns instead.
    Each,
}

/// A guest to be started.
pub(crate) struct Guest<'a> {
    /// Its kernel.
    pub(crate) kernel: &'a Kernel,
    /// Its initramfs.
    pub(crate) initramfs: &'a Path,
    /// Its memory in MiB.
    pub(crate) memory_mib: u32,
    /// The accelerator.
    pub(crate) accelerator: Accelerator,
    /// The threads of its processors.
    pub(crate) threads: Threads,
    /// Where the kernel's messages go.
    pub(crate) console: PathBuf,
    /// The pipes of QEMU's monitor: this path with `.in` and `.out` added.
    pub(crate) monitor: PathBuf,
    /// The socket of its vhost-user-blk disk, if it has one.
    pub(crate) disk: Option<PathBuf>,
    /// Its disks that are compared.
    pub(crate) disks: &'static [Disk],
    /// Where those have their sockets and files.
    pub(crate) dir: PathBuf,
    /// The image of the disk where it keeps its files, if its first process is systemd; it can restart then. Else they
    /// are in its memory, and it ends.
    pub(crate) systemd: Option<PathBuf>,
}

impl Guest<'_> {
    /// QEMU's command line; `command` is QEMU itself. The guest's second serial line is standard
    /// input and output.
    fn command(&self, mut command: Command, kernel_words: &str) -> Command {
        command.args(["-nodefaults", "-display", "none", "-smp", "2"]);
        if self.systemd.is_none() {
            command.arg("-no-reboot");
        }
        command.args(self.accelerator.words(self.threads)).arg("-m").arg(format!("{}M", self.memory_mib));
        command.arg("-kernel").arg(self.kernel.image()).arg("-initrd").arg(self.initramfs);
        // tsc=reliable: on a busy host the kernel else takes the TSC, which is the host's clock, for broken, and asks
        // the HPET from then on, for which each question leaves the guest. transparent_hugepage=never: an emulated
        // processor that clears 2 MiB in one go was taken for locked up more than once (khugepaged, 22 s).
        command.arg("-append").arg(format!(
            "console=ttyS0 loglevel=6 sysctl.kernel.sysrq=1 panic=-1 oops=panic tsc=reliable transparent_hugepage=never \
             sysctl.kernel.hung_task_panic=1 sysctl.kernel.hung_task_timeout_secs={HUNG_TASK_SECONDS} {kernel_words}"
        ));
        command.arg("-serial").arg(joined("file:", &self.console));
        command.args(["-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"]);
        command
    }

    /// Makes the monitor's pipes, and the part of the command line that names them.
    fn add_monitor(&self, command: &mut Command) -> Result<()> {
        for end in ["in", "out"] {
            let pipe = self.monitor.with_extension(end);
            mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                .with_context(|| format!("cannot make {}", pipe.display()))?;
        }
        command.arg("-chardev").arg(joined("pipe,id=monitor,path=", &self.monitor));
        command.args(["-mon", "chardev=monitor,mode=readline"]);
        Ok(())
    }

    /// Adds the memory, which servers of disks can map. All of it is there before the guest runs: a host that is
    /// itself a virtual machine may have to ask for each page that was free, and the guest's processors would stand
    /// still meanwhile.
    fn add_memory(&self, command: &mut Command) {
        let (kind, share) = match self.disk.is_some() || !self.disks.is_empty() {
            true => ("memfd", "on"),
            false => ("ram", "off"),
        };
        let memory =
            format!("memory-backend-{kind},id=ram,size={}M,share={share},prealloc=on", self.memory_mib);
        command.args(["-object", &memory, "-machine", "memory-backend=ram"]);
    }

    /// Adds the disks.
    fn add_disks(&self, command: &mut Command) {
        for (index, disk) in self.disks.iter().enumerate() {
            command.args(disk.qemu_words(index, &self.dir));
        }
        let Some(socket) = &self.disk else { return };
        let mut chardev = joined("socket,id=disk,path=", socket);
        chardev.push(",reconnect=1");
        command.arg("-chardev").arg(chardev).args(["-device", "vhost-user-blk-pci,chardev=disk"]);
    }

    /// Makes and adds the disk of the files of a guest with systemd.
    fn add_root_disk(&self, command: &mut Command) -> Result<()> {
        let Some(image) = &self.systemd else { return Ok(()) };
        File::create(image).and_then(|file| file.set_len(ROOT_DISK_LEN)).context("cannot make a disk")?;
        util::output(util::command("mkfs.ext4").args(["-q", "-F"]).arg(image))?;
        command.arg("-drive").arg(joined("if=none,id=files,format=raw,cache=unsafe,file=", image));
        command.args(["-device", "virtio-blk-pci,drive=files"]);
        Ok(())
    }

    /// Makes the kernel write where all tasks stand, and the state of its memory, to
    /// the console: what a deadlock leaves to look at. Returns when it had time for that.
    pub(crate) fn show_tasks(&self) -> Result<()> {
        let mut monitor = OpenOptions::new().write(true).open(self.monitor.with_extension("in"))?;
        for key in ["alt-sysrq-9", "alt-sysrq-t", "alt-sysrq-w", "alt-sysrq-m"] {
            writeln!(monitor, "sendkey {key}")?;
            thread::sleep(KEY_TIME);
        }
        Ok(())
    }

    /// The command line of a guest that runs `runner` on the host's root, exchanges files with the
    /// host in `share`, and has a user-mode network.
    pub(crate) fn on_host_root(&self, netns: &Netns, runner: &Path, share: &Path) -> Result<Command> {
        let modules = self.kernel.modules();
        let mut words = format!("lab.modules={} lab.runner={}", modules.display(), runner.display());
        if self.systemd.is_some() {
            words += " lab.systemd";
        }
        let mut command = self.command(netns.command("qemu-system-x86_64"), &words);
        let local = "security_model=none,multidevs=remap,path=";
        command.arg("-fsdev").arg(joined(
            "local,id=root,readonly=on,security_model=none,multidevs=remap,path=",
            Path::new("/"),
        ));
        command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot"]);
        command.arg("-fsdev").arg(joined(&format!("local,id=share,{local}"), share));
        command.args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=labshare"]);
        command.args(["-netdev", &netns.qemu_network(), "-device", "virtio-net-pci,netdev=net,romfile="]);
        self.add_memory(&mut command);
        self.add_disks(&mut command);
        self.add_root_disk(&mut command)?;
        self.add_monitor(&mut command)?;
        Ok(command)
    }

    /// Whether the guest reaches its first process in time.
    fn comes_alive(&self, netns: &Netns) -> Result<bool> {
        let mut command = self.command(netns.command("qemu-system-x86_64"), "lab.probe");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("cannot start QEMU")?;
        let stdout = child.stdout.take().context("QEMU has no output")?;
        let lines = read_lines(stdout);
        let alive = loop {
            match lines.recv_timeout(PROBE_TIME_MAX) {
                Ok(line) if line.contains("@lab alive") => break true,
                Ok(_) => {}
                Err(_) => break false,
            }
        };
        // It may have ended on its own.
        let _ = child.kill();
        child.wait()?;
        Ok(alive)
    }
}

/// The lines of a stream, read by a thread of their own until it ends; without line ends.
pub(crate) fn read_lines(stream: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    receiver
}

/// Chooses KVM when it works, which only a try can tell: some hosts have a `/dev/kvm` that boots
/// no stock kernel. The answer is kept in the cache for as long as the host's kernel is the same.
pub(crate) fn choose(kernel: &Kernel, initramfs: &Path, netns: &Netns, cache: &Path) -> Result<Accelerator> {
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accelerator::Tcg);
    }
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    let kept = cache.join("accelerator");
    for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
        if fs::read_to_string(&kept).is_ok_and(|text| text == format!("{} {host}", accelerator.name())) {
            return Ok(accelerator);
        }
    }
    let probe = Guest {
        kernel,
        initramfs,
        memory_mib: 512,
        accelerator: Accelerator::Kvm,
        threads: Threads::One,
        console: cache.join("probe.log"),
        monitor: cache.join("probe"),
        disk: None,
        disks: &[],
        dir: cache.to_owned(),
        systemd: None,
    };
    let accelerator = match probe.comes_alive(netns)? {
        true => Accelerator::Kvm,
        false => Accelerator::Tcg,
    };
    fs::write(kept, format!("{} {host}", accelerator.name()))?;
    Ok(accelerator)
}

/// An option of QEMU that ends in a path; a comma in it is written twice.
fn joined(option: &str, path: &Path) -> OsString {
    let mut word = OsString::from(option);
    word.push(path.to_string_lossy().replace(',', ",,"));
    word
}
