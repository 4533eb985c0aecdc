//! Problems, as every command tells them: by severity and code (docs/health.md), the worst first.

use std::process::ExitCode;

use xpm_protocol::api::health::{Problem, Severity};

use crate::output::{WIDTH, one_line, wrapped};

/// Columns of the severity in front of a problem.
const SEVERITY: usize = 10;

/// The exit status that tells the worst of them: 0 for nothing or what is only worth knowing, 1 for a warning, 2 for
/// what is critical.
pub(crate) fn exit(problems: &[Problem]) -> ExitCode {
    ExitCode::from(match xpm_protocol::api::health::worst(problems) {
        None | Some(Severity::Info) => 0,
        Some(Severity::Warning) => 1,
        Some(Severity::Critical) => 2,
    })
}

/// The worst first, and those of one severity in the order in which they were found.
pub(crate) fn sort(problems: &mut [Problem]) {
    problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
}

/// Each problem with what to do about it, in lines of 80 columns unless all is to be on one.
pub(crate) fn lines(problems: &[Problem], wide: bool) -> String {
    let width = if wide { usize::MAX } else { WIDTH };
    problems.iter().map(|problem| told(problem, width)).collect()
}

fn told(problem: &Problem, width: usize) -> String {
    let Problem { code, severity, summary, remedy, .. } = problem;
    let mut text =
        wrapped(&format!("{severity:<SEVERITY$}"), &format!("{code}: {}", one_line(summary)), width);
    if !remedy.is_empty() {
        text.push_str(&wrapped(&" ".repeat(SEVERITY), &format!("-> {}", one_line(remedy)), width));
    }
    text
}

/// How many there are of each severity, in a few words.
pub(crate) fn summary(problems: &[Problem]) -> String {
    let count = |severity| problems.iter().filter(|problem| problem.severity == severity).count();
    let (critical, warnings, infos) =
        (count(Severity::Critical), count(Severity::Warning), count(Severity::Info));
    let plural = if warnings == 1 { "" } else { "s" };
    let words = [
        (critical, format!("{critical} critical")),
        (warnings, format!("{warnings} warning{plural}")),
        (infos, format!("{infos} worth knowing")),
    ];
    let said: Vec<String> = words.into_iter().filter(|(count, _)| *count > 0).map(|(_, text)| text).collect();
    let worst = match (critical, warnings) {
        (0, 0) => "ok",
        (0, _) => "warning",
        _ => "critical",
    };
    if said.is_empty() { worst.to_owned() } else { format!("{worst} ({})", said.join(", ")) }
}

/// The same in one word, for programs: `ok`, `warning` or `critical`.
pub(crate) fn health(problems: &[Problem]) -> &'static str {
    match xpm_protocol::api::health::worst(problems) {
        None | Some(Severity::Info) => "ok",
        Some(severity) => severity.as_str(),
    }
}

#[cfg(test)]
mod tests {
    use xpm_protocol::api::health::Check;

    use super::*;

    #[test]
    fn problems_are_told_within_80_columns() {
        let long = "an appliance is out of reach, and everything that was asked of it waits until it is back"
            .to_owned();
        let problem =
            Problem::new(Check::DeviceHolding, "device//dev/ublkb0", long).with_remedy("bring it back");
        let text = lines(std::slice::from_ref(&problem), false);
        assert_eq!(
            text,
            "warning   DEVICE_HOLDING: an appliance is out of reach, and everything that was\n          \
             asked of it waits until it is back\n          -> bring it back\n"
        );
        assert_eq!(lines(&[problem], true).lines().count(), 2);
    }
}
