//! The frontends and slots of one family in terms of the plan: addresses instead of octets, ids
//! instead of keys.

use std::net::IpAddr;

use ipnet::IpNet;
use shunt_common::{
    filter, hash,
    layout::{self, BACKEND_LOCAL, FrontendKey, MemberKey, Slot, SourceRangeKey, names},
};

use crate::{
    datapath::maps::{Filter, Map, MapFamily, Maps, PerFamily, Result},
    object::Protocol,
    plan::{FrontendAddress, FrontendId, FrontendKind, Scope},
};

/// Which of the two families something belongs to; index into pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FamilyIndex {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl FamilyIndex {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of_address(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The family of a frontend.
    pub fn of(id: &FrontendId) -> Self {
        match id.address {
            FrontendAddress::Ip(IpAddr::V4(_)) | FrontendAddress::NodePortV4 => Self::V4,
            FrontendAddress::Ip(IpAddr::V6(_)) | FrontendAddress::NodePortV6 => Self::V6,
        }
    }

    /// Name of its `slots` map.
    pub fn slots_name(self) -> &'static str {
        names::SLOTS[self as usize]
    }
}

/// A slot's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Choice {
    /// The backend's address.
    pub address: IpAddr,
    /// The backend's port.
    pub port: u16,
    /// Whether it runs on this node.
    pub local: bool,
    /// Its id.
    pub id: u32,
}

/// [`PerFamily`] without its type parameter. Addresses given to it must be of its family.
pub trait FrontendTable: Sync {
    /// The entry of a frontend.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    fn get(&self, id: &FrontendId) -> Result<Option<layout::Frontend>>;

    /// Creates or replaces the entry of a frontend.
    ///
    /// # Errors
    /// The map is full, or the kernel's.
    fn put(&self, id: &FrontendId, value: &layout::Frontend) -> Result<()>;

    /// Deletes the entry of a frontend; says whether it was there.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    fn delete(&self, id: &FrontendId) -> Result<bool>;

    /// All entries; those of protocols that no Service has are left out.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    fn entries(&self) -> Result<Vec<(FrontendId, layout::Frontend)>>;

    /// Number of slots.
    fn slots(&self) -> u32;

    /// One slot; `None` beyond the end.
    fn slot(&self, index: u32) -> Option<Choice>;

    /// Writes a slot that no frontend names.
    fn set_slot(&self, index: u32, choice: &Choice);

    /// Which slots hold which backends, for frontends with affinity.
    fn members(&self) -> &Map<MemberKey, u32>;

    /// All source ranges by Service number.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    fn source_ranges(&self) -> Result<Vec<(u32, IpNet)>>;

    /// Lets a Service's sources in.
    ///
    /// # Errors
    /// The map is full, or the kernel's.
    fn add_source_range(&self, service: u32, range: IpNet) -> Result<()>;

    /// Lets them in no longer.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    fn remove_source_range(&self, service: u32, range: IpNet) -> Result<()>;

    /// Lets packets to a frontend past the filter.
    fn admit_frontend(&self, filter: &Filter, id: &FrontendId);

    /// Lets packets of a backend past the filter.
    fn admit_backend(&self, filter: &Filter, address: IpAddr, port: u16, protocol: Protocol);

    /// What Maglev knows a backend by: the same on every node.
    fn identity(&self, address: IpAddr, port: u16, protocol: Protocol) -> u64;
}

impl Maps {
    /// The frontends and slots of a family.
    pub fn table(&self, family: FamilyIndex) -> &dyn FrontendTable {
        match family {
            FamilyIndex::V4 => &self.v4,
            FamilyIndex::V6 => &self.v6,
        }
    }
}

/// The protocol with an IANA number; `None` for those that Services do not have.
pub fn protocol(number: u8) -> Option<Protocol> {
    match number {
        layout::TCP => Some(Protocol::Tcp),
        layout::UDP => Some(Protocol::Udp),
        layout::SCTP => Some(Protocol::Sctp),
        _ => None,
    }
}

/// A kind as [`layout::Frontend::kind`] has it.
pub fn kind_number(kind: FrontendKind) -> u16 {
    match kind {
        FrontendKind::ClusterIp => layout::KIND_CLUSTER_IP,
        FrontendKind::NodePort => layout::KIND_NODE_PORT,
        FrontendKind::LoadBalancer => layout::KIND_LOAD_BALANCER,
        FrontendKind::ExternalIp => layout::KIND_EXTERNAL_IP,
    }
}

/// [`layout::Frontend::kind`] as people say it.
pub fn kind_name(number: u16) -> &'static str {
    match number {
        layout::KIND_CLUSTER_IP => "ClusterIP",
        layout::KIND_NODE_PORT => "NodePort",
        layout::KIND_LOAD_BALANCER => "LoadBalancer",
        layout::KIND_EXTERNAL_IP => "ExternalIP",
        _ => "unknown",
    }
}

/// An address as octets of the family; the unspecified address for one of the other family, which
/// no plan contains.
fn octets<F: MapFamily>(address: IpAddr) -> F::Addr {
    debug_assert!(
        F::octets(address).is_some(),
        "{address} is of the other family"
    );
    F::octets(address).unwrap_or(F::bytes(F::UNSPECIFIED))
}

