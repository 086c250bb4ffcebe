//! The pinned maps with the types of [`shunt_common::layout`]: all that the agent and the command
//! line know of the kernel.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use shunt_common::{
    event::Event,
    family::{Family, V4, V6},
    layout::{
        Affinity, AffinityKey, BackendState, Config, DirectKey, FLOW_SNAT, Flow, FlowKey, Frontend,
        FrontendKey, MemberKey, NAME_LEN, ServiceInfo, Slot, SnatSlot, SocketPeer, SourceRangeKey,
        Traffic, names,
    },
    snat,
};

use super::bpf::map;

mod error;
mod family;
mod filter;
mod pinned;
mod states;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod usage;

pub(in crate::datapath) use self::pinned::open_pin;
pub use self::{
    error::{MapError, Result},
    family::MapFamily,
    filter::Filter,
    pinned::{Array, Map, links_dir, maps_dir, progs_dir},
    states::BackendStates,
    usage::{SnatUse, Usage},
};

/// The settings of `shunt run` that say how large a map is, for messages.
pub mod settings {
    /// Entries of `frontends4`, `frontends6`, `services`, `service_addrs4`, `service_addrs6`,
    /// `source_ranges4` and `source_ranges6`.
    pub const MAX_FRONTENDS: &str = "--max-frontends";
    /// Entries of `slots4` and `slots6`.
    pub const MAX_SLOTS: &str = "--max-slots";
    /// Entries of `backends`, `set_members4` and `set_members6`.
    pub const MAX_BACKENDS: &str = "--max-backends";
    /// Entries of `flows4` and `flows6`.
    pub const MAX_FLOWS: &str = "--max-flows";
    /// Entries of `unconfirmed4` and `unconfirmed6`.
    pub const MAX_NEW_FLOWS: &str = "--max-new-flows";
    /// Entries of `snat4` and `snat6`.
    pub const MAX_SNAT: &str = "--max-snat";
    /// Entries of `affinity4`, `affinity6`, `new_affinity4` and `new_affinity6`.
    pub const MAX_AFFINITY: &str = "--max-affinity";
    /// Entries of `sockets`.
    pub const MAX_SOCKETS: &str = "--max-sockets";
    /// Entries of `node_addrs4` and `node_addrs6`: follows from the addresses that are admitted.
    pub const NODEPORT_ADDRESSES: &str = "--nodeport-addresses";
}

/// A connection table of one family.
pub type FlowMap<F> = Map<FlowKey<<F as Family>::Addr>, Flow<<F as Family>::Addr>>;

/// The maps that exist once per family.
pub struct PerFamily<F: MapFamily> {
    /// What clients dial.
    pub frontends: Map<FrontendKey<F::Addr>, Frontend>,
    /// What they reach.
    pub slots: Array<Slot<F::Addr>>,
    /// Flows seen in both directions.
    pub flows: FlowMap<F>,
    /// Flows not yet answered.
    pub unconfirmed: FlowMap<F>,
    /// Owners of translated source ports.
    pub snat: Array<SnatSlot<F::Addr>>,
    /// Connections of the node that are no Service's, and when they last sent.
    pub direct: Map<DirectKey<F::Addr>, u32>,
    /// What pods send to backends themselves, and when they did last.
    pub bypass: Map<DirectKey<F::Addr>, u32>,
    /// Addresses that node ports answer on.
    pub node_addrs: Map<F::Addr, u32>,
    /// Backends that are kept for clients.
    pub affinity: Map<AffinityKey<F::Addr>, Affinity>,
    /// The same for clients that have not spoken after an answer.
    pub new_affinity: Map<AffinityKey<F::Addr>, Affinity>,
    /// Backends among the slots of frontends with affinity, and where.
    pub members: Map<MemberKey, u32>,
    /// Who may dial a Service's load balancer addresses.
    pub source_ranges: Map<SourceRangeKey<F::Addr>, u32>,
    /// Addresses of Services, with `ADDRESS_*` bits.
    pub addresses: Map<F::Addr, u32>,
}

impl<F: MapFamily> PerFamily<F> {
    fn open(root: &Path) -> Result<Self> {
        let i = F::INDEX;
        Ok(Self {
            frontends: Map::open(root, names::FRONTENDS[i], settings::MAX_FRONTENDS)?,
            slots: Array::open(root, names::SLOTS[i], settings::MAX_SLOTS)?,
            flows: Map::open(root, names::FLOWS[i], settings::MAX_FLOWS)?,
            unconfirmed: Map::open(root, names::UNCONFIRMED[i], settings::MAX_NEW_FLOWS)?,
            snat: Array::open(root, names::SNAT[i], settings::MAX_SNAT)?,
            direct: Map::open(root, names::DIRECT[i], "")?,
            bypass: Map::open(root, names::BYPASS[i], "")?,
            node_addrs: Map::open(root, names::NODE_ADDRS[i], settings::NODEPORT_ADDRESSES)?,
            affinity: Map::open(root, names::AFFINITY[i], settings::MAX_AFFINITY)?,
            new_affinity: Map::open(root, names::NEW_AFFINITY[i], settings::MAX_AFFINITY)?,
            members: Map::open(root, names::SET_MEMBERS[i], settings::MAX_BACKENDS)?,
            source_ranges: Map::open(root, names::SOURCE_RANGES[i], settings::MAX_FRONTENDS)?,
            addresses: Map::open(root, names::SERVICE_ADDRS[i], settings::MAX_FRONTENDS)?,
        })
    }

