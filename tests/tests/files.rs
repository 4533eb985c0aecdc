//! An allocation as a file: real daemons, the kernel's FUSE, and programs that read, write and map it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use rustix::fs::{FallocateFlags, fallocate};
use xpm_tests::files::{self, Files};
use xpm_tests::mapped::Mapped;
use xpm_tests::{Cluster, Daemon, wait_until};

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

/// A cluster with an xpm-fs, whose mounts and processes end with it.
struct Site {
    // Ended in this order.
    fs: Files,
    cluster: Cluster,
}

impl Site {
    /// None where this machine cannot mount files.
    fn start() -> Option<Site> {
        let (fs, cluster) = files::start("standby-reserve = \"1MiB\"\nhang-limit = \"4s\"")?;
        fs.wait_standby();
        Some(Site { fs, cluster })
    }

    fn attach(&self, name: &str, size: &str, more: &[&str]) -> PathBuf {
        self.cluster.ok(&["alloc", "create", name, "--size", size]);
        let path = self.path(name);
        let at = path.display().to_string();
        assert_eq!(self.cluster.ok(&[&["fs", "attach", name, "--at", &at], more].concat()), at);
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.dir().join("files").join(name)
    }

    /// Ends every process of this site's xpm-fs.
    fn kill_all(&mut self) {
        self.fs.kill_all();
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// A page that tells its place and how often it was written.
fn page(place: u64, version: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        let value = match index % 2 {
            0 => place.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64,
            _ => version,
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

fn read_page(file: &File, place: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    file.read_exact_at(&mut bytes, place * PAGE as u64).unwrap();
    bytes
}

/// Drops what the kernel caches of a file, so that it is read from external memory.
fn forget_pages(file: &File) {
    file.sync_all().unwrap();
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn a_file_holds_what_is_written_and_says_what_it_is() {
    let Some(site) = Site::start() else { return };
    let path = site.attach("data", "64MiB", &["--transport", "nbd-tcp"]);
    let facts = std::fs::metadata(&path).unwrap();
    assert!(facts.is_file());
    assert_eq!((facts.len(), facts.permissions().mode() & 0o7777), (64 * MIB, 0o600));
    assert!(facts.modified().unwrap().elapsed().unwrap().as_secs() < 600, "a file of today");
    let sizes = rustix::fs::statvfs(&path).unwrap();
    assert_eq!(sizes.f_blocks * sizes.f_frsize, 64 * MIB);

    let file = open(&path);
    assert_eq!(read_page(&file, 5), [0; PAGE], "what was never written is zeros");
    let places = [0, 1, 77, 16_383];
    places.iter().for_each(|&place| file.write_all_at(&page(place, 1), place * PAGE as u64).unwrap());
    forget_pages(&file);
    places.iter().for_each(|&place| assert_eq!(read_page(&file, place), page(place, 1)));
    // The last byte, a piece of a page, and nothing behind the end.
    file.write_all_at(&[9], 64 * MIB - 1).unwrap();
    file.write_all_at(&[8; 100], 10).unwrap();
    forget_pages(&file);
    let mut bytes = [0; 100];
    file.read_exact_at(&mut bytes, 10).unwrap();
    assert_eq!(bytes, [8; 100]);
    assert_eq!(file.read_at(&mut bytes, 64 * MIB).unwrap(), 0);

    // A hole gives memory back and reads as zeros, also where it cuts pages.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, PAGE as u64, PAGE as u64).unwrap();
    fallocate(&file, punch, 20, 30).unwrap();
    forget_pages(&file);
    assert_eq!(read_page(&file, 1), [0; PAGE]);
    file.read_exact_at(&mut bytes, 10).unwrap();
    assert_eq!((&bytes[..10], &bytes[10..40], &bytes[40..]), (&[8; 10][..], &[0; 30][..], &[8; 60][..]));
    assert_eq!(site.cluster.json(&["fs", "show", "data"])["counters"]["trims"], 2);

    // Size, owner and permissions are not changed by programs.
    let refused = |done: io::Result<()>| assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::EPERM));
    refused(file.set_len(MIB));
    refused(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)));
    refused(std::os::unix::fs::chown(&path, Some(1), None));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * MIB);

