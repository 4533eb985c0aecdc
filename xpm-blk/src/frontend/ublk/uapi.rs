//! The kernel's names and byte layouts for ublk, as in `linux/ublk_cmd.h` of Linux 6.12.
//!
//! Every structure for the kernel is built as an array of bytes of the structure's size, so that no layout of
//! a Rust type has to agree with C; the offsets are those of the header. Numbers are in the machine's own
//! byte order, as for any structure in memory.

/// The control device; it exists once the module `ublk_drv` is loaded.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

const fn ioctl(direction: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | (b'u' as u32) << 8 | number
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;
const CONTROL_LEN: u32 = 32;
const IO_LEN: u32 = 16;

/// `UBLK_U_CMD_GET_DEV_INFO`
pub(super) const GET_DEV_INFO: u32 = ioctl(READ, 0x02, CONTROL_LEN);
/// `UBLK_U_CMD_ADD_DEV`
pub(super) const ADD_DEV: u32 = ioctl(READ_WRITE, 0x04, CONTROL_LEN);
/// `UBLK_U_CMD_DEL_DEV`
pub(super) const DEL_DEV: u32 = ioctl(READ_WRITE, 0x05, CONTROL_LEN);
/// `UBLK_U_CMD_START_DEV`
pub(super) const START_DEV: u32 = ioctl(READ_WRITE, 0x06, CONTROL_LEN);
/// `UBLK_U_CMD_STOP_DEV`
pub(super) const STOP_DEV: u32 = ioctl(READ_WRITE, 0x07, CONTROL_LEN);
/// `UBLK_U_CMD_SET_PARAMS`
pub(super) const SET_PARAMS: u32 = ioctl(READ_WRITE, 0x08, CONTROL_LEN);
/// `UBLK_U_CMD_GET_PARAMS`
pub(super) const GET_PARAMS: u32 = ioctl(READ, 0x09, CONTROL_LEN);
/// `UBLK_U_CMD_START_USER_RECOVERY`
pub(super) const START_USER_RECOVERY: u32 = ioctl(READ_WRITE, 0x10, CONTROL_LEN);
/// `UBLK_U_CMD_END_USER_RECOVERY`
pub(super) const END_USER_RECOVERY: u32 = ioctl(READ_WRITE, 0x11, CONTROL_LEN);
/// `UBLK_U_CMD_GET_FEATURES`, since Linux 6.5
pub(super) const GET_FEATURES: u32 = ioctl(READ, 0x13, CONTROL_LEN);
/// `UBLK_U_IO_FETCH_REQ`
pub(super) const FETCH_REQ: u32 = ioctl(READ_WRITE, 0x20, IO_LEN);
/// `UBLK_U_IO_COMMIT_AND_FETCH_REQ`
pub(super) const COMMIT_AND_FETCH_REQ: u32 = ioctl(READ_WRITE, 0x21, IO_LEN);

/// `UBLK_IO_RES_ABORT`: the result of a fetch when the device stops.
pub(super) const RES_ABORT: i32 = -libc::ENODEV;

/// `UBLK_F_USER_RECOVERY`: the device outlives its server.
pub(super) const F_USER_RECOVERY: u64 = 1 << 3;
/// `UBLK_F_USER_RECOVERY_REISSUE`: requests that its server had in flight go to the next server.
pub(super) const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// `UBLK_F_CMD_IOCTL_ENCODE`
pub(super) const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;

/// `UBLK_S_DEV_DEAD`
pub(super) const STATE_DEAD: u16 = 0;
/// `UBLK_S_DEV_QUIESCED`: its server is gone, and the device waits for another one.
pub(super) const STATE_QUIESCED: u16 = 2;

/// `UBLK_MAX_QUEUE_DEPTH`: determines the distance of the queues' descriptors in the device file.
const QUEUE_DEPTH_MAX: u64 = 4096;

/// Length of one `struct ublksrv_io_desc`.
pub(super) const DESCRIPTOR_LEN: usize = 24;

/// The offset of a queue's descriptors in the device file, in bytes.
pub(super) const fn descriptors_offset(queue: u16) -> u64 {
    queue as u64 * (QUEUE_DEPTH_MAX * DESCRIPTOR_LEN as u64).next_multiple_of(4096)
}

/// `struct ublksrv_ctrl_cmd`, in the 80 bytes that a submission entry of 128 bytes has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ControlCommand {
    /// The device; `u32::MAX` to let the kernel choose, or for none.
    pub(super) device: u32,
    /// Address and length of the command's buffer.
    pub(super) buffer: (u64, u16),
    /// `data[0]`
    pub(super) data: u64,
}

