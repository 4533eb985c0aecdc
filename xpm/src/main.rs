//! `xpm`: the operator's command. It speaks to the allocator and to this host's xpm-blk over
//! their control interfaces and never touches the data path.

mod age;
mod alloc;
mod appliance;
mod attach;
mod blk;
mod cli;
mod client;
mod complete;
mod connect;
mod doctor;
mod events;
mod explain;
mod fs;
mod fsck;
mod hibernation;
mod json;
mod life;
mod listing;
mod lost;
mod man;
mod output;
mod patience;
mod policy;
mod problems;
mod run;
mod setup;
mod status;
mod swap;
mod table;
mod usage;
mod vm;
mod waiting;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};

use crate::cli::{Cli, Command, VmArgs, VmCommand};
use crate::connect::Daemons;
use crate::output::{Form, Output};
use crate::setup::Setup;

/// Exit status of wrong usage, as clap has it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    complete::answer_if_asked();
    if std::env::args_os().len() <= 1 {
        return print_help();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let form = if cli.global.json { Form::Wire } else { setup::form(cli.global.output) };
    // Made again when the settings are known.
    let mut output = Output::new(form);
    match run(cli, &mut output) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output.fail(&error);
            ExitCode::FAILURE
        }
    }
}

fn print_help() -> ExitCode {
    match output::print(&Cli::command().render_help().to_string()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Help and version go to standard output. A mistake is told in the form that was asked for, as far as that can be
/// seen.
fn usage(error: &clap::Error) -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let json = words.windows(2).any(|two| matches!(two[0].as_str(), "-o" | "--output") && two[1] == "json")
        || words.iter().any(|word| word == "-ojson" || word == "--output=json");
    if json && error.use_stderr() {
        let text = error.render().to_string();
        let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        eprintln!("{:#}", json::told("usage", &output::one_line(line)));
        return ExitCode::from(USAGE);
    }
    // No reader is left, so there is nothing to report.
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { USAGE } else { 0 })
}

fn run(cli: Cli, output: &mut Output) -> anyhow::Result<ExitCode> {
    match cli.command {
        // These need neither settings nor daemons.
        Command::Completions { shell } => complete::script(shell).map(|()| ExitCode::SUCCESS),
        Command::Man { directory } => man::man_pages(&directory, *output).map(|()| ExitCode::SUCCESS),
        Command::Schema => {
            output::print(&(xpm_protocol::policy::schema() + "\n")).map(|()| ExitCode::SUCCESS)
        }
        // Libvirt starts it with an environment of its own.
        Command::Vm(VmArgs { command: VmCommand::Exec(args), .. }) => vm::exec(&args),
        Command::Vm(VmArgs { command: VmCommand::Fetch(args), .. }) => vm::fetch(&args),
        command => {
            let setup = Setup::new(&cli.global)?;
            *output = Output::new(setup.form);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot start the runtime for control connections")?;
            runtime.block_on(dispatch(command, &setup, *output))
        }
    }
}

async fn dispatch(command: Command, setup: &Setup, output: Output) -> anyhow::Result<ExitCode> {
    let daemons = Daemons::new(setup);
    match command {
        Command::Appliance(command) => appliance::run(command, &daemons, output).await?,
        Command::Alloc(command) => return alloc::run(command, &daemons, output).await,
        Command::Blk(command) => blk::run(command, &daemons, output).await?,
        Command::Fs(command) => fs::run(command, &daemons, output).await?,
        Command::Swap(args) => return swap::run(args, output).await,
        Command::Apply(args) => return policy::apply(&args, &daemons, output).await,
        Command::Get(args) => policy::get(&args, &daemons, output).await?,
        Command::Edit(args) => return policy::edit(&args, &daemons, output).await,
        Command::Delete(args) => policy::delete(&args, &daemons, output).await?,
        Command::Usage(args) => usage::run(&args, &daemons, output).await?,
        Command::Events(args) => events::run(args, &daemons, output).await?,
        Command::Backup { file } => life::backup(&file, &daemons, output).await?,
        Command::Fsck => return fsck::run(&daemons, output).await,
        Command::Rebalance(args) => life::rebalance(&args, &daemons, output).await?,
        Command::Run(args) => return run::run(&args, setup, &daemons).await,
        Command::Vm(args) => return vm::run(args, setup, &daemons, output).await,
        Command::Client(command) => client::run(command, &daemons, output).await?,
        Command::Status(args) => return status::run(&args, &daemons.impatient(), output).await,
        Command::Doctor => return doctor::run(&daemons, output).await,
        Command::Completions { .. } | Command::Man { .. } | Command::Schema => {}
    }
    Ok(ExitCode::SUCCESS)
}
