//! `xpm run`: programs that know nothing of external memory, with less local memory than they use.

use std::path::Path;
use std::process::{Command, Output};

use xpm_tests::{Cluster, skip_without};

/// The report of `xpm run -v` about a program.
#[derive(Debug, Default)]
struct Account {
    /// How much of its memory was external at most, in MiB.
    external: u64,
    /// Pages that came back from external memory.
    fetched: u64,
}

impl Account {
    /// As far as it is told.
    fn of(said: &str) -> Account {
        let external = said.split("up to ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        let fetched =
            said.split(" pages fetched").next().and_then(|before| before.rsplit(' ').next()?.parse().ok());
        Account { external: external.unwrap_or(0), fetched: fetched.unwrap_or(0) }
    }
}

/// Runs a program with 16 MiB of local memory; what it said, and what was said of it.
fn run(cluster: &Cluster, size: &str, program: &[&str]) -> (Output, Account) {
    run_with(cluster, (size, "16MiB"), program)
}

/// The same with so much external memory, and so much of it local.
fn run_with(cluster: &Cluster, (size, local): (&str, &str), program: &[&str]) -> (Output, Account) {
    let mut words = vec!["run", "-v", "--size", size, "--local", local, "--"];
    words.extend(program);
    let output = cluster.command(&words).output().expect("it can be started");
    let account = Account::of(&String::from_utf8_lossy(&output.stderr));
    (output, account)
}

fn ok(output: &Output) {
    let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said:?}");
}

/// Nothing is left of what was run: its memory is given back when it ends, and its record goes when that is written
/// down.
fn nothing_left(cluster: &Cluster) {
    let list = || cluster.json(&["alloc", "list"]);
    let given_back = |one: &serde_json::Value| one["state"] == "deleting";
    assert!(list().as_array().is_some_and(|all| all.iter().all(given_back)), "{}", list());
    xpm_tests::wait_until("nothing is left", || list() == serde_json::json!([]));
}

#[test]
fn whatever_a_program_does_with_its_memory() {
    let cluster = Cluster::start(1);
    let program = cluster.dir().join("pieces");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c/pieces.c");
    let mut cc = Command::new("cc");
    // Pairs of calls whose results are not looked at must not be left out.
    cc.args(["-Wall", "-Wextra", "-Werror", "-O1", "-fno-builtin", "-pthread", "-o"])
        .arg(&program)
        .arg(source);
    ok(&cc.output().expect("a C compiler"));
    ok(&Command::new(&program).output().expect("it runs by itself"));
    let (output, account) = run(&cluster, "128MiB", &[&program.display().to_string(), "external"]);
    ok(&output);
    assert_eq!(output.stdout, b"all is as it should be\n");
    assert!(account.external >= 32, "{account:?}");
    nothing_left(&cluster);
}

#[test]
fn sort_of_a_file_that_is_larger_than_its_local_memory() {
    const LOCAL: u64 = 4 << 20;
    let cluster = Cluster::start(1);
    let (file, sorted) = (cluster.dir().join("numbers"), cluster.dir().join("sorted"));
    let mut state = 1_u32;
    let mut numbers: Vec<u32> = (0..500_000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        })
        .collect();
    let lines = |numbers: &[u32]| numbers.iter().map(|number| format!("{number}\n")).collect::<String>();
    let content = lines(&numbers);
    assert!(content.len() as u64 > LOCAL);
    std::fs::write(&file, &content).expect("a file");
    let (from, to) = (file.display().to_string(), sorted.display().to_string());
    // All of it at once: no part is merged from files.
    let (size, local) = ("64MiB", LOCAL.to_string());
    let program = ["sort", "-n", "-S", "30M", "--parallel=2", &from, "-o", &to];
    let (output, account) = run_with(&cluster, (size, &local), &program);
    ok(&output);
    numbers.sort_unstable();
    assert!(std::fs::read_to_string(&sorted).expect("a file") == lines(&numbers));
    // The pages that were read first had been evicted when they were sorted.
    assert!(account.external >= 16 && account.fetched > LOCAL / 4096, "{account:?}");
    nothing_left(&cluster);
}

#[test]
fn python() {
    let cluster = Cluster::start(1);
    let script = "\
import subprocess
lists = [list(range(i, i + 200000)) for i in range(4)]
big = bytearray(40 << 20)
for i in range(0, len(big), 4096):
    big[i] = i >> 12 & 255
assert all(big[i] == i >> 12 & 255 for i in range(0, len(big), 4096))
assert sum(map(sum, lists)) == sum(sum(range(i, i + 200000)) for i in range(4))
assert subprocess.run(['true']).returncode == 0
";
    let (output, account) = run(&cluster, "256MiB", &["/usr/bin/python3", "-c", script]);
    ok(&output);
    assert!(account.external >= 64, "{account:?}");
    nothing_left(&cluster);
}

