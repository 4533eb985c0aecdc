//! Problems of the pool and of its allocations, with severity and remedy, for operators and monitoring.

use xpm_protocol::api::allocator::{Allocation, AllocationState, Appliance, ApplianceState, EndReason};
use xpm_protocol::api::health::{Check, Problem, Severity};
use xpm_protocol::{ByteSize, Span};

use super::Service;

impl Service {
    /// Every problem, the worst first.
    pub(super) fn problems(&self, appliances: &[Appliance]) -> Vec<Problem> {
        let allocations = self.list_allocations();
        let unix = self.now.unix;
        let mut problems = self.of_itself();
        problems.extend(appliances.iter().flat_map(of_appliance));
        problems.extend(allocations.iter().flat_map(|one| of_allocation(one, unix)));
        problems.extend(self.list_garbage().into_iter().map(|one| {
            let summary = format!(
                "appliance {} has {} of `{}` that no record knows",
                one.appliance_name, one.bytes, one.name
            );
            Problem::new(Check::GarbageFound, format!("appliance/{}", one.appliance_name), summary)
                .with_remedy(
                    "restore a newer backup if it is needed; else it is freed by itself (`xpm fsck`)",
                )
        }));
        problems.extend(self.handover_problems());
        problems.extend(self.early_problem());
        problems.extend(self.twin_problems());
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
        problems
    }

    /// Problems with the allocator's own metadata and clock.
    fn of_itself(&self) -> Vec<Problem> {
        let problem = |check, summary: &str, remedy: &str| {
            Problem::new(check, "allocator/allocator", summary).with_remedy(remedy)
        };
        let behind = self.behind.as_ref().map(|behind| {
            let remedy =
                "stop it, and run `xpm-allocator recover --from-network URL...` with every appliance";
            problem(Check::MetadataBehind, &behind.text, remedy)
        });
        let read_only = self.read_only.as_ref();
        let read_only =
            read_only.map(|why| problem(Check::MetadataReadOnly, why, "make room, or bring it back"));
        let clock = self.clock_of_day.is_doubted().then(|| {
            let summary = "the clock of the allocator's machine jumped, and nothing is judged by it yet";
            problem(Check::ClockJumped, summary, "check the time service of that machine")
        });
        behind.into_iter().chain(read_only).chain(clock).collect()
    }
}

fn of_appliance(one: &Appliance) -> Vec<Problem> {
    let name = &one.info.name;
    let object = format!("appliance/{name}");
    let mut problems = Vec::new();
    if one.state == ApplianceState::Silent {
        let silent = match one.silent {
            Some(silent) => {
                format!("has not been heard for {}", Span(std::time::Duration::from_secs(silent.0.as_secs())))
            }
            None => "has not been heard since the allocator started".to_owned(),
        };
        let (at_stake, severity) = match one.regions {
            0 => ("no allocation has memory on it".to_owned(), Severity::Warning),
            1 => ("1 region of an allocation is on it".to_owned(), Severity::Critical),
            regions => (format!("{regions} regions of allocations are on it"), Severity::Critical),
        };
        problems.push(
            Problem::new(
                Check::ApplianceSilent,
                object.clone(),
                format!("appliance {name} {silent}; {at_stake}"),
            )
            .with_severity(severity)
            .with_remedy(format!("bring it back; `xpm appliance show {name}` lists what is on it")),
        );
    }
    if let Some(drain) = &one.drain {
        problems.push(match &drain.stuck {
            Some(why) => Problem::new(
                Check::ApplianceDrainStuck,
                object,
                format!("the emptying of {name} is stuck: {why}"),
            )
            .with_remedy("bring memory, or delete what nobody needs"),
            None => {
                Problem::new(Check::ApplianceDraining, object, format!("appliance {name} is being emptied"))
            }
        });
    }
    problems
}

fn of_allocation(one: &Allocation, unix: u64) -> Vec<Problem> {
    let name = &one.name;
    let object = format!("allocation/{name}");
    let mut problems = Vec::new();
    let mut found = |problem: Problem| problems.push(problem);
    if !one.lost.is_empty() {
        let summary = format!("`{name}` has lost what it had on {}", one.lost.join(", "));
        found(
            Problem::new(Check::AllocationLost, object.clone(), summary)
                .with_remedy("stop what uses it, then delete it and make it anew"),
        );
    }
    if let Some(ending) = &one.ending {
        let graceful = one.lease.is_none_or(|lease| lease.ends > unix);
        // An end that was planned from the beginning is no problem until it comes.
        let severity = match (one.owner.is_some() && !graceful, ending.reason) {
            (true, _) => Severity::Critical,
            (false, EndReason::Reclaim) => Severity::Warning,
            (false, EndReason::Lease | EndReason::Hours) => Severity::Info,
        };
        found(
            Problem::new(Check::AllocationEnding, object.clone(), ending.text.clone())
                .with_severity(severity),
        );
    }
    if let Some(why) = &one.refused {
        found(Problem::new(
            Check::ChangeRefused,
            object.clone(),
            format!("the last change of `{name}`: {why}"),
        ));
    }
    let waiting = one.waiting.as_ref();
    match one.state {
        AllocationState::Ready => {}
        AllocationState::Waiting => {
            let (before, why) = waiting.map_or((0, ""), |one| (one.before.unwrap_or(0), one.why.as_str()));
            let size: ByteSize = one.size;
            found(
                Problem::new(
                    Check::RequestWaiting,
                    object,
                    format!("`{name}` waits for {size}, {before} requests before it: {why}"),
                )
                .with_remedy(format!("`xpm alloc delete {name}` takes the request back")),
            );
        }
        AllocationState::Refused => {
            let why = waiting.map_or("", |one| one.why.as_str());
            found(Problem::new(
                Check::RequestRefused,
                object,
                format!("`{name}` was refused after waiting: {why}"),
            ));
        }
        AllocationState::Creating => {
            found(Problem::new(Check::AllocationCreating, object, format!("`{name}` is being made")));
        }
        AllocationState::Deleting => {
            found(Problem::new(
                Check::AllocationDeleting,
                object,
                format!("`{name}` is being deleted: an appliance has not confirmed yet"),
            ));
        }
    }
    problems
}
