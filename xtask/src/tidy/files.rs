//! The files of the source tree.

use std::path::Path;

use anyhow::Result;

use crate::util;

/// A text file of the repository.
#[derive(Debug)]
pub(super) struct File {
    /// Path from the root of the repository.
    pub(super) path: String,
    pub(super) text: String,
}

/// The kinds of files that have rules of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Rust,
    C,
    Markdown,
    /// A script of a shell other than the guest's busybox.
    Shell,
    /// Configuration with comments that begin with `#`.
    Settings,
    Other,
}

impl File {
    pub(super) fn new(path: &str, text: &str) -> File {
        File { path: path.to_owned(), text: text.to_owned() }
    }

    pub(super) fn kind(&self) -> Kind {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        let first = self.text.lines().next().unwrap_or_default();
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("rs") => Kind::Rust,
            Some("c" | "h") => Kind::C,
            Some("md") => Kind::Markdown,
            Some("sh") => Kind::Shell,
            Some("toml" | "service" | "socket" | "conf" | "rules" | "swap" | "mount") => Kind::Settings,
            _ if first.starts_with("#!") && first.ends_with("sh") => Kind::Shell,
            _ => Kind::Other,
        }
    }
}

/// All files that git tracks or would track. Files that are not text are left out.
pub(super) fn tracked(root: &Path) -> Result<Vec<File>> {
    let mut git = util::command("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let names = util::output(&mut git)?;
    let read = |path: &str| Some(File::new(path, &std::fs::read_to_string(root.join(path)).ok()?));
    Ok(names.split_terminator('\0').filter_map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_by_name_and_first_line() {
        let kind = |path, text| File::new(path, text).kind();
        assert_eq!(kind("a/b.rs", ""), Kind::Rust);
        assert_eq!(kind("packaging/x/postinst", "#!/bin/sh\n"), Kind::Shell);
        assert_eq!(kind(".ci/run", "#!/usr/bin/env bash\n"), Kind::Shell);
        assert_eq!(kind("LICENSE-MIT", "text"), Kind::Other);
    }

    #[test]
    fn this_file_is_tracked() {
        let files = tracked(&util::repository()).unwrap();
        assert!(files.iter().any(|file| file.path == "xtask/src/tidy/files.rs"));
    }
}
