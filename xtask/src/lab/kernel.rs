//! The guest's kernel: one of Debian's, unpacked and not installed.

use std::cmp::Reverse;
use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::{apt, util};

/// The suite with the newest kernel that Debian builds for a stable release.
const NEWEST_SUITE: &str = "trixie-backports";
/// The keys of Debian's archive; those of Debian 12 know the archives of Debian 13, too.
const ARCHIVE_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Written last into the root of an unpacked kernel, so that an interrupted download does not count as a kernel.
const COMPLETE: &str = "complete";

/// Which kernel the guest gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Source {
    /// Debian's 6.12 for Debian 12: the kernel of the test command.
    #[default]
    Stock,
    /// The newest kernel of Debian's backports for Debian 13.
    Newest,
    /// The root of kernel packages that somebody unpacked: the directory that has `boot` or `usr` in it.
    Unpacked(PathBuf),
}

impl FromStr for Source {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Source, Infallible> {
        Ok(match text {
            "6.12" => Source::Stock,
            "newest" => Source::Newest,
            path => Source::Unpacked(path.into()),
        })
    }
}

/// An unpacked kernel package.
pub(crate) struct Kernel {
    /// The directory that has a directory for each release, as `/lib/modules`.
    modules: PathBuf,
    /// Its release as `uname -r` shows it.
    release: String,
    /// The bootable image.
    image: PathBuf,
}

impl Kernel {
    /// The kernel of the cache; where it has none yet, the newest one that apt offers, downloaded into it.
    ///
    /// # Errors
    /// When apt offers no such kernel, or the named directory has no image and modules of exactly one release.
    pub(crate) fn get(source: &Source, cache: &Path) -> Result<Kernel> {
        let root = match source {
            Source::Stock => cache.join("kernel"),
            Source::Newest => cache.join("kernel-newest"),
            Source::Unpacked(root) => return Kernel::unpacked(root),
        };
        if !root.join(COMPLETE).is_file() {
            let suite = match source {
                Source::Newest => Suite::newest(cache)?,
                _ => Suite::of_the_host(),
            };
            suite.fetch(&root).context("cannot get the guest's kernel")?;
        }
        Kernel::unpacked(&root)
    }

    /// The kernel below `root`, where Debian's packages have image and modules.
    fn unpacked(root: &Path) -> Result<Kernel> {
        let modules = modules_below(root)?;
        let release = only_release(&modules)?;
        let images =
            [root.join("boot").join(format!("vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
        let image = images.into_iter().find(|image| image.is_file());
        let image = image.with_context(|| {
            format!(
                "{} has no image of Linux {release}: neither boot/vmlinuz-{release} nor vmlinuz beside the modules",
                root.display()
            )
        })?;
        ensure!(
            modules.join(&release).join("modules.dep").is_file(),
            "{} has no modules.dep: run depmod -b on the directory above lib/modules",
            modules.join(&release).display()
        );
        // The guest gets the path on the kernel's command line, where a relative one means nothing.
        Ok(Kernel { modules: modules.canonicalize()?, release, image: image.canonicalize()? })
    }

    /// The release as `uname -r` shows it.
    pub(crate) fn release(&self) -> &str {
        &self.release
    }

    /// The bootable image.
    pub(crate) fn image(&self) -> PathBuf {
        self.image.clone()
    }

    /// The directory that is to be `/lib/modules` of the guest.
    pub(crate) fn modules(&self) -> PathBuf {
        self.modules.clone()
    }

    /// Module files that the named modules need, and their own, as paths below the release's
    /// directory and in the order in which they can be inserted. A module that the kernel has built in has no file and
    /// is left out.
    pub(crate) fn module_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let (dependencies, builtin) = (self.list("modules.dep")?, self.list("modules.builtin")?);
        let mut order = Vec::new();
        for name in names {
            match find_module(&dependencies, name) {
                Some(path) => insert_after_needs(&dependencies, path, &mut order),
                None if is_builtin(&builtin, name) => {}
                None => bail!("Linux {} has no module {name}", self.release),
            }
        }
        Ok(order)
    }

    /// Whether there is a file of this module.
    pub(crate) fn has_module(&self, name: &str) -> Result<bool> {
        Ok(find_module(&self.list("modules.dep")?, name).is_some())
    }

    /// The text of one of depmod's files.
    fn list(&self, name: &str) -> Result<String> {
        let file = self.modules.join(&self.release).join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    }
}

/// `lib/modules` of unpacked packages; newer ones have it in `usr`.
fn modules_below(root: &Path) -> Result<PathBuf> {
    let places = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place));
    places.into_iter().find(|place| place.is_dir()).with_context(|| {
        format!(
            "{} has neither lib/modules nor usr/lib/modules: unpack kernel packages there",
            root.display()
        )
    })
}

