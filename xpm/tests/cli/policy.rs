//! Documents and waiting: what is sent, what is printed, how it ends.

use crate::fixtures::{allocation, refused};
use crate::support::{Host, Script};
use serde_json::{Value, json};

fn waiting(state: &str, why: &str) -> Value {
    let mut shown = allocation("data", None);
    shown["state"] = json!(state);
    shown["waiting"] = json!({"before": 2, "priority": 100, "since": 1, "until": 2, "why": why});
    shown
}

#[test]
fn problems_are_told_a_line_each() {
    let problem =
        |line: u64, key: &str| json!({"file": "pool.toml", "line": line, "key": key, "text": "it is wrong"});
    let applied =
        json!({"revision": 3, "problems": [problem(7, "account[0].name"), problem(0, "")], "changes": []});
    let host = Host::with_allocator(&Script::new().on("POST /v1/policy", 200, &applied));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pool.toml");
    std::fs::write(&file, "[[account]]\nname = 'a'\n").unwrap();
    host.xpm(&["apply", file.to_str().unwrap()]).fails_with_lines(&[
        "pool.toml:7: account[0].name: it is wrong",
        "pool.toml: it is wrong",
        "nothing was applied: 2 problems",
    ]);
    host.xpm(&["apply", "/nonexistent/pool.toml"]).fails_with(&["/nonexistent/pool.toml"]);
}

#[test]
fn files_are_sent_as_they_are() {
    let change = json!({"kind": "account", "name": "a", "action": "created", "version": 4, "before": "", "after": "x = 1\n"});
    let applied = json!({"revision": 4, "problems": [], "changes": [change]});
    let script = Script::new().on("POST /v1/policy", 200, &applied);
    let host = Host::with_allocator(&script);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pool.json");
    std::fs::write(&file, "{\"account\": [{\"name\": \"a\"}]}").unwrap();
    let text = host.xpm(&["apply", "--dry-run", file.to_str().unwrap()]).ok();
    assert!(text.contains("account `a`: would be created (version 4)") && text.contains("+x = 1"), "{text}");
    let sent = script.body_of("POST /v1/policy");
    assert_eq!((&sent["dry_run"], &sent["files"][0]["format"]), (&json!(true), &json!("json")));
}

#[test]
fn what_is_got_can_be_applied() {
    let documents = json!({"account": [{"name": "a", "version": 2, "priority": 7}, {"name": "b"}]});
    let script = Script::new().on("GET /v1/policy", 200, &json!({"revision": 2, "documents": documents}));
    let host = Host::with_allocator(&script);
    let text = host.xpm(&["get", "account", "a"]).ok();
    assert!(text.starts_with("[[account]]\nname = \"a\"\nversion = 2\npriority = 7\n"), "{text}");
    assert!(!text.contains("\"b\""), "{text}");
    assert!(host.xpm(&["get", "strategies"]).ok().contains("no strategy"));
    host.xpm(&["get", "account", "c"]).fails_with(&["there is no account `c`"]);
    let all = host.xpm(&["get", "accounts", "--json"]).json();
    assert_eq!(all["account"].as_array().map(Vec::len), Some(2));
}

#[test]
fn who_waits_is_told_why_it_was_refused() {
    let script = Script::new().on("POST /v1/allocations", 200, &waiting("waiting", "no room")).on(
        "GET /v1/allocations/data",
        200,
        &waiting("refused", "the time to wait is over: no room"),
    );
    let host = Host::with_allocator(&script);
    let wait = ["alloc", "create", "data", "--size", "1GiB", "--wait", "10m"];
    host.xpm(&wait).fails_with(&["the time to wait is over: no room"]);
    assert_eq!(script.body_of("POST /v1/allocations")["wait"], "10m");

    let script = Script::new().on("POST /v1/allocations", 200, &waiting("waiting", "no room")).on(
        "GET /v1/allocations/data",
        200,
        &allocation("data", None),
    );
    let host = Host::with_allocator(&script);
    assert!(host.xpm(&wait).ok().contains("on a, b"));
}

#[test]
fn a_refusal_is_explained_where_that_is_asked() {
    let script = Script::new()
        .on("POST /v1/allocations", 403, &refused("denied", "account a has all of it"))
        .on("GET /v1/allocations/data/decisions", 200, &json!([]));
    let host = Host::with_allocator(&script);
    host.xpm(&["alloc", "create", "data", "--size", "1GiB", "--explain"])
        .fails_with(&["account a has all of it"]);
    assert!(script.seen().iter().any(|request| request.line.contains("/decisions")));
    host.xpm(&["alloc", "explain", "data"]).fails_with(&["nothing was decided about `data`"]);
}
