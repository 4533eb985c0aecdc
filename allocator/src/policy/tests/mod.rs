//! Tests of documents: applying, reading back, removing, conditions, and the published schema.

use proptest::prelude::*;
use xpm_protocol::Percent;
use xpm_protocol::api::policy::PolicyFormat;

use super::*;

mod limits;
mod problems;
mod round_trip;

fn file(format: PolicyFormat, text: &str) -> PolicyFile {
    PolicyFile { name: "pool".to_owned(), format, text: text.to_owned() }
}

fn toml(text: &str) -> PolicyFile {
    file(PolicyFormat::Toml, text)
}

fn json(text: &str) -> PolicyFile {
    file(PolicyFormat::Json, text)
}

/// A policy with the documents of `text`.
fn applied(text: &str) -> Policy {
    let plan = Policy::default().plan(&[toml(text)], &Usage::default());
    assert_eq!(plan.problems, []);
    plan.next.unwrap()
}

/// The problems, each as `line key: text`.
fn problems(policy: &Policy, file: PolicyFile) -> Vec<String> {
    let plan = policy.plan(&[file], &Usage::default());
    assert!(plan.next.is_none() || plan.problems.is_empty(), "all or nothing");
    plan.problems.iter().map(|one| format!("{} {}: {}", one.line, one.key, one.text)).collect()
}

fn name(kind: Kind, name: &str) -> DocumentName {
    DocumentName { kind, name: name.parse().unwrap() }
}

const POOL: &str = r#"
[[account]]
name = "batch"
priority = 10
hard-limit = "1TiB"
strategy = "default"
time-zone = "Europe/Berlin"
hours = [{ days = ["mon", "tue"], from = "22:00", to = "06:00" }]
lease = { duration = "8h", warning = "1h", grace = "5m" }

[[client]]
name = "db1"
account = "batch"
labels = { rack = "r1" }

[[appliance]]
name = "a1"
head-room = "10%"
labels = { rack = "r1" }

[[strategy]]
name = "default"

[[strategy.rule]]
name = "gold"
when = { account = ["batch"], size-min = "1GiB" }
require = { labels = { tier = "gold" } }
layout = { stripe = 4, stripe-unit = "64KiB" }

[[strategy.rule]]
name = "rest"
use = "other"

[[strategy]]
name = "other"

[[strategy.rule]]
name = "near"
locality = { within = "rack" }
"#;

#[test]
fn documents_are_made_changed_and_left_alone() {
    let policy = applied(POOL);
    assert_eq!(policy.revision(), 1);
    assert_eq!(policy.documents().into_contents().filter(|one| one.version() == Some(1)).count(), 5);
    let again = policy.plan(&[toml(POOL)], &Usage::default());
    assert!(
        again.changes.iter().all(|change| change.action == ChangeAction::Unchanged && change.version == 1)
    );
    assert_eq!((again.next.unwrap().revision(), again.documents.len()), (1, 0));
    let other = policy.plan(&[toml(&POOL.replace("priority = 10", "priority = 20"))], &Usage::default());
    let changed: Vec<_> = other.changes.iter().filter(|one| one.action == ChangeAction::Changed).collect();
    assert_eq!(
        (changed.len(), changed[0].version, &changed[0].document),
        (1, 2, &name(Kind::Account, "batch"))
    );
    assert!(changed[0].before.contains("priority = 10") && changed[0].after.contains("priority = 20"));
    assert_eq!(
        policy.account(&"batch".parse().unwrap()).unwrap().account.priority,
        10,
        "the old one stays as it is"
    );
}

#[test]
fn documents_read_back_can_be_applied_again() {
    let policy = applied(POOL);
    let text = toml::to_string_pretty(&policy.documents()).unwrap();
    let plan = policy.plan(&[toml(&text)], &Usage::default());
    assert_eq!(plan.problems, []);
    assert!(plan.changes.iter().all(|change| change.action == ChangeAction::Unchanged), "{text}");
    let text = serde_json::to_string(&policy.documents()).unwrap();
    assert_eq!(policy.plan(&[json(&text)], &Usage::default()).problems, []);
}

