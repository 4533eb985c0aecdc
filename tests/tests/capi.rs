//! The C library, by programs in C that are compiled here, against real daemons.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use xpm_tests::{Cluster, programs};

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// Compiles a program against the header and the library of this build.
fn compile(dir: &Path, name: &str, file: &Path) -> PathBuf {
    let program = dir.join(name);
    let library = programs();
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-o"]).arg(&program).arg(file);
    cc.arg("-I").arg(source("libxpm/include")).arg("-L").arg(&library).arg("-lxpm");
    // The library's own name has the number of its ABI, as it is installed.
    let _ = std::os::unix::fs::symlink(library.join("libxpm.so"), dir.join("libxpm.so.0"));
    cc.arg(format!("-Wl,-rpath,{}", dir.display()));
    let output = cc.output().expect("a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

fn run(cluster: &Cluster, program: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).env("XPM_ALLOCATOR", cluster.allocator_url());
    command.output().expect("it can be started")
}

#[test]
fn the_example_sorts_more_than_its_local_memory() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "numbers", "--size", "64MiB"]);
    let program = compile(cluster.dir(), "sort", &source("libxpm/examples/sort.c"));
    let output = run(&cluster, &program, &["numbers", "16"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(words[0], "2097152");
    let pages: Vec<u64> = words.iter().filter_map(|word| word.parse().ok()).collect();
    assert!(pages[1] > 3000 && pages[2] > 3000, "three quarters were elsewhere: {said}");
    // It gave the allocation back.
    assert!(cluster.json(&["alloc", "show", "numbers"])["owner"].is_null());
    let output = run(&cluster, &program, &["letters", "16"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("letters"), "{said}");
}

/// A listener in the place of an allocator: the headers of the first request.
fn headers_of_one_request(listener: &TcpListener) -> String {
    let (stream, _) = listener.accept().expect("the library connects");
    let mut headers = String::new();
    for line in BufReader::new(&stream).lines() {
        let line = line.expect("headers");
        if line.is_empty() {
            break;
        }
        headers.push_str(&line);
        headers.push('\n');
    }
    headers
}

#[test]
fn allocator_and_token_are_found_by_files_and_environment() {
    let dir = tempfile::tempdir().expect("a directory");
    let program = compile(dir.path(), "sort", &source("libxpm/examples/sort.c"));
    let token = dir.path().join("token");
    std::fs::write(&token, "0123456789abcdef-of-the-file\n").expect("a token");
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).expect("a mode");
    let ask = |config: &str, token: Option<&Path>| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let file = dir.path().join("xpm.toml");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        std::fs::write(&file, config.replace("URL", &url)).expect("a file");
        let mut command = Command::new(&program);
        command.args(["numbers", "16"]).env("XPM_CONFIG", &file).env_remove("XPM_ALLOCATOR");
        match token {
            Some(token) => command.env("XPM_TOKEN_FILE", token),
            None => command.env_remove("XPM_TOKEN_FILE"),
        };
        let heard = std::thread::spawn(move || headers_of_one_request(&listener));
        command.output().expect("it can be started");
        heard.join().expect("a request").to_ascii_lowercase()
    };
    let shown = "authorization: bearer 0123456789abcdef-of-the-file";
    let of_file = ask("allocator = 'URL'\ntoken-file = 'token'\n", None);
    assert!(of_file.contains(shown), "{of_file}");
    let of_environment = ask("allocator = 'URL'\n", Some(&token));
    assert!(of_environment.contains(shown), "{of_environment}");
}

#[test]
fn all_of_the_c_library() {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    let program = compile(cluster.dir(), "all", &source("tests/c/all.c"));
    let output = run(&cluster, &program, &["v"]);
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
