//! The daemon that shows allocations of external memory as files.

use std::process::ExitCode;

use clap::Parser;
use xpm_blk::program::Program;
use xpm_blk::start::{self, Options};

/// Shows allocations of external memory as files, whose pages the kernel caches: memory that programs map, and
/// the RAM of virtual machines. `xpm fs attach` tells it what to show.
#[derive(Debug, Parser)]
#[command(name = "xpm-fs", version)]
struct Args {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    xpm_control::daemon::main(|args: Args| start::run(Program::Fs, args.options))
}
