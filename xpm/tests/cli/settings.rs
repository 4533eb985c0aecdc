//! Where the command finds allocator and token, and how it waits for an allocator.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::Duration;

use crate::support::{Host, Run, Script};
use serde_json::json;

fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn the_user_s_file_names_allocator_token_and_form() {
    let script = Script::new().on("GET /v1/allocations", 200, &json!([]));
    let host = Host::with_allocator(&script);
    let directory = host.directory.path().join("xpm");
    fs::create_dir(&directory).unwrap();
    private(&directory.join("token"), "0123456789abcdef-of-the-user\n");
    let file = directory.join("xpm.toml");
    fs::write(&file, format!("allocator = '{}'\ntoken-file = 'token'\noutput = 'json'\n", host.allocator))
        .unwrap();
    let run = |change: &dyn Fn(&mut std::process::Command)| {
        let mut command = host.command(&["alloc", "list"]);
        command.env_remove("XPM_ALLOCATOR").env_remove("XPM_CONFIG");
        command.env("XDG_CONFIG_HOME", host.directory.path());
        change(&mut command);
        Run::from(command.output().unwrap())
    };
    assert_eq!(run(&|_| ()).ok(), "[]\n");
    let headers = script.seen()[0].headers.to_ascii_lowercase();
    assert!(headers.contains("authorization: bearer 0123456789abcdef-of-the-user"), "{headers}");
    // The nearer setting wins.
    assert!(run(&|command| _ = command.args(["-o", "text"])).ok().starts_with("No allocations"));
    run(&|command| _ = command.env("XPM_ALLOCATOR", "nonsense")).fails_json("failed", "--allocator");
    fs::write(&file, "allocator = 'http://127.0.0.1:1'\ntoken = 'x'\n").unwrap();
    let place = format!("{}:2:1: ", file.display());
    run(&|_| ()).fails_with(&[&place, "`token`"]);
}

#[test]
fn a_token_that_cannot_be_read_is_not_answered_with_the_command_that_overwrites_it() {
    let host = Host::new();
    let token = host.directory.path().join("token");
    private(&token, "0123456789abcdef0123456789abcdef\n");
    let mut command = host.command(&["alloc", "list", "--token-file", token.to_str().unwrap()]);
    if rustix::process::geteuid().is_root() {
        // A user who may not read it: the program lies where everybody may run it.
        let program = host.directory.path().join("xpm");
        fs::copy(env!("CARGO_BIN_EXE_xpm"), &program).unwrap();
        fs::set_permissions(host.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut other = std::process::Command::new(program);
        other.args(command.get_args().map(ToOwned::to_owned).collect::<Vec<_>>());
        other.env("XPM_ALLOCATOR", &host.allocator).env("XPM_CONFIG", "").uid(65534).gid(65534);
        command = other;
    } else {
        fs::set_permissions(&token, fs::Permissions::from_mode(0o000)).unwrap();
    }
    let run = Run::from(command.output().unwrap());
    assert!(!run.err.contains("openssl") && !run.err.contains('>'), "{}", run.err);
    run.fails_with(&["cannot read the token file", token.to_str().unwrap(), "sudo"]);
    host.xpm(&["alloc", "list", "--token-file", "/nowhere/token"])
        .fails_with(&["there is no token file /nowhere/token", "openssl"]);
}

#[test]
fn an_allocator_that_refuses_connections_is_waited_for() {
    let script = Script::new().on("GET /v1/allocations", 200, &json!([]));
    let host = Host::new();
    let child = host
        .command(&["alloc", "list"])
        .env("XPM_PATIENCE", "30s")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It begins while nothing listens.
    std::thread::sleep(Duration::from_millis(500));
    script.serve_at(host.allocator.trim_start_matches("http://"));
    let run = Run::from(child.wait_with_output().unwrap());
    assert_eq!(run.err.lines().count(), 1, "it is said once: {}", run.err);
    assert!(
        run.err.contains("cannot reach the allocator") && run.err.contains("trying again for 30s"),
        "{}",
        run.err
    );
    run.ok();
}

#[test]
fn patience_has_an_end() {
    let mut command = Host::new().command(&["alloc", "list"]);
    let run = Run::from(command.env("XPM_PATIENCE", "300ms").output().unwrap());
    let lines: Vec<&str> = run.err.lines().collect();
    assert_eq!((run.code, lines.len()), (1, 2), "{}", run.err);
    assert!(
        lines[1].contains("cannot reach the allocator") && lines[1].contains("start xpm-allocator"),
        "{}",
        run.err
    );
}
