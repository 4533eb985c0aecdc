//! `xpm run`: programs that do what daemons and launchers do with descriptors, processes and memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use xpm_tests::{Cluster, wait_until};

const PYTHON: &str = "/usr/bin/python3";

/// Compiles a program of `c/`.
fn compiled(cluster: &Cluster, name: &str) -> PathBuf {
    let program = cluster.dir().join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("c/{name}.c"));
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o"]).arg(&program).arg(source);
    let output = cc.output().expect("a C compiler");
    assert!(output.status.success(), "{}", said(&output));
    program
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a program with so much external memory, of which so much is local, over TCP.
fn run(cluster: &Cluster, (size, local): (&str, &str), program: &[&str]) -> Output {
    // Python's own pieces stay local, of which its children have need.
    let mut words = vec![
        "run",
        "-v",
        "--size",
        size,
        "--local",
        local,
        "--transport",
        "nbd-tcp",
        "--threshold",
        "2MiB",
        "--",
    ];
    words.extend(program);
    cluster.command(&words).output().expect("it can be started")
}

/// The output of a program that succeeded with at least so many MiB external.
fn well(output: &Output, external: u64) -> String {
    let said = said(output);
    assert!(output.status.success(), "{} {said}", String::from_utf8_lossy(&output.stdout));
    assert!(accounts(&said).max() >= Some(external), "{said}");
    said
}

/// How many MiB each process had external.
fn accounts(said: &str) -> impl Iterator<Item = u64> + '_ {
    said.split("up to ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok())
}

#[test]
fn descriptors_that_the_program_closes_and_reuses() {
    let cluster = Cluster::start(1);
    let program = compiled(&cluster, "descriptors").display().to_string();
    let files = cluster.dir().join("files");
    std::fs::create_dir(&files).expect("a directory");
    let files = files.display().to_string();
    let plain = Command::new(&program).arg(&files).output().expect("it can be started");
    assert!(plain.status.success(), "{}", said(&plain));
    well(&run(&cluster, ("128MiB", "8MiB"), &[&program, &files]), 64);
}

#[test]
fn descriptors_that_python_closes() {
    let cluster = Cluster::start(1);
    let file = cluster.dir().join("file").display().to_string();
    let script = format!(
        "\
import os
big = bytearray(48 << 20)
for i in range(0, len(big), 4096):
    big[i] = i >> 12 & 255
os.closerange(3, 1024)
files = [os.open({file:?}, os.O_RDWR | os.O_CREAT) for _ in range(40)]
for round in range(2):
    assert all(big[i] == i >> 12 & 255 for i in range(0, len(big), 4096))
assert os.fstat(files[0]).st_size == 0
"
    );
    well(&run(&cluster, ("128MiB", "8MiB"), &[PYTHON, "-c", &script]), 48);
}

/// The memory goes to the process that wants it, one after the other, by whatever way these come about.
#[test]
fn processes_one_after_the_other() {
    let cluster = Cluster::start(1);
    let big = "big = bytearray(40 << 20); big[::4096] = b'x' * (len(big) // 4096); assert big.count(b'x') == len(big) // 4096";
    // A script whose helper programs use none, as launchers of pyenv and the like are; then two that do.
    let script = format!(
        "basename x >/dev/null; {PYTHON} -c pass; {PYTHON} -c \"{big}\" && exec {PYTHON} -c \"{big}\""
    );
    let said = well(&run(&cluster, ("192MiB", "8MiB"), &["bash", "-c", &script]), 40);
    assert_eq!(accounts(&said).filter(|most| *most >= 64).count(), 2, "{said}");
    // A daemon: its parent ends before it asks.
    let script = format!("import os, time\nif os.fork(): os._exit(0)\nos.setsid()\n{big}");
    well(&run(&cluster, ("192MiB", "8MiB"), &[PYTHON, "-c", &script]), 40);
    // A child whose parent has it does without.
    let script = format!(
        "import os\n{big}\npid = os.fork()\nif pid == 0:\n    {big}\n    os._exit(0)\nassert os.waitpid(pid, 0)[1] == 0"
    );
    well(&run(&cluster, ("192MiB", "8MiB"), &[PYTHON, "-c", &script]), 40);
}

