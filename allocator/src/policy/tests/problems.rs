//! Each problem, with its line and its key.

use super::*;

/// Each problem of the table, in TOML and in JSON.
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
        ("[[account]]\nname = 'a'\nlink-speed = '0bps'\n", 3, "account[0].link-speed", "some speed"),
        ("[[account]]\nname = 'a'\nhard-limit = '9000P'\n", 3, "account[0].hard-limit", "a size is below"),
        ("[[account]]\nname = 'a'\nhard-limit = -1\n", 3, "account[0].hard-limit", "negative"),
        (
            "[[account]]\nname = 'a'\nlease = { duration = '1h', grace = '900years' }\n",
            3,
            "account[0].lease.grace",
            "a hundred years",
        ),
        (
            "[[account]]\nname = 'a'\nhours = [{ days = ['mon', 'monday'] }]\n",
            3,
            "account[0].hours[0].days[1]",
            "unknown variant",
        ),
        ("[[account]]\nname = 'a'\nat-close = 'stop'\n", 3, "account[0].at-close", "unknown variant"),
        ("[[account]]\nname = '-a'\n", 2, "account[0].name", "a name"),
        ("[[account]]\nname = 'a'\nversion = 3\n", 3, "account[0].version", "not there any more"),
        ("[[account]]\nname = 'batch'\nversion = 3\n", 3, "account[0].version", "has version 1"),
        ("[[client]]\nname = 'c'\nown-link-speed = '0bps'\n", 3, "client[0].own-link-speed", "some speed"),
        (
            "[[appliance]]\nname = 'a'\ncapacity = '1GiB'\nhead-room = '1GiB'\n",
            4,
            "appliance[0].head-room",
            "use `drain`",
        ),
        ("[[appliance]]\nname = 'a'\nramp-up = '900years'\n", 3, "appliance[0].ramp-up", "a hundred years"),
        ("[[client]]\nname = 'c'\naccount = 'none'\n", 3, "client[0].account", "no account `none`"),
        ("[[account]]\nname = 'a'\n[[account]]\nname = 'a'\n", 4, "account[1].name", "there twice"),
        ("[[appliance]]\nname = 'a'\nlink-speed = '0bps'\n", 3, "appliance[0].link-speed", "some speed"),
        ("[[appliance]]\nname = 'a'\nhead-room = '200%'\n", 3, "appliance[0].head-room", "25%"),
    ] {
        check(&policy, text, line, key, part);
    }
}

#[test]
fn problems_of_strategies_have_line_and_key() {
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
        (
            "forbid = [{ labels = { rack = 'a' } }]\n[[strategy.rule]]\nname = 'b'\nrequire = { labels = { rack = 'a' } }\n",
            8,
            "rule[1].require",
            "rule `a` forbids all",
        ),
        ("layout = {}\n", 5, "rule[0].layout", "sets nothing"),
        ("locality = { round-trip-max = '0s' }\n", 5, "rule[0].locality.round-trip-max", "takes some time"),
        ("require = { link-speed-min = '0bps' }\n", 5, "rule[0].require.link-speed-min", "some speed"),
        ("last = true\nwhen = { any = [{}] }\n", 6, "rule[0].when.any[0]", "always holds"),
        ("last = true\nwhen = { all = [{}] }\n", 6, "rule[0].when.all[0]", "always holds"),
        ("last = true\nwhen = { size-max = '9000P' }\n", 6, "rule[0].when.size-max", "a size is below"),
        (
            "last = true\nwhen = { account-used-min = 2, account-used-max = 1 }\n",
            6,
            "rule[0].when.account-used-min",
            "never hold",
        ),
        (
            "last = true\n[strategy.rule.when]\ntime-zone = 'UTC'\n",
            7,
            "rule[0].when.time-zone",
            "without `time`",
        ),
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
    let told = |file: PolicyFile, line: u64| {
        let text = file.text.clone();
        let found = problems(policy, file);
        let told = found.iter().any(|one| one.starts_with(&format!("{line} {key}: ")) && one.contains(part));
        assert!(told, "{text}\nwanted {line} {key}: ..{part}.., found {found:#?}");
    };
    told(toml(text), line);
    if let Ok(value) = ::toml::from_str::<serde_json::Value>(text) {
        told(json(&serde_json::to_string_pretty(&value).unwrap()), line_in_json(&value, key));
    }
}

/// The line of a key in printed JSON: the value is replaced by a mark, and the mark is searched.
fn line_in_json(value: &serde_json::Value, key: &str) -> u64 {
    let mut marked = value.clone();
    let pointer = format!("/{}", key.replace(['.', '['], "/").replace(']', ""));
    *marked.pointer_mut(&pointer).unwrap() = "@@".into();
    let text = serde_json::to_string_pretty(&marked).unwrap();
    text.lines().position(|line| line.contains("@@")).unwrap() as u64 + 1
}

/// Documents that are allowed, though they look odd.
#[test]
fn odd_but_valid_documents_are_accepted() {
    let policy = applied(POOL);
    let rule = "[[strategy]]\nname = 's'\n[[strategy.rule]]\nname = 'r'\n";
    let another = "[[strategy.rule]]\nname = 'r2'\n";
    for text in [
        "",
        "# .................................................................\n",
        "[[account]]\nname = 'a'\ndescription = '[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[['\n",
        "[[account]]\nname = 'a'\nhours = [{ from = '07:00', to = '07:00' }]\n",
        "[[account]]\nname = 'a'\nhard-limit = 0\n",
        "[[client]]\nname = 'new'\n",
        &format!("{rule}when = {{ client = ['unknown'] }}\nlast = true\n"),
        &format!("{rule}require = {{ appliances = ['unknown'] }}\n"),
        &format!(
            "{rule}when = {{ size-min = 2 }}\nrequire = {{ rdma = true }}\n{another}when = {{ size-max = 1 }}\nrequire = {{ rdma = false }}\n"
        ),
        &format!("{rule}when = {{ account = ['batch'] }}\nlast = true\n{another}reclaimable = true\n"),
    ] {
        assert_eq!(problems(&policy, toml(text)), [] as [&str; 0], "{text}");
    }
}

#[test]
fn limits_below_present_use_are_reported() {
    let mut record = crate::testing::allocation(1, "a");
    record.terms.account = Some("batch".parse().unwrap());
    record.terms.client = Some("db1".parse().unwrap());
    record.terms.strategies = vec!["default".parse().unwrap()];
    let mut usage = Usage::default();
    usage.add(&record);
    let (policy, used) = (applied(POOL), record.taken());
    let found = |text: &str, limit: u64| {
        let plan = policy.plan(&[toml(&format!("{text} = {limit}\n"))], &usage);
        let found = plan.problems.iter().map(|one| format!("{} {}: {}", one.line, one.key, one.text));
        found.collect::<Vec<_>>()
    };
    for (text, begin) in [
        (
            "[[account]]\nname = 'batch'\nhard-limit",
            "3 account[0].hard-limit: account `batch` has 256MiB already: set at least that",
        ),
        ("[[client]]\nname = 'db1'\nhard-limit", "3 client[0].hard-limit: client `db1` has 256MiB already"),
        (
            "[[strategy]]\nname = 'default'\n[[strategy.rule]]\nname = 'r'\nlimit.hard",
            "5 strategy[0].rule[0].limit.hard: strategy `default` has 256MiB already",
        ),
    ] {
        let refused = found(text, used - 1);
        assert!(refused.len() == 1 && refused[0].starts_with(begin), "{refused:?}");
        assert_eq!(found(text, used), [] as [&str; 0]);
    }
}