fn only_release(modules: &Path) -> Result<String> {
    let entries = fs::read_dir(modules).with_context(|| format!("cannot read {}", modules.display()))?;
    let mut releases: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    ensure!(
        releases.len() == 1,
        "{} must have the modules of one kernel; it has {}: {}",
        modules.display(),
        releases.len(),
        releases.join(", ")
    );
    Ok(releases.remove(0))
}

/// Where apt finds kernel packages, and what they are called there.
struct Suite {
    /// Options that make apt read this suite; none for the host's own ones.
    options: Vec<String>,
    /// A regular expression for the names of the packages with a bootable image.
    pattern: &'static str,
    /// The part before the release in the names of all packages of a kernel, the package with the image first.
    prefixes: &'static [&'static str],
    /// How to make apt know such packages where it does not.
    remedy: &'static str,
}

impl Suite {
    /// The stock 6.12 kernel for Debian 12; not the `cloud` flavour, which lacks 9p and Soft-RoCE.
    fn of_the_host() -> Suite {
        Suite {
            options: Vec::new(),
            pattern: r"^linux-image-6\.12\.[0-9]+\+deb12-amd64$",
            prefixes: &["linux-image-"],
            remedy: "add Debian's bookworm-security or bookworm-backports to its sources",
        }
    }

    /// The newest backport for Debian 13, from the archive that the host's apt uses, with lists of its own: the host's
    /// sources stay as they are.
    fn newest(cache: &Path) -> Result<Suite> {
        let site = archive()?;
        let (lists, sources) = (cache.join("apt/lists"), cache.join("apt/sources.list"));
        fs::create_dir_all(lists.join("partial"))?;
        fs::write(&sources, format!("deb [signed-by={ARCHIVE_KEYS}] {site} {NEWEST_SUITE} main\n"))?;
        let options = [
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", lists.display()),
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
            // The lists and packages lie in a directory that apt's own user may not be able to enter.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Suite {
            options: options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect(),
            pattern: r"^linux-binary-[0-9.]+\+deb13-amd64$",
            prefixes: &["linux-binary-", "linux-modules-", "linux-base-"],
            remedy: "its archive has no kernel in trixie-backports",
        })
    }

    fn apt(&self, program: &str) -> std::process::Command {
        let mut apt = util::command(program);
        apt.args(&self.options);
        apt
    }

    /// Downloads and unpacks the newest kernel.
    fn fetch(&self, root: &Path) -> Result<()> {
        fs::create_dir_all(root)?;
        let release = self.newest_release()?;
        println!("lab: getting Debian's kernel {release}");
        let packages = self.prefixes.iter().map(|prefix| format!("{prefix}{release}"));
        util::output(self.apt("apt-get").current_dir(root).args(["download", "-qq"]).args(packages))?;
        let packages: Vec<PathBuf> = fs::read_dir(root)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|suffix| suffix == "deb"))
            .collect();
        ensure!(packages.len() == self.prefixes.len(), "apt-get download left {} packages", packages.len());
        for package in packages {
            util::run(util::command("dpkg").arg("-x").args([&package, root]))?;
            fs::remove_file(package)?;
        }
        let above = modules_below(root)?.ancestors().nth(2).map(Path::to_owned);
        util::run(util::command("depmod").arg("-b").arg(above.context("no root")?).arg(&release))?;
        fs::write(root.join(COMPLETE), &release)?;
        Ok(())
    }

    /// The newest release that apt knows.
    fn newest_release(&self) -> Result<String> {
        let search = || util::output(self.apt("apt-cache").args(["search", "--names-only", self.pattern]));
        let mut found = search()?;
        if found.trim().is_empty() {
            apt::get(self.apt("apt-get").args(["update", "-qq"]))?;
            found = search()?;
        }
        let image = self.prefixes[0];
        let mut releases: Vec<&str> =
            found.lines().filter_map(|line| line.split_whitespace().next()?.strip_prefix(image)).collect();
        releases.sort_by_key(|release| Reverse(version(release)));
        ensure!(!releases.is_empty(), "apt knows no {image}* for the guest: {}", self.remedy);
        Ok(releases[0].to_owned())
    }
}

/// The archive from which the host's apt takes Debian's main section.
fn archive() -> Result<String> {
    let format = "$(ORIGIN) $(CODENAME) $(SITE)";
    let targets = util::output(util::command("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    debian_archive(&targets).with_context(|| {
        format!(
            "apt has no source of Debian's archive, from which to get the newest kernel; it has:\n{targets}"
        )
    })
}