impl ControlCommand {
    pub(super) fn encode(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&self.device.to_ne_bytes());
        // `queue_id`: -1, because none of the commands here is for a single queue.
        bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.buffer.1.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.buffer.0.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes
    }
}

/// `struct ublksrv_io_cmd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IoCommand {
    pub(super) queue: u16,
    pub(super) tag: u16,
    /// Bytes done, or a negative errno; for commits only.
    pub(super) result: i32,
    /// The tag's buffer.
    pub(super) address: u64,
}

impl IoCommand {
    pub(super) fn encode(self) -> [u8; IO_LEN as usize] {
        let mut bytes = [0; IO_LEN as usize];
        bytes[0..2].copy_from_slice(&self.queue.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.address.to_ne_bytes());
        bytes
    }
}

/// `struct ublksrv_ctrl_dev_info`; only the fields that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    pub(super) queues: u16,
    pub(super) depth: u16,
    /// Filled in by the kernel: one of `UBLK_S_DEV_*`.
    pub(super) state: u16,
    pub(super) io_len_max: u32,
    pub(super) device: u32,
    /// Filled in by the kernel: the process that serves the device.
    pub(super) pid: i32,
    pub(super) flags: u64,
    /// `ublksrv_flags`: stored by the kernel for the server, and not interpreted.
    pub(super) mark: u64,
}

impl DeviceInfo {
    pub(super) const LEN: usize = 64;

    pub(super) fn encode(self) -> [u8; DeviceInfo::LEN] {
        let mut bytes = [0; DeviceInfo::LEN];
        bytes[0..2].copy_from_slice(&self.queues.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.depth.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.state.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.io_len_max.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.device.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.mark.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; DeviceInfo::LEN]) -> DeviceInfo {
        DeviceInfo {
            queues: u16::from_ne_bytes(part(bytes, 0)),
            depth: u16::from_ne_bytes(part(bytes, 2)),
            state: u16::from_ne_bytes(part(bytes, 4)),
            io_len_max: u32::from_ne_bytes(part(bytes, 8)),
            device: u32::from_ne_bytes(part(bytes, 12)),
            pid: i32::from_ne_bytes(part(bytes, 16)),
            flags: u64::from_ne_bytes(part(bytes, 24)),
            mark: u64::from_ne_bytes(part(bytes, 32)),
        }
    }
}

/// `struct ublk_params` with the parts `basic` and `discard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Params {
    /// Size of the device in sectors of 512 bytes.
    pub(super) sectors: u64,
    /// Longest read or write, in sectors.
    pub(super) sectors_max: u32,
    /// Longest discard or write of zeros, in sectors.
    pub(super) discard_sectors_max: u32,
    pub(super) logical_block_shift: u8,
    pub(super) physical_block_shift: u8,
}

impl Params {
    pub(super) const LEN: usize = 64;
    const TYPE_BASIC: u32 = 1;
    const TYPE_DISCARD: u32 = 2;

