//! Each command against scripted daemons: what it sends, what it prints, how it ends.

use std::io::{BufRead as _, BufReader};

use crate::fixtures::{allocation, appliance, blk_status, device, refused, status};
use crate::support::{Host, Script};
use serde_json::{Value, json};

#[test]
fn appliances_are_listed_as_a_table_and_as_they_are() {
    let both = json!([appliance("a", 1, "up"), appliance("b", 2, "silent")]);
    let host = Host::with_allocator(&Script::new().on("GET /v1/appliances", 200, &both));
    let table = host.xpm(&["appliance", "list"]).ok();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["NAME", "STATE", "MEMORY", "FREE", "GRANTED", "RESIDENT", "ADDRESS"]
    );
    assert!(lines[1].contains("4GiB") && lines[1].contains("10.0.0.1:7702"), "{table}");
    assert!(lines[2].contains("silent 1m 30s"), "{table}");
    let printed: Value = host.xpm(&["--json", "appliance", "list"]).json();
    assert_eq!(printed[1]["info"]["name"], "b");
    assert_eq!(printed[0]["status"]["capacity"], 4_u64 << 30);
}

#[test]
fn an_empty_pool_says_what_to_do() {
    let script =
        Script::new().on("GET /v1/appliances", 200, &json!([])).on("GET /v1/allocations", 200, &json!([]));
    let host = Host::with_allocator(&script);
    assert!(host.xpm(&["appliance", "list"]).ok().contains("xpm-appliance"));
    assert!(host.xpm(&["alloc", "list"]).ok().contains("xpm alloc create"));
    assert_eq!(host.xpm(&["alloc", "list", "--json"]).json(), json!([]));
}

#[test]
fn an_appliance_is_found_by_name_or_id_if_that_is_one() {
    let all = json!([appliance("twin", 1, "up"), appliance("twin", 2, "up"), appliance("c", 3, "up")]);
    let script = Script::new()
        .on("GET /v1/appliances", 200, &all)
        .on("GET /v1/allocations", 200, &json!([allocation("data", None)]))
        .on_raw("DELETE /v1/appliances/00000000000000000000000000000003", 204, "");
    let host = Host::with_allocator(&script);
    assert!(host.xpm(&["appliance", "show", "c"]).ok().contains("4GiB of memory"));
    assert!(
        host.xpm(&["appliance", "show", &format!("{:032x}", 1)]).ok().contains("data"),
        "it has regions of data"
    );
    host.xpm(&["appliance", "show", "twin"]).fails_with(&["2 appliances", &format!("{:032x}", 2)]);
    host.xpm(&["appliance", "show", "x"]).fails_with(&["`x`", "xpm appliance list"]);
    host.xpm(&["appliance", "forget", "c"]).ok();
    assert!(script.seen().iter().any(|request| request.line.starts_with("DELETE")));
}

#[test]
fn create_sends_what_was_asked_for() {
    let script = Script::new().on("POST /v1/allocations", 200, &allocation("data", None));
    let host = Host::with_allocator(&script);
    let args = ["alloc", "create", "data", "--size", "1.5GiB", "--stripe", "3", "--stripe-unit", "128KiB"];
    let text = host.xpm(&args).ok();
    assert!(text.contains("striped over 2 by 64KiB") && text.contains("on a, b"), "{text}");
    let expected = json!({"name": "data", "size": 3_u64 << 29, "stripe": 3, "stripe_unit": 128 << 10});
    assert_eq!(script.body_of("POST /v1/allocations"), expected);
    let script = Script::new().on("POST /v1/allocations", 200, &allocation("data", None));
    let host = Host::with_allocator(&script);
    let printed =
        host.xpm(&["alloc", "create", "data", "--size", "4096", "--region-size", "16MiB", "--json"]).json();
    assert_eq!(printed["region_len"], 512 << 20);
    assert_eq!(script.body_of("POST /v1/allocations")["region_len"], 16 << 20);
}

