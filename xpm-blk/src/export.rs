//! What an NBD client, the kernel's among them, is told of a volume.

use xpm_client::Volume;
use xpm_protocol::BlockSize;
use xpm_protocol::nbd::{BlockSizes, ExportInfo, PAYLOAD_MAX, TransmissionFlags};

/// Size, flags and block sizes of a volume. No cache is between a write's end and the memory it
/// goes to, so a flush has nothing to do and several connections see the same bytes; flush and
/// FUA are offered for clients that insist on them. The smallest block is the allocation's logical block; requests of other
/// lengths are served as well, for clients that do not ask.
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

/// What the kernel's nbd driver is told: the same without flush and FUA, which it would send for
/// every barrier of a file system although they do nothing.
pub(crate) fn kernel_flags() -> TransmissionFlags {
    TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::SEND_TRIM)
        .with(TransmissionFlags::SEND_WRITE_ZEROES)
        .with(TransmissionFlags::CAN_MULTI_CONN)
}
