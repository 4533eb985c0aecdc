//! Trees: directories whose files are allocations, end to end, also while their server dies.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use xpm_tests::files::{self, Files};
use xpm_tests::mapped::Mapped;
use xpm_tests::{Cluster, wait_until};

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

/// A cluster with a mounted tree, whose mounts and processes end with it.
struct Site {
    // Ended in this order.
    fs: Files,
    cluster: Cluster,
}

impl Site {
    /// None where this machine cannot mount files.
    fn start(settings: &str) -> Option<Site> {
        let (fs, cluster) = files::start(settings)?;
        let site = Site { fs, cluster };
        site.mount();
        Some(site)
    }

    fn mount(&self) {
        let at = self.root().display().to_string();
        assert_eq!(self.cluster.ok(&["fs", "mount", &at]), at);
    }

    fn unmount(&self) {
        self.cluster.ok(&["fs", "unmount", &self.root().display().to_string()]);
    }

    fn root(&self) -> PathBuf {
        self.cluster.dir().join("far")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Names of the allocations of files, without that of the tree.
    fn allocations(&self) -> Vec<String> {
        let all = self.cluster.json(&["alloc", "list"]);
        let names =
            all.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str().map(str::to_owned));
        names.filter(|name| name.starts_with("far.")).collect()
    }

    /// Kills the process that serves, and waits until its standby serves.
    fn kill_serving(&self) {
        self.fs.wait_standby();
        self.fs.replace_serving();
    }
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn forget_pages(file: &File) {
    file.sync_all().unwrap();
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

fn open(path: &std::path::Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

fn errno<T>(done: io::Result<T>) -> Option<i32> {
    done.err().and_then(|error| error.raw_os_error())
}

fn names(directory: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn files_take_memory_when_they_are_written_and_give_it_back_when_they_go() {
    let Some(site) = Site::start("standby = false") else { return };
    assert_eq!(names(&site.root()), [""; 0]);
    let path = site.path("a");
    let file = open(&path);
    assert_eq!(site.allocations(), [""; 0], "an empty file takes nothing");
    // Growth by write, beyond what one region holds.
    let data = bytes(7, 20 * MIB as usize);
    (&file).write_all(&data).unwrap();
    forget_pages(&file);
    assert_eq!(site.allocations().len(), 1);
    assert_eq!(fs::metadata(&path).unwrap().len(), 20 * MIB);
    let mut read = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut read).unwrap();
    assert!(read == data, "what was written is read");
    // Growth by ftruncate, and a private and a shared mapping of what is new.
    let sized = open(&site.path("b"));
    sized.set_len(40 * MIB).unwrap();
    assert_eq!(site.allocations().len(), 2);
    let mapped = Mapped::new(&sized, 40 * MIB as usize);
    mapped.write(33 * MIB as usize, &data[..PAGE]);
    let mut page = [0; PAGE];
    mapped.read(5 * PAGE, &mut page);
    assert_eq!(page, [0; PAGE], "never written");
    drop(mapped);
    forget_pages(&sized);
    sized.read_exact_at(&mut page, 33 * MIB).unwrap();
    assert!(page == data[..PAGE]);
    // The bytes that were cut off are zeros when the file grows again.
    sized.set_len(33 * MIB + 100).unwrap();
    sized.set_len(40 * MIB).unwrap();
    forget_pages(&sized);
    sized.read_exact_at(&mut page, 33 * MIB).unwrap();
    assert!(page[..100] == data[..100] && page[100..] == [0; PAGE - 100]);
    // A hole.
    file.write_all_at(&data[..3 * PAGE], 0).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, PAGE as u64, PAGE as u64).unwrap();
    forget_pages(&file);
    file.read_exact_at(&mut page, PAGE as u64).unwrap();
    assert_eq!(page, [0; PAGE]);
    // Removed, and cut to nothing.
    drop(file);
    fs::remove_file(&path).unwrap();
    wait_until("a removed file gives its memory back", || site.allocations().len() == 1);
    sized.set_len(0).unwrap();
    wait_until("an empty file has none", || site.allocations().is_empty());
    sized.write_all_at(b"again", 3).unwrap();
    forget_pages(&sized);
    let mut text = String::new();
    File::open(site.path("b")).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "\0\0\0again");
}

#[test]
fn names_do_what_posix_says() {
    let Some(site) = Site::start("standby = false") else { return };
    let [a, b, d] = ["a", "b", "d"].map(|name| site.path(name));
    fs::write(&a, "one").unwrap();
    assert_eq!(errno(OpenOptions::new().write(true).create_new(true).open(&a)), Some(libc::EEXIST));
    assert_eq!(errno(File::open(&b)), Some(libc::ENOENT));
    fs::create_dir(&d).unwrap();
    assert_eq!(errno(fs::create_dir(&d)), Some(libc::EEXIST));
    assert_eq!(errno(fs::remove_file(&d)), Some(libc::EISDIR));
    assert_eq!(errno(fs::remove_dir(&a)), Some(libc::ENOTDIR));
    // Renamed over another one, into a directory, and not into itself.
    fs::write(&b, "two").unwrap();
    fs::rename(&a, &b).unwrap();
    assert_eq!((fs::read_to_string(&b).unwrap(), a.exists()), ("one".to_owned(), false));
    fs::rename(&b, d.join("c")).unwrap();
    assert_eq!(errno(fs::rename(&d, d.join("e"))), Some(libc::EINVAL));
    assert_eq!(errno(fs::remove_dir(&d)), Some(libc::ENOTEMPTY));
    fs::create_dir(site.path("empty")).unwrap();
    assert_eq!(errno(fs::rename(site.path("empty"), &d)), Some(libc::ENOTEMPTY));
    fs::rename(&d, site.path("empty")).unwrap();
    assert_eq!(fs::read_to_string(site.path("empty/c")).unwrap(), "one");
    // Links of both kinds, and their counts.
    let (c, hard) = (site.path("empty/c"), site.path("hard"));
    fs::hard_link(&c, &hard).unwrap();
    assert_eq!((fs::metadata(&hard).unwrap().nlink(), fs::metadata(site.root()).unwrap().nlink()), (2, 3));
    fs::remove_file(&c).unwrap();
    assert_eq!(fs::read_to_string(&hard).unwrap(), "one");
    std::os::unix::fs::symlink("hard", site.path("soft")).unwrap();
    assert_eq!(fs::read_to_string(site.path("soft")).unwrap(), "one");
    assert_eq!(fs::read_link(site.path("soft")).unwrap(), PathBuf::from("hard"));
    // Permissions, owners and times, of which the kernel keeps nothing.
    fs::set_permissions(&hard, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&hard, Some(65_534), Some(65_533)).unwrap();
    let past = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 7);
    open(&hard).set_modified(past).unwrap();
    site.unmount();
    assert_eq!(names(&site.root()), [""; 0]);
    site.mount();
    let facts = fs::metadata(&hard).unwrap();
    assert_eq!((facts.mode() & 0o7777, facts.uid(), facts.gid()), (0o640, 65_534, 65_533));
    assert_eq!(facts.modified().unwrap(), past);
    assert_eq!(fs::read_to_string(&hard).unwrap(), "one", "data outlive the mount");
    assert_eq!(names(&site.root()), ["empty", "hard", "soft"]);
    // A directory of which entries go while it is listed.
    let many = site.path("many");
    fs::create_dir(&many).unwrap();
    (0..500).for_each(|number| drop(File::create(many.join(format!("{number}"))).unwrap()));
    assert_eq!(names(&many).len(), 500);
    fs::remove_dir_all(&many).unwrap();
    assert!(!many.exists());
}

