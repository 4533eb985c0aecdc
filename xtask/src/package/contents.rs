//! The content of each package.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::man::{self, Page};
use super::stage::Stage;
use crate::util;

/// Where units, rules and libraries belong on Debian.
const UNITS: &str = "usr/lib/systemd/system";
const RULES: &str = "usr/lib/udev/rules.d";
const MAN: &str = "usr/share/man";

/// A package before it is one.
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) section: &'static str,
    pub(crate) summary: &'static str,
    pub(crate) description: &'static str,
    /// `@VERSION@` is the packages' own.
    pub(crate) depends: Vec<&'static str>,
    pub(crate) recommends: Vec<&'static str>,
    /// Programs and libraries, whose needs are looked up.
    pub(crate) binaries: Vec<String>,
    /// Configuration that dpkg keeps as an operator changed it.
    pub(crate) conffiles: Vec<String>,
    /// Further files for dpkg.
    pub(crate) control_files: Vec<(&'static str, String)>,
    pub(crate) stage: Stage,
}

/// Where everything comes from.
pub(crate) struct Shared {
    /// The programs.
    programs: PathBuf,
    /// Where the trees are made.
    work: PathBuf,
    /// Directory of this machine's libraries, such as `x86_64-linux-gnu`.
    multiarch: String,
}

