//! The tree of files of one package, as it will lie on a machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::util;

const FILE: u32 = 0o644;
const PROGRAM: u32 = 0o755;

/// A tree of files below a directory.
pub(crate) struct Stage {
    root: PathBuf,
}

impl Stage {
    /// An empty tree.
    pub(crate) fn new(root: PathBuf) -> Result<Stage> {
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        Ok(Stage { root })
    }

    /// The directory that stands for `/`.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A copy of a file.
    pub(crate) fn copy(&self, from: &Path, to: &str) -> Result<()> {
        self.place(from, to, FILE).map(drop)
    }

    /// A copy of a program or a shared library, without what only a debugger needs.
    pub(crate) fn program(&self, from: &Path, to: &str, is_library: bool) -> Result<()> {
        let mode = if is_library { FILE } else { PROGRAM };
        let file = self.place(from, to, mode)?;
        // Sections that only the linker or a reader of symbols needs are removed as well.
        let strip = ["--strip-unneeded", "--remove-section=.comment", "--remove-section=.note"];
        util::output(util::command("strip").args(strip).arg(file)).map(drop)
    }

    /// A copy of a script.
    pub(crate) fn script(&self, from: &Path, to: &str) -> Result<()> {
        self.place(from, to, PROGRAM).map(drop)
    }

    /// A file with this text.
    pub(crate) fn text(&self, text: &str, to: &str) -> Result<()> {
        let file = self.file(to)?;
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        mode(&file, FILE)
    }

    /// A file with this text, compressed; `.gz` is added to its name.
    pub(crate) fn compressed(&self, text: &str, to: &str) -> Result<()> {
        self.text(text, to)?;
        // Without name and time in it, so that the same text gives the same file.
        util::output(util::command("gzip").args(["-9", "-n"]).arg(self.root.join(to))).map(drop)
    }

    /// An empty directory.
    pub(crate) fn directory(&self, to: &str) -> Result<()> {
        self.file(&format!("{to}/x")).map(drop)
    }

    /// A symbolic link.
    pub(crate) fn link(&self, target: &str, to: &str) -> Result<()> {
        let file = self.file(to)?;
        symlink(target, &file).with_context(|| format!("cannot make {}", file.display()))
    }

    fn place(&self, from: &Path, to: &str, permissions: u32) -> Result<PathBuf> {
        let file = self.file(to)?;
        fs::copy(from, &file)
            .with_context(|| format!("cannot copy {} to {}", from.display(), file.display()))?;
        mode(&file, permissions)?;
        Ok(file)
    }

    /// The path of a file of the tree, in a directory that is there.
    fn file(&self, to: &str) -> Result<PathBuf> {
        let file = self.root.join(to);
        let directory = file.parent().context("a file of a package has no name")?;
        let mut missing: Vec<&Path> = directory.ancestors().take_while(|path| !path.exists()).collect();
        while let Some(directory) = missing.pop() {
            fs::create_dir(directory)?;
            mode(directory, PROGRAM)?;
        }
        Ok(file)
    }
}

fn mode(file: &Path, permissions: u32) -> Result<()> {
    fs::set_permissions(file, fs::Permissions::from_mode(permissions))
        .with_context(|| format!("cannot set the mode of {}", file.display()))
}