#[test]
fn a_tree_outlives_its_server_and_files_without_a_name_their_names() {
    let Some(site) = Site::start("standby-reserve = \"1MiB\"\nhang-limit = \"4s\"") else { return };
    let data = bytes(3, 3 * MIB as usize);
    let kept = open(&site.path("kept"));
    kept.write_all_at(&data, 0).unwrap();
    let nameless = open(&site.path("nameless"));
    nameless.write_all_at(&data, 0).unwrap();
    nameless.sync_all().unwrap();
    fs::remove_file(site.path("nameless")).unwrap();
    site.kill_serving();
    // Not yet synced when the server died, and what is made after it.
    fs::create_dir(site.path("d")).unwrap();
    forget_pages(&kept);
    forget_pages(&nameless);
    let mut read = vec![0; data.len()];
    for file in [&kept, &nameless] {
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == data);
    }
    kept.write_all_at(&data, 18 * MIB).unwrap();
    forget_pages(&kept);
    kept.read_exact_at(&mut read, 18 * MIB).unwrap();
    assert!(read == data);
    assert_eq!(names(&site.root()), ["d", "kept"]);
    assert_eq!(site.allocations().len(), 2);
    // Its last close, which this server has not seen the opening of.
    drop(nameless);
    wait_until("the file without a name is gone", || site.allocations().len() == 1);
}

