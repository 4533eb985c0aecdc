//! The program `xpm-appliance`.

use std::process::ExitCode;

use xpm_appliance::config::Cli;
use xpm_appliance::daemon;

fn main() -> ExitCode {
    xpm_control::daemon::main(|cli: Cli| daemon::run(cli.settle()?))
}