#[test]
fn an_allocation_shows_its_regions_by_appliance() {
    let owned = allocation("data", Some("web1"));
    let script = Script::new()
        .on("GET /v1/allocations/data", 200, &owned)
        .on("GET /v1/allocations", 200, &json!([owned]))
        .on("GET /v1/allocations/no", 404, &refused("not-found", "no allocation `no`; see `xpm alloc list`"));
    let host = Host::with_allocator(&script);
    let text = host.xpm(&["alloc", "show", "data"]).ok();
    assert!(text.contains("web1 (ublk)") && text.contains("2GiB"), "{text}");
    let row = text.lines().find(|line| line.starts_with("a ")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["a", "2", "1GiB", "0,", "2"]);
    assert!(host.xpm(&["alloc", "list"]).ok().contains("web1 (ublk)"));
    host.xpm(&["alloc", "show", "no"]).fails_with(&["no allocation `no`"]);
}

#[test]
fn deletion_is_refused_or_forced_and_a_live_device_is_named() {
    let script = Script::new()
        .on(
            "DELETE /v1/allocations/data",
            409,
            &refused("in-use", "`data` is used by web1; detach it there or use --force"),
        )
        .on_raw("DELETE /v1/allocations/data?force=true", 204, "");
    let blk = Script::new().on("GET /v1/devices", 200, &json!([device("data", "ublk", "live", &["swap"])]));
    let host = Host::with_allocator(&script).with_blk(&blk);
    host.xpm(&["alloc", "delete", "data"]).fails_with(&["data", "used by web1", "--force"]);
    let forced = host.xpm(&["alloc", "delete", "data", "--force"]);
    assert!(forced.err.contains("warning: /dev/ublkb0") && forced.err.contains("swap"), "{}", forced.err);
    forced.ok();
    let elsewhere = Host::with_allocator(&script);
    let forced = elsewhere.xpm(&["alloc", "delete", "data", "--force", "--json"]);
    assert_eq!(forced.err, "");
    assert_eq!(forced.json(), json!({"deleted": "data"}));
}

#[test]
fn attach_prints_the_path_alone() {
    let made = device("data", "ublk", "live", &[]);
    let script = Script::new().on("POST /v1/devices", 200, &made);
    let host = Host::new().with_blk(&script);
    let args =
        ["blk", "attach", "data", "--as", "ublk", "--queues", "2", "--depth", "64", "--transport", "nbd-tcp"];
    let run = host.xpm(&[&args[..], &["--hold", "5m", "--force"]].concat());
    assert_eq!(run.err, "", "hints are for terminals");
    assert_eq!(run.ok(), "/dev/ublkb0\n");
    let expected = json!({"name": "data", "as": "ublk", "queues": 2, "depth": 64, "transport": "nbd-tcp", "hold": "5m", "force": true});
    assert_eq!(script.body_of("POST /v1/devices"), expected);
    assert_eq!(
        host.xpm(&["blk", "attach", "data", "--as", "nbd-socket=/a", "--json"]).json()["path"],
        "/dev/ublkb0"
    );
}

#[test]
fn devices_are_listed_shown_and_detached() {
    let held = device("data", "ublk", "holding", &["mounted at /mnt"]);
    let script = Script::new()
        .on("GET /v1/devices", 200, &json!([held]))
        .on("GET /v1/devices/data", 200, &held)
        .on(
            "DELETE /v1/devices/data",
            409,
            &refused("in-use", "/dev/ublkb0 is mounted at /mnt: umount it first, or use --force"),
        )
        .on_raw("DELETE /v1/devices/data?force=true", 204, "");
    let host = Host::new().with_blk(&script);
    assert!(host.xpm(&["blk", "list"]).ok().contains("mounted at /mnt"));
    let text = host.xpm(&["blk", "show", "data"]).ok();
    assert!(
        text.contains("holding: an appliance is out of reach") && text.contains("connection refused"),
        "{text}"
    );
    host.xpm(&["blk", "detach", "data"]).fails_with(&["cannot detach `data`", "mounted at /mnt"]);
    assert_eq!(host.xpm(&["blk", "detach", "data", "--force"]).ok(), "");
}