/// Files are made, written, checked and removed while the server is killed again and again; after that the tree can be
/// unmounted, and no allocation of a removed file is left.
#[test]
fn a_tree_whose_server_is_killed_under_load_is_unmounted_and_empty() {
    let Some(site) = Site::start("standby-reserve = \"1MiB\"\nhang-limit = \"4s\"") else { return };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (site, stop) = (&site, &stop);
            scope.spawn(move || {
                let path = site.path(&format!("file{thread}"));
                for round in 1.. {
                    let data = bytes(round * 2 + thread, 300 * 1024);
                    let file = open(&path);
                    file.write_all_at(&data, 0).unwrap();
                    forget_pages(&file);
                    let mut read = vec![0; data.len()];
                    file.read_exact_at(&mut read, 0).unwrap();
                    assert!(read == data, "round {round} of thread {thread}");
                    fs::remove_file(&path).unwrap();
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        (0..xpm_tests::rounds(2, 20)).for_each(|_| site.kill_serving());
        stop.store(true, Ordering::Relaxed);
    });
    let root = site.root().display().to_string();
    let mut unmounting = site.cluster.command(&["fs", "unmount", &root]).spawn().unwrap();
    wait_until("it is unmounted", || unmounting.try_wait().unwrap().is_some_and(|status| status.success()));
    wait_until("the allocations of its files are freed", || site.allocations().is_empty());
    site.mount();
    assert_eq!(names(&site.root()), Vec::<String>::new());
}

#[test]
fn a_copy_of_a_tree_in_another_namespace_does_not_hold_an_unmount_up() {
    let Some(site) = Site::start("standby = false") else { return };
    let data = bytes(1, 300 * 1024);
    fs::write(site.path("file"), &data).unwrap();
    let copy = files::in_a_namespace("exec sleep infinity");
    let root = site.root().display().to_string();
    let mut unmounting = site.cluster.command(&["fs", "unmount", &root]).spawn().unwrap();
    wait_until("it is unmounted", || unmounting.try_wait().unwrap().is_some_and(|status| status.success()));
    site.mount();
    assert!(fs::read(site.path("file")).unwrap() == data);
    drop(copy);
}

#[test]
fn a_tree_without_any_server_is_mounted_anew_with_its_files() {
    let Some(mut site) = Site::start("standby = false") else { return };
    let file = open(&site.path("a"));
    file.write_all_at(b"words", 0).unwrap();
    file.sync_all().unwrap();
    let gone = open(&site.path("gone"));
    gone.write_all_at(b"words", 0).unwrap();
    gone.sync_all().unwrap();
    fs::remove_file(site.path("gone")).unwrap();
    assert_eq!(site.allocations().len(), 2);
    site.fs.kill_all();
    assert_eq!(errno(fs::read(site.path("a"))), Some(libc::ENOTCONN));
    site.fs.daemon = site.cluster.fs("standby = false");
    wait_until("the tree is mounted anew", || fs::read(site.path("a")).is_ok_and(|bytes| bytes == b"words"));
    wait_until("what was open without a name is freed", || site.allocations().len() == 1);
}

#[test]
fn a_tree_says_how_much_memory_there_is_and_when_there_is_none() {
    let Some(site) = Site::start("standby = false") else { return };
    let free = || {
        let facts = rustix::fs::statvfs(site.root()).unwrap();
        facts.f_bavail * facts.f_frsize
    };
    let before = free();
    assert_eq!(before, site.cluster.json(&["status"])["allocator"]["free"].as_u64().unwrap_or(before));
    let file = open(&site.path("a"));
    file.set_len(32 * MIB).unwrap();
    wait_until("less is free", || free() + 32 * MIB == before);
    assert_eq!(fs::metadata(site.path("a")).unwrap().blocks() * 512, 32 * MIB);
    assert_eq!(errno(file.set_len(1 << 37)), Some(libc::ENOSPC));
    assert_eq!(errno(file.set_len(1 << 50)), Some(libc::EFBIG), "more regions than there can be");
    assert_eq!(file.metadata().unwrap().len(), 32 * MIB);
    // A file that has no room fails alone, and a smaller one is served.
    let big = open(&site.path("big"));
    assert_eq!(errno(big.set_len(1 << 50)), Some(libc::ENOSPC));
    big.write_all_at(b"small", 0).unwrap();
    big.sync_all().unwrap();
    wait_until("what was refused leaves nothing", || site.allocations().len() == 2);
    // Direct I/O.
    let direct =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(site.path("a")).unwrap();
    let mut aligned = vec![0_u8; 3 * PAGE];
    let start = aligned.as_ptr().align_offset(PAGE);
    let page = &mut aligned[start..start + PAGE];
    page.fill(9);
    direct.write_all_at(page, 8 * MIB).unwrap();
    page.fill(0);
    direct.read_exact_at(page, 8 * MIB).unwrap();
    assert!(page.iter().all(|byte| *byte == 9));
}
