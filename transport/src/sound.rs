//! Copies from and to memory of which a page may be unusable: an uncorrectable error of the hardware, or a
//! file that was made shorter. Touching such a page raises SIGBUS. The copies of this module return an error
//! instead, and the process continues.
//!
//! A handler of SIGBUS checks whether the faulting instruction is the one copy instruction of this module; if so, the
//! process continues behind that instruction. Any other SIGBUS goes to the handler that was there before. System
//! calls that access such a page fail with EFAULT (recvmsg, sendmsg) or EIO (pread), and raise no signal.
//!
//! On processors other than x86-64 these are plain copies, and such a page ends the process.
//!
//! Sources: sigaction(2), prctl(2) on `PR_MCE_KILL`; the *Intel SDM* on interrupted `REP MOVSB`: the
//! registers say how much is left, and the reported address is that of the instruction.

#![allow(unsafe_code)]

use std::io;

use crate::io::IoBuf;

/// The memory, or a part of it, cannot be accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("memory cannot be accessed any more")]
pub struct BadMemory;

impl IoBuf {
    /// As [`IoBuf::copy_from_slice`], but once [`survive`] was called, bad memory is an error. The bytes
    /// copied before the bad page stay.
    ///
    /// # Errors
    /// [`BadMemory`].
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn try_copy_from_slice(self, bytes: &[u8]) -> Result<(), BadMemory> {
        assert_eq!(self.len(), bytes.len(), "copy between buffers of different lengths");
        // SAFETY: the slice is readable. The buffer is mapped by the contract of `IoBuf::new`, though its
        // memory may be bad; by the same contract the two do not overlap.
        unsafe { copy(self.as_ptr(), bytes.as_ptr(), bytes.len()) }
    }

    /// As [`IoBuf::copy_to_slice`], but once [`survive`] was called, bad memory is an error.
    ///
    /// # Errors
    /// [`BadMemory`].
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn try_copy_to_slice(self, target: &mut [u8]) -> Result<(), BadMemory> {
        assert_eq!(self.len(), target.len(), "copy between buffers of different lengths");
        // SAFETY: as in `try_copy_from_slice`, with source and target exchanged.
        unsafe { copy(target.as_mut_ptr(), self.as_ptr(), target.len()) }
    }

    /// As [`IoBuf::copy_to`] for buffers that do not overlap, but once [`survive`] was called, bad memory is
    /// an error.
    ///
    /// # Errors
    /// [`BadMemory`].
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn try_copy_to(self, target: IoBuf) -> Result<(), BadMemory> {
        assert_eq!(self.len(), target.len(), "copy between buffers of different lengths");
        // SAFETY: both are mapped by the contract of `IoBuf::new`, though their memory may be bad.
        unsafe { copy(target.as_ptr(), self.as_ptr(), self.len()) }
    }

