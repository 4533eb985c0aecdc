//! A message that a daemon owes the allocator is recorded, and delivered later.

use serde_json::Value;
use xpm_tests::{Cluster, wait_until};

fn owner(cluster: &Cluster, name: &str) -> Value {
    cluster.json(&["alloc", "show", name])["owner"].clone()
}

#[test]
fn what_is_detached_while_the_allocator_is_away_is_given_back_later_also_by_the_next_process() {
    let mut cluster = Cluster::start(1);
    for name in ["a", "b"] {
        cluster.attach(name, "16MiB", &[], "nbd-tcp");
    }
    cluster.allocator.kill();
    for name in ["a", "b"] {
        let output = cluster.xpm(&["blk", "detach", name]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.contains("the allocator does not know yet"), "{said}");
    }
    let listed = String::from_utf8_lossy(&cluster.xpm(&["blk", "list"]).stderr).into_owned();
    assert!(listed.contains("`a` is detached here") && listed.contains("`b` is detached here"), "{listed}");
    cluster.restart_blk();
    let listed = String::from_utf8_lossy(&cluster.xpm(&["blk", "list"]).stderr).into_owned();
    assert!(listed.contains("`a` is detached here"), "it is known to the next process: {listed}");

    cluster.restart_allocator();
    // One that is used again is not given back.
    let socket = cluster.dir().join("b2.sock");
    cluster.ok(&["blk", "attach", "b", "--as", &format!("nbd-socket={}", socket.display())]);
    wait_until("it is given back", || !owner(&cluster, "a").is_object());
    assert!(owner(&cluster, "b").is_object());
    wait_until("nothing is owed", || cluster.xpm(&["blk", "list"]).stderr.is_empty());
}
