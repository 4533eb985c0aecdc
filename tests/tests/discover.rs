//! Appliances that find their allocator on the network, without being told where it is.

use serde_json::Value;
use xpm_tests::{Daemon, free_port, programs, wait_until};

fn start(dir: &std::path::Path, name: &str, program: &str, flags: &[(&str, String)]) -> Daemon {
    let words = flags.iter().flat_map(|(flag, value)| match value.is_empty() {
        true => vec![(*flag).to_owned()],
        false => vec![(*flag).to_owned(), value.clone()],
    });
    Daemon::start(dir, name, program, &words.collect::<Vec<_>>())
}

fn appliances(url: &str) -> Vec<Value> {
    let mut xpm = std::process::Command::new(programs().join("xpm"));
    let output = xpm.args(["--allocator", url, "--json", "appliance", "list"]).output().expect("xpm starts");
    serde_json::from_slice::<Value>(&output.stdout)
        .ok()
        .and_then(|list| list.as_array().cloned())
        .unwrap_or_default()
}

#[test]
fn an_appliance_finds_the_allocator_of_its_group() {
    let dir = tempfile::tempdir().expect("a directory");
    let group = format!("test-{}", std::process::id());
    let under = |name: &str| dir.path().join(name).display().to_string();
    let appliance = |name: &str, group: &str| {
        let flags = [
            ("--memory", "64MiB".to_owned()),
            ("--region-size", "16MiB".to_owned()),
            ("--name", name.to_owned()),
            ("--listen", format!("127.0.0.1:{}", free_port())),
            ("--nbd", format!("127.0.0.1:{}", free_port())),
            ("--run-dir", under(&format!("{name}-run"))),
            ("--state", under(&format!("{name}-state"))),
            ("--no-lock", String::new()),
        ];
        let discover = [(format!("--discover={group}"), String::new())];
        let discover: Vec<(&str, String)> =
            discover.iter().map(|(flag, value)| (flag.as_str(), value.clone())).collect();
        start(dir.path(), name, "xpm-appliance", &[&flags[..], &discover[..]].concat())
    };
    // It looks before there is anybody to be found, and one of another group never finds this one.
    let _ours = appliance("ours", &group);
    let other = appliance("other", &format!("{group}-other"));
    let port = free_port();
    let announce = format!("--announce={group}");
    let flags = [
        ("--listen", format!("127.0.0.1:{port}")),
        ("--data", under("allocator")),
        ("--heartbeat", "300ms".to_owned()),
        (announce.as_str(), String::new()),
    ];
    let _allocator = start(dir.path(), "allocator", "xpm-allocator", &flags);
    let url = format!("http://127.0.0.1:{port}");
    wait_until("the appliance registers", || !appliances(&url).is_empty());
    let found = appliances(&url);
    assert_eq!((found.len(), &found[0]["info"]["name"]), (1, &"ours".into()), "{found:?}");
    assert!(!other.log().contains("found the allocator"), "{}", other.log());
}
