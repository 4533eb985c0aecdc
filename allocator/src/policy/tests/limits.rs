//! Files that exceed limits of size, depth or number.

use std::time::{Duration, Instant};

use super::*;

/// Time limit for one file, with a machine under load in mind; an unlimited computation takes longer.
const SOON: Duration = Duration::from_secs(20);

fn refused(file: PolicyFile, part: &str) {
    let begin: String = file.text.chars().take(60).collect();
    let start = Instant::now();
    let found = problems(&Policy::default(), file);
    assert!(found.iter().any(|one| one.contains(part)), "{begin}: {:?}", found.first());
    assert!(start.elapsed() < SOON, "{begin}: {:?}", start.elapsed());
}

#[test]
fn deep_nesting_is_refused() {
    let rule = "[[strategy]]\nname='s'\n[[strategy.rule]]\nname='a'\nlast=true\n";
    let key = "a.".repeat(15) + "a";
    let tables = |key: &str, times: usize| format!("{key}={}1{}", "{a=".repeat(times), "}".repeat(times));
    for text in [
        "[".repeat(1_000_000),
        format!("a = {}", "[".repeat(1 << 19)),
        format!("{rule}when={}", "{not=".repeat(200_000)),
        format!("{}=1", "a.".repeat(400_000)),
        format!("[{}a]", "a.".repeat(400_000)),
        format!("[[{}a]]", "\"a\".".repeat(200_000)),
        format!("x = {{ {}=1 }}", "a.".repeat(300_000)),
        format!("\"=\".{key} = {}1{}", format!("{{ {key} = ").repeat(47), "}".repeat(47)),
        format!("{rule}[strategy.rule.when]\n{}", tables(&key, 41)),
        format!("[[account]]\nname='a'\n[account.{key}]\n{}", tables(&key, 24)),
        format!("{rule}[strategy.rule.when]\nnot={}{{size-min=1}}{}", "{not=".repeat(38), "}".repeat(38)),
    ] {
        refused(toml(&text), "deep");
    }
    for text in
        ["[".repeat(1_000_000), "{\"a\":".repeat(150_000), format!("{{\"account\":{}", "[".repeat(1 << 19))]
    {
        refused(json(&text), "recursion limit");
    }
    refused(json(&format!("{{\"account\":[{}1{}]}}", "[".repeat(120), "]".repeat(120))), "deep");
    let nots = "{\"not\":".repeat(60) + "{\"size-min\":1}" + &"}".repeat(60);
    refused(json_strategy(&nots), "deep");
}

/// A strategy of one rule with this condition.
fn json_strategy(when: &str) -> PolicyFile {
    let rule = format!("{{\"name\":\"r\",\"last\":true,\"when\":{when}}}");
    json(&format!("{{\"strategy\":[{{\"name\":\"s\",\"rule\":[{rule}]}}]}}"))
}

#[test]
fn conditions_nest_eight_deep_at_most() {
    let nested = |depth: usize| "{\"not\":".repeat(depth - 1) + "{\"size-min\":1}" + &"}".repeat(depth - 1);
    assert_eq!(problems(&Policy::default(), json_strategy(&nested(8))), [] as [&str; 0]);
    refused(json_strategy(&nested(9)), "conditions lie more than 8 deep");
}

#[test]
fn too_many_documents_are_refused() {
    refused(toml(&"[[account]]\nname='a'\n".repeat(40_000)), "there twice");
    refused(toml(&"x".repeat((1 << 20) + 1)), "1048576 bytes");
    refused(PolicyFile { name: "x".repeat(1 << 20), ..toml("x") }, "1048576 bytes");
    let plan = Policy::default().plan(&vec![toml(""); 65], &Usage::default());
    assert!(plan.problems[0].text.contains("64 files"));
}

