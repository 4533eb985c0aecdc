//! JSON for programs, as docs/json.md describes it: the daemons' messages with the unit of each number in its key, and
//! moments as RFC 3339 has them.
//!
//! A message says a unit by its type, which JSON does not have. So the keys are listed here; the tests of `document`
//! compare the lists with the types, and docs/json.md with both.

#[cfg(test)]
mod document;

use serde_json::{Map, Number, Value, json};
use xpm_protocol::Span;
use xpm_protocol::speed::LinkSpeed;

use crate::connect::Failure;

/// Numbers of bytes.
const BYTES: &[&str] = &[
    "asked",
    "available",
    "base",
    "bytes",
    "cached",
    "capacity",
    "copied",
    "data",
    "dirty",
    "free",
    "free_below",
    "from",
    "granted",
    "hard",
    "hard_limit",
    "left",
    "len",
    "local",
    "locked",
    "max_mr_size",
    "maximum",
    "most",
    "moved",
    "mtu",
    "next_step",
    "offset",
    "plugged",
    "rate",
    "ready",
    "region",
    "region_len",
    "reserved",
    "resident",
    "sent",
    "size",
    "soft",
    "soft_limit",
    "taken",
    "total",
    "unit",
    "used",
    "writeback",
];

/// Moments, in seconds since 1970.
const MOMENTS: &[&str] = &["at", "created", "ends", "frees", "given_up", "heard", "since", "until"];

/// Spans of time, as text.
const SPANS: &[&str] =
    &["again", "age", "deadline", "eta", "interval", "last", "shrink_after", "silent", "since", "uptime"];

/// Speeds of links, as text.
const SPEEDS: &[&str] = &["asked", "has", "left", "link_speed", "traffic"];

/// The value with units in its keys.
pub(crate) fn documented(value: Value) -> Value {
    match value {
        Value::Array(list) => list.into_iter().map(documented).collect(),
        Value::Object(object) => Value::Object(object_with_units(object)),
        other => other,
    }
}

fn object_with_units(object: Map<String, Value>) -> Map<String, Value> {
    // Of a rejected appliance, `most` is a time where its round trip is too long.
    let nanos = object.get("reason").is_some_and(|reason| reason == "too-slow");
    // Of metadata that are behind, `heard` is the number of a state, and no moment.
    let counted = object.contains_key("who");
    let with_unit = |(key, value): (String, Value)| match (key.as_str(), value) {
        ("round_trips", value) => ("round_trips_ns".to_owned(), value),
        ("heard", value) if counted => ("heard".to_owned(), value),
        ("round_trip" | "most", value) if nanos => (format!("{key}_ns"), value),
        ("some_avg10", Value::Number(hundredths)) => {
            ("some_avg10_percent".to_owned(), json!(hundredths.as_f64().unwrap_or(0.0) / 100.0))
        }
        ("share", value @ Value::Number(_)) => ("share_permille".to_owned(), value),
        (_, value) => unit_of(key, documented(value)),
    };
    object.into_iter().map(with_unit).collect()
}

fn unit_of(key: String, value: Value) -> (String, Value) {
    let is = |list: &[&str]| list.contains(&key.as_str());
    match &value {
        Value::Number(seconds) if is(MOMENTS) => (key, moment(seconds)),
        Value::Number(_) if is(BYTES) => (in_bytes(&key), value),
        Value::String(text) => {
            let span = text.parse::<Span>().ok().filter(|_| is(SPANS));
            let speed = text.parse::<LinkSpeed>().ok().filter(|_| is(SPEEDS));
            match (span, speed) {
                (Some(span), _) => (format!("{key}_seconds"), seconds(span)),
                (None, Some(speed)) => (format!("{key}_bps"), speed.0.into()),
                (None, None) => (key, value),
            }
        }
        // Nothing is said in the place of a number or a time.
        Value::Null if is(SPANS) => (format!("{key}_seconds"), value),
        Value::Null if is(BYTES) => (in_bytes(&key), value),
        _ => (key, value),
    }
}

fn in_bytes(key: &str) -> String {
    match key {
        "bytes" => key.to_owned(),
        "len" => "length_bytes".to_owned(),
        "rate" => "rate_bytes_per_second".to_owned(),
        "region_len" => "region_bytes".to_owned(),
        _ => format!("{key}_bytes"),
    }
}

fn seconds(span: Span) -> Value {
    match span.0.subsec_nanos() {
        0 => span.0.as_secs().into(),
        _ => span.0.as_secs_f64().into(),
    }
}

fn moment(seconds: &Number) -> Value {
    let moment = seconds.as_i64().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    moment.map_or(Value::Null, |moment| moment.to_string().into())
}

/// Why a command failed.
pub(crate) fn failure(error: &anyhow::Error, message: &str) -> Value {
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    told(&failure.map_or("failed".to_owned(), Failure::word), message)
}

/// An error of this kind.
pub(crate) fn told(kind: &str, message: &str) -> Value {
    json!({"error": {"kind": kind, "message": message}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_in_the_keys() {
        let wire = json!({
            "size": 4096, "region_len": 16, "created": 0, "uptime": "1m 30s", "silent": null, "name": "a",
            "link_speed": "25Gbps", "regions": [{"region": "0f", "since": "250ms"}], "rate": 5, "ending": "1h"
        });
        let expected = json!({
            "size_bytes": 4096, "region_bytes": 16, "created": "1970-01-01T00:00:00Z", "uptime_seconds": 90,
            "silent_seconds": null, "name": "a", "link_speed_bps": 25_000_000_000_u64,
            "regions": [{"region": "0f", "since_seconds": 0.25}], "rate_bytes_per_second": 5, "ending": "1h"
        });
        assert_eq!(documented(wire), expected);
        let slow = json!({"reason": "too-slow", "round_trip": 5, "most": 4});
        assert_eq!(documented(slow), json!({"reason": "too-slow", "round_trip_ns": 5, "most_ns": 4}));
    }
}