    /// Both flow maps: unanswered flows first, so that one that moves during a walk is not missed.
    pub fn flow_maps(&self) -> [&FlowMap<F>; 2] {
        [&self.unconfirmed, &self.flows]
    }

    /// Gives back the translated source port of a flow that is being deleted, unless another flow
    /// owns it by now.
    pub fn release_snat(&self, config: &Config, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) {
        if flow.state & FLOW_SNAT == 0 {
            return;
        }
        let places = snat::places::<F>(
            config,
            flow.snat_port,
            F::words(flow.backend),
            flow.backend_port,
            key.proto,
        );
        for index in places {
            let Some(slot) = self.snat.get(index) else {
                return;
            };
            let owned = snat::is_of(
                &slot,
                flow.snat_port,
                flow.backend,
                flow.backend_port,
                key.proto,
            ) && slot.client == key.client
                && slot.client_port == key.client_port
                && slot.frontend == flow.frontend
                && slot.frontend_port == flow.frontend_port;
            if owned {
                self.snat.release(index, slot.last_seen);
            }
        }
    }

    fn writes(&self) -> u64 {
        [
            self.frontends.writes(),
            self.slots.writes(),
            self.flows.writes(),
            self.unconfirmed.writes(),
            self.snat.writes(),
            self.direct.writes(),
            self.bypass.writes(),
            self.node_addrs.writes(),
            self.affinity.writes(),
            self.new_affinity.writes(),
            self.members.writes(),
            self.source_ranges.writes(),
            self.addresses.writes(),
        ]
        .into_iter()
        .sum()
    }
}

/// All pinned maps.
pub struct Maps {
    /// IPv4.
    pub v4: PerFamily<V4>,
    /// IPv6.
    pub v6: PerFamily<V6>,
    /// See [`shunt_common::filter`].
    pub filter: Filter,
    /// Backend states by id.
    pub backends: Map<u32, BackendState>,
    /// Services by number.
    pub services: Map<u32, ServiceInfo>,
    /// Flows that wait for their first answer in `flows`, per family.
    pub half_open: Map<u32, u64>,
    /// What connected sockets dialled, by cookie (`SO_COOKIE`).
    pub sockets: Map<u64, SocketPeer>,
    config: Map<u32, Config>,
    events: OwnedFd,
    traffic: OwnedFd,
    cpus: usize,
    root: PathBuf,
}

impl Maps {
    /// Opens all maps that an agent has pinned under `bpf_root`.
    ///
    /// # Errors
    /// [`MapError::NoAgent`] when there are none, [`MapError::OtherLayout`] when another release
    /// has pinned them, and what [`Map::open`] says.
    pub fn open(bpf_root: &Path) -> Result<Self> {
        // A missing folder and a missing map are the same to a user: no agent got that far.
        let dir = maps_dir(bpf_root);
        if let Err(source) = fs::metadata(&dir) {
            return Err(match source.kind() {
                io::ErrorKind::PermissionDenied => MapError::Permission { path: dir, source },
                _ => pinned::missing(bpf_root, dir),
            });
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| MapError::Kernel {
            action: "count the CPUs of",
            map: names::EVENTS,
            source,
        })?;
        Ok(Self {
            v4: PerFamily::open(bpf_root)?,
            v6: PerFamily::open(bpf_root)?,
            filter: Filter::open(bpf_root)?,
            backends: Map::open(bpf_root, names::BACKENDS, settings::MAX_BACKENDS)?,
            services: Map::open(bpf_root, names::SERVICES, settings::MAX_FRONTENDS)?,
            half_open: Map::open(bpf_root, names::HALF_OPEN, "")?,
            sockets: Map::open(bpf_root, names::SOCKETS, settings::MAX_SOCKETS)?,
            config: Map::open(bpf_root, names::CONFIG, "")?,
            events: open_pin(bpf_root, names::EVENTS, size_of::<u32>(), size_of::<u64>())?.0,
            traffic: open_pin(
                bpf_root,
                names::TRAFFIC,
                size_of::<u32>(),
                size_of::<Traffic>(),
            )?
            .0,
            cpus,
            root: bpf_root.into(),
        })
    }

