//! Translating the errors of RDMA to those of links and connection attempts.

use std::io;

use super::wire::Refusal;
use crate::connect::ConnectError;
use crate::link::LinkDown;

/// The statuses of `enum ibv_wc_status` (ibv_poll_cq(3)) that this module distinguishes.
mod status {
    pub(super) const LOC_LEN_ERR: u32 = 1;
    pub(super) const LOC_QP_OP_ERR: u32 = 2;
    pub(super) const LOC_PROT_ERR: u32 = 4;
    pub(super) const BAD_RESP_ERR: u32 = 7;
    pub(super) const LOC_ACCESS_ERR: u32 = 8;
    pub(super) const REM_INV_REQ_ERR: u32 = 9;
    pub(super) const REM_ACCESS_ERR: u32 = 10;
    pub(super) const REM_OP_ERR: u32 = 11;
}

/// The state of a link whose work request failed.
///
/// A refused access means that the key is no longer valid: the grant was revoked. An unanswered request
/// (retries exceeded), and a request that was flushed with the queue, mean a broken connection. A status that
/// only a wrong message can cause means a violated protocol.
pub(super) const fn of_status(status: u32) -> LinkDown {
    match status {
        status::REM_ACCESS_ERR | status::REM_INV_REQ_ERR | status::REM_OP_ERR => LinkDown::Revoked,
        status::LOC_LEN_ERR
        | status::LOC_QP_OP_ERR
        | status::LOC_PROT_ERR
        | status::LOC_ACCESS_ERR
        | status::BAD_RESP_ERR => LinkDown::Protocol,
        _ => LinkDown::Broken,
    }
}

/// Why an appliance rejected a connection. `said` is the private data of the rejection.
pub(super) fn of_rejection(reason: i32, said: &[u8]) -> ConnectError {
    match Refusal::decode(said) {
        Some(refusal) => of_refusal(refusal),
        None => ConnectError::Unreachable(io::Error::other(format!(
            "the connection was rejected for reason {reason}: nothing listens there, or not this protocol"
        ))),
    }
}

/// The error for a refusal by the appliance.
pub(super) fn of_refusal(refusal: Refusal) -> ConnectError {
    match refusal {
        Refusal::Unknown => ConnectError::UnknownExport,
        Refusal::NotReady => ConnectError::Unreachable(io::Error::new(
            io::ErrorKind::WouldBlock,
            "the appliance is still registering the memory",
        )),
        Refusal::Shared => {
            ConnectError::Refused("a process on the appliance's host has the memory mapped".to_owned())
        }
        Refusal::Failed => {
            ConnectError::Refused("the appliance cannot register the memory with its device".to_owned())
        }
        Refusal::Version => ConnectError::Unsupported("another version of xpm's RDMA protocol".to_owned()),
        Refusal::Outdated => ConnectError::Outdated,
        Refusal::Busy => ConnectError::Refused("the appliance has too many connections".to_owned()),
    }
}

/// The error for a host without RDMA; its text names the reason and the remedy.
pub(super) fn no_rdma(error: &io::Error) -> ConnectError {
    ConnectError::Unavailable(explain(error))
}

/// The text of [`no_rdma`].
pub(super) fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            "no RDMA: the libraries are missing (apt-get install librdmacm1 ibverbs-providers)".to_owned()
        }
        Some(libc::ENOSYS | libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "no RDMA: the kernel's part is missing (modprobe rdma_ucm)".to_owned()
        }
        Some(libc::EACCES | libc::EPERM) => {
            "no RDMA: /dev/infiniband/rdma_cm cannot be opened for want of rights".to_owned()
        }
        _ => format!("no RDMA: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares with the numbers of infiniband/verbs.h, so that a mistake in the table shows.
    #[test]
    fn each_status_has_its_state() {
        use rdma_mummy_sys::ibv_wc_status as wc;
        let cases = [
            (wc::IBV_WC_REM_ACCESS_ERR, LinkDown::Revoked),
            (wc::IBV_WC_REM_INV_REQ_ERR, LinkDown::Revoked),
            (wc::IBV_WC_REM_OP_ERR, LinkDown::Revoked),
            (wc::IBV_WC_RETRY_EXC_ERR, LinkDown::Broken),
            (wc::IBV_WC_RNR_RETRY_EXC_ERR, LinkDown::Broken),
            (wc::IBV_WC_WR_FLUSH_ERR, LinkDown::Broken),
            (wc::IBV_WC_FATAL_ERR, LinkDown::Broken),
            (wc::IBV_WC_REM_ABORT_ERR, LinkDown::Broken),
            (wc::IBV_WC_LOC_LEN_ERR, LinkDown::Protocol),
            (wc::IBV_WC_LOC_QP_OP_ERR, LinkDown::Protocol),
            (wc::IBV_WC_LOC_PROT_ERR, LinkDown::Protocol),
            (wc::IBV_WC_LOC_ACCESS_ERR, LinkDown::Protocol),
            (wc::IBV_WC_BAD_RESP_ERR, LinkDown::Protocol),
        ];
        for (status, state) in cases {
            assert_eq!(of_status(status), state, "{status}");
        }
        assert_eq!(of_status(12345), LinkDown::Broken);
    }

    #[test]
    fn rejections_become_the_matching_connect_error() {
        let of = |refusal: Refusal| of_rejection(28, &refusal.encode());
        assert!(matches!(of(Refusal::Unknown), ConnectError::UnknownExport));
        assert!(
            matches!(of(Refusal::NotReady), ConnectError::Unreachable(error) if error.kind() == io::ErrorKind::WouldBlock)
        );
        assert!(matches!(of(Refusal::Shared), ConnectError::Refused(_)));
        assert!(matches!(of(Refusal::Version), ConnectError::Unsupported(_)));
        assert!(matches!(of_rejection(8, &[]), ConnectError::Unreachable(_)));
    }

    #[test]
    fn a_missing_part_is_named_with_its_remedy() {
        let text = |number| explain(&io::Error::from_raw_os_error(number));
        assert!(text(libc::EOPNOTSUPP).contains("librdmacm1"));
        assert!(text(libc::ENOSYS).contains("modprobe"));
        assert!(text(libc::EACCES).contains("rights"));
    }
}