/// The site of a line `Debian CODENAME SITE`, of a release itself and not its updates.
fn debian_archive(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (origin, codename, site) = (words.next()?, words.next()?, words.next()?);
        (origin == "Debian" && !codename.contains('-')).then(|| site.to_owned())
    })
}

/// The numbers of a release such as `6.12.117+deb12-amd64`, before its first `+`.
fn version(release: &str) -> Vec<u32> {
    let numbers = release.split('+').next().unwrap_or_default();
    numbers.split('.').map(|number| number.parse().unwrap_or(0)).collect()
}

/// Whether the text of `modules.builtin` has that module.
fn is_builtin(text: &str, name: &str) -> bool {
    text.lines().any(|path| module_name(path) == name)
}

/// The path of a module in the text of `modules.dep`.
fn find_module<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut paths = text.lines().filter_map(|line| Some(line.split_once(':')?.0));
    paths.find(|path| module_name(path) == name)
}

/// `kernel/fs/9p/9p.ko.xz` is the module `9p`; the kernel takes `-` and `_` for the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// Adds a module to the order behind everything that it needs.
fn insert_after_needs(text: &str, path: &str, order: &mut Vec<String>) {
    if order.iter().any(|known| known == path) {
        return;
    }
    let needs = text.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| *file == path);
    for need in needs.map(|(_, needs)| needs.split_whitespace()).into_iter().flatten() {
        insert_after_needs(text, need, order);
    }
    order.push(path.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/9p/9p.ko.xz: kernel/fs/netfs/netfs.ko.xz kernel/net/9p/9pnet.ko.xz
kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs/netfs.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/drivers/block/ublk-drv.ko.xz:
";

    #[test]
    fn needs_come_first_and_once() {
        let mut order = Vec::new();
        for name in ["9p", "9pnet_virtio"] {
            insert_after_needs(DEP, find_module(DEP, name).unwrap(), &mut order);
        }
        let names: Vec<_> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["netfs", "9pnet", "9p", "9pnet_virtio"]);
    }

    #[test]
    fn names_of_modules() {
        assert!(find_module(DEP, "ublk_drv").is_some());
        assert!(find_module(DEP, "netfs.ko").is_none());
    }

    #[test]
    fn newest_is_by_number() {
        assert!(version("6.12.117+deb12-amd64") > version("6.12.99+deb12-amd64"));
        assert!(version("7.0.4+deb13-amd64") > version("6.19.14+deb13-amd64"));
    }

    #[test]
    fn a_module_can_be_built_in() {
        assert!(is_builtin("kernel/lib/crc/crc32.ko\nkernel/crypto/crypto.ko\n", "crc32"));
        assert!(!is_builtin("kernel/lib/crc/crc32.ko\n", "crc32c_generic"));
    }

    #[test]
    fn the_archive_is_that_of_a_release() {
        let targets = "nodistro nodistro https://other\nDebian bookworm-updates http://updates\nDebian bookworm http://archive\n";
        assert_eq!(debian_archive(targets).as_deref(), Some("http://archive"));
        assert_eq!(debian_archive("Debian bookworm-backports http://b\n"), None);
    }

    #[test]
    fn a_kernel_needs_image_and_modules_of_one_release() {
        let root = tempfile::tempdir().unwrap();
        let error = || Kernel::unpacked(root.path()).map(|_| ()).unwrap_err().to_string();
        assert!(error().contains("neither lib/modules nor usr/lib/modules"), "{}", error());
        let modules = root.path().join("usr/lib/modules/7.3.4");
        fs::create_dir_all(&modules).unwrap();
        assert!(error().contains("no image of Linux 7.3.4"), "{}", error());
        fs::write(modules.join("vmlinuz"), "image").unwrap();
        assert!(error().contains("depmod"), "{}", error());
        fs::write(modules.join("modules.dep"), "").unwrap();
        let kernel = Kernel::unpacked(root.path()).unwrap();
        assert_eq!((kernel.release(), kernel.image()), ("7.3.4", modules.join("vmlinuz")));
        fs::create_dir_all(root.path().join("usr/lib/modules/7.3.5")).unwrap();
        assert!(error().contains("must have the modules of one kernel"), "{}", error());
    }

    #[test]
    fn words_of_the_command_line() {
        let source = |text: &str| text.parse::<Source>().unwrap();
        assert_eq!(source("6.12"), Source::Stock);
        assert_eq!(source("newest"), Source::Newest);
        assert_eq!(source("/tmp/root"), Source::Unpacked("/tmp/root".into()));
    }
}
