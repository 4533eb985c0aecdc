//! How an allocation is opened.

use std::ffi::{CStr, c_char, c_int};
use std::mem::{MaybeUninit, offset_of};
use std::path::PathBuf;

use xpm_control::error_line;
use xpm_control::settings::Settings;
use xpm_mapping::{AttachOptions, Budget, Faults, SpaceOptions};
use xpm_protocol::Name;

use crate::error::Error;

/// Bytes of the options in the first version. Members that came later have 8 bytes each: in padding at the end a program that was
/// compiled before could have anything.
const FIRST_LEN: usize = offset_of!(xpm_options, budget_percent);

/// For the member `threads` of the options: pages are brought by the threads that touch them.
pub const XPM_IN_LINE: u32 = u32::MAX;

/// How an allocation is opened. Fill it with zeros first; what stays zero has the value that is said.
#[repr(C)]
pub struct xpm_options {
    /// sizeof(struct xpm_options), so that later versions can have more.
    pub size: usize,
    /// URLs of the allocators, with commas between them. NULL: what the environment variable XPM_ALLOCATOR says, or else
    /// `allocator` in ~/.config/xpm/xpm.toml or /etc/xpm/xpm.toml.
    pub allocator: *const c_char,
    /// File with the secret of the control plane. NULL: what the environment variable XPM_TOKEN_FILE says, or else `token-file` in
    /// one of those files. Empty: none.
    pub token_file: *const c_char,
    /// Local memory in bytes to be used as cache, at least 256 KiB. 0: 64 MiB.
    pub budget: u64,
    /// Bytes at the start of the allocation whose content stays, for xpm_map(), in 2 MiB; UINT64_MAX: all. 0: none.
    pub kept: u64,
    /// Threads that bring pages; whatever touches memory may touch the mapping, write(2) and other system calls included. 0: one.
    /// XPM_IN_LINE: none; the thread that touches a page brings it itself, in a handler of SIGBUS: quicker, but system calls that are given
    /// absent pages fail with EFAULT.
    pub threads: u32,
    /// Nonzero: takes the allocation from another owner, who is cut off.
    pub force: c_int,
    /// Identity of this client, 32 hexadecimal digits: after a crash it is let in again. NULL: a new one.
    pub client: *const c_char,
    /// Local memory in percent, 1 to 100, of the memory that is free on this machine and in this process's cgroups, in place of
    /// `budget`: it follows that, and becomes less when memory is short. 0: `budget` says it.
    pub budget_percent: u64,
}

impl xpm_options {
    fn attach(&self, name: &str) -> Result<AttachOptions, Error> {
        let said = self.settings()?;
        let urls = said.allocator.clone().ok_or_else(|| {
            Error::invalid(
                "no allocator is named: set `allocator` of the options, XPM_ALLOCATOR in the environment, or `allocator` in \
                 /etc/xpm/xpm.toml",
            )
        })?;
        let name = name.parse().map_err(|error| Error::invalid(format!("allocation `{name}`: {error}")))?;
        let mut attach = AttachOptions::new(urls, name);
        attach.token = said.token().map_err(|error| Error::invalid(error.to_string()))?;
        if let Some(client) = text(self.client)? {
            let id = client.parse().map_err(|error| Error::invalid(format!("client `{client}`: {error}")))?;
            attach.client = Some(id);
        }
        attach.force = self.force != 0;
        Ok(attach)
    }

    /// Allocators and token file: of the options, and where these say nothing, of the environment and the files.
    fn settings(&self) -> Result<Settings, Error> {
        let options = Settings {
            allocator: text(self.allocator)?
                .map(|urls| {
                    urls.parse().map_err(|error| Error::invalid(format!("allocator `{urls}`: {error}")))
                })
                .transpose()?,
            token_file: text(self.token_file)?.map(PathBuf::from),
            output: None,
        };
        let mut said = match options.is_whole() {
            // Nobody is refused for a file that is not needed.
            true => options,
            false => options.over(Settings::load().map_err(|error| Error::invalid(error_line(&error)))?),
        };
        said.token_file = said.token_file.filter(|path| !path.as_os_str().is_empty());
        Ok(said)
    }

    fn budget(&self) -> Result<Budget, Error> {
        match (self.budget, self.budget_percent) {
            (0, 0) => Ok(Budget::Fixed(64 << 20)),
            (bytes, 0) => Ok(Budget::Fixed(bytes)),
            (0, percent @ 1..=100) => Ok(Budget::percent(percent as u8)),
            (0, percent) => {
                Err(Error::invalid(format!("a budget of {percent}% cannot be: choose 1 to 100 percent")))
            }
            _ => {
                Err(Error::invalid("there are two budgets: set `budget`, or `budget_percent`, and not both"))
            }
        }
    }

    fn space(&self, budget: Budget, size: u64) -> SpaceOptions {
        SpaceOptions {
            budget,
            faults: match self.threads {
                XPM_IN_LINE => Faults::Inline,
                0 => Faults::Handled(1),
                threads => Faults::Handled(threads as usize),
            },
            kept: if self.kept == u64::MAX { size } else { self.kept },
        }
    }
}

/// What the options say of attaching, and, for an allocation of a size, of mapping it.
pub(crate) fn read(
    name: *const c_char,
    options: *const xpm_options,
) -> Result<(AttachOptions, impl Fn(u64) -> SpaceOptions), Error> {
    let name = text(name)?.ok_or_else(|| Error::invalid("no allocation is named"))?;
    let options = whole(options)?;
    let (attach, budget) = (options.attach(name)?, options.budget()?);
    Ok((attach, move |size| options.space(budget, size)))
}

/// The options with what an earlier header does not have as zeros.
fn whole(options: *const xpm_options) -> Result<xpm_options, Error> {
    if options.is_null() {
        return Err(Error::invalid("there are no options: give a structure"));
    }
    // SAFETY: the caller of xpm_open() gives such a structure, and its length is the first of it in every version.
    let len = unsafe { options.cast::<usize>().read() };
    if !(FIRST_LEN..=size_of::<xpm_options>()).contains(&len) {
        return Err(Error::invalid(format!(
            "the options have {len} bytes, not {FIRST_LEN} to {}: set `size` to sizeof(struct xpm_options), and compile with the header of this library",
            size_of::<xpm_options>()
        )));
    }
    let mut whole = MaybeUninit::<xpm_options>::zeroed();
    // SAFETY: by the caller's word they have so many bytes, which are not more than there is place for; a structure of numbers
    // and plain pointers may have any bits.
    unsafe {
        options.cast::<u8>().copy_to_nonoverlapping(whole.as_mut_ptr().cast(), len);
        Ok(whole.assume_init())
    }
}

/// The name of a slab.
pub(crate) fn name(name: *const c_char) -> Result<Name, Error> {
    let name = text(name)?.ok_or_else(|| Error::invalid("no slab is named"))?;
    name.parse().map_err(|error| Error::invalid(format!("slab {name:?}: {error}")))
}

fn text<'a>(text: *const c_char) -> Result<Option<&'a str>, Error> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller of xpm_open() gives NULL or strings, which last for that call.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Error::invalid("a text of the options is no UTF-8"))
}
