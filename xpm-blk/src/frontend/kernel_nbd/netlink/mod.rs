//! The kernel's nbd driver by generic netlink (`linux/nbd-netlink.h`): connect, reconfigure, disconnect,
//! status, and notifications of dead connections.

mod message;
mod socket;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use self::message::{Attributes, Message, Outcome, Request, messages};
use self::socket::Socket;
use crate::error::{DeviceError, Step};

/// `GENL_ID_CTRL`, and the parts of its family that are used here.
const CONTROL_FAMILY: u16 = 16;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;
const CONTROL_GROUPS: u16 = 7;
const CONTROL_GROUP_NAME: u16 = 1;
const CONTROL_GROUP_ID: u16 = 2;

const FAMILY: &str = "nbd";
const FAMILY_VERSION: u8 = 1;
const GROUP: &str = "nbd_mc_group";

const COMMAND_CONNECT: u8 = 1;
const COMMAND_DISCONNECT: u8 = 2;
const COMMAND_RECONFIGURE: u8 = 3;
const COMMAND_LINK_DEAD: u8 = 4;
const COMMAND_STATUS: u8 = 5;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// Time limit of an answer: a disconnect waits in the kernel for the connections' receivers.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

const MODPROBE: &str = "load the kernel's module with `modprobe nbd` (CONFIG_BLK_DEV_NBD), \
                        or show the allocation as ublk or nbd-socket";

/// The parameters of a new device.
pub(super) struct Connect<'a> {
    /// Number of the device; none: the kernel chooses.
    pub(super) index: Option<u32>,
    /// Size in bytes.
    pub(super) size: u64,
    /// Logical block size in bytes.
    pub(super) block_len: u64,
    /// Time limit of a request; none: no limit.
    pub(super) timeout: Option<Duration>,
    /// How long requests wait for a new connection when all are dead.
    pub(super) dead_timeout: Duration,
    /// Transmission flags of the server.
    pub(super) server_flags: u16,
    /// The identifier that is required to reconfigure the device.
    pub(super) identifier: &'a str,
}

/// A connection to the driver's control interface.
pub(super) struct NbdControl {
    socket: Socket,
    family: u16,
    group: Option<u32>,
    sequence: u32,
}

impl NbdControl {
    /// Finds the driver.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](xpm_protocol::api::ErrorKind) where it is not loaded.
    pub(super) fn open() -> Result<NbdControl, DeviceError> {
        let socket = Socket::open(ANSWER_LIMIT).at("open a netlink socket")?;
        let mut control = NbdControl { socket, family: CONTROL_FAMILY, group: None, sequence: 0 };
        let request = Request::new(CONTROL_FAMILY, control.next(), CONTROL_GET_FAMILY, 1)
            .text(CONTROL_FAMILY_NAME, FAMILY);
        let mut family = None;
        let asked =
            control.ask(request, |message| family = message.generic().and_then(read_family).or(family));
        match (asked, family) {
            (Ok(()), Some((id, group))) => Ok(NbdControl { family: id, group, ..control }),
            (Err(error), _) if error.kind() != io::ErrorKind::NotFound => {
                Err(error.at("look for the kernel's nbd driver"))
            }
            _ => Err(DeviceError::unsupported("this kernel has no nbd driver", MODPROBE)),
        }
    }

