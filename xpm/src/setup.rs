//! The settings of this run of the command: its options, then the settings of user and machine.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use xpm_control::error_line;
use xpm_control::settings::{OutputForm, Settings};

use crate::cli::Global;
use crate::output::Form;

/// Where an allocator is that nobody names.
pub(crate) const ALLOCATOR: &str = "http://127.0.0.1:7700";

/// Options and settings, put together.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    /// URLs of the allocators as they were written, with commas in between.
    pub(crate) allocator: String,
    pub(crate) blk: PathBuf,
    pub(crate) fs: PathBuf,
    pub(crate) token_file: Option<PathBuf>,
    /// How long an allocator that refuses connections is asked again.
    pub(crate) patience: Duration,
    pub(crate) form: Form,
}

impl Setup {
    /// Reads the files of settings.
    pub(crate) fn new(global: &Global) -> anyhow::Result<Setup> {
        let settings = Settings::of_files()
            .map_err(|error| anyhow::anyhow!("{}", error_line(&error)))
            .context("the settings cannot be used")?;
        let said = settings.allocator.map(|urls| urls.to_string());
        let token_file = global.token_file.clone().filter(|path| !path.as_os_str().is_empty());
        Ok(Setup {
            allocator: global.allocator.clone().or(said).unwrap_or_else(|| ALLOCATOR.to_owned()),
            blk: global.blk.clone(),
            fs: global.fs.clone(),
            token_file: token_file.or(settings.token_file),
            patience: global.patience.0,
            form: if global.json { Form::Wire } else { form(global.output.or(settings.output)) },
        })
    }
}

/// The form that was asked for.
pub(crate) fn form(chosen: Option<OutputForm>) -> Form {
    match chosen.unwrap_or_default() {
        OutputForm::Text => Form::Text,
        OutputForm::Wide => Form::Wide,
        OutputForm::Json => Form::Json,
        OutputForm::Yaml => Form::Yaml,
    }
}
