//! `xpm doctor`: what this machine is fit for, and whether its devices are safe.
//!
//! [`machine`] reads, [`parse`] understands what was read, [`fitness`], [`rdma`] and [`devices`] judge
//! it; the last four are pure.

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
use crate::output::{Output, one_line};

pub(crate) async fn run(daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let machine = machine::Machine::read();
    let mut checks = fitness::checks(&machine);
    let inventory = Inventory::read();
    checks.extend(rdma::checks(&inventory, &machine));
    let host = devices::Host::read(daemons, &machine, !inventory.devices.is_empty()).await;
    checks.extend(devices::checks(&host));
    let safe = checks.iter().all(|check| check.verdict != Verdict::Unsafe);
    let report = Report { safe, checks, rdma: rdma::Facts::from(&inventory) };
    output.print(&report, Report::text)?;
    Ok(if report.safe { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

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
    verdict: Verdict,
    found: String,
    /// What mends it: a command where one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// As it should be.
    Ok,
    /// It works, but not as well or as safely as it could.
    Warn,
    /// Something cannot be done on this machine as it is.
    Missing,
    /// Something that is in use now may lose data or stop the machine.
    Unsafe,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Missing => "missing",
            Verdict::Unsafe => "UNSAFE",
        })
    }
}

impl Check {
    fn new(group: &str, item: &str, verdict: Verdict, found: impl Into<String>) -> Check {
        Check { group: group.to_owned(), item: item.to_owned(), verdict, found: found.into(), remedy: None }
    }

    fn ok(group: &str, item: &str, found: impl Into<String>) -> Check {
        Check::new(group, item, Verdict::Ok, found)
    }

    fn warn(group: &str, item: &str, found: impl Into<String>) -> Check {
        Check::new(group, item, Verdict::Warn, found)
    }

    fn missing(group: &str, item: &str, found: impl Into<String>) -> Check {
        Check::new(group, item, Verdict::Missing, found)
    }

    fn mend(mut self, remedy: impl Into<String>) -> Check {
        self.remedy = Some(remedy.into());
        self
    }
}

impl Report {
    fn text(&self) -> String {
        let width = self.checks.iter().map(|check| check.item.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        let mut group = "";
        for check in &self.checks {
            if check.group != group {
                group = &check.group;
                let gap = if text.is_empty() { "" } else { "\n" };
                text.push_str(&format!("{gap}{}\n", one_line(group)));
            }
            let found = one_line(&check.found);
            text.push_str(&format!("  {:<8} {:<width$}  {found}\n", check.verdict, one_line(&check.item)));
            if let Some(remedy) = &check.remedy {
                text.push_str(&format!("  {:<8} {:<width$}  -> {}\n", "", "", one_line(remedy)));
            }
        }
        text
    }
}