    /// Creates a device from connected sockets, whose servers are in the transmission phase already; returns
    /// its number. The kernel keeps the sockets; ours may be closed.
    pub(super) fn connect(&mut self, connect: &Connect<'_>, sockets: &[BorrowedFd<'_>]) -> io::Result<u32> {
        let request = connect_request(self.family, self.next(), connect, sockets);
        let mut index = connect.index;
        self.ask(request, |message| {
            if let Some((COMMAND_CONNECT, attributes)) = message.generic() {
                index = attributes.u32(INDEX).or(index);
            }
        })?;
        index.ok_or_else(|| io::Error::other("the driver did not say which device it made"))
    }

    /// Replaces dead sockets of a device. The kernel silently drops sockets for which it has no place.
    /// Without a request time limit (`timeouts.0`) the device's limit stays.
    pub(super) fn reconfigure(
        &mut self,
        index: u32,
        identifier: &str,
        timeouts: (Option<Duration>, Duration),
        sockets: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut request = Request::new(self.family, self.next(), COMMAND_RECONFIGURE, FAMILY_VERSION)
            .u32(INDEX, index)
            .u64(DEAD_CONN_TIMEOUT, timeouts.1.as_secs())
            .text(BACKEND_IDENTIFIER, identifier);
        if let Some(limit) = timeouts.0 {
            request = request.u64(TIMEOUT, limit.as_secs());
        }
        self.ask(with_sockets(request, sockets), |_| ())
    }

    /// Changes the size of a device, in bytes; a multiple of the block length.
    pub(super) fn resize(&mut self, index: u32, identifier: &str, size: u64) -> io::Result<()> {
        let request = Request::new(self.family, self.next(), COMMAND_RECONFIGURE, FAMILY_VERSION)
            .u32(INDEX, index)
            .u64(SIZE_BYTES, size)
            .text(BACKEND_IDENTIFIER, identifier);
        self.ask(request, |_| ())
    }

    /// Disconnects a device; its requests in flight fail.
    pub(super) fn disconnect(&mut self, index: u32) -> io::Result<()> {
        let request =
            Request::new(self.family, self.next(), COMMAND_DISCONNECT, FAMILY_VERSION).u32(INDEX, index);
        self.ask(request, |_| ())
    }

    /// Whether a device is connected; none when there is no such device.
    pub(super) fn connected(&mut self, index: u32) -> io::Result<Option<bool>> {
        let request =
            Request::new(self.family, self.next(), COMMAND_STATUS, FAMILY_VERSION).u32(INDEX, index);
        let mut connected = None;
        self.ask(request, |message| {
            if let Some((COMMAND_STATUS, attributes)) = message.generic() {
                connected = read_status(attributes, index).or(connected);
            }
        })?;
        Ok(connected)
    }

    /// Makes this connection receive notifications of dead links; from then on it is used only for that.
    pub(super) fn listen(self) -> io::Result<DeadLinks> {
        let group = self.group.ok_or_else(|| io::Error::other("the nbd driver has no multicast group"))?;
        self.socket.join(group)?;
        Ok(DeadLinks { socket: self.socket, family: self.family })
    }

    fn next(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }

    fn ask(&mut self, request: Request, mut answer: impl FnMut(Message<'_>)) -> io::Result<()> {
        let sequence = self.sequence;
        self.socket.send(&request.finish())?;
        loop {
            let datagram = self.socket.receive()?;
            for message in messages(datagram).filter(|message| message.sequence == sequence) {
                match message.outcome() {
                    Some(outcome) => return finish(outcome),
                    None => answer(message),
                }
            }
        }
    }
}

/// Notifications of dead links.
pub(super) struct DeadLinks {
    socket: Socket,
    family: u16,
}

impl DeadLinks {
    /// Numbers of the devices with a link that died since the last call. Never blocks.
    pub(super) fn take(&mut self) -> Vec<u32> {
        let mut devices = Vec::new();
        while let Ok(datagram) = self.socket.receive_now() {
            devices.extend(messages(datagram).filter(|message| message.kind == self.family).filter_map(
                |message| match message.generic() {
                    Some((COMMAND_LINK_DEAD, attributes)) => attributes.u32(INDEX),
                    _ => None,
                },
            ));
        }
        devices
    }
}

impl AsFd for DeadLinks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn connect_request(family: u16, sequence: u32, connect: &Connect<'_>, sockets: &[BorrowedFd<'_>]) -> Request {
    let mut request = Request::new(family, sequence, COMMAND_CONNECT, FAMILY_VERSION);
    if let Some(index) = connect.index {
        request = request.u32(INDEX, index);
    }
    let request = request
        .u64(SIZE_BYTES, connect.size)
        .u64(BLOCK_SIZE_BYTES, connect.block_len)
        .u64(TIMEOUT, connect.timeout.map_or(0, |limit| limit.as_secs()))
        .u64(SERVER_FLAGS, u64::from(connect.server_flags))
        // The device is neither destroyed on disconnect nor disconnected on the last close.
        .u64(CLIENT_FLAGS, 0)
        .u64(DEAD_CONN_TIMEOUT, connect.dead_timeout.as_secs())
        .text(BACKEND_IDENTIFIER, connect.identifier);
    with_sockets(request, sockets)
}