#[test]
fn the_second_of_two_operators_is_refused() {
    let policy = applied(POOL);
    let mine = toml("[[account]]\nname = 'batch'\nversion = 1\npriority = 5\n");
    let theirs = toml("[[account]]\nname = 'batch'\nversion = 1\npriority = 6\n");
    let policy = policy.plan(&[mine], &Usage::default()).next.unwrap();
    let refused = problems(&policy, theirs);
    assert_eq!(refused.len(), 1);
    assert!(
        refused[0].starts_with("3 account[0].version: it was changed meanwhile and has version 2"),
        "{refused:?}"
    );
    let gone = problems(&policy, toml("[[account]]\nname = 'none'\nversion = 1\n"));
    assert!(gone[0].contains("not there any more"), "{gone:?}");
}

#[test]
fn documents_in_use_are_not_removed() {
    let policy = applied(POOL);
    let refused = |name: &DocumentName, version, used: Option<&str>| {
        let error = policy.remove(name, version, used.map(str::to_owned)).unwrap_err();
        (error.0, error.1)
    };
    let other = name(Kind::Strategy, "other");
    let (kind, line) = refused(&other, None, None);
    assert!(kind == ErrorKind::InUse && line.contains("strategy `default`"), "{line}");
    assert_eq!(
        refused(&name(Kind::Strategy, "default"), None, None).0,
        ErrorKind::InUse,
        "an account names it"
    );
    assert_eq!(
        refused(&name(Kind::Account, "batch"), None, None).0,
        ErrorKind::InUse,
        "a client and a rule name it"
    );
    assert_eq!(refused(&name(Kind::Account, "none"), None, None).0, ErrorKind::NotFound);
    let client = name(Kind::Client, "db1");
    assert_eq!(refused(&client, Some(7), None).0, ErrorKind::Conflict);
    let (kind, line) = refused(&client, Some(1), Some("3 allocations"));
    assert!(kind == ErrorKind::InUse && line.contains("3 allocations"), "{line}");
    let next = policy.remove(&client, Some(1), None).unwrap();
    assert!(next.client(&client.name).is_none() && next.revision() == 2);
    let anew = next.plan(&[toml("[[client]]\nname = 'db1'\n")], &Usage::default());
    assert_eq!(anew.changes[0].version, 3, "a version is never used twice");
}

#[test]
fn problems_in_json_have_lines() {
    let text = "{\n  \"account\": [\n    {\"name\": \"a\",\n     \"lease\": {\n       \"duration\": \"1h\",\n       \"warning\": \"2h\"}}\n  ]\n}";
    assert!(problems(&Policy::default(), json(text))[0].starts_with("6 account[0].lease.warning: "));
    for (text, part) in [
        ("{\"account\": [],}", "not JSON"),
        ("// no\n{}", "not JSON"),
        ("", "not JSON"),
        ("[]", "a table"),
        ("{\"account\": [{\"name\": \"a\", \"name\": \"b\"}]}", "there twice"),
    ] {
        let found = problems(&Policy::default(), json(text));
        assert!(found.len() == 1 && found[0].contains(part), "{text}: {found:?}");
    }
}

#[test]
fn all_files_are_checked() {
    let files = [
        toml("[[account]]\nname = 1\n[[client]]\nname = 2\n"),
        json("{"),
        toml("[[account]]\nname = 'ok'\n"),
    ];
    let plan = Policy::default().plan(&files, &Usage::default());
    assert!(plan.problems.len() == 3 && plan.next.is_none() && plan.changes.is_empty());
}

