//! An attachment that fails leaves nothing behind, also where the state directory is full.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use xpm_tests::Cluster;

/// A file system with little room, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn on(place: &Path) -> Option<Small> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k,mode=700", "none"])
            .arg(place)
            .status();
        mounted.is_ok_and(|status| status.success()).then(|| Small(place.to_owned()))
    }

    /// Leaves room for one file of a page.
    fn fill(&self) {
        fs::write(self.0.join("room"), [1; 4096]).expect("there is room for this");
        let mut pages = 0;
        while fs::write(self.0.join(format!("full{pages}")), [1; 4096]).is_ok() {
            pages += 1;
        }
        let _ = fs::remove_file(self.0.join(format!("full{pages}")));
        fs::remove_file(self.0.join("room")).expect("it is there");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy"]).arg(&self.0).status();
    }
}

#[test]
fn an_attachment_that_fails_in_a_full_directory_is_undone() {
    let mut cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "disk", "--size", "16MiB"]);
    cluster.blk.kill();
    let Some(state) = Small::on(&cluster.dir().join("blk")) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    cluster.restart_blk();
    let form = format!("nbd-socket={}", cluster.dir().join("disk.sock").display());
    // The file with the state of the allocator's metadata exists from the first attachment on.
    cluster.ok(&["blk", "attach", "disk", "--as", &form]);
    cluster.ok(&["blk", "detach", "disk"]);
    state.fill();
    let line = cluster.refused(&["blk", "attach", "disk", "--as", &form]);
    assert!(line.contains("No space left"), "{line}");
    assert!(cluster.json(&["blk", "list"]).as_array().is_some_and(Vec::is_empty), "it is not shown");
    assert!(cluster.json(&["alloc", "show", "disk"])["owner"].is_null(), "nobody owns it");
    assert!(!cluster.dir().join("disk.sock").exists(), "nobody listens");
    cluster.restart_blk();
    // Records are shown before the control interface answers; what is not on its way then does not come.
    assert!(cluster.json(&["blk", "list"]).as_array().is_some_and(Vec::is_empty), "nor at the next start");
    assert_eq!(fs::read_dir(cluster.dir().join("blk/devices")).expect("records").count(), 0);
    drop(state);
}
