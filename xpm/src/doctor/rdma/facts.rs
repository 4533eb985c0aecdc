//! What was found of RDMA, for programs: `rdma` in what `doctor --json` prints.

use std::net::{IpAddr, Ipv6Addr};

use serde::Serialize;
use xpm_transport::rdma::inventory::{Device, Gid, Inventory, Limits, Port};

/// The RDMA devices of this machine.
#[derive(Debug, Serialize)]
pub(in crate::doctor) struct Facts {
    /// Whether a device can be used, and a port of it is active.
    usable: bool,
    /// What stands in the way, in words.
    obstacles: Vec<String>,
    devices: Vec<DeviceFacts>,
}

#[derive(Debug, Serialize)]
struct DeviceFacts {
    name: String,
    driver: Option<String>,
    software: bool,
    node_guid: Option<String>,
    /// None where the device could not be asked.
    limits: Option<LimitFacts>,
    ports: Vec<PortFacts>,
}

/// The names are those of `ibv_query_device(3)`.
#[derive(Debug, Serialize)]
struct LimitFacts {
    max_mr_size: u64,
    max_mr: u32,
    max_pd: u32,
    max_qp: u32,
    max_qp_wr: u32,
    max_cqe: u32,
    max_qp_rd_atom: u32,
    max_qp_init_rd_atom: u32,
}

#[derive(Debug, Serialize)]
struct PortFacts {
    number: u8,
    state: String,
    link_layer: Option<String>,
    /// In bytes.
    mtu: Option<u32>,
    rate: Option<String>,
    net_devices: Vec<String>,
    gids: Vec<GidFacts>,
}

#[derive(Debug, Serialize)]
struct GidFacts {
    index: u32,
    gid: Ipv6Addr,
    /// What the connection manager calls it by.
    address: Option<IpAddr>,
    #[serde(rename = "type")]
    kind: String,
    net_device: Option<String>,
}

impl From<&Inventory> for Facts {
    fn from(inventory: &Inventory) -> Facts {
        Facts {
            usable: inventory.is_usable(),
            obstacles: inventory.obstacles().iter().map(ToString::to_string).collect(),
            devices: inventory.devices.iter().map(device).collect(),
        }
    }
}

fn device(device: &Device) -> DeviceFacts {
    DeviceFacts {
        name: device.name.clone(),
        driver: device.driver.clone(),
        software: device.software,
        node_guid: device.node_guid.map(|guid| guid.to_string()),
        limits: device.limits.ok().map(limits),
        ports: device.ports.iter().map(port).collect(),
    }
}

fn limits(limits: Limits) -> LimitFacts {
    LimitFacts {
        max_mr_size: limits.max_mr_size,
        max_mr: limits.max_mr,
        max_pd: limits.max_pd,
        max_qp: limits.max_qp,
        max_qp_wr: limits.max_qp_wr,
        max_cqe: limits.max_cqe,
        max_qp_rd_atom: limits.max_qp_rd_atom,
        max_qp_init_rd_atom: limits.max_qp_init_rd_atom,
    }
}

fn port(port: &Port) -> PortFacts {
    PortFacts {
        number: port.number,
        state: port.state.to_string(),
        link_layer: port.link_layer.map(|layer| layer.to_string()),
        mtu: port.mtu,
        rate: port.rate.clone(),
        net_devices: port.net_devices.clone(),
        gids: port.gids.iter().map(gid).collect(),
    }
}

fn gid(gid: &Gid) -> GidFacts {
    GidFacts {
        index: gid.index,
        gid: gid.gid,
        address: gid.address(),
        kind: gid.kind.to_string(),
        net_device: gid.net_device.clone(),
    }
}