#[test]
fn arrays_of_numpy() {
    let python = |script| Command::new("/usr/bin/python3").args(["-c", script]).output().expect("python3");
    let known = "import importlib.util, sys; sys.exit(importlib.util.find_spec('numpy') is None)";
    if !python(known).status.success() {
        return skip_without("numpy");
    }
    let cluster = Cluster::start(1);
    // External memory is recognised by the flag of memory that is registered with userfaultfd; see proc_pid_smaps(5).
    let script = "\
import numpy
def is_external(array):
    at, inside = array.ctypes.data, False
    for line in open('/proc/self/smaps'):
        words = line.split()
        if not words[0].endswith(':'):
            start, end = (int(edge, 16) for edge in words[0].split('-'))
            inside = start <= at < end
        elif inside and words[0] == 'VmFlags:':
            return 'um' in words
a = numpy.arange(1500000, dtype=numpy.float64)
b = numpy.sqrt(a * a)
assert (a == b).all()
c = numpy.random.default_rng(1).permutation(a)
c.sort()
assert (c == b).all()
assert is_external(a) and is_external(b) and is_external(c)
assert not is_external(numpy.arange(10))
";
    let (output, account) = run(&cluster, "256MiB", &["/usr/bin/python3", "-c", script]);
    ok(&output);
    // Two of the three do not fit into local memory.
    assert!(account.external >= 36 && account.fetched > 0, "{account:?}");
    nothing_left(&cluster);
}

#[test]
fn what_ends_it_and_what_is_wrong() {
    let cluster = Cluster::start(1);
    let (output, _) = run(&cluster, "32MiB", &["sh", "-c", "exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    let (output, _) = run(&cluster, "32MiB", &["sh", "-c", "kill -9 $$"]);
    assert_eq!(output.status.code(), Some(128 + 9));
    let (output, _) = run(&cluster, "32MiB", &["no-such-program"]);
    assert_eq!(output.status.code(), Some(127));
    nothing_left(&cluster);
    for program in [&["/sbin/ldconfig", "--version"][..], &["env", "-u", "LD_PRELOAD", "true"], &["true"]] {
        let (output, _) = run(&cluster, "32MiB", program);
        ok(&output);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("nothing was external"), "{said}");
    }
    let said = cluster.refused(&["run", "--size", "32MiB", "--local", "32MiB", "--", "true"]);
    assert!(said.contains("nothing would be external"), "{said}");
    let said = cluster.refused(&["run", "--size", "32MiB", "--local", "1KiB", "--", "true"]);
    assert!(said.contains("too small"), "{said}");
    for (local, why) in [
        ("0%", "choose 1% to 100%"),
        ("101%", "0% to 100%"),
        ("x%", "a whole percentage like 25%"),
        ("lots", "not a size"),
    ] {
        let said = cluster.refused(&["run", "--size", "32MiB", "--local", local, "--", "true"]);
        assert!(said.contains(local) && said.contains(why), "{said}");
    }
    let said = cluster.refused(&["run", "--size", "32TiB", "--local", "1MiB", "--", "true"]);
    assert!(said.contains("no external memory"), "{said}");
    nothing_left(&cluster);
}

#[test]
fn redis() {
    // The server by its other name, under which it comes without a service of the system.
    let program = "/usr/bin/redis-check-rdb";
    assert!(Path::new(program).exists(), "redis-tools is not installed: run `cargo xtask setup`");
    let cluster = Cluster::start(1);
    let server = cluster.dir().join("redis-server");
    std::os::unix::fs::symlink(program, &server).expect("a link");
    let server = server.display().to_string();
    let socket = cluster.dir().join("redis.sock").display().to_string();
    let words = ["run", "-v", "--size", "256MiB", "--local", "16MiB", "--"];
    let words_of_server =
        [server.as_str(), "--port", "0", "--unixsocket", &socket, "--save", "", "--appendonly", "no"];
    let mut command = cluster.command(&[&words[..], &words_of_server[..]].concat());
    let log = std::fs::File::create(cluster.dir().join("redis.log")).expect("a file");
    command.stderr(log.try_clone().expect("a descriptor")).stdout(log);
    let mut redis = command.spawn().expect("it can be started");
    let ask = |words: &[&str]| {
        let output = Command::new("redis-cli").args(["-s", &socket]).args(words).output().expect("redis-cli");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    xpm_tests::wait_until("redis answers", || ask(&["ping"]) == "PONG");
    let load =
        ["-s", &socket, "-t", "set,get", "-d", "1000", "-r", "60000", "-n", "120000", "-P", "16", "-q"];
    ok(&Command::new("redis-benchmark").args(load).output().expect("redis-benchmark"));
    ask(&["set", "known", "value"]);
    assert_eq!(ask(&["get", "known"]), "value");
    let keys: u64 = ask(&["dbsize"]).parse().expect("a number");
    assert!(keys > 40_000, "{keys}");
    ask(&["shutdown", "nosave"]);
    assert!(redis.wait().expect("it ends").success());
    let said = std::fs::read_to_string(cluster.dir().join("redis.log")).expect("a file");
    let account = Account::of(&said);
    assert!(account.external >= 32 && account.fetched > 0, "{said}");
    nothing_left(&cluster);
}
