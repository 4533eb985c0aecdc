//! The real binary, run against scripted daemons.

mod commands;
mod failures;
mod fixtures;
mod policy;
mod support;