/// Mappings of a child of fork(2) never lie where its parent's external memory is, and a child that
/// touches that is told of.
#[test]
fn children_know_what_is_theirs() {
    let cluster = Cluster::start(1);
    let script = "\
import ctypes, os, signal
libc = ctypes.PyDLL(None)
big = bytearray(40 << 20)
big[::4096] = b'x' * (len(big) // 4096)
for fork in os.fork, libc._Fork:
    pid = fork()
    if pid == 0:
        import mmap
        for i in range(64):
            own = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            own[0:5] = b'hello'
            own.madvise(mmap.MADV_DONTNEED)
            if own[0:5] != bytes(5): os._exit(3)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    pid = fork()
    if pid == 0: os._exit(big[4096])
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
assert big.count(b'x') == len(big) // 4096
";
    let said = well(&run(&cluster, ("192MiB", "8MiB"), &[PYTHON, "-c", script]), 40);
    assert!(said.contains("a child of fork(2) and touched external memory of its parent"), "{said}");
}

/// A child has a copy of memory that is no more than may be local, and its changes are its own.
#[test]
fn children_have_copies_of_little() {
    let cluster = Cluster::start(1);
    let script = "\
import mmap, os
big = bytearray(24 << 20)
big[::4096] = b'x' * (len(big) // 4096)
own = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
own[0:5] = b'hello'
for depth in range(2):
    pid = os.fork()
    if pid == 0:
        assert big.count(b'x') == len(big) // 4096 and own[0:5] == b'hello'
        big[0] = 1
        big.extend(b'y' * (40 << 20))
        assert big.count(b'y') == 40 << 20 and big.count(b'x') == (24 << 20) // 4096 - 1
        own.madvise(mmap.MADV_DONTNEED)
        assert own[0:5] == bytes(5)
        own.close()
        child = os.fork()
        if child == 0: os._exit(big.count(b'x') != (24 << 20) // 4096 - 1)
        assert os.waitpid(child, 0)[1] == 0
        del big
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
assert big.count(b'x') == len(big) // 4096 and own[0:5] == b'hello'
";
    well(&run(&cluster, ("192MiB", "48MiB"), &[PYTHON, "-c", script]), 36);
}

#[test]
fn all_memory_is_locked() {
    let cluster = Cluster::start(1);
    let program = compiled(&cluster, "locked").display().to_string();
    for arguments in [&[program.as_str()][..], &[program.as_str(), "raw"]] {
        let said = well(&run(&cluster, ("192MiB", "8MiB"), arguments), 96);
        assert!(said.contains("external memory is not locked"), "{said}");
    }
}

#[test]
fn more_is_pinned_than_may_be_local() {
    let cluster = Cluster::start(1);
    let program = compiled(&cluster, "pinned").display().to_string();
    let output = run(&cluster, ("192MiB", "16MiB"), &[&program]);
    let said = well(&output, 32);
    if output.stdout != b"no io_uring\n" {
        assert_eq!(said.matches("more is used until it unpins some").count(), 1, "{said}");
    }
}

/// The cause of a SIGBUS is said before it.
#[test]
fn lost_memory_is_told() {
    let mut cluster = Cluster::start(1);
    let script = "\
import sys
big = bytearray(48 << 20)
big[::4096] = b'x' * (len(big) // 4096)
print('filled', flush=True)
sys.stdin.readline()
print(big.count(b'x'))
";
    let words =
        ["run", "--size", "192MiB", "--local", "8MiB", "--transport", "nbd-tcp", "--", PYTHON, "-c", script];
    let log = cluster.dir().join("said");
    let file = std::fs::File::create(&log).expect("a file");
    let mut command = cluster.command(&words);
    let mut program =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file).spawn().expect("it can be started");
    let mut output = std::io::BufReader::new(program.stdout.take().expect("its output"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).expect("a line");
    assert_eq!(line, "filled\n");
    // Its memory is lost.
    cluster.restart_appliance(0);
    drop(program.stdin.take());
    let status = program.wait().expect("it ends");
    let said = std::fs::read_to_string(&log).expect("a file");
    assert_eq!(status.code(), Some(128 + 7), "{said}");
    let told = said.lines().find(|line| line.contains("SIGBUS for accesses to 0x")).unwrap_or_default();
    assert!(
        told.contains("allocation `run-") && told.contains("the memory is gone from the appliance"),
        "{said}"
    );
    wait_until("nothing is left", || cluster.json(&["alloc", "list"]) == serde_json::json!([]));
}
