//! A verifier of files in the manner of fsx: random operations on a file of fixed size or on a tree, each of which is
//! compared with a model in memory.
//!
//! Every operation is written to a log before it is done, one JSON object a line, below a line that names the seed.
//! [`replay`] does the operations of a log again. An operation that is not possible where it stands (a write to a slot
//! that has no file) is skipped, so a person can delete lines of a log in search of the few that matter.

mod model;
mod operation;

use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::model::Site;
pub use self::operation::{Generator, Operation};

/// The subject of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// One file, whose length stays.
    File,
    /// A directory, which is empty at the start.
    Tree,
}

/// The first line of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// File or tree.
    pub shape: Shape,
    /// Seed of the operations; not 0.
    pub seed: u64,
    /// The largest length of a file, in bytes; the length of a file of fixed size.
    pub max: usize,
}

/// An operation whose outcome is not that of the model.
#[derive(Debug)]
pub struct Failure {
    /// Its number, from 1; 0 for the check of all files at the end.
    number: u64,
    operation: Option<Operation>,
    why: String,
    seed: u64,
    log: PathBuf,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.operation {
            Some(operation) => write!(f, "operation {} {operation:?}", self.number)?,
            None => write!(f, "the check of all files")?,
        }
        write!(f, ": {}; seed {}, operations in {}", self.why, self.seed, self.log.display())
    }
}

impl std::error::Error for Failure {}

/// A run in progress.
pub struct Run {
    header: Header,
    generator: Generator,
    site: Site,
    log: File,
    log_path: PathBuf,
    count: u64,
}

impl Run {
    /// Begins at the file or the empty directory `path`. A file must hold zeros.
    ///
    /// # Errors
    /// When the log cannot be written, or the file is not there or not as long as the header says.
    pub fn new(header: Header, path: &Path, log_path: &Path) -> std::io::Result<Run> {
        let mut log = File::create(log_path)?;
        writeln!(log, "{}", serde_json::to_string(&header)?)?;
        let site = Site::new(header, path)?;
        let generator = Generator::new(header);
        Ok(Run { header, generator, site, log, log_path: log_path.to_owned(), count: 0 })
    }

    /// Does one random operation.
    ///
    /// # Errors
    /// When its outcome is not that of the model.
    pub fn step(&mut self) -> Result<(), Failure> {
        let operation = self.generator.next(&self.site);
        self.apply(operation)
    }

    fn apply(&mut self, operation: Operation) -> Result<(), Failure> {
        self.count += 1;
        // First, since an access to a mapping can end the process.
        let line = serde_json::to_string(&operation).expect("an operation is JSON");
        let done =
            writeln!(self.log, "{line}").map_err(|error| format!("the log cannot be written: {error}"));
        let done = done.and_then(|()| self.site.apply(&operation));
        done.map_err(|why| self.failure(Some(operation), why))
    }

    /// Closes all files; as many as have no name are gone then.
    pub fn close_all(&mut self) {
        self.site.close_all();
    }

    /// Compares all files that have names with the model, from outside of the page cache, and the names too.
    ///
    /// # Errors
    /// At the first difference.
    pub fn check_all(&mut self) -> Result<(), Failure> {
        self.site.check_all().map_err(|why| self.failure(None, why))
    }

    /// Operations so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    fn failure(&self, operation: Option<Operation>, why: String) -> Failure {
        let number = if operation.is_some() { self.count } else { 0 };
        Failure { number, operation, why, seed: self.header.seed, log: self.log_path.clone() }
    }
}

/// The header and the operations of a log.
///
/// # Errors
/// With the first line that is none.
pub fn read_log(path: &Path) -> Result<(Header, Vec<Operation>), String> {
    let file = File::open(path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
    let at = |index: usize, why: String| format!("{}, line {}: {why}", path.display(), index + 1);
    let mut header = None;
    let mut operations = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|error| at(index, error.to_string()))?;
        let bad = |error: serde_json::Error| at(index, error.to_string());
        match &header {
            None => header = Some(serde_json::from_str::<Header>(&line).map_err(bad)?),
            Some(header) => {
                let operation: Operation = serde_json::from_str(&line).map_err(bad)?;
                if !operation.fits(header.max) {
                    return Err(at(index, "a slot or a range is too large".to_owned()));
                }
                operations.push(operation);
            }
        }
    }
    Ok((header.ok_or_else(|| format!("{} is empty", path.display()))?, operations))
}

/// Does the operations of a log again, and writes a log of its own.
///
/// # Errors
/// At the first operation whose outcome is not that of the model.
pub fn replay(
    header: Header,
    operations: Vec<Operation>,
    path: &Path,
    log: &Path,
) -> Result<Run, Box<dyn std::error::Error>> {
    let mut run = Run::new(header, path, log)?;
    for operation in operations {
        run.apply(operation)?;
    }
    Ok(run)
}
