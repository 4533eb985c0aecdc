//! Allocations at addresses, for the tests of the client library.

#![allow(unsafe_code)]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicU64;

use xpm_mapping::{AttachOptions, Attachment, Budget, Faults, Mapping, SpaceOptions, Volume};
use xpm_protocol::api::blk::TransportKind;

use crate::Cluster;

/// Bytes of a mebibyte.
pub const MIB: u64 = 1 << 20;
/// Bytes of a page.
pub const PAGE: usize = 4096;

/// An allocation, attached by this process.
///
/// # Panics
/// When it cannot be.
pub fn attached(cluster: &Cluster, name: &str, transport: Option<TransportKind>) -> (Attachment, Volume) {
    let mut options = attach_options(&cluster.allocator_url(), name);
    options.transport = transport;
    Attachment::attach(&options).expect("it can be attached")
}

/// How to attach an allocation.
///
/// # Panics
/// When that is no URL, or no name.
pub fn attach_options(url: &str, name: &str) -> AttachOptions {
    AttachOptions::new(url.parse().expect("a URL"), name.parse().expect("a name"))
}

/// A space with a fixed budget.
pub fn options(budget: u64, faults: Faults, kept: u64) -> SpaceOptions {
    SpaceOptions { budget: Budget::Fixed(budget), faults, kept }
}

/// The words of a mapping, which several threads may use.
pub fn words(mapping: &Mapping) -> &[AtomicU64] {
    // SAFETY: the mapping is mapped for as long as it lives, aligned to pages, and any bits are a u64; it is
    // accessed as atomics only.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr().as_ptr().cast::<AtomicU64>(), mapping.len() / 8) }
}

/// Numbers that look random, the same each time.
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// The next one, below `range`.
    pub fn below(&mut self, range: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % range
    }
}

/// Starts an ignored test of this test program in a process of its own, with the allocator's URL in
/// `XPM_TEST_ALLOCATOR`; gives its output as lines.
///
/// # Panics
/// When it cannot be started.
pub fn in_own_process(
    cluster: &Cluster,
    test: &str,
    environment: &[(&str, &str)],
) -> (Child, impl Iterator<Item = String> + use<>) {
    own_process(cluster, test, &[], environment)
}

/// The same, by way of another program, whose words `enter` are.
///
/// # Panics
/// When it cannot be started.
pub fn own_process(
    cluster: &Cluster,
    test: &str,
    enter: &[String],
    environment: &[(&str, &str)],
) -> (Child, impl Iterator<Item = String> + use<>) {
    let me = std::env::current_exe().expect("this program").display().to_string();
    let words: Vec<&String> = enter.iter().chain([&me]).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).args(["--exact", test, "--ignored", "--nocapture"]);
    command.envs(environment.iter().copied()).env("XPM_TEST_ALLOCATOR", cluster.allocator_url());
    let mut program =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it can be started");
    let output: ChildStdout = program.stdout.take().expect("its output");
    (program, BufReader::new(output).lines().map_while(Result::ok))
}
