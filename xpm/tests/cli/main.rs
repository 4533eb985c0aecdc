//! The real binary, run against scripted daemons.

mod commands;
mod failures;
mod fixtures;
mod golden;
mod json;
mod lists;
mod policy;
mod settings;
mod support;
