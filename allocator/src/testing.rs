//! Samples for tests.

use xpm_protocol::api::allocator::RegionSlot;
use xpm_protocol::api::appliance::{Endpoints, Info, Medium, Status};
use xpm_protocol::units::REGION_LEN_DEFAULT;
use xpm_protocol::{
    AllocationId, ApplianceId, BlockSize, ByteSize, Epoch, GrantId, GrantKey, HostId, Layout, RegionId,
};

use crate::store::record::{AllocationRecord, ApplianceRecord, GrantRecord, Phase};

/// A whole allocation of one region on appliance 1.
pub(crate) fn allocation(number: u128, name: &str) -> AllocationRecord {
    let grant = GrantRecord {
        id: GrantId::from_u128(number),
        appliance: ApplianceId::from_u128(1),
        key: GrantKey::from_bytes([7; 32]),
        count: 1,
        regions: vec![RegionId::from_u128(number)],
        from: None,
    };
    AllocationRecord {
        id: AllocationId::from_u128(number),
        name: name.parse().expect("tests use valid names"),
        size: REGION_LEN_DEFAULT,
        layout: Layout::Linear,
        region_len: REGION_LEN_DEFAULT,
        created: 1,
        phase: Phase::Ready,
        epoch: Epoch::FIRST,
        owner: None,
        revealed: false,
        next: None,
        grants: vec![grant],
        slots: vec![RegionSlot { grant: 0, slot: 0 }],
        terms: Default::default(),
        idle_since: 1,
        reclaim: None,
        version: 0,
        changes: 0,
        change: None,
        slabs: Default::default(),
        given_up: Default::default(),
        standby: None,
        handover: None,
        block_size: Some(BlockSize::B4096),
        keyless: false,
    }
}

/// An appliance without grants.
pub(crate) fn appliance(number: u128) -> ApplianceRecord {
    let endpoints = Endpoints {
        host: HostId::from_u128(1),
        nbd: Vec::new(),
        names: Vec::new(),
        rdma: Vec::new(),
        nbd_unix: None,
        shm: None,
    };
    let info = Info {
        id: ApplianceId::from_u128(number),
        name: format!("a{number}").parse().expect("tests use valid names"),
        version: "0".to_owned(),
        control: format!("http://127.0.0.1:{number}"),
        endpoints,
        medium: Medium::Memory,
        region_len: ByteSize(REGION_LEN_DEFAULT),
        labels: Default::default(),
        link_speed: None,
        life: None,
    };
    ApplianceRecord { info, status: Status::default(), since: 0, drain: None, given_up: None }
}
