//! A budget of local memory that is a share of what is free: on a machine and in a cgroup that say what a test
//! writes, and in a real cgroup where one can be made.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use xpm_mapping::{Attachment, Budget, Faults, Space, SpaceOptions};
use xpm_tests::mapping::{Dice, MIB, attach_options, own_process, words};
use xpm_tests::{Cluster, wait_until};

/// The memory that the program below has at addresses.
const LEN: u64 = 64 * MIB;
/// The lower limit of a share.
const LEAST: u64 = 16 * MIB;

#[test]
fn a_share_follows_what_is_free_and_gives_way_under_pressure() {
    let cluster = Cluster::start(1);
    let Some(stage) = Stage::set_up(&cluster) else { return };
    stage.free(64);
    let mut program = Program::start(&cluster, &stage.enter());
    let (first, _) = program.budget();
    assert!((32 * MIB..=48 * MIB).contains(&first), "half of 64 MiB, and of what it has: {first}");
    program.falls_to_least(|| stage.free(0));
    program.grows(|| stage.free(4096));
    program.falls_to_least(|| stage.presses("proc-pressure", 50));
    program.grows(|| stage.presses("proc-pressure", 5));
    // A cgroup with a limit that is reached, but for what it caches.
    stage.write("group/memory.current", &format!("{}\n", 256 * MIB));
    stage.write("group/memory.stat", &format!("anon 1\ninactive_file {}\n", 128 * MIB));
    program.grows(|| stage.write("group/memory.max", &format!("{}\n", 256 * MIB)));
    program.falls_to_least(|| stage.write("group/memory.stat", "anon 1\ninactive_file 0\n"));
    program.grows(|| stage.write("group/memory.max", "max\n"));
    // Nor does it matter then how long its programs wait.
    program.grows(|| stage.presses("group/memory.pressure", 50));
    program.falls_to_least(|| stage.write("group/memory.max", &format!("{}\n", 4096 * MIB)));
    program.ends_well();
}

/// Other memory reduces the share, long before it would be too much for the cgroup.
#[test]
fn in_a_cgroup_it_makes_room_for_what_is_beside_it() {
    const LIMIT: u64 = 192;
    let Some(group) = Cgroup::make(LIMIT * MIB) else { return };
    let cluster = Cluster::start(1);
    let enter = ["sh", "-c", "echo $$ > \"$0\" && exec \"$@\""].map(str::to_owned);
    let mut program = Program::start(
        &cluster,
        &[&enter[..], &[group.0.join("cgroup.procs").display().to_string()]].concat(),
    );
    let (first, _) = program.budget();
    assert!((40 * MIB..=LIMIT / 2 * MIB).contains(&first), "half of {LIMIT} MiB but for its own: {first}");
    for _ in 0..12 {
        program.ask("take 8", "taken");
        // One look at what is free, and the next.
        std::thread::sleep(std::time::Duration::from_millis(600));
    }
    wait_until("of the other 96 MiB it has no more than half, as much as it leaves", || {
        let (budget, resident) = program.budget();
        assert!(budget >= LEAST, "{budget}");
        budget <= LIMIT / 4 * MIB && resident <= budget
    });
    program.ends_well();
}

#[test]
fn a_share_for_a_program_that_knows_nothing_of_it() {
    let cluster = Cluster::start(1);
    let Some(stage) = Stage::set_up(&cluster) else { return };
    stage.free(32);
    let script = "\
big = bytearray(96 << 20)
for i in range(0, len(big), 4096):
    big[i] = i >> 12 & 255
assert all(big[i] == i >> 12 & 255 for i in range(0, len(big), 4096))
";
    let run = cluster.command(&["run", "-v", "--size", "128MiB", "--local", "50%", "--"]);
    let words = stage.enter();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).arg(run.get_program()).args(run.get_args());
    command.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = command.args(["/usr/bin/python3", "-c", script]).output().expect("it can be started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let budget = said.split("of them local at the end, of ").nth(1).and_then(|rest| rest.split(' ').next());
    let budget: u64 = budget.and_then(|mib| mib.parse().ok()).unwrap_or_else(|| panic!("{said}"));
    assert!((16..=32).contains(&budget), "half of 32 MiB, and of what it has: {said}");
}

/// A machine, and a cgroup of all programs, that say what is written to files.
struct Stage(PathBuf);

impl Stage {
    /// None, and says why, where nothing can be mounted.
    fn set_up(cluster: &Cluster) -> Option<Stage> {
        let stage = Stage(cluster.dir().join("stage"));
        fs::create_dir_all(stage.0.join("group")).expect("a directory");
        stage.free(0);
        stage.presses("proc-pressure", 0);
        stage.presses("group/memory.pressure", 0);
        for (name, text) in [("max", "max\n"), ("current", "0\n"), ("stat", "anon 1\n")] {
            stage.write(&format!("group/memory.{name}"), text);
        }
        let words = stage.enter();
        let tried = Command::new(&words[0]).args(&words[1..]).arg("true").output();
        match tried {
            Ok(output) if output.status.success() => Some(stage),
            tried => {
                eprintln!("skipped: nothing can be mounted over /proc/meminfo: {tried:?}");
                None
            }
        }
    }

