//! Answers of daemons, as JSON, each checked against its type.

use serde_json::{Value, json};
use xpm_protocol::api::{ErrorBody, allocator, blk};

/// `value`, if it is a `T`.
fn checked<T: serde::de::DeserializeOwned>(value: Value) -> Value {
    serde_json::from_value::<T>(value.clone()).unwrap();
    value
}

pub(crate) fn refused(kind: &str, error: &str) -> Value {
    checked::<ErrorBody>(json!({"kind": kind, "error": error}))
}

pub(crate) fn appliance(name: &str, id: u128, state: &str) -> Value {
    let status = json!({
        "capacity": 4_u64 << 30, "granted": 1_u64 << 30, "reserved": 0, "free": 3_u64 << 30, "ready": 512 << 20,
        "resident": 100 << 20, "regions": 4, "grants": 1, "connections": 2, "uptime": "1h", "counters": {}
    });
    checked::<allocator::Appliance>(json!({
        "info": {
            "id": format!("{id:032x}"), "name": name, "version": "0.1.0", "control": "http://10.0.0.1:7701",
            "endpoints": {"host": format!("{:032x}", 9), "nbd": ["10.0.0.1:7702"]},
            "medium": "memory", "region_len": 256 << 20
        },
        "status": status, "state": state, "silent": "1m 30s", "regions": 4
    }))
}

pub(crate) fn allocation(name: &str, owner: Option<&str>) -> Value {
    let place = |region: u32| {
        let (id, name) = [(1, "a"), (2, "b")][region as usize % 2];
        json!({"region": format!("{region:032x}"), "appliance": format!("{id:032x}"), "appliance_name": name})
    };
    let mut allocation = json!({
        "name": name, "id": format!("{:032x}", 7), "size": 2_u64 << 30,
        "layout": {"kind": "striped", "columns": 2, "unit": 65536}, "region_len": 512 << 20,
        "epoch": 3, "state": "ready", "regions": [place(0), place(1), place(2), place(3)], "created": 1_700_000_000
    });
    if let Some(host) = owner {
        allocation["owner"] = json!({"client": format!("{:032x}", 5), "host_name": host, "purpose": "ublk", "since": 1_700_000_000});
    }
    checked::<allocator::Allocation>(allocation)
}

pub(crate) fn status() -> Value {
    checked::<allocator::Status>(json!({
        "version": "0.1.0", "uptime": "2h 5m", "appliances_up": 1, "appliances_silent": 1, "allocations": 1,
        "capacity": 4_u64 << 30, "free": 3_u64 << 30
    }))
}

pub(crate) fn device(name: &str, form: &str, state: &str, users: &[&str]) -> Value {
    let link = match state {
        "live" => json!({"state": "up"}),
        _ => json!({"state": "connecting", "reason": "connection refused"}),
    };
    let mut links = json!({"appliance": format!("{:032x}", 1), "appliance_name": "a", "transport": "nbd-tcp", "since": "10s", "reconnects": 1});
    links.as_object_mut().unwrap().extend(link.as_object().unwrap().clone());
    checked::<blk::Device>(json!({
        "name": name, "as": form, "path": "/dev/ublkb0", "size": 2_u64 << 30, "epoch": 3, "queues": 2, "depth": 128,
        "state": state, "links": [links], "users": users, "counters": {}, "in_flight": 0, "age": "1m"
    }))
}

pub(crate) fn blk_status(safe: bool) -> Value {
    checked::<blk::Status>(json!({
        "version": "0.1.0", "client": format!("{:032x}", 5), "pid": 4242, "uptime": "3m", "allocator": "http://a:7700",
        "devices": 1, "safety": [{"item": "mlockall", "ok": safe, "found": if safe { "locked" } else { "not locked" }}]
    }))
}
