//! Queue pairs without the connection manager: ports and their identifiers, and the steps that make a queue
//! pair operational (ibv_modify_qp(3)).

#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_mummy_sys as sys;

use super::cm::{ACK_TIMEOUT, RETRIES, Size};
use super::verbs::{CompletionQueue, Device, Domain, check, complain, pointer};
use super::wire::End;

/// `IBV_GID_TYPE_ROCE_V2` and `IBV_LINK_LAYER_ETHERNET` of infiniband/verbs.h.
const ROCE_V2: u32 = 2;
const ETHERNET: u8 = 2;
/// Concurrent READs: more have no benefit.
const READS_MAX: u8 = 16;
/// Hop limit of packets.
const HOP_LIMIT: u8 = 64;
/// Time that the other end waits when this end is not ready, code for 0.64 ms (IBTA 1, table 45).
const NOT_READY_TIMER: u8 = 12;

/// An active port of a device, with one of its global identifiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Port {
    number: u8,
    gid_index: u8,
    gid: [u8; 16],
    lid: u16,
    mtu: u8,
    ethernet: bool,
}

impl Port {
    /// The active ports of a device: an InfiniBand port with its first identifier, an Ethernet port once with
    /// each identifier of RoCE v2.
    pub(super) fn all(device: &Device) -> Vec<Port> {
        // A device has at most 255 ports; a query for a missing port fails.
        let ports = (1..=u8::MAX).map_while(|number| Some((number, attributes(device, number)?)));
        let active = ports.filter(|(_, found)| found.state == sys::ibv_port_state::IBV_PORT_ACTIVE);
        active.flat_map(|(number, found)| Port::of(device, number, &found)).collect()
    }

    fn of(device: &Device, number: u8, found: &sys::ibv_port_attr) -> Vec<Port> {
        let ethernet = found.link_layer == ETHERNET;
        let count = if ethernet { u8::try_from(found.gid_tbl_len).unwrap_or(u8::MAX) } else { 1 };
        let entries = (0..count).filter_map(|index| gid(device, number, index).map(|entry| (index, entry)));
        let usable = entries.filter(|(_, entry)| !ethernet || entry.gid_type == ROCE_V2);
        usable
            .map(|(gid_index, entry)| Port {
                number,
                gid_index,
                // SAFETY: both forms of the union are the same 16 bytes.
                gid: unsafe { entry.gid.raw },
                lid: found.lid,
                mtu: u8::try_from(found.active_mtu).unwrap_or(1),
                ethernet,
            })
            .collect()
    }

    /// The IP address that the identifier stands for.
    fn ip(&self) -> IpAddr {
        Ipv6Addr::from(self.gid).to_canonical()
    }

    /// The device and port of an address of this host; an InfiniBand port if no port has that address.
    pub(super) fn find(devices: &[Arc<Device>], ip: IpAddr) -> Option<(Arc<Device>, Port)> {
        let all: Vec<_> = devices
            .iter()
            .flat_map(|device| Port::all(device).into_iter().map(move |port| (device.clone(), port)))
            .collect();
        let of_address = |(_, port): &&(Arc<Device>, Port)| port.ethernet && port.ip() == ip.to_canonical();
        all.iter().find(of_address).or_else(|| all.iter().find(|(_, port)| !port.ethernet)).cloned()
    }
}

fn attributes(device: &Device, port: u8) -> Option<sys::ibv_port_attr> {
    // SAFETY: the structure consists of plain numbers, for which zeros are valid.
    let mut found: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the device is open, and `found` is written only during the call.
    check(unsafe { sys::ibv_query_port(device.raw(), port, &raw mut found) }).ok()?;
    Some(found)
}

fn gid(device: &Device, port: u8, index: u8) -> Option<sys::ibv_gid_entry> {
    // SAFETY: the structure consists of plain numbers, for which zeros are valid.
    let mut found: sys::ibv_gid_entry = unsafe { std::mem::zeroed() };
    // SAFETY: the device is open, and `found` is written only during the call.
    let status =
        unsafe { sys::ibv_query_gid_ex(device.raw(), u32::from(port), u32::from(index), &raw mut found, 0) };
    check(status).ok()?;
    Some(found)
}

/// A queue pair that belongs to no identifier of the connection manager.
pub(super) struct Pair {
    raw: NonNull<sys::ibv_qp>,
    _domain: Arc<Domain>,
}

// SAFETY: verbs may be called from any thread; calls that change the queue pair take it exclusively.
unsafe impl Send for Pair {}
// SAFETY: as above.
unsafe impl Sync for Pair {}

impl Pair {
    /// Creates a queue pair in a domain. `completions` has to live as long. Also returns the inline capacity
    /// in bytes.
    pub(super) fn new(
        domain: &Arc<Domain>,
        completions: &CompletionQueue,
        size: Size,
    ) -> io::Result<(Pair, u32)> {
        let mut wanted = size.attributes(completions);
        // SAFETY: the domain and the completion queue are alive, and `wanted` is used during the call only.
        let raw = pointer(unsafe { sys::ibv_create_qp(domain.raw(), &raw mut wanted) })?;
        Ok((Pair { raw, _domain: domain.clone() }, wanted.cap.max_inline_data))
    }

