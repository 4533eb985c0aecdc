//! Suspends a machine to a file: its RAM stays where it is, and only the state of its devices is written.
//!
//! The file begins with a block of 4096 bytes, a JSON header padded with blanks; QEMU's state follows. The file is
//! written under another name and renamed when it is complete. A state matches the RAM only once: as soon as the
//! machine runs again, its RAM changes. So the file is renamed to `FILE.resumed` before the machine runs.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use xpm_protocol::{ByteSize, Name};
use xxhash_rust::xxh3::Xxh3;

use crate::Error;
use crate::arguments::Start;
use crate::machine::{Guarded, Terms, version_text};
use crate::memory::{Cache, Sizes};
use crate::migrate::settle;
use crate::migrate::tunnel;
use crate::place::{Destination, Machine, Place, Stage};
use crate::qmp::{Qmp, Version};
use crate::verbs::Way;

const HEAD_LEN: usize = 4096;
const FORMAT: u32 = 1;
const MONITOR_LIMIT: Duration = Duration::from_secs(5);

/// The header of a state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Version of the format.
    #[serde(rename = "xpm-vm-state")]
    pub format: u32,
    /// The machine's name.
    pub name: Name,
    /// RAM at the start.
    pub size: ByteSize,
    /// Largest total RAM.
    pub maximum: Option<ByteSize>,
    /// The version of QEMU that wrote it.
    pub qemu: Version,
    /// Whether the machine was paused; a paused machine stays paused after it is resumed.
    pub paused: bool,
    /// Length of the state in bytes.
    pub len: u64,
    /// XXH3-64 of the state.
    pub digest: u64,
}

/// Stops a machine and writes its state to a new file; returns the length of the state. Then its QEMU has ended.
///
/// # Errors
/// When the state could not be written; then the machine goes on.
pub async fn suspend(place: &Place, file: &Path) -> Result<u64, Error> {
    let _lock = place.lock_to_change()?;
    let mut machine = place.load_alive()?;
    if machine.stage != Stage::Here {
        return Err(Error::Machine(settle::advice(&machine)));
    }
    let process = machine.qemu.ok_or_else(|| Error::Machine("the record has no QEMU".to_owned()))?;
    if file.exists() {
        return Err(Error::Usage(format!(
            "{} is there already: give another name, or remove it",
            file.display()
        )));
    }
    let mut qmp = Qmp::connect(&place.drive(), MONITOR_LIMIT).await?;
    let (name, only) = (&machine.name, ": it must run or be paused");
    let paused = qmp.may_leave(&format!("write the state of machine `{name}`"), name, only).await?;
    let beside = with_suffix(file, ".new");
    let written = write(place, &mut machine, &mut qmp, paused, &beside, file).await;
    match written {
        Ok(len) => {
            settle::end_here(place, &mut machine, process, Some(&mut qmp)).await?;
            Ok(len)
        }
        Err(error) => {
            let _ = fs::remove_file(&beside);
            Err(go_on(place, &mut machine, &mut qmp, paused, error).await)
        }
    }
}

