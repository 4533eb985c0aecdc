//! Which of several allocators leads.

use serde::Serialize;
use xpm_protocol::api::health::{Check, Problem};
use xpm_protocol::api::{ErrorKind, allocator};

use crate::connect::{Daemon, Daemons};

/// One of several allocators.
#[derive(Debug, Serialize)]
pub(super) struct Allocator {
    url: String,
    role: Role,
    /// Why it does not answer, or whom it follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Role {
    Leads,
    Follows,
    Silent,
}

/// Asks each of them; nothing where there is only one.
pub(super) async fn read(daemons: &Daemons) -> Vec<Allocator> {
    let each = daemons.each_allocator().unwrap_or_default();
    if each.len() < 2 {
        return Vec::new();
    }
    let asked: Vec<_> = each.into_iter().map(|one| tokio::spawn(async move { ask(&one).await })).collect();
    let mut allocators = Vec::new();
    for one in asked {
        allocators.extend(one.await);
    }
    allocators
}

async fn ask(daemon: &Daemon) -> Allocator {
    let asked: Result<allocator::Status, _> = daemon.get("/v1/status").await;
    let (role, reason) = match asked {
        Ok(_) => (Role::Leads, None),
        Err(error) if error.is(ErrorKind::NotLeader) => (Role::Follows, Some(error.to_string())),
        Err(error) => (Role::Silent, Some(error.to_string())),
    };
    Allocator { url: daemon.url().to_owned(), role, reason }
}

/// All of them in a line; empty where there is only one.
pub(super) fn line(allocators: &[Allocator]) -> String {
    let all: Vec<String> = allocators.iter().map(Allocator::text).collect();
    if all.is_empty() { String::new() } else { format!("Allocators: {}\n", all.join(", ")) }
}

impl Allocator {
    fn text(&self) -> String {
        match self.role {
            Role::Leads => format!("{} leads", self.url),
            Role::Follows => format!("{} follows", self.url),
            Role::Silent => format!("{} does not answer", self.url),
        }
    }

    /// Its problem, if it has one.
    pub(super) fn problem(&self) -> Option<Problem> {
        let reason = self.reason.as_ref().filter(|_| self.role == Role::Silent)?;
        Some(Problem::new(Check::AllocatorDown, format!("allocator/{}", self.url), reason.clone()))
    }
}