#[test]
fn status_names_what_is_wrong_first() {
    let mut sick = allocation("data", Some("web1"));
    sick["state"] = json!("deleting");
    let script = Script::new()
        .on("GET /v1/status", 200, &status())
        .on("GET /v1/appliances", 200, &json!([appliance("a", 1, "up"), appliance("b", 2, "silent")]))
        .on("GET /v1/allocations", 200, &json!([sick]));
    let blk = Script::new().on("GET /v1/status", 200, &blk_status(false)).on(
        "GET /v1/devices",
        200,
        &json!([device("data", "ublk", "holding", &["swap"])]),
    );
    let host = Host::with_allocator(&script).with_blk(&blk);
    let run = host.xpm(&["status", "-o", "json"]);
    assert_eq!(run.code, 2);
    let printed: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(printed["health"], "critical");
    let found: Vec<(&str, &str, &str)> = printed["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            (
                one["severity"].as_str().unwrap(),
                one["code"].as_str().unwrap(),
                one["object"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("critical", "APPLIANCE_SILENT", "appliance/b"),
            ("critical", "SWAP_UNSAFE", "device//dev/ublkb0"),
            ("warning", "DEVICE_HOLDING", "device//dev/ublkb0"),
        ]
    );
    let text = host.xpm(&["status"]).out;
    assert!(
        text.starts_with("Health: critical (2 critical, 1 warning)\ncritical  APPLIANCE_SILENT: "),
        "{text}"
    );
}

#[test]
fn what_is_on_schedule_is_no_failure() {
    let mut status = status();
    let waiting = json!({"code": "REQUEST_WAITING", "severity": "info", "object": "allocation/later", "summary": "`later` waits"});
    status["problems"] = json!([waiting]);
    let script = Script::new()
        .on("GET /v1/status", 200, &status)
        .on("GET /v1/appliances", 200, &json!([appliance("a", 1, "up")]))
        .on("GET /v1/allocations", 200, &json!([]));
    let text = Host::with_allocator(&script).xpm(&["status"]).ok();
    assert!(
        text.starts_with("Health: ok (1 worth knowing)\ninfo      REQUEST_WAITING: `later` waits\n"),
        "{text}"
    );
}