    // It is in use, by name; then it goes, and its data stay.
    let line = site.cluster.refused(&["fs", "detach", "data"]);
    assert!(line.contains(&format!("(process {})", std::process::id())), "{line}");
    drop(file);
    site.cluster.ok(&["fs", "detach", "data"]);
    assert!(!path.exists(), "the file that the mount lay on is removed");
    let at = path.display().to_string();
    site.cluster.ok(&["fs", "attach", "data", "--at", &at]);
    assert_eq!(read_page(&open(&path), 77), page(77, 1));
}

#[test]
fn permissions_are_those_of_the_file_below() {
    let Some(site) = Site::start() else { return };
    let path = site.path("data");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path).unwrap();
    std::os::unix::fs::chown(&path, Some(65_534), Some(65_533)).unwrap();
    site.attach("data", "16MiB", &[]);
    let facts = std::fs::metadata(&path).unwrap();
    assert_eq!(
        (facts.len(), facts.mode() & 0o7777, facts.uid(), facts.gid()),
        (16 * MIB, 0o640, 65_534, 65_533)
    );
    // A directory that is not empty is not mounted over.
    let full = site.path("full");
    std::fs::write(&full, "words").unwrap();
    site.cluster.ok(&["alloc", "create", "full", "--size", "16MiB"]);
    let line = site.cluster.refused(&["fs", "attach", "full", "--at", &full.display().to_string()]);
    assert!(line.contains("not an empty file"), "{line}");
    assert_eq!(std::fs::read_to_string(&full).unwrap(), "words");
    // Each daemon shows its own forms.
    let form = format!("file={}", full.display());
    let line = site.cluster.refused(&["blk", "attach", "full", "--as", &form]);
    assert!(line.contains("xpm fs attach"), "{line}");
}

#[test]
fn a_file_grows_with_its_allocation() {
    let Some(site) = Site::start() else { return };
    let path = site.attach("data", "32MiB", &[]);
    let file = open(&path);
    file.write_all_at(&page(3, 1), 3 * PAGE as u64).unwrap();
    site.cluster.ok(&["alloc", "resize", "data", "64MiB"]);
    wait_until("the file has its new size", || std::fs::metadata(&path).unwrap().len() == 64 * MIB);
    file.write_all_at(&page(16_000, 1), 16_000 * PAGE as u64).unwrap();
    forget_pages(&file);
    assert_eq!(read_page(&file, 16_000), page(16_000, 1));
    assert_eq!(read_page(&file, 3), page(3, 1));
}

#[test]
fn what_is_cached_is_told_and_dropped_also_while_it_is_mapped() {
    let Some(site) = Site::start() else { return };
    let path = site.attach("data", "32MiB", &["--transport", "nbd-tcp"]);
    let file = open(&path);
    let cache = |more: &[&str]| site.cluster.json(&[&["fs", "cache", "data"], more].concat());
    (0..16).for_each(|place| file.write_all_at(&page(place, 1), place * PAGE as u64).unwrap());
    assert_eq!(cache(&[])["cached"], 16 * PAGE);
    let mapped = Mapped::new(&file, 16 * PAGE);
    let check = || {
        let mut bytes = [0; PAGE];
        mapped.read(5 * PAGE, &mut bytes);
        assert_eq!(bytes, page(5, 1));
    };
    check();
    let left = cache(&["--drop"]);
    assert_eq!((&left["cached"], &left["dirty"], &left["writeback"]), (&0.into(), &0.into(), &0.into()));
    let reads = || site.cluster.json(&["fs", "show", "data"])["counters"]["reads"].as_u64().unwrap();
    let before = reads();
    check();
    assert_eq!(reads(), before + 1, "the page is fetched again, and no other one");
}