impl Shared {
    pub(crate) fn make(programs: &Path, work: &Path) -> Result<Shared> {
        let multiarch = util::output(util::command("dpkg-architecture").arg("-qDEB_HOST_MULTIARCH"))?;
        let multiarch = multiarch.trim().to_owned();
        Ok(Shared { programs: programs.to_path_buf(), work: work.to_path_buf(), multiarch })
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// A package with what every package has.
    fn package(
        &self,
        name: &'static str,
        summary: &'static str,
        description: &'static str,
    ) -> Result<Package> {
        let stage = Stage::new(self.work.join(name))?;
        let doc = format!("usr/share/doc/{name}");
        stage.copy(&packaging("copyright"), &format!("{doc}/copyright"))?;
        stage.compressed(&read(&util::repository().join("CHANGELOG.md"))?, &format!("{doc}/changelog"))?;
        Ok(Package {
            name,
            section: "admin",
            summary,
            description,
            depends: Vec::new(),
            recommends: Vec::new(),
            binaries: Vec::new(),
            conffiles: Vec::new(),
            control_files: Vec::new(),
            stage,
        })
    }
}

/// All packages.
pub(crate) fn all(shared: &Shared) -> Result<Vec<Package>> {
    Ok(vec![client(shared)?, appliance(shared)?, allocator(shared)?, library(shared)?, development(shared)?])
}

fn client(shared: &Shared) -> Result<Package> {
    let mut package = shared.package(
        "xpm-client",
        "external memory of other machines as block devices",
        "xpm turns spare memory of other machines into block devices of this one,\n\
         for swap and file systems, on stock kernels and over any network.\n\n\
         This package has the daemon that shows allocations of external memory as\n\
         block devices (ublk, the kernel's nbd, NBD sockets, disks of virtual\n\
         machines), and the operator's command.",
    )?;
    package.add_program(shared, "xpm")?;
    package.add_daemon(shared, "xpm-blk")?;
    package.add_daemon(shared, "xpm-fs")?;
    package.add_daemon(shared, "xpm-swapd")?;
    package.add_units(&["xpm-blk", "xpm-fs", "xpm-swapd"])?;
    package.add_rules(&["59-xpm", "60-xpm"])?;
    package.stage.copy(&packaging("device-wait.conf"), &format!("{UNITS}/dev-xpm-.device.d/wait.conf"))?;
    package.add_conffile("xpm.toml")?;
    for unit in ["hibernate", "hybrid-sleep", "suspend-then-hibernate"] {
        let place = format!("{UNITS}/systemd-{unit}.service.d/xpm.conf");
        package.stage.copy(&packaging("hibernate.conf"), &place)?;
    }
    package.add_conffile("blk.toml")?;
    package.add_conffile("fs.toml")?;
    package.stage.directory("etc/xpm/blk.d")?;
    if packaging("etc/swapd.toml").is_file() {
        package.add_conffile("swapd.toml")?;
    }
    for example in sorted(&packaging("examples"))? {
        package.stage.copy(&example, &format!("usr/share/doc/xpm-client/examples/{}", name(&example)))?;
    }
    package.add_command_help(shared)?;
    package.add_settings_page("xpm.toml", "xpm and the libraries", "xpm(1), xpm(3), xpm(7)")?;
    package.add_settings_page("xpm-blk.toml", "xpm-blk", "xpm-blk(8), xpm(7)")?;
    package.add_settings_page("xpm-fs.toml", "xpm-fs", "xpm-fs(8), xpm(7)")?;
    package.add_settings_page("xpm-swapd.toml", "xpm-swapd", "xpm-swapd(8), xpm(7)")?;
    package.add_overview()?;
    package.add_documents(&[
        "config",
        "fs",
        "health",
        "json",
        "life",
        "mapping",
        "operations",
        "rdma",
        "strategies",
        "wire",
    ])?;
    package.depends = vec!["systemd", "udev", "kmod"];
    package.recommends = vec!["libxpm0"];
    Ok(package)
}

fn appliance(shared: &Shared) -> Result<Package> {
    let mut package = shared.package(
        "xpm-appliance",
        "lends this machine's memory to other machines",
        "xpm turns spare memory of machines into block devices and memory of others.\n\n\
         This package has the daemon that lends memory, over RDMA, TCP and as shared\n\
         memory. What it lends outlives a restart of the daemon.",
    )?;
    package.add_daemon(shared, "xpm-appliance")?;
    package.add_units(&["xpm-appliance"])?;
    package.add_conffile("appliance.toml")?;
    package.add_settings_page("xpm-appliance.toml", "xpm-appliance", "xpm-appliance(8)")?;
    package.add_documents(&["config", "operations", "rdma", "wire"])?;
    package.depends = vec!["systemd"];
    Ok(package)
}

fn allocator(shared: &Shared) -> Result<Package> {
    let mut package = shared.package(
        "xpm-allocator",
        "decides which machines' memory serves whom",
        "xpm turns spare memory of machines into block devices and memory of others.\n\n\
         This package has the daemon that decides, by strategies that an operator\n\
         writes, which appliances serve whom, and remembers it.",
    )?;
    package.add_daemon(shared, "xpm-allocator")?;
    package.add_units(&["xpm-allocator"])?;
    package.add_conffile("allocator.toml")?;
    package.add_settings_page("xpm-allocator.toml", "xpm-allocator", "xpm-allocator(8)")?;
    package.add_documents(&["config", "health", "metadata", "operations", "strategies"])?;
    package.depends = vec!["systemd"];
    package.recommends = vec!["xpm-client"];
    Ok(package)
}

fn library(shared: &Shared) -> Result<Package> {
    let mut package = shared.package(
        "libxpm0",
        "external memory of other machines at addresses of a program",
        "xpm turns spare memory of machines into memory of others.\n\n\
         This package has the C library that gives a program external memory at\n\
         addresses, and the one by which `xpm run` gives it to unmodified programs.",
    )?;
    package.section = "libs";
    package.add_library(shared, "libxpm.so", &format!("usr/lib/{}/libxpm.so.0", shared.multiarch))?;
    package.add_library(shared, "libxpm_preload.so", "usr/lib/xpm/libxpm-preload.so")?;
    package.add_rules(&["60-libxpm"])?;
    package.stage.copy(&packaging("libxpm0/sysusers.conf"), "usr/lib/sysusers.d/libxpm0.conf")?;
    package.depends = vec!["systemd | systemd-standalone-sysusers | systemd-sysusers", "passwd"];
    package.control_files = vec![
        ("shlibs", "libxpm 0 libxpm0\n".to_owned()),
        ("triggers", "activate-noawait ldconfig\n".to_owned()),
    ];
    Ok(package)
}

/// Not `libxpm-dev`: Debian has a package of that name, of the X Window System.
fn development(shared: &Shared) -> Result<Package> {
    let mut package = shared.package(
        "libxpm0-dev",
        "external memory at addresses of a program: development files",
        "xpm turns spare memory of machines into memory of others.\n\n\
         This package has the header, the manual page and an example of the C library\n\
         that gives a program external memory at addresses.",
    )?;
    package.section = "libdevel";
    package.depends = vec!["libxpm0 (= @VERSION@)", "libc6-dev"];
    let source = util::repository().join("libxpm");
    let lib = format!("usr/lib/{}", shared.multiarch);
    package.stage.copy(&source.join("include/xpm.h"), "usr/include/xpm.h")?;
    package.stage.link("libxpm.so.0", &format!("{lib}/libxpm.so"))?;
    let config = read(&source.join("xpm.pc.in"))?
        .replace("@PREFIX@", "/usr")
        .replace("@LIBDIR@", &format!("/{lib}"))
        .replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    package.stage.text(&config, &format!("{lib}/pkgconfig/libxpm.pc"))?;
    package.stage.compressed(&read(&source.join("xpm.3"))?, &format!("{MAN}/man3/xpm.3"))?;
    package.add_documents(&["mapping"])?;
    for example in sorted(&source.join("examples"))? {
        package.stage.copy(&example, &format!("usr/share/doc/libxpm0-dev/examples/{}", name(&example)))?;
    }
    Ok(package)
}

impl Package {
    fn add_program(&mut self, shared: &Shared, name: &str) -> Result<()> {
        let to = format!("usr/bin/{name}");
        self.stage.program(&shared.program(name), &to, false)?;
        self.binaries.push(to);
        Ok(())
    }

