use proptest::prelude::*;
use xpm_protocol::Percent;
use xpm_protocol::api::policy::PolicyFormat;

use super::*;

fn file(format: PolicyFormat, text: &str) -> PolicyFile {
    PolicyFile { name: "pool".to_owned(), format, text: text.to_owned() }
}

fn toml(text: &str) -> PolicyFile {
    file(PolicyFormat::Toml, text)
}

fn json(text: &str) -> PolicyFile {
    file(PolicyFormat::Json, text)
}

/// Documents that are there.
fn applied(text: &str) -> Policy {
    let plan = Policy::default().plan(&[toml(text)], &Usage::default());
    assert_eq!(plan.problems, []);
    plan.next.unwrap()
}

/// The problems as `line key: text`.
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
fn what_is_read_back_can_be_applied_again() {
    let policy = applied(POOL);
    let text = toml::to_string_pretty(&policy.documents()).unwrap();
    let plan = policy.plan(&[toml(&text)], &Usage::default());
    assert_eq!(plan.problems, []);
    assert!(plan.changes.iter().all(|change| change.action == ChangeAction::Unchanged), "{text}");
    let text = serde_json::to_string(&policy.documents()).unwrap();
    assert_eq!(policy.plan(&[json(&text)], &Usage::default()).problems, []);
}

