//! Programs of an earlier commit, built out of the repository's history: what a pool runs before it is upgraded.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::util;

/// The commit whose programs must work together with those of today.
const COMMIT: &str = "cb8ba7c";
/// The programs that a pool has.
const PROGRAMS: [&str; 5] = ["xpm-allocator", "xpm-appliance", "xpm-blk", "xpm-swapd", "xpm"];

/// The directory of the earlier programs, which are built into the lab's cache unless they are there already. Blocks
/// for the minutes that the build takes.
///
/// # Errors
/// When the history has no such commit (a shallow clone), or the commit does not build.
pub(super) fn programs(cache: &Path) -> Result<PathBuf> {
    let root = cache.join(format!("earlier-{COMMIT}"));
    let (source, target) = (root.join("source"), root.join("target"));
    let built = target.join("debug");
    if PROGRAMS.iter().all(|program| built.join(program).is_file()) {
        return Ok(built);
    }
    println!("lab: building the programs of commit {COMMIT}, from which the pool is upgraded");
    unpack(&source)?;
    let mut cargo = util::command("cargo");
    cargo.current_dir(&source).args(["build", "--locked", "--quiet", "--bins", "--target-dir"]).arg(&target);
    for program in PROGRAMS {
        cargo.args(["--package", program]);
    }
    util::run(&mut cargo)?;
    Ok(built)
}

/// Writes the tree of the commit to `source`.
fn unpack(source: &Path) -> Result<()> {
    let known = format!("{COMMIT}^{{commit}}");
    let found = util::output(util::command("git").current_dir(util::repository()).args([
        "rev-parse",
        "--verify",
        "--quiet",
        &known,
    ]));
    ensure!(
        found.is_ok(),
        "the history has no commit {COMMIT}, whose programs are to be upgraded: run git fetch --unshallow"
    );
    if source.exists() {
        fs::remove_dir_all(source).with_context(|| format!("cannot remove {}", source.display()))?;
    }
    fs::create_dir_all(source).with_context(|| format!("cannot make {}", source.display()))?;
    let mut git = util::command("git")
        .current_dir(util::repository())
        .args(["archive", COMMIT])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run git archive")?;
    let tree = git.stdout.take().context("git has no output")?;
    util::run(util::command("tar").arg("-x").arg("-C").arg(source).stdin(tree))?;
    ensure!(git.wait()?.success(), "git archive {COMMIT} failed");
    Ok(())
}

/// A directory of links to programs, which can be pointed at those of another build while the programs run.
pub(super) struct Links {
    dir: PathBuf,
}

impl Links {
    /// Makes `dir` with a link to each program in `programs`.
    pub(super) fn new(dir: PathBuf, programs: &Path) -> Result<Links> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let links = Links { dir };
        PROGRAMS.iter().try_for_each(|program| links.point(program, programs))?;
        Ok(links)
    }

    /// Points the link of one program at that in `programs`.
    pub(super) fn point(&self, program: &str, programs: &Path) -> Result<()> {
        let (link, new) = (self.path(program), self.dir.join(format!("{program}.new")));
        std::os::unix::fs::symlink(programs.join(program), &new)
            .and_then(|()| fs::rename(&new, &link))
            .with_context(|| format!("cannot make {}", link.display()))
    }

    /// The link of one program.
    pub(super) fn path(&self, program: &str) -> PathBuf {
        self.dir.join(program)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_points_at_one_build_and_then_at_another() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        let links = Links::new(dir.path().join("links"), &old).unwrap();
        assert_eq!(fs::read_link(links.path("xpm")).unwrap(), old.join("xpm"));
        links.point("xpm", &new).unwrap();
        assert_eq!(fs::read_link(links.path("xpm")).unwrap(), new.join("xpm"));
        assert_eq!(fs::read_link(links.path("xpm-blk")).unwrap(), old.join("xpm-blk"));
    }
}