#[test]
fn status_is_watched_until_nobody_reads() {
    let host = Host::new();
    let mut child =
        host.command(&["status", "--watch=100ms"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let looks =
        lines.by_ref().filter(|line| line.as_ref().unwrap().starts_with("Health: critical")).take(3).count();
    assert_eq!(looks, 3);
    drop(lines);
    assert!(child.wait().unwrap().success(), "a reader that goes away is no failure");
}

#[test]
fn a_link_that_is_not_by_the_best_transport_is_named() {
    let mut slow = device("data", "ublk", "live", &[]);
    slow["links"][0]["reason"] = json!("no shm to the appliance: it did not answer within the time limit");
    let blk =
        Script::new().on("GET /v1/status", 200, &blk_status(true)).on("GET /v1/devices", 200, &json!([slow]));
    let host = Host::new().with_blk(&blk);
    let text = host.xpm(&["status"]).out;
    assert!(
        text.contains("warning   DEVICE_SLOW_PATH: device /dev/ublkb0 (data) reaches a by nbd-tcp"),
        "{text}"
    );
    let report = host.xpm(&["doctor", "--json"]);
    assert_eq!(report.code, 0, "it works: {}", report.out);
    let checks = report.json()["checks"].as_array().unwrap().clone();
    let check = checks.iter().find(|check| check["item"] == "transport").unwrap();
    assert_eq!((&check["severity"], &check["code"]), (&json!("warning"), &json!("DEVICE_SLOW_PATH")));
    assert!(check["found"].as_str().unwrap().contains("a by nbd-tcp"), "{check}");
}

#[test]
fn status_shows_devices_when_the_allocator_is_gone() {
    let blk = Script::new().on("GET /v1/status", 200, &blk_status(true)).on(
        "GET /v1/devices",
        200,
        &json!([device("data", "ublk", "live", &[])]),
    );
    let run = Host::new().with_blk(&blk).xpm(&["status"]);
    assert_eq!(run.code, 2);
    assert!(
        run.out.contains("critical  ALLOCATOR_UNREACHABLE: cannot reach") && run.out.contains("/dev/ublkb0"),
        "{}",
        run.out
    );
}

#[test]
fn status_of_a_machine_without_devices_is_no_failure() {
    let script = Script::new()
        .on("GET /v1/status", 200, &status())
        .on("GET /v1/appliances", 200, &json!([appliance("a", 1, "up")]))
        .on("GET /v1/allocations", 200, &json!([]));
    let text = Host::with_allocator(&script).xpm(&["status"]).ok();
    assert!(text.starts_with("Health: ok\n\nPool:") && text.contains("xpm-blk does not run here"), "{text}");
}

#[test]
fn doctor_fails_only_for_what_is_in_use() {
    let report = |safe, users: &[&str]| {
        let blk = Script::new().on("GET /v1/status", 200, &blk_status(safe)).on(
            "GET /v1/devices",
            200,
            &json!([device("data", "ublk", "live", users)]),
        );
        Host::new().with_blk(&blk).xpm(&["doctor", "--json"])
    };
    for (safe, users, code) in [(true, &["swap"][..], 0), (false, &[][..], 0), (false, &["swap"][..], 2)] {
        let run = report(safe, users);
        assert_eq!(run.code, code, "{safe} {users:?}: {}", run.out);
        let printed: Value = serde_json::from_str(&run.out).unwrap();
        assert_eq!(printed["safe"], code == 0);
    }
    let fitness = Host::new().xpm(&["doctor"]).ok();
    assert!(fitness.contains("nbd-socket") && fitness.contains("vhost-user"));
}

#[test]
fn ensure_is_content_with_a_device_of_that_form_only() {
    let blk = Script::new().on("GET /v1/devices/data", 200, &device("data", "ublk", "live", &[]));
    let host = Host::new().with_blk(&blk);
    assert_eq!(host.xpm(&["blk", "attach", "data", "--as", "ublk", "--ensure"]).ok(), "/dev/ublkb0\n");
    host.xpm(&["blk", "attach", "data", "--as", "nbd", "--ensure"]).fails_with(&[
        "cannot attach `data` as nbd",
        "shown as ublk",
        "xpm blk detach data",
    ]);
    assert!(blk.seen().iter().all(|request| request.line.starts_with("GET ")), "nothing was asked for");
}

#[test]
fn ensure_tries_again_what_may_pass_and_nothing_else() {
    let ensure = |kind, status| {
        let answer = refused(kind, "for a reason");
        let blk = Script::new().on("POST /v1/devices", status, &answer);
        let words = ["blk", "attach", "data", "--as", "ublk", "--ensure", "--wait", "1s"];
        let run = Host::new().with_blk(&blk).xpm(&words);
        let tries = blk.seen().iter().filter(|request| request.line == "POST /v1/devices").count();
        (run, tries)
    };
    let (run, tries) = ensure("unavailable", 503);
    assert!(run.code == 1 && run.err.contains("for a reason; trying again for 1s"), "{}", run.err);
    assert_eq!(tries, 2);
    let (run, tries) = ensure("not-found", 404);
    run.fails_with(&["cannot attach `data` as ublk", "for a reason"]);
    assert_eq!(tries, 1);
}