async fn write(
    place: &Place,
    machine: &mut Machine,
    qmp: &mut Qmp,
    paused: bool,
    beside: &Path,
    file: &Path,
) -> Result<u64, Error> {
    let cache = Cache::open(&machine.files)?;
    let mut options = OpenOptions::new();
    let out = options.write(true).create(true).truncate(true).mode(0o600).open(beside);
    let mut out = out.map_err(Error::io("write", beside))?;
    let failed = |why| Error::io("write", beside)(why);
    machine.stage = Stage::Leaving(Destination { to: file.display().to_string(), session: String::new() });
    place.save(machine)?;
    qmp.set_way(Way::File, true).await?;
    cache.flush_ahead()?;
    let listener = tunnel::listen(&place.state())?;
    if !paused {
        qmp.stop().await?;
    }
    qmp.migrate_to(&place.state()).await?;
    let mut from = tunnel::accept(&listener).await?;
    out.seek(SeekFrom::Start(HEAD_LEN as u64)).map_err(failed)?;
    let (mut buffer, mut digest, mut len) = (vec![0; 256 << 10], Xxh3::new(), 0);
    loop {
        let count = from.read(&mut buffer).await.map_err(Error::io("read from QEMU at", &place.state()))?;
        if count == 0 {
            break;
        }
        out.write_all(&buffer[..count]).map_err(failed)?;
        digest.update(&buffer[..count]);
        len += count as u64;
    }
    qmp.migration_is("completed").await?;
    cache.flush()?;
    cache.prove_clean()?;
    let head = Head {
        format: FORMAT,
        name: machine.name.clone(),
        size: machine.size,
        maximum: machine.maximum,
        qemu: qmp.version(),
        paused,
        len,
        digest: digest.digest(),
    };
    out.rewind().map_err(failed)?;
    out.write_all(&head.to_block()?).map_err(failed)?;
    out.sync_all().map_err(failed)?;
    fs::rename(beside, file).map_err(failed)?;
    sync_directory(file)?;
    Ok(len)
}

/// Lets the machine go on, because its state could not be written. Returns the error for the user.
async fn go_on(place: &Place, machine: &mut Machine, qmp: &mut Qmp, paused: bool, error: Error) -> Error {
    let name = machine.name.clone();
    let going = async {
        qmp.migrate_cancel().await?;
        if !paused && qmp.status().await? != "running" {
            qmp.cont().await?;
        }
        machine.stage = Stage::Here;
        place.save(machine)
    };
    match going.await {
        Ok(()) => Error::Machine(format!("machine `{name}` was not suspended and goes on: {error}")),
        Err(second) => Error::Machine(format!(
            "machine `{name}` was not suspended ({error}) and is stopped, for it cannot go on: {second}; run `xpm vm settle \
             {name}` when that is mended"
        )),
    }
}

/// The RAM of the machine `name`, from the file of its state.
///
/// # Errors
/// When the file is no state of this machine, or is damaged.
pub fn sizes(file: &Path, name: &Name) -> Result<Sizes, Error> {
    let (head, _) = open(file)?;
    match head.name == *name {
        true => Ok(Sizes { memory: head.size, maximum: head.maximum }),
        false => Err(Error::Usage(format!(
            "{} is the state of machine `{}`, not `{name}`",
            file.display(),
            head.name
        ))),
    }
}

/// Starts a suspended machine, with the RAM that [`sizes`] returns.
///
/// # Errors
/// When it could not be started. Then the file is at its place and still valid, unless the text says otherwise.
pub async fn resume(terms: &Terms, file: &Path) -> Result<Guarded, Error> {
    let (head, mut state) = open(file)?;
    let (mut guarded, mut qmp) = Guarded::start(terms, Start::Incoming).await?;
    let came = load(&mut guarded, &mut qmp, &head, &mut state, file).await;
    match came {
        Ok(()) => Ok(guarded),
        Err(error) => {
            guarded.end();
            Err(error)
        }
    }
}

async fn load(
    guarded: &mut Guarded,
    qmp: &mut Qmp,
    head: &Head,
    state: &mut File,
    file: &Path,
) -> Result<(), Error> {
    let (there, here) = (head.qemu, qmp.version());
    if (there.0, there.1) > (here.0, here.1) {
        return Err(Error::Usage(format!(
            "{} was written by QEMU {}, and this is the older {}",
            file.display(),
            version_text(there),
            version_text(here)
        )));
    }
    let socket = guarded.place.state();
    qmp.set_way(Way::File, false).await?;
    qmp.migrate_from(&socket).await?;
    let mut to = UnixStream::connect(&socket).await.map_err(Error::io("connect to QEMU at", &socket))?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = state.read(&mut buffer).map_err(Error::io("read", file))?;
        if count == 0 {
            break;
        }
        // A QEMU that has refused the state reports the reason in its migration status.
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
    qmp.migration_is("completed").await?;
    let used = with_suffix(file, ".resumed");
    fs::rename(file, &used).map_err(Error::io("rename", file))?;
    sync_directory(file)?;
    guarded.set_stage(Stage::Here)?;
    if !head.paused {
        let started = qmp.cont().await;
        started.map_err(|error| {
            Error::Machine(format!(
                "the machine did not start ({error}); it ran nothing, so its state {} still fits: rename it to {}",
                used.display(),
                file.display()
            ))
        })?;
    }
    Ok(())
}

