//! Lists, their forms, and what a shell completes.

use std::process::Command;

use crate::fixtures::{allocation, refused};
use crate::support::{Host, Run, Script};
use serde_json::{Value, json};

fn three() -> Value {
    let mut large = allocation("large", Some("web1"));
    large["size"] = json!(64_u64 << 30);
    large["account"] = json!("database");
    let mut lost = allocation("broken", Some("web1"));
    lost["lost"] = json!(["a"]);
    let mut waits = allocation("later", None);
    waits["state"] = json!("waiting");
    waits["size"] = json!(512_u64 << 20);
    waits["waiting"] = json!({"before": 2, "priority": 100, "since": 1, "until": 2, "why": "no appliance has 512MiB free in one place, and it is asked for by two requests of a higher priority"});
    json!([large, lost, waits])
}

fn host() -> Host {
    Host::with_allocator(&Script::new().on("GET /v1/allocations", 200, &three()))
}

#[test]
fn a_list_fits_80_columns_and_says_the_reason_of_each_state() {
    let text = host().xpm(&["alloc", "ls"]).ok();
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(line("broken").contains("lost on a, used by web1 (ublk)"), "{text}");
    assert!(line("later").contains("waiting, 2 before it: no appliance"), "{text}");
    assert!(line("large").contains("database"), "{text}");
    let wide = host().xpm(&["alloc", "list", "-o", "wide"]).ok();
    assert!(wide.contains("of a higher priority") && wide.contains("EPOCH"), "{wide}");
}

#[test]
fn lists_are_sorted_and_can_do_without_headings() {
    let names = |args: &[&str]| {
        let text = host().xpm(&[&["alloc", "list", "--no-headers"], args].concat()).ok();
        text.lines().map(|line| line.split_whitespace().next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&["--sort-by", "size"]), ["later", "broken", "large"]);
    assert_eq!(names(&["--sort-by=-name"]), ["later", "large", "broken"]);
    let sorted = host().xpm(&["alloc", "list", "-o", "json", "--sort-by", "name"]).json();
    assert_eq!(sorted[0]["name"], "broken");
    host().xpm(&["alloc", "list", "--sort-by", "colour"]).fails_with(&["`colour`", "name, size"]);
}

#[test]
fn programs_get_json_and_yaml_with_units_in_the_keys() {
    let printed = host().xpm(&["alloc", "list", "-o", "json"]).json();
    assert_eq!(printed[0]["size_bytes"], 64_u64 << 30);
    assert_eq!(printed[0]["created"], "2023-11-14T22:13:20Z");
    let yaml = host().xpm(&["alloc", "list", "-o", "yaml"]).ok();
    assert!(yaml.contains("name: large") && yaml.contains("size_bytes: 68719476736"), "{yaml}");
}

#[test]
fn errors_are_json_where_answers_are() {
    let script = Script::new().on("GET /v1/allocations/no", 404, &refused("not-found", "no allocation `no`"));
    let host = Host::with_allocator(&script);
    host.xpm(&["alloc", "describe", "no", "-o", "json"]).fails_json("not-found", "no allocation `no`");
    Host::new().xpm(&["alloc", "list", "-o", "json"]).fails_json("unreachable", "cannot reach the allocator");
    let usage = host.xpm(&["alloc", "show", "-o", "json"]);
    assert_eq!(usage.code, 2);
    usage.fails_json("usage", "required");
}

#[test]
fn a_refused_dry_run_is_a_failure() {
    let decision = |outcome: Value| {
        json!({
            "at": 0, "name": "data", "request": "1GiB", "size": 1 << 30, "seed": 1, "revision": 0, "documents": [],
            "rules": [], "demands": [], "limits": [], "appliances_total": 0, "appliances": [], "rejected": [],
            "outcome": outcome
        })
    };
    let run = |outcome: Value| {
        let script = Script::new().on("POST /v1/decisions", 200, &decision(outcome));
        Host::with_allocator(&script).xpm(&["alloc", "create", "data", "--size", "1GiB", "--dry-run"])
    };
    let no = run(
        json!({"outcome": "refused", "kind": "no-space", "why": "it does not fit", "remedies": ["ask for less"]}),
    );
    assert_eq!(no.code, 1);
    assert!(no.out.contains("refused: it does not fit"), "{}", no.out);
    run(json!({"outcome": "placed", "regions": 1, "region_len": 1 << 30, "appliances": 1})).ok();
}

#[test]
fn without_a_command_there_is_help() {
    let help = Host::new().xpm(&[]).ok();
    assert!(help.contains("Usage: xpm") && help.contains("alloc"), "{help}");
}

#[test]
fn a_shell_completes_the_names_of_allocations() {
    let host = host();
    let script = host.directory.path().join("completions");
    std::fs::write(&script, host.xpm(&["completions", "bash"]).ok()).unwrap();
    let completed = |word: &str| {
        let program = std::path::Path::new(env!("CARGO_BIN_EXE_xpm")).parent().unwrap();
        let ask = format!(
            "PATH={}:$PATH; source {}; COMP_WORDS=(xpm alloc show '{word}'); COMP_CWORD=3; COMP_TYPE=9; \
             _clap_complete_xpm xpm '{word}' show; echo ${{COMPREPLY[@]}}",
            program.display(),
            script.display()
        );
        let mut bash = Command::new("bash");
        bash.args(["-c", &ask]).env("XPM_ALLOCATOR", &host.allocator).env("XPM_CONFIG", "");
        Run::from(bash.output().unwrap()).ok().trim().to_owned()
    };
    assert_eq!(completed("l"), "large later");
    assert_eq!(completed("bro"), "broken");
    assert_eq!(completed("x"), "");
}