    pub(super) const fn raw(&self) -> NonNull<sys::ibv_qp> {
        self.raw
    }

    /// This end in the form that the other end needs. Its first packet will have the number `packet`.
    pub(super) fn end(&self, port: &Port, packet: u32) -> End {
        End {
            // SAFETY: the queue pair is alive.
            number: unsafe { (*self.raw.as_ptr()).qp_num },
            packet,
            lid: port.lid,
            mtu: port.mtu,
            ethernet: port.ethernet,
            gid: port.gid,
        }
    }

    /// Connects the queue pair to the other end. From now on it answers requests, and requests may be posted
    /// on it.
    pub(super) fn connect(&self, device: &Device, port: &Port, packet: u32, other: &End) -> io::Result<()> {
        use sys::ibv_access_flags as access;
        use sys::ibv_qp_attr_mask as mask;

        if port.ethernet != other.ethernet {
            return Err(io::Error::other("one end is InfiniBand and the other Ethernet"));
        }
        let limits = device.limits()?;
        let mut attributes = no_attributes();
        attributes.qp_state = sys::ibv_qp_state::IBV_QPS_INIT;
        attributes.port_num = port.number;
        attributes.qp_access_flags = access::IBV_ACCESS_REMOTE_READ.0 | access::IBV_ACCESS_REMOTE_WRITE.0;
        let init =
            mask::IBV_QP_STATE | mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS;
        self.modify(&mut attributes, init)?;

        let mut attributes = no_attributes();
        attributes.qp_state = sys::ibv_qp_state::IBV_QPS_RTR;
        attributes.path_mtu = u32::from(port.mtu.min(other.mtu));
        attributes.dest_qp_num = other.number;
        attributes.rq_psn = other.packet;
        attributes.max_dest_rd_atomic = limits.reads_answered.clamp(1, READS_MAX);
        attributes.min_rnr_timer = NOT_READY_TIMER;
        attributes.ah_attr.dlid = other.lid;
        attributes.ah_attr.port_num = port.number;
        attributes.ah_attr.is_global = u8::from(port.ethernet || other.lid == 0);
        attributes.ah_attr.grh.dgid = sys::ibv_gid { raw: other.gid };
        attributes.ah_attr.grh.sgid_index = port.gid_index;
        attributes.ah_attr.grh.hop_limit = HOP_LIMIT;
        let ready_to_receive = mask::IBV_QP_STATE
            | mask::IBV_QP_AV
            | mask::IBV_QP_PATH_MTU
            | mask::IBV_QP_DEST_QPN
            | mask::IBV_QP_RQ_PSN
            | mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(&mut attributes, ready_to_receive)?;

        let mut attributes = no_attributes();
        attributes.qp_state = sys::ibv_qp_state::IBV_QPS_RTS;
        attributes.timeout = ACK_TIMEOUT;
        attributes.retry_cnt = RETRIES;
        attributes.rnr_retry = RETRIES;
        attributes.sq_psn = packet;
        attributes.max_rd_atomic = limits.reads_asked.clamp(1, READS_MAX);
        let ready_to_send = mask::IBV_QP_STATE
            | mask::IBV_QP_TIMEOUT
            | mask::IBV_QP_RETRY_CNT
            | mask::IBV_QP_RNR_RETRY
            | mask::IBV_QP_SQ_PSN
            | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut attributes, ready_to_send)
    }

    fn modify(&self, attributes: &mut sys::ibv_qp_attr, mask: sys::ibv_qp_attr_mask) -> io::Result<()> {
        // SAFETY: the queue pair is alive, and the attributes are read during the call only.
        check(unsafe { sys::ibv_modify_qp(self.raw.as_ptr(), attributes, mask.0.cast_signed()) })
    }
}

fn no_attributes() -> sys::ibv_qp_attr {
    // SAFETY: the structure consists of numbers, and a union of numbers, for which zeros are valid.
    unsafe { std::mem::zeroed() }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: the queue pair was created by this type and is destroyed once. After this call, the device
        // no longer accesses a buffer for it.
        complain("a queue pair", unsafe { sys::ibv_destroy_qp(self.raw.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roce_identifier_stands_for_an_ip_address() {
        let mut gid = [0; 16];
        gid[10..].copy_from_slice(&[0xff, 0xff, 192, 0, 2, 7]);
        let port = Port { number: 1, gid_index: 1, gid, lid: 0, mtu: 3, ethernet: true };
        assert_eq!(port.ip(), "192.0.2.7".parse::<IpAddr>().unwrap());
        assert!(Port::find(&[], port.ip()).is_none());
    }
}
