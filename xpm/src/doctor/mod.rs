//! `xpm doctor`: what this machine is fit for, and whether its devices are safe.
//!
//! [`machine`] reads, [`parse`] understands what was read, [`fitness`], [`rdma`] and [`devices`] judge
//! it; the last four are pure.

mod codes;
mod devices;
mod fitness;
mod machine;
mod parse;
mod rdma;

use std::fmt;
use std::process::ExitCode;

use serde::Serialize;
use xpm_transport::rdma::inventory::Inventory;

use crate::connect::Daemons;
use crate::output::{Output, WIDTH, one_line, wrapped};

pub(crate) async fn run(daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let machine = machine::Machine::read();
    let mut checks = fitness::checks(&machine);
    let inventory = Inventory::read();
    checks.extend(rdma::checks(&inventory, &machine));
    let host = devices::Host::read(daemons, &machine, !inventory.devices.is_empty()).await;
    checks.extend(devices::checks(&host));
    codes::give(&mut checks);
    let safe = checks.iter().all(|check| check.severity != Verdict::Critical);
    let report = Report { safe, checks, rdma: rdma::Facts::from(&inventory) };
    output.print(&report, |report| text(&report.checks, output.is_wide()))?;
    Ok(if report.safe { ExitCode::SUCCESS } else { ExitCode::from(CRITICAL) })
}

/// Exit status where something that is in use may lose data or stop the machine.
const CRITICAL: u8 = 2;

/// What `doctor --json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether nothing that is in use is unsafe.
    safe: bool,
    checks: Vec<Check>,
    rdma: rdma::Facts,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    /// The heading that it stands under.
    group: String,
    item: String,
    severity: Verdict,
    /// The code of what is not as it should be (docs/health.md).
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    found: String,
    /// What mends it: a command where one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// What a check came to: the severities of problems, and `ok`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Something cannot be done on this machine as it is.
    Info,
    /// It works, but not as well or as safely as it could.
    Warning,
    /// Something that is in use now may lose data or stop the machine.
    Critical,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Ok => "ok",
            Verdict::Info => "info",
            Verdict::Warning => "warning",
            Verdict::Critical => "critical",
        })
    }
}

impl Check {
    fn new(group: &str, item: &str, severity: Verdict, found: impl Into<String>) -> Check {
        Check {
            group: group.to_owned(),
            item: item.to_owned(),
            severity,
            code: None,
            found: found.into(),
            remedy: None,
        }
    }

    fn ok(group: &str, item: &str, found: impl Into<String>) -> Check {
        Check::new(group, item, Verdict::Ok, found)
    }

    fn warn(group: &str, item: &str, found: impl Into<String>) -> Check {
        Check::new(group, item, Verdict::Warning, found)
    }

    fn info(group: &str, item: &str, found: impl Into<String>) -> Check {
        Check::new(group, item, Verdict::Info, found)
    }

    fn mend(mut self, remedy: impl Into<String>) -> Check {
        self.remedy = Some(remedy.into());
        self
    }
}

/// The checks under their headings.
fn text(checks: &[Check], wide: bool) -> String {
    let items = checks.iter().map(|check| check.item.chars().count()).max().unwrap_or(0);
    let width = if wide { usize::MAX } else { WIDTH };
    let mut text = String::new();
    let mut group = "";
    for check in checks {
        if check.group != group {
            group = &check.group;
            let gap = if text.is_empty() { "" } else { "\n" };
            text.push_str(&format!("{gap}{}\n", one_line(group)));
        }
        let first = format!("  {:<8} {:<items$}  ", check.severity, one_line(&check.item));
        let code = check.code.map(|code| format!("{code}: ")).unwrap_or_default();
        text.push_str(&wrapped(&first, &format!("{code}{}", one_line(&check.found)), width));
        if let Some(remedy) = &check.remedy {
            let below = " ".repeat(first.chars().count());
            text.push_str(&wrapped(&below, &format!("-> {}", one_line(remedy)), width));
        }
    }
    text
}

/// The report on these checks, as people see it.
#[cfg(test)]
fn text_of(mut checks: Vec<Check>) -> String {
    codes::give(&mut checks);
    text(&checks, false)
}
