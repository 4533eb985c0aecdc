//! Appliances whose addresses change, and that have several.

#![allow(missing_docs)]

use std::process::Command;

use serde_json::Value;
use xpm_tests::{Cluster, free_port, have, json_of, wait_until};

fn qemu_io(uri: &str, command: &str) -> String {
    let output =
        Command::new("qemu-io").args(["-f", "raw", uri, "-c", command]).output().expect("qemu-io starts");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn set(arguments: &mut [String], flag: &str, value: &str) {
    let place = arguments.iter().position(|word| word == flag).expect("it is said");
    arguments[place + 1] = value.to_owned();
}

fn device(cluster: &Cluster) -> Value {
    json_of(&cluster.dir().join("blk.sock"), &["blk", "show", "v", "--json"])
}

/// Each way to have the device shown follows the appliance, and so does one that starts while the allocator is away.
#[test]
fn a_live_device_follows_an_appliance_with_a_new_address() {
    if !have("qemu-io") {
        return;
    }
    let mut cluster = Cluster::start_kept(&[vec![]]);
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 9 0 16M").contains("wrote 16777216/16777216"));
    cluster.appliances[0].kill();
    let address = format!("127.0.0.2:{}", free_port());
    cluster.change_appliance(0, |arguments| set(arguments, "--nbd", &address));
    cluster.start_appliance(0);
    let said = qemu_io(&uri, "read -P 9 0 16M");
    assert!(said.contains("read 16777216/16777216") && !said.contains("failed"), "{said}");
    assert_eq!(device(&cluster)["state"], "live");
    let events = cluster.ok(&["events"]);
    assert!(events.contains("appliance-moved"), "{events}");

    let record = cluster.dir().join("blk/devices/v.json");
    wait_until("the record has the new address", || {
        std::fs::read_to_string(&record).is_ok_and(|record| record.contains(&address))
    });
    cluster.allocator.kill();
    cluster.restart_blk();
    wait_until("the device is back without the allocator", || device(&cluster)["state"] == "live");
    let said = qemu_io(&uri, "read -P 9 0 16M");
    assert!(said.contains("read 16777216/16777216") && !said.contains("failed"), "{said}");
}

#[test]
fn an_appliance_is_reached_at_whichever_of_its_addresses_works() {
    if !have("qemu-io") {
        return;
    }
    let ports: [String; 2] = std::array::from_fn(|_| free_port().to_string());
    let places = ["127.0.0.1", "[::1]"].map(|ip| format!("{ip}:{}", ports[0]));
    let nowhere = format!("127.0.0.3:{}", ports[1]);
    let name = format!("localhost:{}", ports[0]);
    let more = ["--nbd", &places[0], "--nbd", &places[1], "--advertise", &nowhere, "--advertise", &name];
    let cluster = Cluster::start_pool(&[more.to_vec()], false);
    let shown = cluster.json(&["appliance", "list"])[0]["info"]["endpoints"].clone();
    assert_eq!(shown["nbd"][0], nowhere.as_str(), "{shown}");
    assert_eq!(shown["names"][0], name.as_str(), "{shown}");
    let uri = cluster.attach("v", "16MiB", &[], "nbd-tcp");
    assert!(qemu_io(&uri, "write -P 9 0 16M").contains("wrote 16777216/16777216"));
    for place in &places {
        let port = place.parse::<std::net::SocketAddr>().expect("an address");
        std::net::TcpStream::connect(port).expect("it listens there");
    }
}
