//! Files and trees under random operations, each compared with a model, also while their server is killed.
//!
//! A failure names the seed, the operation and a log; `fsx replay LOG PATH` does the operations again.
//! `XPM_FSX_SEED=N` chooses another seed.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use xpm_tests::files::{self, Files};
use xpm_tests::fsx::{Header, Run, Shape, read_log, replay};
use xpm_tests::{Cluster, rounds};

const MIB: usize = 1 << 20;
/// The largest length of a file, beyond the first region of an allocation.
const MAX: usize = 20 * MIB;

fn seed() -> u64 {
    let word = std::env::var("XPM_FSX_SEED").ok();
    word.map_or(1, |word| word.parse().expect("XPM_FSX_SEED is a number"))
}

/// A place that stays after a failure.
fn log(name: &str, seed: u64) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fsx-{name}-{seed}.log"))
}

struct Site {
    // Ended in this order.
    fs: Files,
    cluster: Cluster,
}

impl Site {
    fn start(settings: &str) -> Option<Site> {
        let (fs, cluster) = files::start(settings)?;
        Some(Site { fs, cluster })
    }

    fn attach(&self, transport: &str) -> PathBuf {
        let at = self.cluster.dir().join("files/data");
        self.cluster.ok(&["alloc", "create", "data", "--size", &format!("{}MiB", 2 * MAX / MIB)]);
        self.cluster.ok(&[
            "fs",
            "attach",
            "data",
            "--at",
            &at.display().to_string(),
            "--transport",
            transport,
        ]);
        at
    }

    fn root(&self) -> PathBuf {
        self.cluster.dir().join("far")
    }

    fn mount(&self) {
        self.cluster.ok(&["fs", "mount", &self.root().display().to_string()]);
    }

    fn unmount(&self) {
        self.cluster.ok(&["fs", "unmount", &self.root().display().to_string()]);
    }
}

fn steps(run: &mut Run, count: u64) {
    (0..count).for_each(|_| run.step().unwrap_or_else(|failure| panic!("{failure}")));
}

fn check(run: &mut Run) {
    run.check_all().unwrap_or_else(|failure| panic!("{failure}"));
}

fn file(header: Header, path: &Path, name: &str) -> Run {
    let header = Header { shape: Shape::File, max: 2 * MAX, ..header };
    Run::new(header, path, &log(name, header.seed)).unwrap()
}

fn tree(header: Header, path: &Path, name: &str) -> Run {
    std::fs::create_dir_all(path).unwrap();
    Run::new(header, path, &log(name, header.seed)).unwrap()
}

fn header(seed: u64) -> Header {
    Header { shape: Shape::Tree, seed, max: MAX }
}

#[test]
fn a_file_is_as_the_model_says() {
    let Some(site) = Site::start("standby = false") else { return };
    let path = site.attach("nbd-tcp");
    let mut run = file(header(seed()), &path, "file");
    steps(&mut run, rounds(1500, 50_000));
    check(&mut run);
}

#[test]
fn a_tree_is_as_the_model_says_also_after_it_was_mounted_anew() {
    let Some(site) = Site::start("standby = false") else { return };
    site.mount();
    let mut run = tree(header(seed()), &site.root(), "tree");
    for _ in 0..2 {
        steps(&mut run, rounds(300, 10_000));
        run.close_all();
        site.unmount();
        site.mount();
        check(&mut run);
    }
}

/// A part of a log that a person keeps is replayed on any file system, and a difference is printed.
#[test]
fn a_log_is_replayed_and_a_difference_is_told() {
    const LOG: &str = r#"{"shape":"tree","seed":7,"max":1048576}
{"write":{"slot":1,"at":0,"len":9,"fill":5}}
{"make_directory":{"path":"d"}}
{"create":{"slot":0,"path":"d/x"}}
{"write":{"slot":0,"at":5000,"len":9000,"fill":5}}
{"rename":{"from":"d/x","to":"y"}}
{"truncate":{"slot":0,"len":6000}}
{"read":{"slot":0,"at":4000,"len":9000}}
"#;
    let dir = tempfile::tempdir().unwrap();
    let [from, log, root] = ["from", "log", "root"].map(|name| dir.path().join(name));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(&from, LOG).unwrap();
    let (header, operations) = read_log(&from).unwrap();
    let mut run = replay(header, operations, &root, &log).unwrap();
    check(&mut run);
    assert_eq!(std::fs::metadata(root.join("y")).unwrap().len(), 6000);
    assert_eq!(std::fs::read_to_string(&log).unwrap(), LOG);
    // Another program writes to the file.
    std::fs::OpenOptions::new().write(true).open(root.join("y")).unwrap().write_at(&[1], 5900).unwrap();
    let failure = run.check_all().err().unwrap().to_string();
    assert!(failure.contains("1 bad bytes from 0x170c") && failure.contains("seed 7"), "{failure}");
    std::fs::write(&from, LOG.replace("\"slot\":1", "\"slot\":99")).unwrap();
    assert!(read_log(&from).err().unwrap().contains("line 2: a slot"));
}

/// A file and two trees at once, while the process that serves them is killed fifty times.
#[test]
#[ignore = "long: fifty kills"]
fn long_files_are_as_the_model_says_while_their_server_is_killed() {
    let Some(site) = Site::start("standby-reserve = \"1MiB\"\nhang-limit = \"4s\"") else { return };
    let data = site.attach("nbd-tcp");
    site.mount();
    let stop = AtomicBool::new(false);
    let go = |mut run: Run| {
        let mut longest = Duration::ZERO;
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            steps(&mut run, 1);
            longest = longest.max(begun.elapsed());
        }
        run.close_all();
        check(&mut run);
        println!("{} operations, the longest took {longest:?}", run.count());
    };
    std::thread::scope(|scope| {
        let (go, root, data) = (&go, site.root(), &data);
        let workers = [
            scope.spawn(move || go(file(header(seed() + 100), data, "killed-file"))),
            scope.spawn({
                let root = root.join("one");
                move || go(tree(header(seed() + 101), &root, "killed-one"))
            }),
            scope.spawn({
                let root = root.join("two");
                move || go(tree(header(seed() + 102), &root, "killed-two"))
            }),
        ];
        for kill in 1..=50 {
            if workers.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                println!("a worker has failed after {} kills", kill - 1);
                break;
            }
            site.fs.wait_standby();
            site.fs.replace_serving();
        }
        stop.store(true, Ordering::Relaxed);
    });
    site.unmount();
}