#[test]
fn a_file_is_read_ahead_where_its_user_asks_for_that() {
    let Some(site) = Site::start() else { return };
    let error = site.cluster.refused(&["fs", "attach", "data", "--read-ahead", "17MiB"]);
    assert!(error.contains("it can be 0B to 16MiB"), "{error}");
    // Programs open it before and after a takeover, which configures the mount anew.
    let path = site.attach("data", "32MiB", &["--transport", "nbd-tcp", "--read-ahead", "128KiB"]);
    (0..2048).for_each(|place| open(&path).write_all_at(&page(place, 1), place * PAGE as u64).unwrap());
    let reads = || site.cluster.json(&["fs", "show", "data"])["counters"]["reads"].as_u64().unwrap();
    let pass = || {
        let file = open(&path);
        forget_pages(&file);
        let before = reads();
        (0..2048).for_each(|place| assert_eq!(read_page(&file, place), page(place, 1)));
        reads() - before
    };
    let requests = pass();
    assert!(requests < 2048 / 8, "{requests} requests for 2048 pages");
    site.fs.replace_serving();
    let requests = pass();
    assert!(requests < 2048 / 8, "{requests} requests for 2048 pages");
}

/// Writers and readers that verify each page, through the cache and past it.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    const PAGES: u64 = 1024;

    fn start(path: &Path, threads: u64) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let run = |number: u64| {
            let (path, stop, done) = (path.to_owned(), Arc::clone(&stop), Arc::clone(&done));
            thread::spawn(move || load(&path, number, &stop, &done))
        };
        let threads = (0..threads).map(run).collect();
        Load { stop, done, threads }
    }

    fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        wait_until("the load goes on", || {
            let failed = self.threads.iter().any(JoinHandle::is_finished);
            failed || self.done.load(Ordering::Relaxed) > before + 500
        });
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let results: Vec<_> = self.threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
    }
}

/// One thread's part: its own run of pages. Every second thread has its pages leave the cache, so that what it reads
/// comes from external memory; half of the threads use a mapping.
fn load(path: &Path, number: u64, stop: &AtomicBool, done: &AtomicU64) -> Result<(), String> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| error.to_string())?;
    let first = number * Load::PAGES;
    let mut versions = vec![0; Load::PAGES as usize];
    let mut random = 0x2545_f491_4f6c_dd1d ^ number;
    let mapped = (number >= 2).then(|| Mapped::new(&file, ((first + Load::PAGES) * PAGE as u64) as usize));
    let at = |what: &str, place: u64, error: io::Error| format!("{what} page {place}: {error}");
    let check = |place: u64, version: u64| {
        let mut bytes = [0; PAGE];
        match &mapped {
            Some(mapped) => mapped.read(place as usize * PAGE, &mut bytes),
            None => {
                file.read_exact_at(&mut bytes, place * PAGE as u64)
                    .map_err(|error| at("read", place, error))?;
            }
        }
        let good = if version == 0 { [0; PAGE] } else { page(place, version) };
        if bytes == good { Ok(()) } else { Err(format!("page {place} is not of version {version}")) }
    };
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let index = random % Load::PAGES;
        let place = first + index;
        let version = &mut versions[index as usize];
        if random & (1 << 20) == 0 {
            *version += 1;
            if let Some(mapped) = &mapped {
                mapped.write(place as usize * PAGE, &page(place, *version));
                continue;
            }
            file.write_all_at(&page(place, *version), place * PAGE as u64)
                .map_err(|error| at("write", place, error))?;
        } else {
            check(place, *version)?;
        }
        if random.is_multiple_of(97) {
            rustix::fs::fdatasync(file.as_fd()).map_err(|error| at("flush", place, error.into()))?;
            if number.is_multiple_of(2) {
                let _ = rustix::fs::fadvise(&file, first * PAGE as u64, None, rustix::fs::Advice::DontNeed);
            }
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    forget_pages(&file);
    (0..).zip(&versions).try_for_each(|(index, version)| check(first + index, *version))
}

#[test]
fn a_file_outlives_its_server() {
    let Some(site) = Site::start() else { return };
    let path = site.attach("data", "64MiB", &["--transport", "nbd-tcp"]);
    let load = Load::start(&path, 4);
    load.goes_on();
    for _ in 0..2 {
        site.fs.replace_serving();
        load.goes_on();
        site.fs.wait_standby();
    }
    // An upgrade: a newer process takes over.
    let before = site.fs.serving();
    let config = site.cluster.dir().join("fs.toml").display().to_string();
    let next = Daemon::start(site.cluster.dir(), "fs", "xpm-fs", &["--config".to_owned(), config]);
    wait_until("the newer process serves", || site.fs.serving() == Some(next.pid().into()));
    assert_ne!(before, Some(next.pid().into()));
    load.goes_on();
    load.finish();
}