fn frontend_octets<F: MapFamily>(id: &FrontendId) -> F::Addr {
    match id.address {
        FrontendAddress::Ip(address) => octets::<F>(address),
        FrontendAddress::NodePortV4 | FrontendAddress::NodePortV6 => F::bytes(F::UNSPECIFIED),
    }
}

fn key<F: MapFamily>(id: &FrontendId) -> FrontendKey<F::Addr> {
    FrontendKey {
        addr: frontend_octets::<F>(id),
        port: id.port,
        proto: id.protocol as u8,
        scope: id.scope as u8,
        reserved: 0,
    }
}

fn id<F: MapFamily>(key: &FrontendKey<F::Addr>) -> Option<FrontendId> {
    Some(FrontendId {
        address: match (F::words(key.addr) == F::UNSPECIFIED, F::INDEX) {
            (true, 0) => FrontendAddress::NodePortV4,
            (true, _) => FrontendAddress::NodePortV6,
            (false, _) => FrontendAddress::Ip(F::address(key.addr)),
        },
        port: key.port,
        protocol: protocol(key.proto)?,
        scope: match key.scope {
            layout::SCOPE_INTERNAL => Scope::Internal,
            layout::SCOPE_EXTERNAL => Scope::External,
            _ => return None,
        },
    })
}

/// Bits of the Service's number in front of a source range's own.
const SERVICE_BITS: u32 = u32::BITS;

fn source_range_key<F: MapFamily>(service: u32, range: IpNet) -> SourceRangeKey<F::Addr> {
    SourceRangeKey {
        prefix_len: SERVICE_BITS + u32::from(range.prefix_len()),
        service,
        addr: octets::<F>(range.network()),
    }
}

impl<F: MapFamily> FrontendTable for PerFamily<F> {
    fn get(&self, id: &FrontendId) -> Result<Option<layout::Frontend>> {
        self.frontends.get(&key::<F>(id))
    }

    fn put(&self, id: &FrontendId, value: &layout::Frontend) -> Result<()> {
        self.frontends.set(&key::<F>(id), value)
    }

    fn delete(&self, id: &FrontendId) -> Result<bool> {
        self.frontends.delete(&key::<F>(id))
    }

    fn entries(&self) -> Result<Vec<(FrontendId, layout::Frontend)>> {
        let entries = self.frontends.entries()?;
        Ok(entries
            .iter()
            .filter_map(|(key, value)| Some((id::<F>(key)?, *value)))
            .collect())
    }

    fn slots(&self) -> u32 {
        self.slots.capacity()
    }

    fn slot(&self, index: u32) -> Option<Choice> {
        self.slots.get(index).map(|slot| Choice {
            address: F::address(slot.addr),
            port: slot.port,
            local: slot.flags & BACKEND_LOCAL != 0,
            id: slot.backend,
        })
    }

    fn set_slot(&self, index: u32, choice: &Choice) {
        let slot = Slot {
            addr: octets::<F>(choice.address),
            port: choice.port,
            flags: if choice.local { BACKEND_LOCAL } else { 0 },
            backend: choice.id,
        };
        self.slots.set(index, slot);
    }

    fn members(&self) -> &Map<MemberKey, u32> {
        &self.members
    }

    fn source_ranges(&self) -> Result<Vec<(u32, IpNet)>> {
        let entries = self.source_ranges.entries()?;
        let range = |key: &SourceRangeKey<F::Addr>| {
            let len = key.prefix_len.checked_sub(SERVICE_BITS)?;
            IpNet::new(F::address(key.addr), u8::try_from(len).ok()?).ok()
        };
        Ok(entries
            .iter()
            .filter_map(|(key, _)| Some((key.service, range(key)?)))
            .collect())
    }

    fn add_source_range(&self, service: u32, range: IpNet) -> Result<()> {
        self.source_ranges
            .set(&source_range_key::<F>(service, range), &1)
    }

    fn remove_source_range(&self, service: u32, range: IpNet) -> Result<()> {
        self.source_ranges
            .delete(&source_range_key::<F>(service, range))
            .map(drop)
    }

    fn admit_frontend(&self, filter: &Filter, id: &FrontendId) {
        match id.address {
            FrontendAddress::Ip(address) => {
                let address = F::words(octets::<F>(address));
                filter.set(filter::frontend::<F>(address, id.port, id.protocol as u8));
                filter.set(filter::service::<F>(address));
            }
            FrontendAddress::NodePortV4 | FrontendAddress::NodePortV6 => {
                filter.set(filter::node_port(id.port));
            }
        }
    }

    fn admit_backend(&self, filter: &Filter, address: IpAddr, port: u16, protocol: Protocol) {
        let address = F::words(octets::<F>(address));
        filter.set(filter::backend::<F>(address, port, protocol as u8));
        filter.set(filter::backend_port(port));
    }

    fn identity(&self, address: IpAddr, port: u16, protocol: Protocol) -> u64 {
        hash::side::<F>(F::words(octets::<F>(address)), port, protocol as u8)
    }
}