    /// A program with its manual page.
    fn add_daemon(&mut self, shared: &Shared, name: &str) -> Result<()> {
        self.add_program(shared, name)?;
        let page = util::output(util::command(&shared.program(name).to_string_lossy()).arg("--man"))?;
        self.stage.compressed(&page, &format!("{MAN}/man8/{name}.8"))
    }

    fn add_library(&mut self, shared: &Shared, name: &str, to: &str) -> Result<()> {
        self.stage.program(&shared.program(name), to, true)?;
        self.binaries.push(to.to_owned());
        Ok(())
    }

    /// The units of these daemons, with their sockets and templates.
    fn add_units(&mut self, daemons: &[&str]) -> Result<()> {
        for unit in sorted(&util::repository().join("systemd"))? {
            let name = name(&unit);
            let stem = name.split(['.', '@']).next().unwrap_or_default();
            if daemons.contains(&stem) {
                self.stage.copy(&unit, &format!("{UNITS}/{name}"))?;
            }
        }
        Ok(())
    }

    /// Rules of udev.
    fn add_rules(&mut self, names: &[&str]) -> Result<()> {
        names.iter().map(|name| format!("{name}.rules")).try_for_each(|name| {
            self.stage.copy(&util::repository().join("udev").join(&name), &format!("{RULES}/{name}"))
        })
    }

    fn add_conffile(&mut self, name: &str) -> Result<()> {
        let to = format!("etc/xpm/{name}");
        self.stage.copy(&packaging("etc").join(name), &to)?;
        self.conffiles.push(format!("/{to}"));
        Ok(())
    }

    /// The manual page of a configuration file, out of a section of docs/config.md.
    fn add_settings_page(&self, name: &str, heading: &str, see_also: &str) -> Result<()> {
        let config = read(&document("config"))?;
        let text = man::section(&config, heading)?;
        let summary = format!("settings of {heading}");
        let page = Page { name, section: 5, summary: &summary, text, see_also };
        self.stage.compressed(&man::render(&page), &format!("{MAN}/man5/{name}.5"))
    }

    /// The page that begins with what xpm is.
    fn add_overview(&self) -> Result<()> {
        let text = read(&packaging("man/xpm.7.md"))?;
        let page = Page {
            name: "xpm",
            section: 7,
            summary: "external primary memory for Linux",
            text: &text,
            see_also: "xpm(1), xpm.toml(5), xpm-blk(8), xpm-swapd(8)",
        };
        self.stage.compressed(&man::render(&page), &format!("{MAN}/man7/xpm.7"))
    }

    /// The README, and documents of docs/.
    fn add_documents(&self, names: &[&str]) -> Result<()> {
        let doc = format!("usr/share/doc/{}", self.name);
        self.stage.copy(&util::repository().join("README.md"), &format!("{doc}/README.md"))?;
        names.iter().try_for_each(|name| self.stage.copy(&document(name), &format!("{doc}/docs/{name}.md")))
    }

    /// Manual pages and completions of the operator's command, by itself.
    fn add_command_help(&self, shared: &Shared) -> Result<()> {
        let xpm = shared.program("xpm");
        let xpm = xpm.to_string_lossy();
        let pages = shared.work.join("man");
        util::output(util::command(&xpm).arg("man").arg(&pages))?;
        for page in sorted(&pages)? {
            self.stage.compressed(&read(&page)?, &format!("{MAN}/man1/{}", name(&page)))?;
        }
        for (shell, to) in [
            ("bash", "usr/share/bash-completion/completions/xpm"),
            ("zsh", "usr/share/zsh/vendor-completions/_xpm"),
            ("fish", "usr/share/fish/vendor_completions.d/xpm.fish"),
        ] {
            let script = util::output(util::command(&xpm).args(["completions", shell]))?;
            self.stage.text(&script, to)?;
        }
        Ok(())
    }
}

fn document(name: &str) -> PathBuf {
    util::repository().join("docs").join(name).with_extension("md")
}

fn packaging(file: &str) -> PathBuf {
    util::repository().join("packaging").join(file)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

fn name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files of a directory.
fn sorted(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}