#[test]
fn a_file_without_any_server_fails_and_is_shown_anew() {
    let Some(mut site) = Site::start() else { return };
    let path = site.attach("data", "32MiB", &[]);
    let file = open(&path);
    file.write_all_at(&page(3, 1), 3 * PAGE as u64).unwrap();
    file.sync_all().unwrap();
    site.kill_all();
    let mut bytes = [0; PAGE];
    let error = file.read_at(&mut bytes, 9 * PAGE as u64).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    site.fs.daemon = site.cluster.fs("standby = false");
    wait_until("the file is shown anew", || {
        std::fs::metadata(&path).is_ok_and(|facts| facts.len() == 32 * MIB)
    });
    assert_eq!(read_page(&open(&path), 3), page(3, 1));
}

/// A shell with a mount namespace of its own has a copy of each mount, which keeps the kernel's connection.
#[test]
fn a_copy_of_the_mount_in_another_namespace_does_not_hold_a_detach_up() {
    let Some(site) = Site::start() else { return };
    let path = site.attach("data", "32MiB", &["--transport", "nbd-tcp"]);
    open(&path).write_all_at(&page(3, 1), 3 * PAGE as u64).unwrap();
    let idle = files::in_a_namespace("exec sleep infinity");
    let shown = path.display().to_string();
    let user = files::in_a_namespace(&format!("exec sleep infinity 3<{shown}"));
    let opened = format!("/proc/{}/fd/3", user.id());
    wait_until("the file is open", || std::fs::read_link(&opened).is_ok_and(|file| file == path));
    let refused = site.cluster.command(&["fs", "detach", "data"]).output().unwrap();
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(error.contains(&format!("opened by sleep (process {})", user.id())), "{error}");
    drop(user);
    let mut detaching = site.cluster.command(&["fs", "detach", "data"]).spawn().unwrap();
    wait_until("it is detached", || detaching.try_wait().unwrap().is_some_and(|status| status.success()));
    assert_eq!(site.cluster.ok(&["fs", "attach", "data", "--at", &shown]), shown);
    assert_eq!(read_page(&open(&path), 3), page(3, 1));
    drop(idle);
}

/// xpm-blk has a mount namespace of its own, made while the file is there.
#[test]
fn xpm_blk_keeps_no_copy_of_a_file() {
    let Some(mut site) = Site::start() else { return };
    let path = site.attach("data", "32MiB", &[]);
    site.cluster.restart_blk();
    let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", site.cluster.blk.pid())).unwrap();
    let shown = path.display().to_string();
    // A copy to which an unmount propagates does no harm.
    let kept = table.lines().find(|line| line.contains(&shown) && !line.contains(" master:"));
    assert_eq!(kept, None);
    site.cluster.ok(&["fs", "detach", "data"]);
}

#[test]
fn a_file_whose_lender_is_silent_can_be_aborted() {
    let Some(site) = Site::start() else { return };
    let path = site.attach("data", "32MiB", &["--transport", "nbd-tcp"]);
    site.cluster.appliances.iter().for_each(Daemon::freeze);
    let file = open(&path);
    let reader = thread::spawn(move || {
        let mut bytes = [0; PAGE];
        file.read_at(&mut bytes, 0).map_err(|error| error.raw_os_error())
    });
    wait_until("a read waits", || site.cluster.json(&["fs", "show", "data"])["in_flight"].as_u64() > Some(0));
    assert!(!reader.is_finished());
    site.cluster.ok(&["fs", "abort", "data"]);
    assert!(reader.join().unwrap().is_err(), "the read ends with an error");
    site.cluster.ok(&["fs", "detach", "data", "--force"]);
    site.cluster.appliances.iter().for_each(|appliance| appliance.signal(rustix::process::Signal::CONT));
    assert!(!path.exists());
}
