//! Decisions for people.

use xpm_protocol::ByteSize;
use xpm_protocol::api::decision::{
    ApplianceTrace, Decision, DecisionOutcome, LimitCheck, ScorePart, Verdict,
};

use crate::age;
use crate::output::one_line;
use crate::table::Table;

/// The outcome in one line, and what would help.
pub(crate) fn outcome(decision: &Decision) -> String {
    let mut text = match &decision.outcome {
        DecisionOutcome::Placed { regions, region_len, appliances } => format!(
            "{}: placed: {} in {regions} regions of {region_len} on {appliances} appliances\n",
            decision.name, decision.size
        ),
        DecisionOutcome::Refused { why, remedies, .. } => {
            let mut text = format!("{}: refused: {}\n", decision.name, one_line(why));
            if !remedies.is_empty() {
                text.push_str("any of these would help:\n");
                remedies.iter().for_each(|remedy| text.push_str(&format!("  - {}\n", one_line(remedy))));
            }
            text
        }
    };
    for warning in &decision.warnings {
        text.push_str(&format!("warning: {}\n", one_line(warning)));
    }
    text
}

/// All of a decision.
pub(crate) fn decision(decision: &Decision) -> String {
    let mut text =
        format!("{} ({}), asked: {}\n", decision.name, age::since(decision.at), one_line(&decision.request));
    text.push_str(&documents(decision));
    text.push_str(&rules(decision));
    for demand in &decision.demands {
        text.push_str(&format!("asked of appliances: {}\n", one_line(demand)));
    }
    if !decision.limits.is_empty() {
        text.push_str(&format!("\n{}", limits(&decision.limits)));
    }
    text.push_str(&appliances(decision));
    text.push('\n');
    text + &outcome(decision)
}

fn documents(decision: &Decision) -> String {
    let list: Vec<String> =
        decision.documents.iter().map(|one| format!("{} version {}", one.document, one.version)).collect();
    let by = if list.is_empty() { "no document".to_owned() } else { list.join(", ") };
    format!("by {by}; documents at revision {}, seed {}\n", decision.revision, decision.seed)
}

fn rules(decision: &Decision) -> String {
    if decision.rules.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["RULE", "APPLIES", "WHY"]);
    for rule in &decision.rules {
        let applies = if rule.applies { "yes" } else { "no" };
        table.row([format!("{}/{}", rule.strategy, rule.rule), applies.to_owned(), rule.why.clone()]);
    }
    format!("\n{}", table.render())
}

fn limits(limits: &[LimitCheck]) -> String {
    let mut table = Table::new(&["LIMIT OF", ">HAS", ">ASKED", ">SOFT", ">HARD"]);
    let shown = |size: Option<ByteSize>| size.map(|size| size.to_string()).unwrap_or_default();
    for limit in limits {
        table.row([
            limit.of.clone(),
            limit.used.to_string(),
            limit.asked.to_string(),
            shown(limit.soft),
            shown(limit.hard),
        ]);
    }
    table.render()
}

fn appliances(decision: &Decision) -> String {
    if decision.appliances.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["APPLIANCE", ">REGIONS", ">POINTS", "WHY"]);
    decision.appliances.iter().for_each(|one| table.row(row(one)));
    let mut text = format!("\n{}", table.render());
    let left_out = decision.appliances_total.saturating_sub(decision.appliances.len() as u64);
    if left_out > 0 {
        let counts: Vec<String> =
            decision.rejected.iter().map(|count| format!("{} {}", count.appliances, count.reason)).collect();
        text.push_str(&format!(
            "and {left_out} more of {} appliances; rejected in all: {}\n",
            decision.appliances_total,
            counts.join(", ")
        ));
    }
    text
}

