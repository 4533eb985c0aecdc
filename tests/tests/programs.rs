//! `xpm run`: programs as they are, each with a workload whose result is checked. `XPM_TEST_ROUNDS=N` has each done N times.
//!
//! The external memory in the report of `-v` is compared with what the program asked for in large pieces that stay local; reserved addresses are not
//! memory.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use xpm_tests::{Cluster, have, have_by_chance, skip_without, wait_until};

const PYTHON: &str = "/usr/bin/python3";

/// The report of `xpm run -v`.
#[derive(Debug, Default)]
struct Account {
    /// Most of one process, in MiB.
    external: u64,
    /// Large pieces that stay local, in MiB.
    local: u64,
    said: String,
}

impl Account {
    fn of(said: &str) -> Account {
        let number = |text: &str| text.split(' ').next()?.parse::<u64>().ok();
        let external = said.split("up to ").skip(1).filter_map(number).max().unwrap_or(0);
        let stays = |part: &str| {
            let (bytes, why) = part.trim().split_once(" MiB were asked for that stay local: ")?;
            (!why.starts_with("reserved")).then(|| bytes.parse::<u64>().ok())?
        };
        let local = said.split([';', '\n']).filter_map(stays).sum();
        Account { external, local, said: said.to_owned() }
    }

    /// At least so many MiB were external, and at least half of all large pieces.
    fn at_least(&self, program: &str, external: u64) {
        eprintln!("{program}: {} MiB external, {} MiB in large pieces local", self.external, self.local);
        assert!(self.external >= external && self.external >= self.local, "{}", self.said);
    }
}