    /// The attributes stay zero: not rotational, writable, and without a volatile cache, because a write has
    /// reached its destination when it ends.
    pub(super) fn encode(self) -> [u8; Params::LEN] {
        let mut bytes = [0; Params::LEN];
        bytes[0..4].copy_from_slice(&(Params::LEN as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&(Params::TYPE_BASIC | Params::TYPE_DISCARD).to_ne_bytes());
        bytes[12] = self.logical_block_shift;
        bytes[13] = self.physical_block_shift;
        // Optimal and minimal request size: a physical block.
        bytes[14] = self.physical_block_shift;
        bytes[15] = self.physical_block_shift;
        bytes[16..20].copy_from_slice(&self.sectors_max.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.sectors.to_ne_bytes());
        let granularity = 1_u32 << self.physical_block_shift;
        bytes[44..48].copy_from_slice(&granularity.to_ne_bytes());
        bytes[48..52].copy_from_slice(&self.discard_sectors_max.to_ne_bytes());
        bytes[52..56].copy_from_slice(&self.discard_sectors_max.to_ne_bytes());
        // The driver supports exactly one segment.
        bytes[56..58].copy_from_slice(&1_u16.to_ne_bytes());
        bytes
    }

    /// An empty buffer for `GET_PARAMS`; its length field determines how much the kernel returns.
    pub(super) fn empty() -> [u8; Params::LEN] {
        let mut bytes = [0; Params::LEN];
        bytes[0..4].copy_from_slice(&(Params::LEN as u32).to_ne_bytes());
        bytes
    }

    /// The size of the device, in sectors of 512 bytes.
    pub(super) fn sectors(bytes: &[u8; Params::LEN]) -> u64 {
        u64::from_ne_bytes(part(bytes, 24))
    }
}

fn part<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[start + i])
}

const _: () = {
    assert!(CONTROL_LEN == 32 && IO_LEN == 16 && DESCRIPTOR_LEN == 24);
    assert!(descriptors_offset(1) == 98_304);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_numbers_are_those_of_the_header() {
        // _IOWR('u', 0x04, struct ublksrv_ctrl_cmd) and the like, as a C compiler computes them.
        assert_eq!(ADD_DEV, 0xc020_7504);
        assert_eq!(GET_FEATURES, 0x8020_7513);
        assert_eq!(GET_DEV_INFO, 0x8020_7502);
        assert_eq!(GET_PARAMS, 0x8020_7509);
        assert_eq!(START_USER_RECOVERY, 0xc020_7510);
        assert_eq!(END_USER_RECOVERY, 0xc020_7511);
        assert_eq!(FETCH_REQ, 0xc010_7520);
        assert_eq!(COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn control_command_bytes() {
        let bytes = ControlCommand { device: 7, buffer: (0x1122_3344_5566_7788, 64), data: 9 }.encode();
        let golden = [
            7, 0, 0, 0, 0xff, 0xff, 64, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 9, 0, 0, 0, 0, 0,
            0, 0,
        ];
        assert_eq!(bytes[..24], golden);
        assert_eq!(bytes[24..], [0; 56]);
    }

    #[test]
    fn io_command_bytes() {
        let bytes = IoCommand { queue: 1, tag: 2, result: -5, address: 0x1000 }.encode();
        assert_eq!(bytes, [1, 0, 2, 0, 0xfb, 0xff, 0xff, 0xff, 0, 0x10, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn device_info_round_trip_and_places() {
        let info =
            DeviceInfo { queues: 1, depth: 2, state: 3, io_len_max: 4, device: 5, pid: 6, flags: 7, mark: 8 };
        let bytes = info.encode();
        assert_eq!(DeviceInfo::decode(&bytes), info);
        let places = [(0, 1), (2, 2), (4, 3), (8, 4), (12, 5), (16, 6), (24, 7), (32, 8)];
        for (place, value) in places {
            assert_eq!(bytes[place], value);
        }
        assert_eq!(bytes.iter().map(|&b| u32::from(b)).sum::<u32>(), 36, "nothing anywhere else");
    }

    #[test]
    fn params_bytes() {
        let bytes = Params {
            sectors: 0x10,
            sectors_max: 0x20,
            discard_sectors_max: 0x30,
            logical_block_shift: 9,
            physical_block_shift: 12,
        }
        .encode();
        let mut golden = [0_u8; 64];
        (golden[0], golden[4]) = (64, 3);
        golden[12..16].copy_from_slice(&[9, 12, 12, 12]);
        (golden[16], golden[24]) = (0x20, 0x10);
        (golden[45], golden[48], golden[52], golden[56]) = (0x10, 0x30, 0x30, 1);
        assert_eq!(bytes, golden);
        assert_eq!(Params::sectors(&bytes), 0x10);
        assert_eq!(Params::empty()[..4], golden[..4]);
    }
}
