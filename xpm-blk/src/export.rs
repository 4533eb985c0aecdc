//! The description of a volume for NBD clients, including the kernel.

use xpm_client_core::Volume;
use xpm_protocol::BlockSize;
use xpm_protocol::nbd::{BlockSizes, ExportInfo, PAYLOAD_MAX, TransmissionFlags};

/// Size, flags and block sizes of a volume. There is no cache between the end of a write and the memory that
/// it goes to, so a flush has no effect and several connections see the same bytes; flush and FUA are offered
/// for clients that require them. The smallest block is the allocation's logical block; requests of other
/// lengths are served as well, for clients that ignore it.
pub(crate) fn info(volume: &Volume, block_size: Option<BlockSize>) -> ExportInfo {
    let flags = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::SEND_FUA)
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::CAN_MULTI_CONN);
    ExportInfo {
        size: volume.size(),
        flags,
        block: BlockSizes { min: block_size.map_or(1, BlockSize::bytes), preferred: 4096, max: PAYLOAD_MAX },
        description: None,
    }
}

/// The flags for the kernel's nbd driver: as in [`info`], but without flush and FUA, which the driver would
/// send for every barrier of a file system although they have no effect.
pub(crate) fn kernel_flags() -> TransmissionFlags {
    TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::CAN_MULTI_CONN)
}
