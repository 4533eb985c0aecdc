//! `xpm`: the operator's command. It speaks to the allocator and to this host's xpm-blk over
//! their control interfaces and never touches the data path.

mod age;
mod alloc;
mod appliance;
mod attach;
mod blk;
mod cli;
mod client;
mod connect;
mod doctor;
mod events;
mod explain;
mod fsck;
mod life;
mod output;
mod policy;
mod run;
mod shell;
mod status;
mod swap;
mod table;
mod usage;
mod waiting;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;

use crate::cli::{Cli, Command};
use crate::connect::Daemons;
use crate::output::Output;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xpm: {}", output::one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime for control connections")?;
    runtime.block_on(dispatch(cli))
}

async fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let output = Output::new(cli.global.json);
    let daemons = Daemons::new(&cli.global);
    match cli.command {
        Command::Appliance(command) => appliance::run(command, &daemons, output).await?,
        Command::Alloc(command) => alloc::run(command, &daemons, output).await?,
        Command::Blk(command) => blk::run(command, &daemons, output).await?,
        Command::Swap(args) => return swap::run(args, output).await,
        Command::Apply(args) => return policy::apply(&args, &daemons, output).await,
        Command::Get(args) => policy::get(&args, &daemons, output).await?,
        Command::Edit(args) => return policy::edit(&args, &daemons, output).await,
        Command::Delete(args) => policy::delete(&args, &daemons, output).await?,
        Command::Schema => output::print(&(xpm_protocol::policy::schema() + "\n"))?,
        Command::Usage => usage::run(&daemons, output).await?,
        Command::Events { follow, after } => events::run(follow, after, &daemons, output).await?,
        Command::Backup { file } => life::backup(&file, &daemons, output).await?,
        Command::Fsck => return fsck::run(&daemons, output).await,
        Command::Rebalance(args) => life::rebalance(&args, &daemons, output).await?,
        Command::Run(args) => return run::run(&args, &cli.global, &daemons).await,
        Command::Client(command) => client::run(command, &daemons, output).await?,
        Command::Status => return status::run(&daemons, output).await,
        Command::Doctor => return doctor::run(&daemons, output).await,
        Command::Completions { shell } => shell::completions(shell)?,
        Command::Man { directory } => shell::man_pages(&directory, output)?,
    }
    Ok(ExitCode::SUCCESS)
}
