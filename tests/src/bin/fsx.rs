//! `fsx tree DIR`, `fsx file FILE`, `fsx replay LOG PATH`: verifies a file or a tree with random operations, see
//! [`xpm_tests::fsx`]. It is of use on any file system, also to see that the verifier itself is right.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use xpm_tests::fsx::{Header, Run, Shape, read_log, replay};

/// Random operations on files, compared with a model.
#[derive(Debug, Parser)]
struct Options {
    /// Seed of the operations.
    #[arg(long, default_value_t = 1, global = true)]
    seed: u64,
    /// Number of operations.
    #[arg(long, default_value_t = 10_000, global = true)]
    operations: u64,
    /// The largest length of a file in a tree, in bytes.
    #[arg(long, default_value_t = 20 << 20, global = true)]
    max: usize,
    /// The log that is written.
    #[arg(long, default_value = "fsx.log", global = true)]
    log: PathBuf,
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, clap::Subcommand)]
enum Subject {
    /// An empty directory.
    Tree { path: PathBuf },
    /// A file that holds zeros, whose length stays.
    File { path: PathBuf },
    /// Does the operations of a log again.
    Replay { from: PathBuf, path: PathBuf },
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(count) => {
            println!("fsx: {count} operations, all as they have to be");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("fsx: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<u64, Box<dyn std::error::Error>> {
    let (path, shape, max) = match &options.subject {
        Subject::Replay { from, path } => {
            let (header, operations) = read_log(from)?;
            let mut run = replay(header, operations, path, &options.log)?;
            run.check_all()?;
            return Ok(run.count());
        }
        Subject::Tree { path } => (path, Shape::Tree, options.max),
        Subject::File { path } => (path, Shape::File, usize::try_from(std::fs::metadata(path)?.len())?),
    };
    let mut run = Run::new(Header { shape, seed: options.seed, max }, path, &options.log)?;
    for _ in 0..options.operations {
        run.step()?;
    }
    run.check_all()?;
    Ok(run.count())
}
