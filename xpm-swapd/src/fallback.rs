//! The last resort: a local file or partition that is swap with a lower priority than external memory, for
//! when no external memory is available.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use xpm_control::proc;

use crate::config::FallbackConfig;
use crate::error::{Error, Step as _};
use crate::os::header::{self, Content};
use crate::os::{area, table};
use crate::state::AreaId;

/// Bytes that are written at once when a file is created.
const PIECE_LEN: usize = 1 << 20;

/// Ensures that the last resort is on, with a priority below `above`. Blocks, and for long if a file has to
/// be created. Returns the id of a created file, which the caller has to remember.
///
/// # Errors
/// When it cannot be on, with the remedy.
pub(crate) fn keep(
    wanted: &FallbackConfig,
    above: u16,
    known: Option<AreaId>,
) -> Result<Option<AreaId>, Error> {
    let path = &wanted.path;
    let shown = path.display();
    let swaps = proc::swaps().at("read /proc/swaps")?;
    if let Some(entry) = table::find(&swaps, &path.to_string_lossy()) {
        return match entry.priority < i32::from(above) {
            true => Ok(known),
            false => Err(Error::conflict(format!(
                "{shown} is swap with priority {}, not below that of external memory, {above}: `swapoff {shown}`, and it is \
                 turned on again with {}",
                entry.priority, wanted.priority
            ))),
        };
    }
    let made = match fs::metadata(path) {
        Ok(_) => known,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(make(wanted)?),
        Err(error) => return Err(error.at(format!("look at {shown}"))),
    };
    check(path)?;
    match (header::look(path).at(format!("read {shown}"))?, made) {
        (Content::Ours(_) | Content::Swap, _) => {}
        (Content::Blank, Some(id)) => {
            header::write(path, &id.0).at(format!("write the swap header of {shown}"))?;
        }
        (Content::Blank, None) => {
            return Err(Error::conflict(format!(
                "{shown} is no swap area: run `mkswap {shown}` if its \
                 content is not needed"
            )));
        }
        (Content::Foreign(what), _) => {
            return Err(Error::conflict(format!("{shown} has {what}: it is left as it is; name another")));
        }
    }
    area::turn_on(path, wanted.priority, false).at(format!("turn swap on at {shown}"))?;
    tracing::info!("{shown} is on as the last resort");
    Ok(made)
}

/// Creates the file, of written zeros: the kernel accepts no holes.
fn make(wanted: &FallbackConfig) -> Result<AreaId, Error> {
    let path = &wanted.path;
    let at = || format!("make {}", path.display());
    let Some(size) = wanted.size else {
        return Err(Error::conflict(format!(
            "{} is not there: make it, or give its size as `fallback.size`",
            path.display()
        )));
    };
    let id = AreaId::random()?;
    let beside = path.with_extension("xpm-new");
    let written = write_zeros(&beside, size.0).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // An incomplete file is useless, and takes space.
        let _ = fs::remove_file(&beside);
    }
    written.at(at())?;
    Ok(id)
}

fn write_zeros(path: &Path, len: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    let zeros = vec![0; PIECE_LEN];
    let mut left = len;
    while left > 0 {
        let piece = left.min(PIECE_LEN as u64) as usize;
        file.write_all(&zeros[..piece])?;
        left -= piece as u64;
    }
    file.sync_all()
}

/// Refuses files that cannot be swap without harm.
fn check(path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let file = File::open(path).at(format!("open {shown}"))?;
    let found = file.metadata().at(format!("look at {shown}"))?;
    if found.file_type().is_block_device() {
        return Ok(());
    }
    if !found.is_file() {
        return Err(Error::conflict(format!("{shown} is neither a file nor a block device")));
    }
    if found.mode() & 0o077 != 0 {
        return Err(Error::conflict(format!("{shown} can be read by others: chmod 600 {shown}")));
    }
    let hole =
        seek(&file, SeekFrom::Hole(0)).map_err(io::Error::from).at(format!("look for holes in {shown}"))?;
    match hole == found.len() && found.blocks() * 512 >= found.len() {
        true => Ok(()),
        false => Err(Error::conflict(format!(
            "{shown} has holes, and the kernel takes no such file as swap: remove it, and it is made anew"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use xpm_protocol::units::ByteSize;

    use super::*;

    #[test]
    fn a_file_is_made_whole_and_checked() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let wanted = FallbackConfig {
            path: directory.path().join("swap"),
            priority: 1,
            size: Some(ByteSize(3 << 20)),
        };
        make(&wanted).unwrap();
        check(&wanted.path).unwrap();
        assert_eq!(header::look(&wanted.path).unwrap(), Content::Blank);
        let refused = |what: &str| {
            let error = check(&wanted.path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        fs::set_permissions(&wanted.path, fs::Permissions::from_mode(0o644)).unwrap();
        refused("chmod 600");
        fs::set_permissions(&wanted.path, fs::Permissions::from_mode(0o600)).unwrap();
        File::options().write(true).open(&wanted.path).unwrap().set_len(8 << 20).unwrap();
        refused("holes");
    }

    #[test]
    fn data_of_others_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let wanted = |size| FallbackConfig { path: path.clone(), priority: 1, size };
        let error = keep(&wanted(None), 100, None).unwrap_err().to_string();
        assert!(error.contains("fallback.size"), "{error}");
        for (content, what) in [(vec![7; 1 << 20], "not zero"), (vec![0; 1 << 20], "mkswap")] {
            fs::write(&path, &content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let error = keep(&wanted(None), 100, None).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }
}