    /// The words before the command line of a program that sees the limit.
    fn enter(&self) -> Vec<String> {
        let mut script = String::new();
        for (from, to) in [
            ("meminfo", "/proc/meminfo"),
            ("proc-pressure", "/proc/pressure/memory"),
            ("group", "/sys/fs/cgroup"),
        ] {
            let _ = write!(script, "mount --bind '{}' {to} && ", self.0.join(from).display());
        }
        script.push_str("exec \"$0\" \"$@\"");
        ["unshare", "--mount", "sh", "-c", &script].map(str::to_owned).to_vec()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).expect("it can be written");
    }

    fn free(&self, mib: u64) {
        self.write("meminfo", &format!("MemTotal: 16777216 kB\nMemAvailable: {} kB\n", mib << 10));
    }

    fn presses(&self, name: &str, percent: u32) {
        self.write(name, &format!("some avg10={percent}.00 avg60=0.00 avg300=0.00 total=1\n"));
    }
}

/// A cgroup with a limit of memory, and without swap.
struct Cgroup(PathBuf);

impl Cgroup {
    /// None, and says why, where it cannot be made.
    fn make(limit: u64) -> Option<Cgroup> {
        let root = Path::new("/sys/fs/cgroup");
        let made = || {
            let group = Cgroup(root.join(format!("xpm-test-{}", std::process::id())));
            let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
            if !controllers.split_whitespace().any(|one| one == "memory") {
                return Err(std::io::Error::other("without the controller of memory"));
            }
            fs::write(root.join("cgroup.subtree_control"), "+memory")?;
            fs::create_dir(&group.0)?;
            fs::write(group.0.join("memory.max"), limit.to_string())?;
            // Not there where the kernel has no swap.
            let _ = fs::write(group.0.join("memory.swap.max"), "0");
            Ok(group)
        };
        made().inspect_err(|error| eprintln!("skipped: no cgroup v2 at {}: {error}", root.display())).ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// [`keeps_what_it_has`] in a process of its own.
struct Program {
    child: Child,
    questions: ChildStdin,
    answers: Box<dyn Iterator<Item = String>>,
}

impl Program {
    /// `enter` goes before its words.
    fn start(cluster: &Cluster, enter: &[String]) -> Program {
        cluster.ok(&["alloc", "create", "v", "--size", "128MiB"]);
        let (mut child, answers) = own_process(cluster, "keeps_what_it_has", enter, &[]);
        let questions = child.stdin.take().expect("its input");
        let mut program = Program { child, questions, answers: Box::new(answers) };
        program.answer("ready");
        program
    }

    fn ask(&mut self, question: &str, word: &str) -> String {
        writeln!(self.questions, "{question}").expect("it listens");
        self.answer(word)
    }

    /// The text after a word.
    fn answer(&mut self, word: &str) -> String {
        let found = self.answers.find_map(|line| Some(line.strip_prefix(word)?.trim().to_owned()));
        found.unwrap_or_else(|| panic!("it ended before it said `{word}`"))
    }

    /// The budget, and what is local, in bytes.
    fn budget(&mut self) -> (u64, u64) {
        let answer = self.ask("budget", "budget");
        let mut numbers = answer.split(' ').map(|number| number.parse().expect("a number"));
        (numbers.next().expect("the budget"), numbers.next().expect("what is local"))
    }

    fn falls_to_least(&mut self, change: impl FnOnce()) {
        let (before, _) = self.budget();
        assert!(before > LEAST, "{before}");
        change();
        wait_until("the budget falls to the least, and the rest leaves", || {
            let (budget, resident) = self.budget();
            assert!(budget >= LEAST, "{budget}");
            budget == LEAST && resident <= LEAST
        });
    }

    fn grows(&mut self, change: impl FnOnce()) {
        change();
        let (before, _) = self.budget();
        wait_until("the budget grows", || self.budget().0 > before + 2 * MIB);
    }

    /// Everything is as it was written.
    fn ends_well(mut self) {
        self.ask("end", "right");
        assert!(self.child.wait().expect("it ends").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test by itself: has more at addresses than is local, looks at all of it all the while, and answers questions.
#[test]
#[ignore = "is run by other tests, in a process of its own"]
fn keeps_what_it_has() {
    let url = std::env::var("XPM_TEST_ALLOCATOR").expect("the allocator");
    let (_attachment, volume) = Attachment::attach(&attach_options(&url, "v")).expect("it can be attached");
    let options = SpaceOptions { budget: Budget::percent(50), faults: Faults::Handled(1), kept: 0 };
    let space = Space::open(volume, &options).expect("a space");
    let slab = space.carve(LEN).expect("a slab");
    let words = words(&slab);
    let content = |word: usize| (word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let check = |word: usize| {
        assert_eq!(words[word].load(Ordering::Relaxed), content(word), "word {word}");
    };
    words.iter().enumerate().for_each(|(word, at)| at.store(content(word), Ordering::Relaxed));
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut dice = Dice(1);
            while !ends.load(Ordering::Relaxed) {
                let word = dice.below(words.len());
                check(word);
                words[word].store(content(word), Ordering::Relaxed);
            }
        });
        println!("\nready");
        let mut beside = Vec::new();
        for question in std::io::stdin().lines().map_while(Result::ok) {
            assert!(!reader.is_finished(), "what it read was not what it wrote");
            match question.split_once(' ') {
                None if question == "budget" => {
                    let stats = space.stats();
                    println!("budget {} {}", stats.budget, stats.resident);
                }
                Some(("take", mib)) => {
                    let len = mib.parse::<usize>().expect("a number") * MIB as usize;
                    beside.push(vec![1_u8; len]);
                    println!("taken");
                }
                _ => break,
            }
        }
        ends.store(true, Ordering::Relaxed);
    });
    (0..words.len()).for_each(check);
    println!("right");
}