#[test]
fn conditions_hold_or_name_the_part_that_does_not() {
    use xpm_protocol::policy::{Access, Labels};
    let text = r#"
[[account]]
name = "batch"
[[strategy]]
name = "s"
[[strategy.rule]]
name = "r"
last = true
when = { account = ["batch"], labels = { job = "x" }, size-min = "1GiB", access = ["block"], pool-used-max = "50%", account-used-max = "1TiB", any = [{ time = [{ days = ["sun"] }] }, { size-max = "2GiB" }], not = { client-labels = { rack = "bad" } } }
"#;
    let policy = applied(text);
    let when = &policy.strategy(&"s".parse().unwrap()).unwrap().rules[0].when;
    let (batch, job, bad) = ("batch".parse().unwrap(), pairs("job=x"), pairs("rack=bad"));
    let none = Labels::new();
    let good = Facts {
        // Midnight on a Thursday.
        unix: 0,
        account: Some(&batch),
        account_labels: &none,
        client: None,
        client_labels: &none,
        labels: &job,
        size: 1 << 30,
        access: Access::Block,
        pool_used: &|| Percent::new(50).unwrap(),
        account_used: 0,
    };
    assert_eq!(when.evaluate(&good), Ok(()));
    let other: Name = "other".parse().unwrap();
    for (facts, part) in [
        (Facts { account: None, ..good.clone() }, "another account"),
        (Facts { account: Some(&other), ..good.clone() }, "another account"),
        (Facts { labels: &none, ..good.clone() }, "the request has other labels"),
        (Facts { size: 1, ..good.clone() }, "less is asked for"),
        (Facts { access: Access::Mapping, ..good.clone() }, "another way"),
        (Facts { pool_used: &|| Percent::new(51).unwrap(), ..good.clone() }, "more of the pool"),
        (Facts { account_used: u64::MAX, ..good.clone() }, "the account has more"),
        (Facts { size: 3 << 30, ..good.clone() }, "none of several"),
        (Facts { client_labels: &bad, ..good.clone() }, "what must not be"),
    ] {
        assert!(when.evaluate(&facts).unwrap_err().to_string().contains(part), "{part}");
    }
    let sunday = Facts { unix: 3 * 86_400, size: 3 << 30, ..good };
    assert_eq!(when.evaluate(&sunday), Ok(()));
}

fn pairs(text: &str) -> xpm_protocol::policy::Labels {
    let (key, value) = text.split_once('=').unwrap();
    [(key.parse().unwrap(), value.parse().unwrap())].into()
}

/// People copy this example.
#[test]
fn the_example_of_the_manual_can_be_applied() {
    let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/strategies.md");
    let manual = std::fs::read_to_string(manual).unwrap();
    let example = manual.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert!(applied(example).strategy(&"default".parse().unwrap()).is_some());
}

/// Every key of the schema is in the manual.
#[test]
fn the_manual_has_every_key() {
    let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/strategies.md");
    let manual = std::fs::read_to_string(manual).unwrap();
    let schema: serde_json::Value = serde_json::from_str(&xpm_protocol::policy::schema()).unwrap();
    let types = schema["$defs"].as_object().unwrap().values().filter_map(|one| one["properties"].as_object());
    let keys: std::collections::BTreeSet<&String> = types.flat_map(|keys| keys.keys()).collect();
    assert!(keys.len() > 50, "{keys:?}");
    let told = |key: &str| {
        [format!("`{key}`"), format!("`{key}."), format!(".{key}`")].iter().any(|form| manual.contains(form))
    };
    let missing: Vec<_> = keys.into_iter().filter(|key| !told(key)).collect();
    assert!(missing.is_empty(), "not in docs/strategies.md: {missing:?}");
}

/// The published schema is the one of the types. `UPDATE_SCHEMA=1` writes it anew.
#[test]
fn the_published_schema_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.schema.json");
    let schema = xpm_protocol::policy::schema() + "\n";
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(path, &schema).unwrap();
    }
    assert!(
        std::fs::read_to_string(path).unwrap() == schema,
        "{path} is old: run this test with UPDATE_SCHEMA=1"
    );
}

proptest! {
    #[test]
    fn any_text_is_answered(text in ".{0,200}", lines in prop::collection::vec("[a-z\\[\\]{}=.'\" 0-9-]{0,30}", 0..8)) {
        for format in [PolicyFormat::Toml, PolicyFormat::Json] {
            let _ = Policy::default().plan(&[file(format, &text), file(format, &lines.join("\n"))], &Usage::default());
        }
    }

    #[test]
    fn a_damaged_file_is_answered(at in 0..POOL.len(), with in "[a-z\\[\\]{}=.'\" 0-9-]{0,3}") {
        let text = format!("{}{with}{}", &POOL[..at], &POOL[at..]);
        let plan = Policy::default().plan(&[toml(&text)], &Usage::default());
        prop_assert_eq!(plan.problems.is_empty(), plan.next.is_some());
    }
}
