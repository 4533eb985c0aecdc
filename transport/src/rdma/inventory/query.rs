//! Asking the library about devices: their limits, and the MTUs of ports, which no file contains.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use rdma_mummy_sys::{
    ibv_close_device, ibv_context, ibv_device, ibv_device_attr, ibv_free_device_list, ibv_get_device_list,
    ibv_get_device_name, ibv_open_device, ibv_port_attr, ibv_query_device, ibv_query_port, ibv_wc_status_str,
    rdma_event_str,
};
use rustix::io::Errno;

use super::{Libraries, Limits};

/// RXE_VENDOR_ID (`drivers/infiniband/sw/rxe/rxe_param.h`).
const VENDOR_RXE: u32 = 0x00ff_ffff;
/// SIW_VENDOR_ID (`drivers/infiniband/sw/siw/siw.h`).
const VENDOR_SIW: u32 = 0x0062_6d74;

/// A device of the library's list.
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) answer: Result<Answer, Errno>,
}

/// A device's answer.
pub(super) struct Answer {
    pub(super) vendor_id: u32,
    pub(super) limits: Limits,
    /// The active MTU of each port in bytes, port 1 first.
    pub(super) mtus: Vec<Option<u32>>,
}

/// The software driver that a vendor id stands for; none for hardware.
pub(super) fn software_driver(vendor_id: u32) -> Option<&'static str> {
    match vendor_id {
        VENDOR_RXE => Some("rxe"),
        VENDOR_SIW => Some("siw"),
        _ => None,
    }
}

/// The libraries that could be loaded.
pub(super) fn libraries() -> Libraries {
    // SAFETY: both functions take any number and access no memory. The binding returns null without a
    // library.
    let (verbs, manager) = unsafe { (ibv_wc_status_str(0), rdma_event_str(0)) };
    Libraries { verbs: !verbs.is_null(), manager: !manager.is_null() }
}

/// Opens each device of the library's list, and asks for its limits.
///
/// # Errors
/// ENOSYS: the kernel lets no process use RDMA devices. EOPNOTSUPP: there is no library. Other errors are the
/// system's. An error of one device is part of its entry.
pub(super) fn devices() -> Result<Vec<Listed>, Errno> {
    let list = List::get()?;
    Ok(list.devices().iter().map(|device| Listed { name: name(*device), answer: ask(*device) }).collect())
}

/// The library's list of devices.
struct List {
    first: NonNull<*mut ibv_device>,
    len: usize,
}

impl List {
    fn get() -> Result<List, Errno> {
        let mut count = 0;
        // SAFETY: `count` is valid for writing one number.
        let first = unsafe { ibv_get_device_list(&raw mut count) };
        let first = NonNull::new(first).ok_or_else(last_errno)?;
        Ok(List { first, len: usize::try_from(count).unwrap_or(0) })
    }

    fn devices(&self) -> &[*mut ibv_device] {
        // SAFETY: the library reported `len` pointers at this address, and they stay valid until `drop`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the list came from ibv_get_device_list, and no pointer from it is kept; all opened devices
        // are closed.
        unsafe { ibv_free_device_list(self.first.as_ptr()) };
    }
}

fn name(device: *mut ibv_device) -> String {
    // SAFETY: the device is in a list that is not freed yet.
    let name = unsafe { ibv_get_device_name(device) };
    if name.is_null() {
        return String::new();
    }
    // SAFETY: a zero-terminated string, which is part of the device.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

fn ask(device: *mut ibv_device) -> Result<Answer, Errno> {
    let context = Context::open(device)?;
    let attributes = context.attributes()?;
    Ok(Answer {
        vendor_id: attributes.vendor_id,
        mtus: (1..=attributes.phys_port_cnt).map(|port| context.mtu(port)).collect(),
        limits: limits(&attributes),
    })
}

/// An opened device.
struct Context(NonNull<ibv_context>);

impl Context {
    fn open(device: *mut ibv_device) -> Result<Context, Errno> {
        // SAFETY: the device is in a list that is not freed yet.
        let context = unsafe { ibv_open_device(device) };
        NonNull::new(context).map(Context).ok_or_else(last_errno)
    }

    fn attributes(&self) -> Result<ibv_device_attr, Errno> {
        let mut attributes = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: the device is open, and `attributes` is valid for writing the answer.
        check(unsafe { ibv_query_device(self.0.as_ptr(), attributes.as_mut_ptr()) })?;
        // SAFETY: the structure consists of numbers, for which zero is valid; fields that the library did not
        // write are zero.
        Ok(unsafe { attributes.assume_init() })
    }

    fn mtu(&self, port: u8) -> Option<u32> {
        let mut attributes = MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: the device is open, and `attributes` is valid for writing the answer.
        check(unsafe { ibv_query_port(self.0.as_ptr(), port, attributes.as_mut_ptr()) }).ok()?;
        // SAFETY: the structure consists of numbers, for which zero is valid; fields that the library did not
        // write are zero.
        mtu_bytes(unsafe { attributes.assume_init() }.active_mtu)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the device is open, and no object was created with it. An error needs no action.
        unsafe { ibv_close_device(self.0.as_ptr()) };
    }
}

fn limits(attributes: &ibv_device_attr) -> Limits {
    let count = |number: i32| u32::try_from(number).unwrap_or(0);
    Limits {
        max_mr_size: attributes.max_mr_size,
        max_mr: count(attributes.max_mr),
        max_pd: count(attributes.max_pd),
        max_qp: count(attributes.max_qp),
        max_qp_wr: count(attributes.max_qp_wr),
        max_cqe: count(attributes.max_cqe),
        max_qp_rd_atom: count(attributes.max_qp_rd_atom),
        max_qp_init_rd_atom: count(attributes.max_qp_init_rd_atom),
    }
}

/// Bytes of an `enum ibv_mtu`: 1 is 256, 5 is 4096.
fn mtu_bytes(mtu: u32) -> Option<u32> {
    (1..=5).contains(&mtu).then(|| 128 << mtu)
}

/// The queries return an errno, or -1 with errno set.
fn check(result: i32) -> Result<(), Errno> {
    match result {
        0 => Ok(()),
        1.. => Err(Errno::from_raw_os_error(result)),
        _ => Err(last_errno()),
    }
}

fn last_errno() -> Errno {
    // The library may fail without setting errno.
    Errno::from_io_error(&std::io::Error::last_os_error())
        .filter(|errno| errno.raw_os_error() != 0)
        .unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtus_in_bytes() {
        assert_eq!([1, 3, 5].map(mtu_bytes), [Some(256), Some(1024), Some(4096)]);
        assert_eq!([0, 6, u32::MAX].map(mtu_bytes), [None; 3]);
    }

    #[test]
    fn both_kinds_of_error_results_are_recognized() {
        assert_eq!(check(0), Ok(()));
        assert_eq!(check(95), Err(Errno::OPNOTSUPP));
        assert!(check(-1).is_err());
    }

    #[test]
    fn this_machine_answers_or_returns_an_error() {
        let listed = devices();
        if !libraries().verbs {
            assert_eq!(listed.err(), Some(Errno::OPNOTSUPP));
        } else if !std::path::Path::new("/sys/class/infiniband_verbs").exists() {
            assert_eq!(listed.err(), Some(Errno::NOSYS));
        } else {
            assert!(listed.is_ok());
        }
    }
}
