//! The QMP commands that this crate uses, named by their purpose.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use xpm_protocol::Name;

use crate::Error;
use crate::qmp::{Event, Qmp, QmpError};

/// How long a machine may take to stop: QEMU waits for the guest's disk requests under way.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long a migration may take for its next status. RAM is not sent, so the whole migration takes less than a
/// second.
pub(crate) const STATE_LIMIT: Duration = Duration::from_secs(60);
/// How long QEMU may take to quit.
pub(crate) const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// Kind of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// To another QEMU that answers, with a stop before the devices are sent.
    Move,
    /// To or from a file.
    File,
}

impl Qmp {
    /// The status of the machine, such as `running`.
    pub(crate) async fn status(&mut self) -> Result<String, QmpError> {
        let status = self.execute("query-status", json!({})).await?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Stops the machine. Returns when none of its processors runs and none of its requests is under way.
    pub(crate) async fn stop(&mut self) -> Result<(), QmpError> {
        self.forget_events();
        self.execute("stop", json!({})).await?;
        self.event("stop", STOP_LIMIT, named("STOP")).await
    }

    /// Lets the machine run.
    pub(crate) async fn cont(&mut self) -> Result<(), QmpError> {
        self.forget_events();
        self.execute("cont", json!({})).await?;
        self.event("cont", STOP_LIMIT, named("RESUME")).await
    }

    /// Configures the next migration. RAM in shared files always stays where it is.
    pub(crate) async fn set_way(&mut self, way: Way, outgoing: bool) -> Result<(), QmpError> {
        let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
        let capabilities = [
            capability("x-ignore-shared", true),
            capability("events", true),
            capability("return-path", way == Way::Move),
            capability("pause-before-switchover", way == Way::Move && outgoing),
        ];
        self.execute("migrate-set-capabilities", json!({"capabilities": capabilities})).await.map(drop)
    }

    /// Why QEMU cannot migrate this machine; empty if it can.
    async fn obstacles(&mut self) -> Result<Vec<String>, QmpError> {
        let migration = self.execute("query-migrate", json!({})).await?;
        let reasons = migration["blocked-reasons"].as_array().cloned().unwrap_or_default();
        Ok(reasons.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// Checks that the machine can leave this QEMU: QEMU must not refuse the operation `what` (such as `migrate
    /// machine `x``), and the machine must run or be paused; otherwise the error ends with `only`. Returns whether it
    /// is paused.
    ///
    /// # Errors
    /// Why it cannot leave.
    pub(crate) async fn may_leave(&mut self, what: &str, name: &Name, only: &str) -> Result<bool, Error> {
        let obstacles = self.obstacles().await?;
        if !obstacles.is_empty() {
            return Err(Error::Machine(format!("QEMU cannot {what}: {}", obstacles.join("; "))));
        }
        match self.status().await?.as_str() {
            "running" => Ok(false),
            "paused" => Ok(true),
            other => Err(Error::Machine(format!("machine `{name}` is `{other}`{only}"))),
        }
    }

    /// Starts to send the machine's state to a unix socket.
    pub(crate) async fn migrate_to(&mut self, socket: &Path) -> Result<(), Error> {
        self.forget_events();
        let uri = uri(socket)?;
        Ok(self.execute("migrate", json!({"uri": uri})).await.map(drop)?)
    }

    /// Makes QEMU listen for a machine's state at a unix socket.
    pub(crate) async fn migrate_from(&mut self, socket: &Path) -> Result<(), Error> {
        self.forget_events();
        let uri = uri(socket)?;
        Ok(self.execute("migrate-incoming", json!({"uri": uri})).await.map(drop)?)
    }

    /// Continues a migration that waits before the devices are sent.
    pub(crate) async fn migrate_continue(&mut self) -> Result<(), QmpError> {
        self.execute("migrate-continue", json!({"state": "pre-switchover"})).await.map(drop)
    }

    /// Waits until the migration has this status.
    ///
    /// # Errors
    /// When it fails or is cancelled, with QEMU's reason.
    pub(crate) async fn migration_is(&mut self, wanted: &str) -> Result<(), Error> {
        let end = |event: &Event| {
            let status = event.migration_status()?;
            (status == wanted || matches!(status, "failed" | "cancelled" | "completed"))
                .then(|| status.to_owned())
        };
        let found = self.event(&format!("migration until `{wanted}`"), STATE_LIMIT, end).await?;
        if found == wanted {
            return Ok(());
        }
        let migration = self.execute("query-migrate", json!({})).await.unwrap_or_default();
        let reason =
            migration["error-desc"].as_str().unwrap_or("QEMU gives no reason; its standard error may");
        Err(Error::Machine(format!("QEMU's migration is {found}: {reason}")))
    }

    /// Cancels a migration that is under way, and waits until it has ended. A completed or failed migration stays as
    /// it is.
    pub(crate) async fn migrate_cancel(&mut self) -> Result<(), Error> {
        self.execute("migrate_cancel", json!({})).await?;
        loop {
            let migration = self.execute("query-migrate", json!({})).await?;
            match migration["status"].as_str() {
                None | Some("none" | "completed" | "failed" | "cancelled")
                    // QEMU sets the machine's status a moment after the migration's.
                    if self.status().await? != "finish-migrate" =>
                {
                    return Ok(());
                }
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// Tells QEMU to end. It may end before it answers.
    pub(crate) async fn quit(&mut self) -> Result<(), QmpError> {
        match self.execute("quit", json!({})).await {
            Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Matches an event of this name.
pub(crate) fn named(name: &str) -> impl FnMut(&Event) -> Option<()> {
    move |event| (event.name == name).then_some(())
}

fn uri(socket: &Path) -> Result<String, Error> {
    match socket.to_str() {
        Some(path) => Ok(format!("unix:{path}")),
        None => Err(Error::Usage(format!("{} is not UTF-8, which QEMU's monitor needs", socket.display()))),
    }
}
