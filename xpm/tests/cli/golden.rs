//! The whole output for people: each output is compared with a file of tests/golden, and no line is longer than a
//! terminal. `XPM_WRITE_GOLDEN=1 cargo test -p xpm` writes the files anew; look at the difference before you commit
//! it.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::fixtures::{allocation, appliance, blk_status, device, refused, status};
use crate::support::{Host, Script};
use serde_json::{Value, json};

/// Columns of a terminal.
const WIDTH: usize = 80;

#[track_caller]
fn check(name: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("XPM_WRITE_GOLDEN").is_some() {
        std::fs::write(&file, text).unwrap();
    }
    let golden = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(golden == text, "not as in {}:\n{text}", file.display());
}

#[track_caller]
fn check_narrow(name: &str, text: &str) {
    let long: Vec<&str> = text.lines().filter(|line| line.chars().count() > WIDTH).collect();
    assert!(long.is_empty(), "longer than {WIDTH} columns: {long:#?}");
    check(name, text);
}

/// A moment so many seconds from now, whole hours: half a minute is added, so that what is shown is the same for that
/// long.
fn ahead(seconds: u64) -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + seconds + 30
}

/// Allocations in each state that there is.
fn allocations() -> Value {
    let mut batch = allocation("batch-7", Some("web1"));
    batch["account"] = json!("batch");
    batch["lease"] = json!({"ends": ahead(7200), "frees": ahead(10_800), "renewable": true});
    let mut broken = allocation("broken", Some("web1"));
    broken["lost"] = json!(["b"]);
    let mut ending = allocation("job", None);
    let text = "`job` gives way to `urgent`, which has a higher priority: its memory is freed at 12:00";
    ending["ending"] = json!({"reason": "reclaim", "since": 1, "frees": ahead(3 * 3600), "text": text});
    ending["account"] = json!("batch");
    let mut later = allocation("later", None);
    later["state"] = json!("waiting");
    later["size"] = json!(1_u64 << 40);
    later["waiting"] = json!({
        "before": 2, "priority": 100, "since": 1, "until": 2, "why": "1TiB do not fit: 3GiB are free on 2 appliances"
    });
    let mut deleting = allocation("old", None);
    deleting["state"] = json!("deleting");
    let mut grows = allocation("scratch", Some("db1"));
    grows["change"] = json!({
        "kind": "grow", "since": 1, "size": 4_u64 << 30, "bytes": 0, "copied": 0, "text": "waits for its owner"
    });
    let mut all = json!([batch, broken, ending, later, deleting, grows, allocation("swap0", Some("web1"))]);
    // An age of a fixed width, for the columns are as wide as their cells: 3 days, 4 hours and a half.
    let created = ahead(0) - (3 * 24 + 4) * 3600 - 1800;
    all.as_array_mut().expect("a list").iter_mut().for_each(|one| one["created"] = json!(created));
    all
}

fn problem(code: &str, severity: &str, object: &str, summary: &str, remedy: &str) -> Value {
    json!({"code": code, "severity": severity, "object": object, "summary": summary, "remedy": remedy})
}

fn pool(status: &Value, allocations: &Value) -> Script {
    Script::new()
        .on("GET /v1/status", 200, status)
        .on("GET /v1/appliances", 200, &json!([appliance("pool1", 1, "up"), appliance("pool2", 2, "silent")]))
        .on("GET /v1/allocations", 200, allocations)
}

#[test]
fn alloc_list() {
    let host = Host::with_allocator(&pool(&status(), &allocations()));
    check_narrow("alloc-list.txt", &host.xpm(&["alloc", "list"]).ok());
    let wide = host.xpm(&["alloc", "list", "-o", "wide", "--sort-by", "size"]).ok();
    check("alloc-list-wide.txt", &wide);
}

