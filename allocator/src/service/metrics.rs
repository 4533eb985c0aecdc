//! Metrics for monitoring, in the text format of Prometheus (prometheus.io/docs/instrumenting/exposition_formats).

use std::fmt::Write as _;

use super::{Service, lease};

impl Service {
    /// All metrics. Names of accounts and allocations need no escape: see [`xpm_protocol::Name`].
    pub(super) fn metrics(&self) -> String {
        let status = self.status();
        let mut text = String::new();
        let one = |text: &mut String, name: &str, help: &str, value: u64| {
            // Writing to a string cannot fail.
            let _ = write!(text, "# HELP xpm_{name} {help}\n# TYPE xpm_{name} gauge\nxpm_{name} {value}\n");
        };
        one(&mut text, "appliances_up", "Appliances that are heard.", status.appliances_up);
        one(&mut text, "appliances_silent", "Appliances that are not heard.", status.appliances_silent);
        one(&mut text, "capacity_bytes", "Memory of all appliances that are up.", status.capacity.0);
        one(&mut text, "free_bytes", "What of it can still be asked for.", status.free.0);
        one(&mut text, "allocations", "Allocations.", status.allocations);
        one(&mut text, "waiting_requests", "Requests that wait for their turn.", self.waiting_count());
        one(&mut text, "policy_revision", "Revision of the documents.", self.policy.revision());
        self.usage_metrics(&mut text);
        self.ending_metrics(&mut text);
        text
    }

    fn usage_metrics(&self, text: &mut String) {
        head(text, "used_bytes", "Memory that allocations of an account, client or strategy take.");
        let usage = self.list_usage();
        for one in &usage {
            let _ = writeln!(
                text,
                "xpm_used_bytes{{kind=\"{}\",name=\"{}\"}} {}",
                one.of.kind, one.of.name, one.used.0
            );
        }
        head(text, "limit_bytes", "What they may take: soft, with a warning, and hard.");
        for one in &usage {
            for (limit, bytes) in [("soft", one.soft_limit), ("hard", one.hard_limit)] {
                if let Some(bytes) = bytes {
                    let (kind, name) = (one.of.kind, &one.of.name);
                    let _ = writeln!(
                        text,
                        "xpm_limit_bytes{{kind=\"{kind}\",name=\"{name}\",limit=\"{limit}\"}} {}",
                        bytes.0
                    );
                }
            }
        }
    }

    /// Allocations whose end is announced, with the moment at which their memory is freed.
    fn ending_metrics(&self, text: &mut String) {
        head(
            text,
            "allocation_frees_timestamp_seconds",
            "When the memory of an allocation that ends is freed.",
        );
        for (_, id) in &self.timers {
            let Some(entry) = self.allocations.get(id) else { continue };
            if let Some(ending) = lease::ending(&entry.record, self.now.unix) {
                let name = &entry.record.name;
                let _ = writeln!(
                    text,
                    "xpm_allocation_frees_timestamp_seconds{{name=\"{name}\"}} {}",
                    ending.frees
                );
            }
        }
    }
}

fn head(text: &mut String, name: &str, help: &str) {
    let _ = write!(text, "# HELP xpm_{name} {help}\n# TYPE xpm_{name} gauge\n");
}
