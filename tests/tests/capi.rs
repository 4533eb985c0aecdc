//! The C library, by programs in C that are compiled here, against real daemons.

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