#[test]
fn status_of_a_pool_with_problems() {
    let mut told = status();
    told["problems"] = json!([
        problem(
            "APPLIANCE_SILENT",
            "critical",
            "appliance/pool2",
            "appliance pool2 has not been heard for 1m 30s; 4 regions of allocations are on it",
            "bring it back; `xpm appliance show pool2` lists what is on it"
        ),
        problem(
            "ALLOCATION_LOST",
            "critical",
            "allocation/broken",
            "`broken` has lost what it had on b",
            "stop what uses it, then delete it and make it anew"
        ),
        problem(
            "REQUEST_WAITING",
            "info",
            "allocation/later",
            "`later` waits for 1TiB, 2 requests before it: 1TiB do not fit: 3GiB are free on 2 appliances",
            "`xpm alloc delete later` takes the request back"
        ),
    ]);
    let blk = Script::new().on("GET /v1/status", 200, &blk_status(false)).on(
        "GET /v1/devices",
        200,
        &json!([device("swap0", "ublk", "holding", &["swap"])]),
    );
    let run = Host::with_allocator(&pool(&told, &allocations())).with_blk(&blk).xpm(&["status"]);
    assert_eq!((run.code, run.err.as_str()), (2, ""));
    check_narrow("status-problems.txt", &run.out);
}

#[test]
fn status_of_a_pool_that_is_well() {
    let script = Script::new()
        .on("GET /v1/status", 200, &status())
        .on("GET /v1/appliances", 200, &json!([appliance("pool1", 1, "up")]))
        .on("GET /v1/allocations", 200, &json!([allocation("swap0", None)]));
    check_narrow("status-well.txt", &Host::with_allocator(&script).xpm(&["status"]).ok());
}

#[test]
fn doctor_on_devices() {
    let blk = Script::new().on("GET /v1/status", 200, &blk_status(false)).on(
        "GET /v1/devices",
        200,
        &json!([device("swap0", "ublk", "lost", &["swap"])]),
    );
    let run = Host::new().with_blk(&blk).xpm(&["doctor"]);
    assert_eq!(run.code, 2, "{}", run.out);
    let long: Vec<&str> = run.out.lines().filter(|line| line.chars().count() > WIDTH).collect();
    assert!(long.is_empty(), "{long:#?}");
    // The part above describes the machine that this test runs on.
    let devices = run.out.find("\nxpm-blk\n").map(|start| &run.out[start + 1..]).unwrap_or_default();
    // Where lines are broken depends on the longest item, which may be one of this machine.
    let mut whole: Vec<String> = Vec::new();
    for line in devices.lines() {
        let words = line.split_whitespace().collect::<Vec<_>>().join(" ");
        match whole.last_mut() {
            Some(last) if line.starts_with("            ") && !words.starts_with("->") => {
                last.push_str(&format!(" {words}"));
            }
            _ => whole.push(words),
        }
    }
    check("doctor-devices.txt", &(whole.join("\n") + "\n"));
}

#[test]
fn refusals() {
    let script = Script::new()
        .on("GET /v1/appliances", 200, &json!([appliance("pool1", 1, "up")]))
        .on("GET /v1/allocations/no", 404, &refused("not-found", "no allocation `no`; see `xpm alloc list`"))
        .on("GET /v1/clients", 401, &refused("unauthorized", "the token is wrong"))
        .on(
            "DELETE /v1/allocations/swap0",
            409,
            &refused(
                "in-use",
                "`swap0` is used by web1 (ublk): run `xpm blk detach swap0` there first, or use --force",
            ),
        );
    let well = Host::with_allocator(&script);
    let nowhere = Host::new();
    let settings = nowhere.directory.path().join("xpm.toml");
    std::fs::write(&settings, "allocator = \"http://10.0.0.1:7700\"\ntoken = \"x\"\n").unwrap();
    let mut text = String::new();
    let mut add = |host: &Host, words: &[&str], settings: Option<&PathBuf>| {
        let mut command = host.command(words);
        if let Some(settings) = settings {
            command.env("XPM_CONFIG", settings);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let said = said
            .replace(&host.allocator, "URL")
            .replace(&host.directory.path().display().to_string(), "DIRECTORY");
        text.push_str(&format!("$ xpm {}\n{said}[{}]\n\n", words.join(" "), output.status.code().unwrap()));
    };
    add(&nowhere, &["alloc", "list"], None);
    add(&nowhere, &["alloc", "list", "-o", "json"], None);
    add(&nowhere, &["blk", "list"], None);
    add(&nowhere, &["alloc", "list"], Some(&settings));
    add(&nowhere, &["alloc", "list", "--token-file", "/nowhere/token"], None);
    add(&well, &["client", "list"], None);
    add(&well, &["appliance", "show", "pool9"], None);
    add(&well, &["alloc", "show", "no"], None);
    add(&well, &["alloc", "delete", "swap0"], None);
    add(&well, &["alloc", "create", "a", "--size", "much"], None);
    check("refusals.txt", &text);
}
