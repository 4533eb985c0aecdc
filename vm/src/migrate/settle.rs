//! Settles a migration that was interrupted because a command or a host died: finds out where the machine is, and
//! ends it at the other place.

use std::net::SocketAddr;
use std::time::Duration;

use rustix::process::Signal;
use xpm_control::token::Token;

use crate::migrate::wire::{Answer, Conn, Purpose, STEP_LIMIT};
use crate::ownership::Ownership;
use crate::place::{Machine, Place, Stage};
use crate::process::Process;
use crate::qmp::Qmp;
use crate::{Error, machine};

const MONITOR_LIMIT: Duration = Duration::from_secs(5);

/// The destination's report on an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The machine runs at the destination.
    Running,
    /// The machine does not run at the destination, and will not.
    Never,
    /// There is no answer, for this reason.
    Unknown(String),
}

/// The user's knowledge of where the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It runs or ran at the destination: the state here no longer matches its RAM.
    Gone,
    /// It never ran at the destination, and the QEMU there has ended.
    NotThere,
}

/// The result of settling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The machine goes on here.
    Here,
    /// The machine is at its destination, and has ended here.
    Gone,
}

/// Asks the destination how an attempt ended.
pub(crate) async fn ask(to: SocketAddr, token: Option<&Token>, session: &str) -> Outcome {
    let asked = async {
        let purpose = Purpose::Ask { session: session.to_owned() };
        Conn::open(to, token, purpose).await?.receive(STEP_LIMIT).await
    };
    match asked.await {
        Ok(Answer::Running) => Outcome::Running,
        Ok(Answer::Never { .. }) => Outcome::Never,
        Ok(Answer::Refused { why }) => Outcome::Unknown(why),
        Ok(other) => Outcome::Unknown(format!("{to} answered {other:?}")),
        Err(error) => Outcome::Unknown(error.to_string()),
    }
}

/// Advice for a machine that is not simply here.
pub(crate) fn advice(machine: &Machine) -> String {
    let name = &machine.name;
    match &machine.stage {
        Stage::Here => format!("machine `{name}` is here"),
        Stage::Starting => format!("machine `{name}` is being started: try again"),
        Stage::Incoming => format!("machine `{name}` has not arrived here yet"),
        Stage::Leaving(destination) | Stage::Gone(destination) => format!(
            "a command that moved machine `{name}` to {} has ended in between: `xpm vm settle {name}` finishes it",
            destination.to
        ),
        Stage::Left => {
            format!("machine `{name}` has left, and its QEMU is ending: `xpm vm settle {name}` ends it")
        }
    }
}

/// Finishes a migration whose command ended before the migration did.
///
/// # Errors
/// When the other host has to be asked and does not answer, and `known` does not state where the machine is.
pub async fn settle<O: Ownership>(
    place: &Place,
    token: Option<&Token>,
    known: Option<Known>,
    mut ownership: O,
) -> Result<Settled, Error> {
    let _lock = place.lock_to_change()?;
    let mut machine = place.load_alive()?;
    let process = machine.qemu.ok_or_else(|| Error::Machine("the record has no QEMU".to_owned()))?;
    let name = machine.name.clone();
    let is_gone = match (&machine.stage, known) {
        (Stage::Here, _) => return Ok(Settled::Here),
        (Stage::Starting | Stage::Incoming, _) => return Err(Error::Machine(advice(&machine))),
        (Stage::Left, _) => true,
        // The destination was never ordered to run the machine, so it does not.
        (Stage::Leaving(_), Some(Known::Gone)) => {
            return Err(Error::Usage(format!(
                "machine `{name}` was never handed over: run `xpm vm settle {name}`"
            )));
        }
        (Stage::Leaving(_), _) => false,
        (Stage::Gone(_), Some(known)) => known == Known::Gone,
        (Stage::Gone(destination), None) => {
            let to: SocketAddr = destination
                .to
                .parse()
                .map_err(|_| Error::Machine(format!("`{}` in the record is no address", destination.to)))?;
            match ask(to, token, &destination.session).await {
                Outcome::Running => true,
                Outcome::Never => false,
                Outcome::Unknown(why) => {
                    return Err(Error::Peer(format!(
                        "{to} does not say whether machine `{name}` runs there ({why}): look there, then give --gone if it \
                         runs or ran there, or --here if it never did and its QEMU has ended"
                    )));
                }
            }
        }
    };
    if is_gone {
        let committed = ownership.commit().await;
        end_here(place, &mut machine, process, None).await?;
        return committed.map(|()| Settled::Gone);
    }
    process.signal(Signal::CONT);
    let mut qmp = Qmp::connect(&place.drive(), MONITOR_LIMIT).await?;
    qmp.migrate_cancel().await?;
    ownership.roll_back().await?;
    if qmp.status().await? != "running" {
        qmp.cont().await?;
    }
    machine.stage = Stage::Here;
    place.save(&machine)?;
    Ok(Settled::Here)
}

/// Ends the QEMU of a machine that is elsewhere, and removes its files if no command supervises it here.
pub(crate) async fn end_here(
    place: &Place,
    machine: &mut Machine,
    process: Process,
    qmp: Option<&mut Qmp>,
) -> Result<(), Error> {
    machine.stage = Stage::Left;
    place.save(machine)?;
    let looked_after = machine.command.is_alive();
    process.signal(Signal::CONT);
    let ended = match qmp {
        Some(qmp) => machine::quit(qmp, process).await,
        None => match Qmp::connect(&place.drive(), MONITOR_LIMIT).await {
            Ok(mut qmp) => machine::quit(&mut qmp, process).await,
            Err(_) if process.kill() => Ok(()),
            Err(error) => Err(error.into()),
        },
    };
    ended?;
    if looked_after { Ok(()) } else { place.remove(machine) }
}