fn repeats() -> usize {
    std::env::var("XPM_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn command(cluster: &Cluster, program: &[&str]) -> Command {
    let words = ["run", "-v", "--size", "256MiB", "--local", "16MiB", "--"];
    cluster.command(&[&words[..], program].concat())
}

fn ok(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {out}{err}", output.status);
    out.into_owned()
}

/// Runs a program to its end; what it printed, and what was external.
fn run(cluster: &Cluster, program: &[&str]) -> (String, Account) {
    let output = command(cluster, program).output().expect("it can be started");
    (ok(&output), Account::of(&String::from_utf8_lossy(&output.stderr)))
}

/// A server under `xpm run`.
struct Server {
    run: Child,
    log: std::path::PathBuf,
}

impl Server {
    fn start(cluster: &Cluster, program: &[&str]) -> Server {
        let log = cluster.dir().join("server.log");
        let file = std::fs::File::create(&log).expect("a file");
        let mut command = command(cluster, program);
        command.stdout(file.try_clone().expect("a descriptor")).stderr(file);
        Server { run: command.spawn().expect("it can be started"), log }
    }

    /// Tells it to end, and waits for that.
    fn end(mut self) -> Account {
        let _ = Pid::from_raw(self.run.id() as i32).map(|run| kill_process(run, Signal::TERM));
        let status = self.run.wait().expect("it ends");
        let said = std::fs::read_to_string(&self.log).expect("a file");
        assert!(matches!(status.code(), Some(0 | 143)), "{status}: {said}");
        Account::of(&said)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Pid::from_raw(self.run.id() as i32).map(|run| kill_process(run, Signal::TERM));
    }
}

fn python(script: &str, arguments: &[&str]) -> String {
    ok(&Command::new(PYTHON).args(["-c", script]).args(arguments).output().expect("python3"))
}

/// Writes numbers that look random as a file of so many bytes.
fn random_file(path: &Path, len: usize) {
    let mut dice = xpm_tests::mapping::Dice(7);
    let bytes: Vec<u8> = (0..len).map(|_| dice.below(256) as u8).collect();
    std::fs::write(path, bytes).expect("a file");
}

fn sum_of(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    ok(&output).split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn memcached_with_locked_memory() {
    if !have("memcached") {
        return;
    }
    let cluster = Cluster::start(1);
    let socket = cluster.dir().join("memcached.sock").display().to_string();
    let server = Server::start(&cluster, &["memcached", "-k", "-u", "root", "-m", "128", "-s", &socket]);
    wait_until("memcached listens", || Path::new(&socket).exists());
    let script = "\
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); f = s.makefile('rb')
value = lambda i: (str(i).zfill(8) * 125).encode()
for i in range(40000):
    s.sendall(b'set k%d 0 0 1000 noreply\\r\\n%s\\r\\n' % (i, value(i)))
for i in range(40000):
    s.sendall(b'get k%d\\r\\n' % i)
    assert f.readline().startswith(b'VALUE'), i
    assert f.read(1002)[:1000] == value(i), i
    assert f.readline() == b'END\\r\\n'
";
    python(script, &[&socket]);
    server.end().at_least("memcached -k", 32);
}

#[test]
fn daemon_of_python() {
    let cluster = Cluster::start(1);
    let file = cluster.dir().join("result").display().to_string();
    let script = "\
import os, sys
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.closerange(0, 1024)
null = os.open('/dev/null', os.O_RDWR); os.dup2(null, 1); os.dup2(null, 2)
table = {i: i * i for i in range(400000)}
big = bytearray(48 << 20)
big[::4096] = b'x' * (len(big) // 4096)
right = big.count(b'x') == len(big) // 4096 and sum(table.values()) == sum(i * i for i in range(400000))
open(sys.argv[1], 'w').write(str(right))
";
    let (_, account) = run(&cluster, &[PYTHON, "-c", script, &file]);
    assert_eq!(std::fs::read_to_string(&file).expect("a file"), "True");
    account.at_least("a daemon of Python", 48);
}

#[test]
fn node() {
    if !have_by_chance("node") {
        return;
    }
    let cluster = Cluster::start(1);
    let script = "\
const crypto = require('crypto');
const make = k => { const b = Buffer.alloc(16 << 20); for (let i = 0; i < b.length; i += 8) b.writeDoubleLE(i * k, i); return b; };
const all = [1, 2, 3, 4].map(make);
let bad = 0;
all.forEach((b, k) => { for (let i = 0; i < b.length; i += 8) if (b.readDoubleLE(i) !== i * (k + 1)) bad++; });
const f = new Float64Array(2 << 20).map((_, i) => i); 
const sum = f.reduce((a, b) => a + b, 0);
console.log(bad, sum, crypto.createHash('sha256').update(all[3]).digest('hex') === crypto.createHash('sha256').update(make(4)).digest('hex'));
";
    let right = "0 2199022206976 true\n";
    for _ in 0..repeats() {
        let (said, account) = run(&cluster, &["node", "-e", script]);
        assert_eq!(said, right);
        account.at_least("node", 64);
    }
}

#[test]
fn java() {
    if !have_by_chance("java") || !have_by_chance("javac") {
        return;
    }
    let cluster = Cluster::start(1);
    let source = cluster.dir().join("Direct.java");
    let text = "\
import java.nio.ByteBuffer;
public class Direct {
    public static void main(String[] words) {
        ByteBuffer[] all = new ByteBuffer[4];
        for (int k = 0; k < 4; k++) {
            all[k] = ByteBuffer.allocateDirect(16 << 20);
            for (int i = 0; i < (16 << 20); i += 8) all[k].putLong(i, (long) i * (k + 3));
        }
        long bad = 0;
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < (16 << 20); i += 8) if (all[k].getLong(i) != (long) i * (k + 3)) bad++;
        System.out.println(\"bad: \" + bad);
    }
}
";
    std::fs::write(&source, text).expect("a file");
    let directory = cluster.dir().display().to_string();
    let mut javac = Command::new("javac");
    ok(&javac.args(["-d", &directory]).arg(&source).output().expect("javac"));
    let (said, account) =
        run(&cluster, &["java", "-Xmx16m", "-XX:MaxDirectMemorySize=100m", "-cp", &directory, "Direct"]);
    assert_eq!(said, "bad: 0\n");
    account.at_least("java (direct buffers)", 64);
}

#[test]
fn duckdb() {
    let known = Command::new(PYTHON).args(["-c", "import duckdb"]).output().expect("python3");
    if !known.status.success() {
        eprintln!("skipped: duckdb is not installed (pip install duckdb)");
        return;
    }
    let cluster = Cluster::start(1);
    let script = "\
import duckdb
db = duckdb.connect(config={'threads': 2, 'memory_limit': '300MB'})
db.execute('set enable_progress_bar = false')
db.execute('create table t as select i, (i * 7919) % 1000003 as k, md5(i::varchar) as m from range(1000000) r(i)')
print(db.execute('select count(*), sum(k), count(distinct k) from t').fetchone())
print(db.execute('select k, i from t order by k desc, i limit 1 offset 500000').fetchone())
";
    let right = python(script, &[]);
    for _ in 0..repeats() {
        let (said, account) = run(&cluster, &[PYTHON, "-c", script]);
        assert_eq!(said, right);
        account.at_least("duckdb", 32);
    }
}

#[test]
fn sqlite() {
    if !have("sqlite3") {
        return;
    }
    let cluster = Cluster::start(1);
    let file = |name: &str| cluster.dir().join(name).display().to_string();
    let script = "\
pragma cache_size=12000; create table t(i integer primary key, k integer, m text);
insert into t select value, (value * 7919) % 1000003, hex(value * 104729) from generate_series(1, 300000);
create index k on t(k); delete from t where i % 7 = 0; pragma integrity_check;
select count(*), sum(k), max(m) from t;";
    let plain = ok(&Command::new("sqlite3").args([&file("plain.db"), script]).output().expect("sqlite3"));
    // One piece for the cache of pages.
    let (said, account) =
        run(&cluster, &["sqlite3", "-pagecache", "4360", "12000", &file("external.db"), script]);
    assert_eq!(said, plain);
    assert!(said.starts_with("ok\n"), "{said}");
    account.at_least("sqlite3 -pagecache", 48);
}

#[test]
fn git() {
    if !have("git") {
        return;
    }
    let cluster = Cluster::start(1);
    let (repository, copy) = (cluster.dir().join("repository"), cluster.dir().join("copy"));
    let file = repository.join("big");
    let (one, other) = (repository.display().to_string(), copy.display().to_string());
    ok(&Command::new("git").args(["init", "-q", &one]).output().expect("git"));
    random_file(&file, 24 << 20);
    let git = |words: &[&str]| {
        let who = [
            "git",
            "-C",
            &one,
            "-c",
            "user.name=n",
            "-c",
            "user.email=e@e",
            "-c",
            "core.bigFileThreshold=1g",
        ];
        run(&cluster, &[&who[..], words].concat()).1
    };
    git(&["add", "."]);
    let account = git(&["commit", "-qm", "one"]);
    let repacked = git(&["repack", "-adfq"]);
    git(&["fsck", "--full"]);
    run(&cluster, &["git", "clone", "-q", "--no-local", &one, &other]);
    assert_eq!(sum_of(&copy.join("big")), sum_of(&file));
    let best = if account.external > repacked.external { account } else { repacked };
    best.at_least("git", 16);
}

#[test]
fn gcc() {
    if !have("gcc") {
        return;
    }
    let cluster = Cluster::start(1);
    let (source, program) = (cluster.dir().join("many.c"), cluster.dir().join("many").display().to_string());
    let functions = xpm_tests::rounds(1500, 4000);
    let mut text = String::from("#include <stdio.h>\n");
    for i in 0..functions {
        text += &format!(
            "static unsigned f{i}(unsigned x) {{ for (unsigned i = 0; i < x % 7; i++) x = x * {i}u + (x >> 3) + i; return x; }}\n"
        );
    }
    text += "int main(void) { unsigned x = 1;\n";
    (0..functions).for_each(|i| text += &format!("x = f{i}(x);\n"));
    text += "printf(\"%u\\n\", x); return 0; }\n";
    std::fs::write(&source, text).expect("a file");
    let source = source.display().to_string();
    let plain = format!("{program}-plain");
    ok(&Command::new("gcc").args(["-O1", "-o", &plain, &source]).output().expect("gcc"));
    let (_, account) = run(&cluster, &["gcc", "-O1", "-o", &program, &source]);
    let result = |program: &str| ok(&Command::new(program).output().expect("what was compiled"));
    assert_eq!(result(&program), result(&plain));
    account.at_least("gcc", 16);
}

#[test]
fn nginx() {
    if !have("nginx") {
        return;
    }
    let cluster = Cluster::start(1);
    let dir = cluster.dir().display().to_string();
    let (file, socket) = (cluster.dir().join("big"), format!("{dir}/nginx.sock"));
    random_file(&file, 24 << 20);
    let settings = format!(
        "user root; daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log;\n\
         events {{}} http {{ access_log off; sendfile off; output_buffers 2 8m; postpone_output 0; client_body_temp_path {dir}/body;\n\
         proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;\n\
         server {{ listen unix:{socket}; root {dir}; }} }}\n"
    );
    let path = format!("{dir}/nginx.conf");
    std::fs::write(&path, settings).expect("a file");
    let server = Server::start(&cluster, &["nginx", "-c", &path]);
    wait_until("nginx listens", || Path::new(&socket).exists());
    let script = "\
import http.client, socket, sys, hashlib
for _ in range(3):
    c = http.client.HTTPConnection('localhost'); c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(sys.argv[1])
    c.request('GET', '/big'); print(hashlib.sha256(c.getresponse().read()).hexdigest())
";
    let sums = python(script, &[&socket]);
    assert_eq!(sums, format!("{}\n", sum_of(&file)).repeat(3));
    server.end().at_least("nginx (output_buffers)", 8);
}

/// With more data than may be local, a child of redis-server that saves is told why it cannot; the server goes on.
#[test]
fn redis_with_bgsave() {
    let program = "/usr/bin/redis-check-rdb";
    if !have(program) {
        return;
    }
    let cluster = Cluster::start(1);
    let name = cluster.dir().join("redis-server");
    std::os::unix::fs::symlink(program, &name).expect("a link");
    let (name, dir) = (name.display().to_string(), cluster.dir().display().to_string());
    let socket = format!("{dir}/redis.sock");
    let words =
        [&name, "--port", "0", "--unixsocket", &socket, "--dir", &dir, "--save", "", "--appendonly", "no"];
    let server = Server::start(&cluster, &words);
    let ask = |words: &[&str]| {
        let output = Command::new("redis-cli").args(["-s", &socket]).args(words).output().expect("redis-cli");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    wait_until("redis answers", || ask(&["ping"]) == "PONG");
    ok(&Command::new("redis-benchmark")
        .args(["-s", &socket, "-t", "set", "-d", "1000", "-r", "60000", "-n", "80000", "-P", "16", "-q"])
        .output()
        .expect("redis-benchmark"));
    ask(&["set", "known", "value"]);
    ask(&["bgsave"]);
    wait_until("it is known that the child could not save", || {
        ask(&["info", "persistence"]).contains("rdb_last_bgsave_status:err")
    });
    assert_eq!(ask(&["get", "known"]), "value");
    let account = server.end();
    assert!(account.said.contains("touched external memory of its parent"), "{}", account.said);
    account.at_least("redis-server", 32);
}

/// Its shared buffers stay local; what its processes sort in is external, one process at a time.
#[test]
fn postgres() {
    let Some(bin) = std::fs::read_dir("/usr/lib/postgresql")
        .ok()
        .and_then(|mut all| Some(all.next()?.ok()?.path().join("bin")))
    else {
        return skip_without("postgresql");
    };
    let cluster = Cluster::start(1);
    let data = tempfile::tempdir().expect("a directory");
    let (dir, bin) = (data.path().display().to_string(), bin.display().to_string());
    ok(&Command::new("chown").args(["postgres", &dir]).output().expect("chown"));
    // It does not run as root; the capability has userfaultfd(2) serve system calls.
    let cap = "+sys_ptrace";
    let who = [
        "setpriv",
        "--reuid",
        "postgres",
        "--init-groups",
        "--regid",
        "postgres",
        "--inh-caps",
        cap,
        "--ambient-caps",
        cap,
    ];
    let plain = |words: &[&str]| {
        let words = [&who[..], words].concat();
        Command::new(words[0]).args(&words[1..]).current_dir("/").output().expect("setpriv")
    };
    let cluster_dir = format!("{dir}/data");
    ok(&plain(&[&format!("{bin}/initdb"), "-D", &cluster_dir, "-A", "trust", "--no-sync"]));
    let postgres = format!("{bin}/postgres");
    let words = [
        &postgres,
        "-D",
        &cluster_dir,
        "-k",
        &dir,
        "-c",
        "listen_addresses=",
        "-c",
        "fsync=off",
        "-c",
        "shared_buffers=16MB",
        "-c",
        "work_mem=200MB",
        "-c",
        "max_parallel_workers_per_gather=0",
        "-c",
        "jit=off",
    ];
    let server = Server::start(&cluster, &[&who[..], &words.map(|word: &str| word)].concat());
    let psql = |query: &str| plain(&["psql", "-h", &dir, "-At", "-c", query, "postgres"]);
    wait_until("PostgreSQL answers", || psql("select 1").status.success());
    let query = "select count(*), sum(k), max(r) from (select (i * 7919) % 1000003 as k, row_number() over (order by (i * 7919) % 1000003, md5(i::text)) as r from generate_series(1::bigint, 400000) i) t";
    let said = ok(&psql(query));
    let sum: u64 = (1..=400_000_u64).map(|i| i * 7919 % 1_000_003).sum();
    assert_eq!(said, format!("400000|{sum}|400000\n"));
    server.end().at_least("postgres (work_mem)", 16);
}

/// It asks for no large pieces: all is local, and that is said.
#[test]
fn openssh() {
    if !have("/usr/sbin/sshd") || !have("ssh") {
        return;
    }
    let cluster = Cluster::start(1);
    let dir = cluster.dir().display().to_string();
    let port = xpm_tests::free_port().to_string();
    for name in ["host", "user"] {
        ok(&Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", &format!("{dir}/{name}")])
            .output()
            .expect("ssh-keygen"));
    }
    std::fs::create_dir_all("/run/sshd").expect("a directory");
    random_file(&cluster.dir().join("big"), 16 << 20);
    let settings = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/user.pub\nStrictModes no\nPidFile {dir}/pid\nUsePAM no\n"
    );
    std::fs::write(format!("{dir}/sshd_config"), settings).expect("a file");
    let server =
        Server::start(&cluster, &["/usr/sbin/sshd", "-D", "-e", "-f", &format!("{dir}/sshd_config")]);
    let ssh = |command: &str| {
        let mut ssh = Command::new("ssh");
        ssh.args([
            "-p",
            &port,
            "-i",
            &format!("{dir}/user"),
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "BatchMode=yes",
        ]);
        ssh.args(["root@127.0.0.1", command]).stdin(Stdio::null()).output().expect("ssh")
    };
    wait_until("sshd answers", || ssh("true").status.success());
    let copy = cluster.dir().join("copy");
    let output = ssh(&format!("cat {dir}/big"));
    std::fs::write(&copy, &output.stdout).expect("a file");
    assert_eq!(sum_of(&copy), sum_of(&cluster.dir().join("big")));
    let account = server.end();
    assert!(account.external > 0 || account.said.contains("nothing was external"), "{}", account.said);
    eprintln!("openssh: {} MiB external", account.external);
}