#[test]
fn large_strategies_are_refused() {
    let any =
        |one: &str, count: usize| json_strategy(&format!("{{\"any\":[{}]}}", vec![one; count].join(",")));
    let one = "{\"size-min\":1}";
    assert_eq!(problems(&Policy::default(), any(one, 9_999)), [] as [&str; 0]);
    refused(any(one, 10_000), "10000 conditions");
    refused(any(one, 60_000), "100000 values");
    refused(any("{}", 300_000), "100000 values");
    let rules = |count: u32| {
        let rules = (0..count).map(|n| format!("[[strategy.rule]]\nname='r{n}'\nreclaimable=true\n"));
        toml(&("[[strategy]]\nname='s'\n".to_owned() + &rules.collect::<String>()))
    };
    assert_eq!(problems(&Policy::default(), rules(1000)), [] as [&str; 0]);
    refused(rules(1001), "1000 rules, not 1001");
    let forbid = "{rdma=true},".repeat(5001);
    let text = format!("[[strategy]]\nname='s'\n[[strategy.rule]]\nname='r'\nforbid=[{forbid}]\n");
    refused(toml(&text), "5000 selectors");
}

/// A problem text is limited in length, whatever the input.
#[test]
fn problems_are_short() {
    let text = format!("[[account]]\nname='a'\n{}=1\n", "k".repeat(100_000));
    let plan = Policy::default().plan(&[toml(&text)], &Usage::default());
    let Problem { key, text, .. } = &plan.problems[0];
    assert!(key.len() < 500 && text.len() < 500 && text.contains("unknown field"), "{}", text.len());
    let many: String = (0..1000).map(|n| format!("[[account]]\nname='a{n}'\npriority=2000\n")).collect();
    assert_eq!(problems(&Policy::default(), toml(&many)).len(), 100);
}

fn link(from: &str, to: &str) -> String {
    format!("[[strategy]]\nname='{from}'\n[[strategy.rule]]\nname='a'\nuse='{to}'\n")
}

fn end(name: &str) -> String {
    format!("[[strategy]]\nname='{name}'\n")
}

/// A chain from `s0` to the strategy of this number.
fn chain(last: u32) -> String {
    let links = (0..last).map(|one| link(&format!("s{one}"), &format!("s{}", one + 1)));
    links.collect::<String>() + &end(&format!("s{last}"))
}

#[test]
fn chains_must_end() {
    assert!(problems(&Policy::default(), toml(&chain(8))).is_empty());
    refused(toml(&chain(9)), "9 times by this: at most 8");
    refused(toml(&chain(5000)), "at most 8");
}

#[test]
fn chains_include_existing_strategies() {
    let policy = applied(&chain(8));
    let longer = link("s8", "s9") + &end("s9");
    assert!(problems(&policy, toml(&longer))[0].starts_with("5 strategy[0].rule[0].use: "));
    let before = link("first", "s0");
    assert!(problems(&policy, toml(&before))[0].contains("9 times"));
    let shorter = end("s3") + &before;
    assert_eq!(problems(&policy, toml(&shorter)), [] as [&str; 0], "the one of the file counts");
    assert_eq!(problems(&policy, toml(&link("new", "s5"))), [] as [&str; 0]);
    for round in [link("s8", "s0"), link("s8", "s8"), link("s8", "x") + &link("x", "s8")] {
        assert!(problems(&policy, toml(&round))[0].contains("in a circle"), "{round}");
    }
}

/// There are 20 to the power of 9 paths through these strategies.
#[test]
fn many_paths_are_checked_in_one_walk() {
    let mut text = String::new();
    for (layer, number) in (0..10).flat_map(|layer| (0..20).map(move |number| (layer, number))) {
        text += &end(&format!("s{layer}-{number}"));
        for next in (0..20).filter(|_| layer < 9) {
            let rule = format!("name='r{next}'\nwhen={{size-min={next}}}\nuse='s{}-{next}'\n", layer + 1);
            text += &format!("[[strategy.rule]]\n{rule}");
        }
    }
    refused(toml(&text), "9 times by this");
}