fn row(one: &ApplianceTrace) -> [String; 4] {
    match &one.verdict {
        Verdict::Rejected(rejection) => {
            [one.name.to_string(), String::new(), String::new(), format!("rejected: {rejection}")]
        }
        Verdict::Scored { score, parts, regions } => {
            let parts: Vec<String> = parts.iter().map(part).collect();
            [one.name.to_string(), regions.to_string(), score.to_string(), parts.join(", ")]
        }
    }
}

/// A part of a score: points of those that can be had.
fn part(part: &ScorePart) -> String {
    match part.weight {
        // A share of all the others together.
        0 => format!("{} {}.{}%", part.of, part.share / 10, part.share % 10),
        weight => {
            let tenths = u32::from(part.share) * u32::from(weight) / 100;
            format!("{} {}.{} of {weight}", part.of, tenths / 10, tenths % 10)
        }
    }
}

#[cfg(test)]
mod tests {
    use xpm_protocol::ApplianceId;
    use xpm_protocol::api::ErrorKind;
    use xpm_protocol::api::decision::{DocumentVersion, Rejection, RuleTrace};
    use xpm_protocol::policy::{DocumentName, Kind};

    use super::*;

    fn sample() -> Decision {
        let name = |text: &str| text.parse().unwrap();
        let trace = |number: u128, verdict| ApplianceTrace {
            id: ApplianceId::from_u128(number),
            name: name(&format!("a{number}")),
            verdict,
        };
        let scored = Verdict::Scored {
            score: 95,
            parts: vec![ScorePart { of: "free".into(), share: 955, weight: 100 }],
            regions: 4,
        };
        let slow = Rejection::LinkTooSlow { has: "1Gbps".parse().ok(), asked: "10Gbps".parse().unwrap() };
        Decision {
            at: 0,
            name: name("swap0"),
            allocation: None,
            request: "1GiB, account batch".into(),
            size: ByteSize(1 << 30),
            seed: 9,
            revision: 3,
            documents: vec![DocumentVersion {
                document: DocumentName { kind: Kind::Account, name: name("batch") },
                version: 2,
            }],
            strategy: Some(name("default")),
            rules: vec![RuleTrace {
                strategy: name("default"),
                rule: name("fast"),
                applies: true,
                why: "asks for a link speed".into(),
            }],
            demands: vec!["link speed of 10Gbps at least, and free".into()],
            limits: vec![LimitCheck {
                of: "account batch".into(),
                used: ByteSize(0),
                asked: ByteSize(1 << 30),
                soft: None,
                hard: Some(ByteSize(2 << 30)),
            }],
            appliances_total: 2,
            appliances: vec![trace(1, scored), trace(2, Verdict::Rejected(slow))],
            rejected: Vec::new(),
            outcome: DecisionOutcome::Placed { regions: 4, region_len: ByteSize(256 << 20), appliances: 1 },
            warnings: Vec::new(),
        }
    }

    #[test]
    fn all_of_it_is_said() {
        let text = decision(&sample());
        let expected = "\
by account `batch` version 2; documents at revision 3, seed 9

RULE          APPLIES  WHY
default/fast  yes      asks for a link speed
asked of appliances: link speed of 10Gbps at least, and free

LIMIT OF       HAS  ASKED  SOFT  HARD
account batch   0B   1GiB     -  2GiB

APPLIANCE  REGIONS  POINTS  WHY
a1               4      95  free 95.5 of 100
a2               -       -  rejected: has a link of 1Gbps, and 10Gbps is asked

swap0: placed: 1GiB in 4 regions of 256MiB on 1 appliances
";
        assert_eq!(text.split_once('\n').unwrap().1, expected);
    }

    #[test]
    fn remedies_are_listed() {
        let refused = DecisionOutcome::Refused {
            kind: ErrorKind::NoSpace,
            why: "it does not fit".into(),
            remedies: vec!["ask for less".into()],
        };
        let text = outcome(&Decision { outcome: refused, ..sample() });
        assert_eq!(text, "swap0: refused: it does not fit\nany of these would help:\n  - ask for less\n");
    }
}
