//! `cargo xtask`: what a developer of xpm runs besides cargo itself.

mod apt;
mod bench;
mod demo;
mod lab;
mod package;
mod sanitize;
mod setup;
mod test;
mod tidy;
mod util;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Demo, tests, lab and benchmarks of xpm.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install the Debian packages that the other commands need; only those that are missing.
    Setup,
    /// Show the whole of xpm at work on this machine, with checks: about a minute after the build.
    Demo(demo::Args),
    /// Run scenarios in a QEMU guest with a stock Debian kernel, real devices and real daemons.
    Lab(lab::Args),
    /// Build everything, run all tests, then the lab.
    Test(test::Args),
    /// Run the libraries' unit tests, and end-to-end tests of what has unsafe code, under AddressSanitizer; builds
    /// everything once more.
    Sanitize(sanitize::Args),
    /// Check the form of the source tree: comments, documents, links, scripts.
    Tidy(tidy::Args),
    /// Make Debian packages of everything.
    Package(package::Args),
    /// Measure xpm and its peers in the same run, and print ratios.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs one command; false when something that was tested failed.
fn run(command: Command) -> Result<bool> {
    match command {
        Command::Setup => setup::run(setup::ALL).map(|()| true),
        Command::Demo(args) => demo::main(&args),
        Command::Lab(args) => lab::main(&args),
        Command::Test(args) => test::main(&args),
        Command::Sanitize(args) => sanitize::main(&args),
        Command::Tidy(args) => tidy::main(&args),
        Command::Package(args) => package::main(&args),
        Command::Bench(args) => bench::main(&args),
    }
}
