//! Before `main`, and at the end.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::{AsFd as _, FromRawFd as _};

use rustix::fs::{SealFlags, fcntl_add_seals};
use xpm_client::mapping::{Budget, Faults, Space, SpaceOptions};
use xpm_client::{AttachOptions, Attachment};
use xpm_control::token::Token;
use xpm_protocol::api::run::{DESCRIPTOR, Run};
use xpm_protocol::policy::Amount;

use crate::external::{self, External};
use crate::threads;

/// Exit status where the program was not started, as of env(1) and timeout(1).
const NOT_STARTED: i32 = 125;

#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_END: extern "C" fn() = at_end;

/// Programs that start others, whom they leave it to.
const STARTERS: [&str; 16] = [
    "bash", "busybox", "chrt", "dash", "env", "ionice", "ksh", "nice", "nohup", "numactl", "setsid", "sh",
    "stdbuf", "taskset", "timeout", "zsh",
];

extern "C" fn at_start() {
    let program = std::env::current_exe().unwrap_or_default();
    if program.file_name().is_some_and(|name| STARTERS.iter().any(|starter| name == *starter)) {
        return;
    }
    let Some(descriptor) = std::env::var(DESCRIPTOR).ok().and_then(|text| text.parse().ok()) else { return };
    if let Err(line) = take(descriptor) {
        eprintln!("xpm run: {line}");
        // SAFETY: ends the process.
        unsafe { libc::_exit(NOT_STARTED) };
    }
}

/// Takes what is handed over, which nobody else gets then, and makes it usable.
fn take(descriptor: i32) -> Result<(), String> {
    // SAFETY: the process has one thread yet.
    unsafe { std::env::remove_var(DESCRIPTOR) };
    // SAFETY: it was inherited for this; what else it might be is found out below.
    let mut file = unsafe { File::from_raw_fd(descriptor) };
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(|error| {
        format!("{DESCRIPTOR} is set, and no descriptor is behind it: start programs by `xpm run` ({error})")
    })?;
    // Sealing goes once: the first one has it.
    if fcntl_add_seals(&file, SealFlags::SEAL).is_err() {
        return Ok(());
    }
    file.set_len(0).map_err(|error| format!("cannot take what is handed over: {error}"))?;
    let run: Run = serde_json::from_str(&text).map_err(|error| {
        format!("`xpm run` and this library do not fit together: install the same version of both ({error})")
    })?;
    threads::starting(|| begin(run))
}

fn begin(run: Run) -> Result<(), String> {
    let urls = run.allocator.parse().map_err(|error| format!("allocator: {error}"))?;
    let mut options = AttachOptions::new(urls, run.map.name.clone());
    options.client = Some(run.client);
    let token = run.token_file.as_deref().map(Token::load).transpose();
    options.token = token.map_err(|error| error.to_string())?;
    let (attachment, volume) = Attachment::adopt(&options, run.map).map_err(|error| error.to_string())?;
    let budget = match run.local {
        Amount::Bytes(local) => Budget::Fixed(local.0),
        Amount::Share(share) => Budget::percent(share.get()),
    };
    let space = SpaceOptions { budget, faults: Faults::Handled(run.threads), kept: 0 };
    let space = Space::open(volume, &space).map_err(|error| error.to_string())?;
    if !space.serves_system_calls() {
        return Err("system calls could not use external memory, for userfaultfd is allowed for user mode only: give this user \
                    access to /dev/userfaultfd (group xpm where the package is installed), or set vm.unprivileged_userfaultfd to 1"
            .to_owned());
    }
    // At the end the program may have closed its own.
    let account = run.verbose.then(|| std::io::stderr().as_fd().try_clone_to_owned().ok()).flatten();
    External::install(space, attachment, run.threshold.0 as usize, account.map(File::from));
    // SAFETY: the handler changes one atomic.
    unsafe { libc::pthread_atfork(None, None, Some(external::in_child)) };
    Ok(())
}

extern "C" fn at_end() {
    if let Some(external) = external::get() {
        external.say();
    }
}