    /// The `--bpf-root` these were opened from.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What the programs know of this node.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    pub fn config(&self) -> Result<Config> {
        Ok(self.config.get(&0)?.unwrap_or_default())
    }

    /// Replaces what the programs know of this node, when it differs. Says whether it did.
    ///
    /// # Errors
    /// `MapError::Full` when the map has no room, which names the setting to raise;
    /// `MapError::Kernel` for anything else, as `EPERM` without `CAP_BPF`.
    pub fn set_config(&self, config: &Config) -> Result<bool> {
        if self.config()? == *config {
            return Ok(false);
        }
        self.config.set(&0, config)?;
        Ok(true)
    }

    /// Counters of all events since the maps were made, summed over CPUs.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    pub fn events(&self) -> Result<Vec<(Event, u64)>> {
        Event::ALL
            .iter()
            .map(|&event| {
                let per_cpu =
                    map::lookup_per_cpu::<u64>(self.events.as_fd(), &(event as u32), self.cpus);
                let per_cpu = per_cpu.map_err(|source| MapError::Kernel {
                    action: "read",
                    map: names::EVENTS,
                    source,
                })?;
                Ok((event, per_cpu.iter().sum()))
            })
            .collect()
    }

    /// Whether packets and bytes are counted, and there were any.
    ///
    /// # Errors
    /// `MapError::Kernel` when the map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    pub fn counts_traffic(&self) -> Result<bool> {
        let empty = map::is_empty(self.traffic.as_fd()).map_err(|source| MapError::Kernel {
            action: "read",
            map: names::TRAFFIC,
            source,
        })?;
        Ok(!empty)
    }

    /// What a backend got and sent, summed over CPUs; zeros where that is not counted.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    pub fn traffic(&self, backend: u32) -> Result<Traffic> {
        match map::lookup_per_cpu::<Traffic>(self.traffic.as_fd(), &backend, self.cpus) {
            Ok(per_cpu) => Ok(total(&per_cpu)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Traffic::default()),
            Err(source) => Err(MapError::Kernel {
                action: "read",
                map: names::TRAFFIC,
                source,
            }),
        }
    }

    /// Calls `visit` with what every backend got and sent, summed over CPUs; not at all where that is
    /// not counted.
    ///
    /// # Errors
    /// `MapError::Kernel` when the map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM`
    /// without memory for a batch. Nothing has changed: try again.
    pub fn for_each_traffic(&self, mut visit: impl FnMut(u32, Traffic)) -> Result<()> {
        let walked = map::for_each_per_cpu(self.traffic.as_fd(), self.cpus, |backend, per_cpu| {
            visit(backend, total(per_cpu));
        });
        walked.map_err(|source| MapError::Kernel {
            action: "walk",
            map: names::TRAFFIC,
            source,
        })
    }

    /// Forgets what a backend got and sent.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    pub fn forget_traffic(&self, backend: u32) -> Result<()> {
        match map::delete(self.traffic.as_fd(), &backend) {
            Ok(_was_there) => Ok(()),
            Err(source) => Err(MapError::Kernel {
                action: "delete from",
                map: names::TRAFFIC,
                source,
            }),
        }
    }

    /// Writes to all maps by this process since it opened them: what the kernel was asked to
    /// change.
    pub fn writes(&self) -> u64 {
        let shared = [
            self.filter.writes(),
            self.backends.writes(),
            self.services.writes(),
            self.config.writes(),
        ];
        let shared: u64 = shared.into_iter().sum();
        shared + self.v4.writes() + self.v6.writes()
    }
}

/// The namespace and name of every Service number.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub fn service_names(maps: &Maps) -> Result<HashMap<u32, (String, String)>> {
    let entries = maps.services.entries()?;
    Ok(entries
        .into_iter()
        .map(|(number, info)| (number, (name_str(&info.namespace), name_str(&info.name))))
        .collect())
}

/// The Service of a number; `?` for one that has no name in the maps.
pub fn service_name(names: &HashMap<u32, (String, String)>, number: u32) -> (String, String) {
    let unknown = || (String::from("?"), format!("#{number}"));
    names.get(&number).cloned().unwrap_or_else(unknown)
}

/// What all CPUs counted.
fn total(per_cpu: &[Traffic]) -> Traffic {
    per_cpu.iter().fold(Traffic::default(), |sum, one| Traffic {
        to_packets: sum.to_packets + one.to_packets,
        to_bytes: sum.to_bytes + one.to_bytes,
        from_packets: sum.from_packets + one.from_packets,
        from_bytes: sum.from_bytes + one.from_bytes,
    })
}

/// A name as [`ServiceInfo`] keeps it; cut to [`NAME_LEN`] − 1 bytes, which no valid name exceeds.
pub fn name_bytes(name: &str) -> [u8; NAME_LEN] {
    let mut bytes = [0; NAME_LEN];
    let len = name.len().min(NAME_LEN - 1);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}

/// The name in a field of [`ServiceInfo`].
pub fn name_str(bytes: &[u8; NAME_LEN]) -> String {
    let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(NAME_LEN);
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}
