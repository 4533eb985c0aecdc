//! The samples of docs/mapping.md are the examples, and compile and run as they stand.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use xpm_tests::{Cluster, programs};

const SUM: &str = "the sum is 2199022206976\n";

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// The sample of a language, as the document has it.
fn sample(language: &str) -> String {
    let text = std::fs::read_to_string(source("docs/mapping.md")).expect("the document");
    let (_, rest) = text.split_once(&format!("```{language}\n")).expect("a sample");
    rest.split_once("```\n").expect("its end").0.to_owned()
}

fn is_example(language: &str, file: &str) {
    let text = std::fs::read_to_string(source(file)).expect("the example");
    assert!(sample(language) == text, "the sample of {language} in docs/mapping.md is not {file}");
}

fn cluster() -> Cluster {
    let cluster = Cluster::start(1);
    cluster.ok(&["alloc", "create", "v", "--size", "64MiB"]);
    cluster
}

fn well(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), SUM, "{said}");
}

#[test]
fn rust() {
    is_example("rust", "mapping/examples/external.rs");
    let cluster = cluster();
    let mut command = Command::new(programs().join("examples/external"));
    command.arg("v").env("XPM_ALLOCATOR", cluster.allocator_url());
    well(&command.output().expect("the example is built with the workspace"));
}

#[test]
fn c() {
    is_example("c", "libxpm/examples/external.c");
    let cluster = cluster();
    let program = cluster.dir().join("external");
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&program);
    cc.arg(source("libxpm/examples/external.c")).arg("-I").arg(source("libxpm/include"));
    cc.arg("-L").arg(programs()).arg("-lxpm").arg(format!("-Wl,-rpath,{}", library(&cluster).display()));
    let output = cc.output().expect("a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut command = Command::new(program);
    well(
        &command.arg("v").env("XPM_ALLOCATOR", cluster.allocator_url()).output().expect("it can be started"),
    );
}

#[test]
fn python() {
    is_example("python", "libxpm/examples/external.py");
    let cluster = cluster();
    let mut command = Command::new("/usr/bin/python3");
    command.arg(source("libxpm/examples/external.py")).arg("v");
    command.env("XPM_ALLOCATOR", cluster.allocator_url()).env("LD_LIBRARY_PATH", library(&cluster));
    well(&command.output().expect("python3"));
    // A token of the environment is read, also where nothing asks for one.
    let file = cluster.dir().join("token");
    std::fs::write(&file, "short").expect("a file");
    let output = command.env("XPM_TOKEN_FILE", &file).output().expect("python3");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("token"), "{said}");
}

/// A directory in which the library has the name that it is installed by.
fn library(cluster: &Cluster) -> PathBuf {
    let dir = cluster.dir().to_owned();
    let _ = std::os::unix::fs::symlink(programs().join("libxpm.so"), dir.join("libxpm.so.0"));
    dir
}