    /// As [`IoBuf::zero`], but once [`survive`] was called, bad memory is an error. The bytes zeroed before
    /// the bad page stay.
    ///
    /// # Errors
    /// [`BadMemory`].
    pub fn try_zero(self) -> Result<(), BadMemory> {
        const ZEROS: [u8; 4096] = [0; 4096];
        (0..self.len()).step_by(ZEROS.len()).try_for_each(|start| {
            let part = self.part(start, ZEROS.len().min(self.len() - start));
            part.try_copy_from_slice(&ZEROS[..part.len()])
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use std::ffi::{c_int, c_void};

    use super::BadMemory;
    use crate::chain::Chain;

    static CHAIN: Chain = Chain::new();

    // A leaf without a stack frame, so the handler can continue behind its one access. glibc copies pages by the
    // same instruction, and as fast (4 KiB to 256 KiB); a loop of SSE moves takes 1.2 to 2 times as long.
    std::arch::global_asm!(
        ".pushsection .text",
        ".hidden xpm_sound_copy",
        ".hidden xpm_sound_copy_at",
        ".hidden xpm_sound_copy_end",
        ".globl xpm_sound_copy",
        ".globl xpm_sound_copy_at",
        ".globl xpm_sound_copy_end",
        ".p2align 4",
        "xpm_sound_copy:",
        // Holds the number of bytes that are left, also when the instruction is interrupted.
        "mov rcx, rdx",
        "xpm_sound_copy_at:",
        "rep movsb",
        "xpm_sound_copy_end:",
        "mov rax, rcx",
        "ret",
        ".popsection",
    );

    unsafe extern "C" {
        fn xpm_sound_copy(target: *mut u8, source: *const u8, len: usize) -> usize;
        fn xpm_sound_copy_at();
        fn xpm_sound_copy_end();
    }

    /// # Safety
    /// Both must be mapped for `len` bytes, though their memory may be bad, and must not overlap.
    pub(super) unsafe fn copy(target: *mut u8, source: *const u8, len: usize) -> Result<(), BadMemory> {
        // SAFETY: by the contract of this function; the direction flag is clear by the calling convention.
        match unsafe { xpm_sound_copy(target, source, len) } {
            0 => Ok(()),
            _ => Err(BadMemory),
        }
    }

    extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        /// A memory error that the hardware found before any thread accessed the page (`BUS_MCEERR_AO` of
        /// sigaction(2)).
        const FOUND: c_int = 5;
        // SAFETY: the kernel passes valid pointers for both to a handler with SA_SIGINFO, for as long as the
        // handler runs.
        let (registers, code) =
            unsafe { (&mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs, (*info).si_code) };
        let at = &mut registers[libc::REG_RIP as usize];
        if *at as usize == xpm_sound_copy_at as *const () as usize {
            *at = xpm_sound_copy_end as *const () as usize as i64;
            return;
        }
        if code == FOUND {
            return;
        }
        // SAFETY: the arguments are the kernel's.
        unsafe { CHAIN.pass_on(signal, info, context) };
    }

    pub(super) fn survive() -> std::io::Result<()> {
        CHAIN.install(libc::SIGBUS, on_bus_error)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod machine {
    pub(super) unsafe fn copy(
        target: *mut u8,
        source: *const u8,
        len: usize,
    ) -> Result<(), super::BadMemory> {
        // SAFETY: by the contract of this function.
        unsafe { std::ptr::copy_nonoverlapping(source, target, len) };
        Ok(())
    }

    pub(super) fn survive() -> std::io::Result<()> {
        Ok(())
    }
}

use machine::copy;

/// Makes bad memory an error of this module's copies, for the whole process: installs a handler of SIGBUS that
/// passes on what is not its own. A program that installs a handler afterwards has to do the same. A thread that
/// blocks SIGBUS is ended by it nevertheless.
///
/// # Errors
/// When the kernel refuses the handler.
pub fn survive() -> io::Result<()> {
    machine::survive()
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::os::fd::AsFd as _;
    use std::ptr::NonNull;

    use rustix::mm::{MapFlags, ProtFlags, mmap};

    use super::*;

    #[test]
    fn copying_a_missing_page_fails_and_other_pages_still_work() {
        survive().unwrap();
        survive().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it stays until the process ends.
        let address =
            unsafe { mmap(std::ptr::null_mut(), 8192, protection, MapFlags::SHARED, file.as_fd(), 0) }
                .unwrap();
        // SAFETY: the memory is mapped, and no reference to it exists.
        let memory = unsafe { IoBuf::new(NonNull::new(address.cast()).unwrap(), 8192) };
        memory.try_copy_from_slice(&[7; 8192]).unwrap();
        file.set_len(4096).unwrap();
        let mut found = [0; 8192];
        assert_eq!(memory.try_copy_to_slice(&mut found), Err(BadMemory));
        assert_eq!(found[..4096], [7; 4096], "what comes before it was copied");
        assert_eq!(memory.part(4096, 1).try_copy_from_slice(b"x"), Err(BadMemory));
        assert_eq!(memory.try_zero(), Err(BadMemory));
        memory.part(0, 4096).try_copy_to_slice(&mut found[..4096]).unwrap();
        assert_eq!(found[..4096], [0; 4096]);
        assert_eq!(memory.part(4096, 8).try_copy_to(memory.part(0, 8)), Err(BadMemory));
    }
}
