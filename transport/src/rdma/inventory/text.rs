//! The textual forms of the parts of an inventory.

use std::fmt;

use super::{Access, GidKind, Guid, LinkLayer, Node, Obstacle, PortState};

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Guid(bits) = *self;
        write!(
            f,
            "{:04x}:{:04x}:{:04x}:{:04x}",
            bits >> 48,
            bits >> 32 & 0xffff,
            bits >> 16 & 0xffff,
            bits & 0xffff
        )
    }
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PortState::Down => "down",
            PortState::Initializing => "initializing",
            PortState::Armed => "armed",
            PortState::Active => "active",
            PortState::ActiveDefer => "active, recovering",
            PortState::Unknown => "in an unknown state",
        })
    }
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LinkLayer::InfiniBand => "InfiniBand",
            LinkLayer::Ethernet => "Ethernet",
        })
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            GidKind::InfiniBand => "InfiniBand",
            GidKind::RoceV1 => "RoCE v1",
            GidKind::RoceV2 => "RoCE v2",
            GidKind::Iwarp => "iWARP",
        })
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NoKernelSupport => f.write_str("the kernel has no RDMA support loaded"),
            Obstacle::NoDevice => f.write_str("this machine has no RDMA device"),
            Obstacle::NoVerbs => f.write_str("the kernel's module ib_uverbs is not loaded"),
            Obstacle::NoVerbsLibrary => f.write_str("libibverbs is not installed"),
            Obstacle::NoManagerLibrary => f.write_str("librdmacm is not installed"),
            Obstacle::NotListed(errno) => write!(f, "libibverbs lists no devices: {errno}"),
            Obstacle::Node(Node { path, access }) => match access {
                Access::Usable => write!(f, "{} can be opened", path.display()),
                Access::Missing => write!(f, "{} is not there", path.display()),
                Access::Denied => write!(f, "{} may not be opened by this process", path.display()),
                Access::Failed(errno) => write!(f, "{} cannot be opened: {errno}", path.display()),
            },
            Obstacle::NoProvider(device) => write!(f, "libibverbs has no provider for {device}"),
            Obstacle::Leaving(device) => write!(f, "{device} is being removed"),
            Obstacle::NotOpened(device, errno) => write!(f, "{device} cannot be used: {errno}"),
            Obstacle::NoActivePort => f.write_str("no port is active"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_have_the_kernels_form() {
        assert_eq!(Guid(0x0002_c903_0021_b3a0).to_string(), "0002:c903:0021:b3a0");
    }
}
