//! The JSON output has no key that docs/json.md does not describe.

use std::collections::BTreeSet;

use crate::fixtures::{allocation, appliance, blk_status, device, status};
use crate::support::{Host, Script};
use serde_json::{Value, json};

/// Objects whose keys are names that operators choose.
const BY_NAMES: [&str; 4] = ["labels", "slabs", "round_trips_ns", "rdma"];

fn keys(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Array(list) => list.iter().for_each(|one| keys(one, found)),
        Value::Object(object) => {
            for (key, value) in object {
                found.insert(key.clone());
                if !BY_NAMES.contains(&key.as_str()) {
                    keys(value, found);
                }
            }
        }
        _ => {}
    }
}

#[test]
fn every_key_is_described() {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/json.md")).unwrap();
    let mut whole = allocation("data", Some("web1"));
    whole["lease"] = json!({"ends": 1, "frees": 2, "renewable": true});
    whole["ending"] = json!({"reason": "lease", "since": 1, "frees": 2, "text": "it ends"});
    whole["change"] = json!({"kind": "grow", "since": 1, "size": 1, "bytes": 1, "copied": 1, "text": "t"});
    whole["lost"] = json!(["a"]);
    let mut told = status();
    told["problems"] = json!([{"code": "ALLOCATION_LOST", "severity": "critical", "object": "allocation/data", "summary": "s", "remedy": "r"}]);
    let mut draining = appliance("a", 1, "up");
    draining["drain"] =
        json!({"since": 1, "rate": 65536, "paused": false, "left": 1, "eta": "1m", "stuck": "no room"});
    let client = json!([{"name": "web1", "facts": {"host": "0".repeat(32), "link_speed": "25Gbps", "round_trips": {}}, "heard": 1}]);
    let usage = json!([{"kind": "account", "name": "a", "used": 1, "allocations": 1, "soft_limit": 1, "hard_limit": 2}]);
    let event = json!([{"number": 1, "at": 1, "kind": "created", "subject": "data", "text": "made"}]);
    let decision = json!([{
        "at": 0, "name": "data", "request": "1GiB", "size": 1, "seed": 1, "revision": 0,
        "documents": [{"kind": "account", "name": "a", "version": 1}],
        "rules": [{"strategy": "s", "rule": "r", "applies": true, "why": "w"}], "demands": [],
        "limits": [{"of": "a", "used": 1, "asked": 1, "soft": 1, "hard": 2}], "appliances_total": 2,
        "appliances": [
            {"id": "0".repeat(32), "name": "a", "verdict": {"verdict": "scored", "score": 9, "parts": [{"of": "free", "share": 9, "weight": 1}], "regions": 1}},
            {"id": "1".repeat(32), "name": "b", "verdict": {"verdict": "rejected", "reason": "full", "free": 1, "region": 2}},
            {"id": "2".repeat(32), "name": "c", "verdict": {"verdict": "rejected", "reason": "too-slow", "round_trip": 5, "most": 2}}
        ],
        "rejected": [{"reason": "full", "appliances": 1}],
        "outcome": {"outcome": "refused", "kind": "no-space", "why": "w", "remedies": []}
    }]);
    let script = Script::new()
        .on("GET /v1/status", 200, &told)
        .on("GET /v1/appliances", 200, &json!([draining]))
        .on("GET /v1/allocations", 200, &json!([whole]))
        .on("GET /v1/allocations/data/decisions", 200, &decision)
        .on("GET /v1/clients", 200, &client)
        .on("GET /v1/usage", 200, &usage)
        .on("GET /v1/events?after=0&wait=false", 200, &event)
        .on("GET /v1/events?after=1&wait=false", 200, &json!([]));
    let blk = Script::new().on("GET /v1/status", 200, &blk_status(false)).on(
        "GET /v1/devices",
        200,
        &json!([device("data", "ublk", "holding", &["swap"])]),
    );
    let host = Host::with_allocator(&script).with_blk(&blk);
    for words in [
        &["status"][..],
        &["doctor"],
        &["alloc", "list"],
        &["alloc", "explain", "data", "--all"],
        &["appliance", "list"],
        &["blk", "list"],
        &["client", "list"],
        &["usage"],
        &["events"],
    ] {
        let run = host.xpm(&[words, &["-o", "json"]].concat());
        let printed: Value =
            serde_json::from_str(&run.out).unwrap_or_else(|_| panic!("{words:?}: {}{}", run.out, run.err));
        let mut found = BTreeSet::new();
        keys(&printed, &mut found);
        assert!(!found.is_empty(), "{words:?}");
        let unknown: Vec<&String> =
            found.iter().filter(|key| !document.contains(&format!("| `{key}` |"))).collect();
        assert!(unknown.is_empty(), "{words:?} prints what docs/json.md does not describe: {unknown:?}");
    }
}
