//! From a tree of files to a Debian package (deb(5), deb-control(5), Debian Policy).

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::contents::Package;
use crate::util;

/// The maintainer of the packages.
const MAINTAINER: &str = "The authors of xpm <maintainers@xpm.example.org>";

/// Version of the packages, and when that was made.
pub(crate) struct Version {
    text: String,
    date: String,
}

impl Version {
    /// That of the workspace with a suffix; the time of its last commit.
    pub(crate) fn of_repository(suffix: &str) -> Result<Version> {
        let mut git = util::command("git");
        git.current_dir(util::repository()).args(["log", "-1", "--format=%cD"]);
        // Without git, as in a tarball, the time of the list of changes has to do.
        let date = util::output(&mut git).or_else(|_| {
            let changes = util::repository().join("CHANGELOG.md");
            util::output(util::command("date").args(["--rfc-email", "--reference"]).arg(changes))
        })?;
        let text = format!("{}{suffix}-1", env!("CARGO_PKG_VERSION"));
        Ok(Version { text, date: date.trim().to_owned() })
    }
}

/// Makes one package in `output`; its path.
pub(crate) fn make(
    package: &Package,
    version: &Version,
    work: &Path,
    output: &Path,
    small: bool,
) -> Result<PathBuf> {
    let root = package.stage.root();
    let doc = format!("usr/share/doc/{}", package.name);
    package.stage.compressed(&changelog(version), &format!("{doc}/changelog.Debian"))?;
    let arch = architecture()?;
    let control = control(package, version, &arch, work)?;
    write_control(package, &control)?;
    let file = output.join(format!("{}_{}_{arch}.deb", package.name, version.text));
    let mut dpkg = util::command("dpkg-deb");
    let how: &[&str] = if small { &["-Zxz"] } else { &["-Zgzip", "-z1"] };
    dpkg.args(["--root-owner-group", "--build"]).args(how).arg(root).arg(&file);
    util::output(&mut dpkg)?;
    Ok(file)
}

fn architecture() -> Result<String> {
    Ok(util::output(util::command("dpkg").arg("--print-architecture"))?.trim().to_owned())
}

fn changelog(version: &Version) -> String {
    let Version { text, date } = version;
    format!("xpm ({text}) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- {MAINTAINER}  {date}\n")
}

fn control(package: &Package, version: &Version, arch: &str, work: &Path) -> Result<String> {
    let mut control = format!(
        "Package: {}\nSource: xpm\nVersion: {}\nArchitecture: {arch}\nMaintainer: {MAINTAINER}\nInstalled-Size: {}\n\
         Section: {}\nPriority: optional\n",
        package.name,
        version.text,
        installed_kib(package.stage.root())?,
        package.section,
    );
    let mut depends: Vec<String> =
        package.depends.iter().map(|need| need.replace("@VERSION@", &version.text)).collect();
    depends.extend(libraries(package, work)?);
    for (field, value) in [("Depends", depends.join(", ")), ("Recommends", package.recommends.join(", "))] {
        if !value.is_empty() {
            writeln!(control, "{field}: {value}")?;
        }
    }
    writeln!(control, "Description: {}", package.summary)?;
    for line in package.description.lines() {
        writeln!(control, " {}", if line.is_empty() { "." } else { line })?;
    }
    Ok(control)
}

/// The dependencies of the package's programs and libraries, as dpkg-shlibdeps finds them.
fn libraries(package: &Package, work: &Path) -> Result<Option<String>> {
    if package.binaries.is_empty() {
        return Ok(None);
    }
    // It wants to stand in a source package.
    let source = work.join("source");
    fs::create_dir_all(source.join("debian"))?;
    fs::write(source.join("debian/control"), "Source: xpm\n\nPackage: xpm\nArchitecture: any\n")?;
    let mut shlibdeps = util::command("dpkg-shlibdeps");
    shlibdeps.current_dir(&source).arg("-O");
    for file in &package.binaries {
        shlibdeps.arg(format!("-e{}", package.stage.root().join(file).display()));
    }
    let said = util::output(&mut shlibdeps)?;
    let depends = said.trim().strip_prefix("shlibs:Depends=").context("dpkg-shlibdeps found nothing")?;
    Ok(Some(depends.to_owned()))
}

/// The directory DEBIAN: control file, maintainer scripts, what is configuration, and checksums.
fn write_control(package: &Package, control: &str) -> Result<()> {
    let stage = &package.stage;
    let checksums = checksums(stage.root())?;
    stage.text(control, "DEBIAN/control")?;
    stage.text(&checksums, "DEBIAN/md5sums")?;
    if !package.conffiles.is_empty() {
        stage.text(&(package.conffiles.join("\n") + "\n"), "DEBIAN/conffiles")?;
    }
    for (name, text) in &package.control_files {
        stage.text(text, &format!("DEBIAN/{name}"))?;
    }
    let scripts = util::repository().join("packaging").join(package.name);
    for script in ["preinst", "postinst", "prerm", "postrm"] {
        let file = scripts.join(script);
        if file.is_file() {
            stage.script(&file, &format!("DEBIAN/{script}"))?;
        }
    }
    Ok(())
}

/// All regular files below a directory, as paths from there, sorted.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_path_buf()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => waiting.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path().strip_prefix(root)?.to_path_buf()),
                _ => {}
            }
        }
    }
    found.sort();
    Ok(found)
}

fn checksums(root: &Path) -> Result<String> {
    util::output(util::command("md5sum").current_dir(root).args(files(root)?))
}

/// Size on disk in KiB: each file in whole KiB (deb-substvars(5)).
fn installed_kib(root: &Path) -> Result<u64> {
    let sizes = files(root)?.into_iter().map(|file| Ok(fs::metadata(root.join(file))?.len().div_ceil(1024)));
    sizes.sum()
}
