//! Failures: each is reported in one line with its remedy.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use crate::support::{Host, Run, Script};
use serde_json::json;

#[test]
fn nobody_answers() {
    let host = Host::new();
    let url = host.allocator.clone();
    for args in [&["appliance", "list"][..], &["alloc", "list"], &["alloc", "create", "a", "--size", "1G"]] {
        host.xpm(args).fails_with(&["cannot reach the allocator", &url, "--allocator"]);
    }
    let socket = host.blk.display().to_string();
    for args in [&["blk", "list"][..], &["blk", "attach", "a", "--as", "ublk"], &["blk", "detach", "a"]] {
        host.xpm(args).fails_with(&["cannot reach xpm-blk", &socket, "--blk"]);
    }
}

#[test]
fn a_wrong_address() {
    let host = Host::new();
    for url in ["ftp://a:1", "nonsense", "http://", ""] {
        host.xpm(&["alloc", "list", "--allocator", url]).fails_with(&["--allocator"]);
    }
    host.xpm(&["alloc", "list", "--allocator", "http://no-such-host.invalid:7700"])
        .fails_with(&["no-such-host.invalid"]);
}

#[test]
fn the_token_is_sent_and_a_wrong_one_is_told() {
    let script = Script::new().on("GET /v1/allocations", 200, &json!([]));
    let host = Host::with_allocator(&script);
    let file = host.directory.path().join("token");
    std::fs::write(&file, "0123456789abcdef0123456789abcdef\n").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let path = file.to_str().unwrap();
    host.xpm(&["alloc", "list", "--token-file", path]).ok();
    let headers = script.seen()[0].headers.to_ascii_lowercase();
    assert!(headers.contains("authorization: bearer 0123456789abcdef"), "{headers}");

    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    host.xpm(&["alloc", "list", "--token-file", path]).fails_with(&[path]);
    host.xpm(&["alloc", "list", "--token-file", "/nowhere/token"]).fails_with(&["/nowhere/token"]);

    let refusing = Script::new().on(
        "GET /v1/allocations",
        401,
        &json!({"kind": "unauthorized", "error": "wrong token"}),
    );
    Host::with_allocator(&refusing).xpm(&["alloc", "list"]).fails_with(&["wrong token", "--token-file"]);
}

#[test]
fn something_else_answers_or_another_version() {
    for (status, body) in [
        (200, "<html>hello</html>"),
        (200, "{\"entirely\": \"different\"}"),
        (200, ""),
        (404, "not here"),
        (404, "{\"message\": \"no route\"}"),
        (500, "panic\r\nat\nline 3"),
        (302, ""),
        (404, "{\"kind\": \"not-found\", \"error\": \"/v1/allocations is no path of this daemon\"}"),
    ] {
        let script = Script::new().on_raw("GET /v1/allocations", status, body);
        Host::with_allocator(&script).xpm(&["alloc", "list"]).fails_with(&["the allocator at", "version"]);
    }
}

#[test]
fn what_daemons_say_cannot_steer_the_terminal() {
    let error = json!({"kind": "internal", "error": "first\nsecond \u{1b}[2Jthird"});
    let script = Script::new().on("GET /v1/allocations", 500, &error);
    let run = Host::with_allocator(&script).xpm(&["alloc", "list"]);
    assert!(!run.err.contains('\u{1b}'), "{}", run.err);
    run.fails_with(&["first second ?[2Jthird"]);
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_would_be_right() {
    let host = Host::new();
    for (args, word) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["alloc", "create", "a"], "--size"),
        (&["alloc", "create", "a", "--size", "0"], "cannot be 0"),
        (&["alloc", "create", "a", "--size", "-1"], "-1"),
        (&["alloc", "create", "a", "--size", "lots"], "1.5GiB"),
        (&["alloc", "create", "../etc", "--size", "1G"], "is not a name"),
        (&["alloc", "create", "a", "--size", "1G", "--region-size", "100MiB"], "power of two"),
        (&["alloc", "create", "a", "--size", "1G", "--stripe", "0"], "--stripe"),
        (&["alloc", "create", "a", "--size", "1G", "--stripe-unit", "64K"], "--stripe"),
        (&["blk", "attach", "a"], "--as"),
        (&["blk", "attach", "a", "--as", "scsi"], "nbd-socket=/ABSOLUTE/PATH"),
        (&["blk", "attach", "a", "--as", "nbd-socket=a.sock"], "ABSOLUTE"),
        (&["blk", "attach", "a", "--as", "vhost-user=a.sock"], "vhost-user=/ABSOLUTE/PATH"),
        (&["blk", "attach", "a", "--as", "ublk", "--queues", "0"], "--queues"),
        (&["blk", "attach", "a", "--as", "ublk", "--depth", "1025"], "--depth"),
        (&["blk", "attach", "a", "--as", "ublk", "--hold", "soon"], "forever"),
        (&["blk", "attach", "a", "--as", "ublk", "--transport", "smoke"], "rdma"),
        (&["completions", "klingon"], "bash"),
    ] {
        let run = host.xpm(args);
        assert_eq!(run.code, 2, "{args:?}: {}", run.err);
        assert!(run.err.contains(word), "{args:?}: {}", run.err);
    }
}

#[test]
fn completions_and_manual_pages() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(host.xpm(&["completions", shell]).ok().contains("COMPLETE"), "{shell}");
    }
    let directory = host.directory.path().join("man/man1");
    let pages = host.xpm(&["man", directory.to_str().unwrap()]).ok();
    assert!(pages.lines().any(|line| line.ends_with("/xpm-blk-attach.1")), "{pages}");
    for page in pages.lines() {
        assert!(std::fs::read_to_string(page).unwrap().contains(".SH NAME"), "{page}");
    }
    let file = host.directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    host.xpm(&["man", file.to_str().unwrap()]).fails_with(&["cannot make the directory"]);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Host::new()
        .command(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let run = Run::from(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.err.as_str()), (0, ""));
}
