//! The daemon that shows allocations of external memory as block devices.

use std::process::ExitCode;

use clap::Parser;
use xpm_blk::program::Program;
use xpm_blk::start::{self, Options};

/// Shows allocations of external memory as block devices: ublk, the kernel's nbd, NBD sockets, or
/// vhost-user-blk disks of virtual machines. `xpm blk attach` selects the allocations to show.
#[derive(Debug, Parser)]
#[command(name = "xpm-blk", version)]
struct Args {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    xpm_control::daemon::main(|args: Args| start::run(Program::Blk, args.options))
}