#[test]
fn two_operators_at_once() {
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
fn removing() {
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

/// Each problem with its line and key, in both forms.
#[test]
fn problems_have_line_and_key() {
    let policy = applied(POOL);
    for (text, line, key, part) in [
        ("[[account]]\nname = 'a'\nprioritty = 1\n", 3, "account[0].prioritty", "unknown field"),
        ("[[account]]\npriority = 1\n", 1, "account[0]", "missing field `name`"),
        ("[[account]]\nname = 'a'\nhard-limit = '1X'\n", 3, "account[0].hard-limit", "its unit is unknown"),
        ("[[acount]]\nname = 'a'\n", 1, "acount", "strategy, account, client and appliance"),
        ("account = 1\n", 1, "account", "[[account]]"),
        ("[[account]\n", 1, "", "not TOML"),
        ("[[account]]\nname = 'a'\npriority = 1001\n", 3, "account[0].priority", "0 to 1000"),
        (
            "[[account]]\nname = 'a'\nsoft-limit = '2GiB'\nhard-limit = '1GiB'\n",
            3,
            "account[0].soft-limit",
            "above the hard limit",
        ),
        ("[[account]]\nname = 'a'\nstrategy = 'none'\n", 3, "account[0].strategy", "no strategy `none`"),
        ("[[account]]\nname = 'a'\nhours = [{ from = '8:00' }]\n", 3, "account[0].hours[0].from", "08:30"),
        (
            "[[account]]\nname = 'a'\ntime-zone = 'Mars/Base'\nhours = [{}]\n",
            3,
            "account[0].time-zone",
            "Europe/Berlin",
        ),
        ("[[account]]\nname = 'a'\ntime-zone = 'UTC'\n", 3, "account[0].time-zone", "without `hours`"),
        (
            "[[account]]\nname = 'a'\nlease = { duration = '0s' }\n",
            3,
            "account[0].lease.duration",
            "a second",
        ),
        (
            "[[account]]\nname = 'a'\n[account.lease]\nduration = '1h'\nwarning = '2h'\n",
            5,
            "account[0].lease.warning",
            "before it begins",
        ),
        (
            "[[account]]\nname = 'a'\nlease = { duration = '1h', total-max = '1m' }\n",
            3,
            "account[0].lease.total-max",
            "shorter",
        ),
        ("[[client]]\nname = 'c'\naccount = 'none'\n", 3, "client[0].account", "no account `none`"),
        ("[[account]]\nname = 'a'\n[[account]]\nname = 'a'\n", 4, "account[1].name", "there twice"),
        ("[[appliance]]\nname = 'a'\nlink-speed = '0bps'\n", 3, "appliance[0].link-speed", "some speed"),
        ("[[appliance]]\nname = 'a'\nhead-room = '200%'\n", 3, "appliance[0].head-room", "25%"),
    ] {
        check(&policy, text, line, key, part);
    }
}

#[test]
fn problems_of_strategies() {
    let policy = applied(POOL);
    let two = "[[strategy]]\nname = 's'\n[[strategy.rule]]\nname = 'a'\n";
    for (rule, line, key, part) in [
        ("", 3, "rule[0]", "does nothing"),
        (
            "last = true\n[[strategy.rule]]\nname = 'b'\nreclaimable = true\n",
            6,
            "rule[1]",
            "never reached: rule `a`",
        ),
        (
            "last = true\nwhen = { size-min = '1' }\n[[strategy.rule]]\nname = 'a'\nlast = true\n",
            8,
            "rule[1].name",
            "two rules",
        ),
        ("refuse = ' '\n", 5, "rule[0].refuse", "say why"),
        ("use = 'none'\n", 5, "rule[0].use", "no strategy `none`"),
        ("use = 's'\n", 5, "rule[0].use", "circle"),
        ("use = 'other'\nlast = true\n", 6, "rule[0].last", "goes on elsewhere"),
        ("require = {}\n", 5, "rule[0].require", "nothing about appliances"),
        ("forbid = [{}]\n", 5, "rule[0].forbid[0]", "use `refuse`"),
        ("prefer = [{ weight = 5 }]\n", 5, "rule[0].prefer[0]", "say which"),
        ("prefer = [{ weight = 0, select = { rdma = true } }]\n", 5, "rule[0].prefer[0].weight", "1 to 1000"),
        ("layout = { stripe-unit = '64KiB' }\n", 5, "rule[0].layout.stripe-unit", "without a stripe"),
        ("layout = { stripe = 2, stripe-unit = '5000' }\n", 5, "rule[0].layout.stripe-unit", "power of two"),
        ("layout = { stripe = 0 }\n", 5, "rule[0].layout.stripe", "1 to 1024"),
        ("layout = { region-size = '1MiB' }\n", 5, "rule[0].layout.region-size", "16MiB"),
        ("locality = {}\n", 5, "rule[0].locality", "how near"),
        ("weights = { free = 1001 }\n", 5, "rule[0].weights.free", "0 to 1000"),
        ("limit = {}\n", 5, "rule[0].limit", "limits nothing"),
        ("limit = { soft = '2GiB', hard = '1GiB' }\n", 5, "rule[0].limit.soft", "above the hard limit"),
        ("link-speed = 'fast'\n", 5, "rule[0].link-speed", "or `client`"),
        (
            "last = true\nwhen = { size-min = '2', size-max = '1' }\n",
            6,
            "rule[0].when.size-min",
            "never hold",
        ),
        (
            "last = true\nwhen = { pool-used-min = '90%', pool-used-max = '10%' }\n",
            6,
            "rule[0].when.pool-used-min",
            "never hold",
        ),
        ("last = true\nwhen = { not = {} }\n", 6, "rule[0].when.not", "never hold"),
        ("last = true\nwhen = { account = ['none'] }\n", 6, "rule[0].when.account[0]", "no account"),
        (
            "last = true\nwhen = { any = [{ time = [{}], time-zone = 'X' }] }\n",
            6,
            "rule[0].when.any[0].time-zone",
            "unknown",
        ),
        (
            "require = { labels = { rack = 'a' } }\n[[strategy.rule]]\nname = 'b'\nrequire = { labels = { rack = 'b' } }\n",
            8,
            "rule[1].require",
            "rule `a` requires",
        ),
        (
            "require = { appliances = ['x'] }\nforbid = [{ appliances = ['x', 'y'] }]\n",
            6,
            "rule[0].forbid[0]",
            "forbids all that rule `a` requires",
        ),
    ] {
        check(&policy, &format!("{two}{rule}"), line, &format!("strategy[0].{key}"), part);
    }
}

fn check(policy: &Policy, text: &str, line: u64, key: &str, part: &str) {
    let found = problems(policy, toml(text));
    let wanted = |one: &String| one.starts_with(&format!("{line} {key}: ")) && one.contains(part);
    assert!(found.iter().any(wanted), "{text}\nwanted {line} {key}: ..{part}.., found {found:#?}");
    let Ok(value) = ::toml::from_str::<serde_json::Value>(text) else { return };
    let found = problems(policy, json(&serde_json::to_string_pretty(&value).unwrap()));
    let wanted = |one: &String| {
        one.split_once(' ')
            .is_some_and(|(_, rest)| rest.starts_with(&format!("{key}: ")) && rest.contains(part))
    };
    assert!(found.iter().any(wanted), "as JSON: {text}\nwanted {key}: ..{part}.., found {found:#?}");
}

#[test]
fn lines_of_json() {
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
fn all_files_are_looked_at() {
    let files = [
        toml("[[account]]\nname = 1\n[[client]]\nname = 2\n"),
        json("{"),
        toml("[[account]]\nname = 'ok'\n"),
    ];
    let plan = Policy::default().plan(&files, &Usage::default());
    assert!(plan.problems.len() == 3 && plan.next.is_none() && plan.changes.is_empty());
}

#[test]
fn bombs_are_refused_quickly() {
    let deep = |open: &str, times: usize| open.repeat(times);
    for text in [
        deep("[", 1 << 20),
        format!("a = {}", deep("[", 1 << 19)),
        format!("[[strategy]]\nname='s'\n[[strategy.rule]]\nname='a'\nwhen={}", deep("{not=", 200_000)),
        format!("{}=1", deep("a.", 400_000)),
        format!("[{}a]", deep("a.", 400_000)),
        format!("[[{}a]]", deep("\"a\".", 200_000)),
        format!("x = {{ {}=1 }}", deep("a.", 300_000)),
        deep("[[account]]\nname='a'\n", 40_000),
        "x".repeat((1 << 20) + 1),
    ] {
        assert!(!problems(&Policy::default(), toml(&text)).is_empty());
    }
    for text in
        [deep("[", 1 << 20), deep("{\"a\":", 200_000), format!("{{\"account\":{}", deep("[", 1 << 19))]
    {
        assert!(!problems(&Policy::default(), json(&text)).is_empty());
    }
    let nine = "[[strategy]]\nname='s'\n[[strategy.rule]]\nname='a'\nlast=true\nwhen=".to_owned()
        + &"{not=".repeat(9)
        + "{size-min=1}"
        + &"}".repeat(9);
    assert!(problems(&Policy::default(), toml(&nine))[0].contains("more than 8 deep"));
}

#[test]
fn chains_end() {
    let strategy = |number: u32| {
        format!("[[strategy]]\nname='s{number}'\n[[strategy.rule]]\nname='a'\nuse='s{}'\n", number + 1)
    };
    let chain = |count: u32| {
        (0..count).map(strategy).collect::<String>() + &format!("[[strategy]]\nname='s{count}'\n")
    };
    assert!(problems(&Policy::default(), toml(&chain(8))).is_empty());
    assert!(problems(&Policy::default(), toml(&chain(9)))[0].contains("9 times by this: at most 8"));
}

#[test]
fn conditions() {
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
        // A Thursday.
        unix: 0,
        account: Some(&batch),
        account_labels: &none,
        client: None,
        client_labels: &none,
        labels: &job,
        size: 1 << 30,
        access: Access::Block,
        pool_used: Percent::new(50).unwrap(),
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
        (Facts { pool_used: Percent::new(51).unwrap(), ..good.clone() }, "more of the pool"),
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

/// The published schema is that of the types. `UPDATE_SCHEMA=1` writes it anew.
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