fn with_sockets(request: Request, sockets: &[BorrowedFd<'_>]) -> Request {
    request.nested(SOCKETS, |list| {
        sockets.iter().fold(list, |list, socket| {
            list.nested(SOCK_ITEM, |item| item.u32(SOCK_FD, socket.as_raw_fd() as u32))
        })
    })
}

fn read_family((_, attributes): (u8, Attributes<'_>)) -> Option<(u16, Option<u32>)> {
    let groups = attributes.nested(CONTROL_GROUPS);
    let group = groups.and_then(|groups| {
        groups
            .items()
            .find(|group| group.text(CONTROL_GROUP_NAME).as_deref() == Some(GROUP))
            .and_then(|group| group.u32(CONTROL_GROUP_ID))
    });
    Some((attributes.u16(CONTROL_FAMILY_ID)?, group))
}

fn read_status(attributes: Attributes<'_>, index: u32) -> Option<bool> {
    let list = attributes.nested(DEVICE_LIST)?;
    let device = list.items().find(|device| device.u32(DEVICE_INDEX) == Some(index))?;
    Some(device.u8(DEVICE_CONNECTED)? != 0)
}

fn finish(outcome: Outcome) -> io::Result<()> {
    match (outcome.errno, outcome.reason) {
        (0, _) => Ok(()),
        (errno, None) => Err(io::Error::from_raw_os_error(errno)),
        (errno, Some(reason)) => {
            let error = io::Error::from_raw_os_error(errno);
            Err(io::Error::new(error.kind(), format!("{reason} ({error})")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_connect() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let connect = Connect {
            index: Some(3),
            size: 1 << 30,
            block_len: 4096,
            timeout: Some(Duration::from_secs(15)),
            dead_timeout: Duration::from_secs(60),
            server_flags: 0x125,
            identifier: "xpm",
        };
        let bytes = connect_request(0x1c, 1, &connect, &[null.as_fd()]).finish();
        let fd = null.as_raw_fd() as u8;
        #[rustfmt::skip]
        let golden = [
            124, 0, 0, 0, 0x1c, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0,
            1, 1, 0, 0,
            8, 0, 1, 0, 3, 0, 0, 0,
            12, 0, 2, 0, 0, 0, 0, 0x40, 0, 0, 0, 0,
            12, 0, 3, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,
            12, 0, 4, 0, 15, 0, 0, 0, 0, 0, 0, 0,
            12, 0, 5, 0, 0x25, 1, 0, 0, 0, 0, 0, 0,
            12, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            12, 0, 8, 0, 60, 0, 0, 0, 0, 0, 0, 0,
            8, 0, 10, 0, b'x', b'p', b'm', 0,
            16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0,
        ];
        assert_eq!(bytes, golden);
    }

    #[test]
    fn a_family_and_its_group() {
        let bytes = Request::new(16, 1, 1, 2)
            .text(CONTROL_FAMILY_NAME, "nbd")
            .nested(CONTROL_GROUPS, |groups| {
                groups.nested(1, |group| group.u32(CONTROL_GROUP_ID, 11).text(CONTROL_GROUP_NAME, GROUP))
            })
            .finish();
        let generic = messages(&bytes).next().unwrap().generic().unwrap();
        assert_eq!(read_family(generic), None, "a family without an id is none");
    }

    #[test]
    fn status_of_one_device() {
        let bytes = Request::new(0x1c, 1, COMMAND_STATUS, 1)
            .nested(DEVICE_LIST, |list| {
                list.nested(1, |item| item.u32(DEVICE_INDEX, 4).u32(DEVICE_CONNECTED, 1))
            })
            .finish();
        let (_, attributes) = messages(&bytes).next().unwrap().generic().unwrap();
        assert_eq!(read_status(attributes, 4), Some(true));
        assert_eq!(read_status(attributes, 5), None);
    }

    #[test]
    fn without_the_driver_the_error_names_the_module_to_load() {
        if std::path::Path::new("/sys/module/nbd").exists() {
            return;
        }
        let error = NbdControl::open().err().expect("there is no driver");
        assert!(error.to_string().contains("modprobe nbd"), "{error}");
    }
}