/// Opens a state file, checks it, and seeks to the start of the state.
fn open(path: &Path) -> Result<(Head, File), Error> {
    let read = |why| Error::io("read", path)(why);
    let mut file = File::open(path).map_err(read)?;
    let mut block = vec![0; HEAD_LEN];
    let head = file.read_exact(&mut block).ok().and_then(|()| serde_json::from_slice::<Head>(&block).ok());
    let head = head.ok_or_else(|| Error::Usage(format!("{} is no state of a machine", path.display())))?;
    if head.format != FORMAT {
        return Err(Error::Usage(format!(
            "{} has form {}, and this xpm reads form {FORMAT}: use the xpm that wrote it",
            path.display(),
            head.format
        )));
    }
    let (mut buffer, mut digest, mut len) = (vec![0; 256 << 10], Xxh3::new(), 0);
    loop {
        let count = file.read(&mut buffer).map_err(read)?;
        if count == 0 {
            break;
        }
        digest.update(&buffer[..count]);
        len += count as u64;
    }
    if (len, digest.digest()) != (head.len, head.digest) {
        return Err(Error::Usage(format!(
            "{} is damaged: it has {len} bytes of state of {}, or others than were written",
            path.display(),
            head.len
        )));
    }
    file.seek(SeekFrom::Start(HEAD_LEN as u64)).map_err(read)?;
    Ok((head, file))
}

impl Head {
    fn to_block(&self) -> Result<Vec<u8>, Error> {
        let mut block = serde_json::to_vec(self).map_err(|error| Error::Machine(error.to_string()))?;
        // This fits: a name has at most 64 bytes, and the other fields are numbers.
        block.resize(HEAD_LEN - 1, b' ');
        block.push(b'\n');
        Ok(block)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn sync_directory(file: &Path) -> Result<(), Error> {
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(Error::io("sync", directory))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state_file(state: &[u8]) -> Vec<u8> {
        let mut digest = Xxh3::new();
        digest.update(state);
        let head = Head {
            format: FORMAT,
            name: "vm1".parse().unwrap(),
            size: ByteSize(1 << 30),
            maximum: None,
            qemu: (7, 2, 0),
            paused: false,
            len: state.len() as u64,
            digest: digest.digest(),
        };
        [head.to_block().unwrap(), state.to_vec()].concat()
    }

    #[test]
    fn a_state_is_read_whole_or_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let good = state_file(&[7; 100_000]);
        fs::write(&path, &good).unwrap();
        let (head, mut file) = open(&path).unwrap();
        let mut state = Vec::new();
        file.read_to_end(&mut state).unwrap();
        assert_eq!((head.len, state), (100_000, vec![7; 100_000]));
        let refused = |bytes: &[u8], text: &str| {
            fs::write(&path, bytes).unwrap();
            let error = open(&path).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(&good[..good.len() - 1], "is damaged");
        let mut changed = good.clone();
        changed[HEAD_LEN + 5] ^= 1;
        refused(&changed, "is damaged");
        refused(&good[..100], "no state of a machine");
        refused(b"", "no state of a machine");
    }

    proptest! {
        #[test]
        fn any_head_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("state");
            let mut block = bytes;
            block.resize(HEAD_LEN, b' ');
            fs::write(&path, &block).unwrap();
            prop_assert!(open(&path).is_err());
        }
    }
}
