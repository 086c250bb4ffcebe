//! The pinned maps with the types of [`shunt_common::layout`]: all that the agent and the command line know of the kernel.

use std::{
    fmt, fs,
    hash::Hash,
    io,
    marker::PhantomData,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use aya::Pod;
use shunt_common::{
    event::Event,
    family::{Family, V4, V6},
    layout::{
        Affinity, AffinityKey, BackendState, Config, FLOW_SNAT, FamilyConfig, Flow, FlowKey, Frontend, FrontendKey,
        LAYOUT_VERSION, MemberKey, NAME_LEN, Octets, ServiceInfo, Slot, SnatSlot, SocketPeer, SourceRangeKey, Traffic,
        names,
    },
    snat,
};

use super::sys::{self, Cursor, MappedArray};

/// Entries read by one batch call: enough to make its cost vanish, few enough for the second-level cache.
const BATCH: usize = 2048;

/// The settings of `shunt run` that say how large a map is, for messages.
pub mod settings {
    /// Entries of `frontends4`, `frontends6`, `services`, `addresses4`, `addresses6`, `source_ranges4` and `source_ranges6`.
    pub const MAX_FRONTENDS: &str = "--max-frontends";
    /// Entries of `slots4` and `slots6`.
    pub const MAX_SLOTS: &str = "--max-slots";
    /// Entries of `backends`, `members4` and `members6`.
    pub const MAX_BACKENDS: &str = "--max-backends";
    /// Entries of `flows4` and `flows6`.
    pub const MAX_FLOWS: &str = "--max-flows";
    /// Entries of `new_flows4` and `new_flows6`.
    pub const MAX_NEW_FLOWS: &str = "--max-new-flows";
    /// Entries of `snat4` and `snat6`.
    pub const MAX_SNAT: &str = "--max-snat";
    /// Entries of `affinity4` and `affinity6`.
    pub const MAX_AFFINITY: &str = "--max-affinity";
    /// Entries of `sockets`.
    pub const MAX_SOCKETS: &str = "--max-sockets";
    /// Entries of `node_addrs4` and `node_addrs6`: follows from the addresses that are admitted.
    pub const NODEPORT_ADDRESSES: &str = "--nodeport-addresses";
}

/// What can go wrong with a pinned map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Nothing is pinned.
    #[error(
        "no agent has run with --bpf-root {}: there is no {}; start one with `shunt run --bpf-root {}`, or name the \
         folder of the running one",
        root.display(), path.display(), root.display()
    )]
    NoAgent {
        /// The bpf root.
        root: PathBuf,
        /// The pin that is not there.
        path: PathBuf,
    },
    /// Not allowed.
    #[error("cannot open {}: {source}; run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", path.display())]
    Permission {
        /// The pin.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Pinned by something else.
    #[error(
        "{} is not a map of this shunt: {what} is {found}, expected {expected}; remove it with `shunt cleanup`",
        path.display()
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Which property differs.
        what: &'static str,
        /// Its value.
        found: u32,
        /// What it should be.
        expected: usize,
    },
    /// No room.
    #[error("map {map} is full ({capacity} entries): start the agent with a larger {setting}")]
    Full {
        /// The map.
        map: &'static str,
        /// Its capacity.
        capacity: u32,
        /// The flag of `shunt run` that sets it.
        setting: &'static str,
    },
    /// Anything else.
    #[error("cannot {action} map {map}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What came of it, or a [`MapError`].
pub type Result<T> = std::result::Result<T, MapError>;

/// An address family as userspace handles it.
pub trait MapFamily: Family<Addr: Octets + Hash + Ord + Send + Sync> + Send + Sync {
    /// Index into the pairs of names in [`names`].
    const INDEX: usize;
    /// The bytes of an address of this family; `None` for the other one.
    fn octets(address: IpAddr) -> Option<Self::Addr>;
    /// The address of some bytes.
    fn address(octets: Self::Addr) -> IpAddr;
    /// This family's part of the node's configuration.
    fn config_mut(config: &mut Config) -> &mut FamilyConfig<Self::Addr>;
}

impl MapFamily for V4 {
    const INDEX: usize = 0;

    fn octets(address: IpAddr) -> Option<[u8; 4]> {
        match address {
            IpAddr::V4(address) => Some(address.octets()),
            IpAddr::V6(_) => None,
        }
    }

    fn address(octets: [u8; 4]) -> IpAddr {
        octets.into()
    }

    fn config_mut(config: &mut Config) -> &mut FamilyConfig<[u8; 4]> {
        &mut config.v4
    }
}

impl MapFamily for V6 {
    const INDEX: usize = 1;

    fn octets(address: IpAddr) -> Option<[u8; 16]> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.octets()),
        }
    }

    fn address(octets: [u8; 16]) -> IpAddr {
        octets.into()
    }

    fn config_mut(config: &mut Config) -> &mut FamilyConfig<[u8; 16]> {
        &mut config.v6
    }
}

/// Folder of the pinned maps.
pub fn maps_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join(format!("v{LAYOUT_VERSION}")).join("maps")
}

/// Folder of the pinned programs.
pub fn progs_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join(format!("v{LAYOUT_VERSION}")).join("progs")
}

/// Folder of the pinned links.
pub fn links_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join(format!("v{LAYOUT_VERSION}")).join("links")
}

fn open_pin(bpf_root: &Path, name: &'static str, key: usize, value: usize) -> Result<(OwnedFd, u32)> {
    let path = maps_dir(bpf_root).join(name);
    let fd = sys::obj_get(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MapError::NoAgent {
            root: bpf_root.into(),
            path: path.clone(),
        },
        io::ErrorKind::PermissionDenied => MapError::Permission {
            path: path.clone(),
            source,
        },
        _ => MapError::Kernel {
            action: "open",
            map: name,
            source,
        },
    })?;
    let info = sys::map_info(fd.as_fd()).map_err(|source| MapError::Kernel {
        action: "inspect",
        map: name,
        source,
    })?;
    for (what, found, expected) in [
        ("the key's size", info.key_size, key),
        ("the value's size", info.value_size, value),
    ] {
        if found as usize != expected {
            return Err(MapError::Layout {
                path,
                what,
                found,
                expected,
            });
        }
    }
    Ok((fd, info.max_entries))
}

/// One pinned map. All methods work beside the programs that use it.
pub struct Map<K, V> {
    name: &'static str,
    setting: &'static str,
    fd: OwnedFd,
    capacity: u32,
    writes: AtomicU64,
    _types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> fmt::Debug for Map<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} entries at most)", self.name, self.capacity)
    }
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Opens the pinned map `name`; `setting` is the flag that sizes it.
    ///
    /// # Errors
    /// Not there, not allowed, or other sizes of key or value than `K` and `V` have.
    pub fn open(bpf_root: &Path, name: &'static str, setting: &'static str) -> Result<Self> {
        let (fd, capacity) = open_pin(bpf_root, name, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            name,
            setting,
            fd,
            capacity,
            writes: AtomicU64::new(0),
            _types: PhantomData,
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Most entries.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The flag of `shunt run` that sets the capacity.
    pub fn setting(&self) -> &'static str {
        self.setting
    }

    /// Writes by this process so far.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    fn error(&self, action: &'static str, source: io::Error) -> MapError {
        match source.raw_os_error() {
            // A hash map says E2BIG when its entries are used up, and ENOMEM when the kernel cannot allocate one.
            // And an LPM trie ENOSPC.
            Some(libc::E2BIG | libc::ENOMEM | libc::ENOSPC) if action == "write" => MapError::Full {
                map: self.name,
                capacity: self.capacity,
                setting: self.setting,
            },
            _ => MapError::Kernel {
                action,
                map: self.name,
                source,
            },
        }
    }

    /// The value of a key; LRU entries are not marked as used.
    ///
    /// # Errors
    /// The kernel's.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        sys::lookup(self.fd.as_fd(), key).map_err(|error| self.error("read", error))
    }

    /// Creates or replaces an entry.
    ///
    /// # Errors
    /// [`MapError::Full`], or the kernel's.
    pub fn set(&self, key: &K, value: &V) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        sys::update(self.fd.as_fd(), key, value, sys::BPF_ANY).map_err(|error| self.error("write", error))
    }

    /// Deletes an entry; says whether it was there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete(&self, key: &K) -> Result<bool> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        sys::delete(self.fd.as_fd(), key).map_err(|error| self.error("delete from", error))
    }

    /// Deletes many entries; returns how many were there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_all(&self, keys: &[K]) -> Result<usize> {
        self.writes.fetch_add(keys.len() as u64, Ordering::Relaxed);
        sys::delete_batch(self.fd.as_fd(), keys).map_err(|error| self.error("delete from", error))
    }

    /// Calls `visit` with every entry, a batch at a time, without marking LRU entries as used. An error of `visit`
    /// ends the walk.
    ///
    /// # Errors
    /// The kernel's, or that of `visit`.
    pub fn for_each_batch(&self, mut visit: impl FnMut(&[K], &[V]) -> Result<()>) -> Result<()> {
        let mut cursor = Cursor::default();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut room = BATCH;
        loop {
            keys.clear();
            values.clear();
            match sys::lookup_batch(self.fd.as_fd(), &mut cursor, &mut keys, &mut values, room) {
                Ok(at_end) => {
                    visit(&keys, &values)?;
                    if at_end {
                        return Ok(());
                    }
                }
                // One bucket's chain is longer than the room.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < self.capacity as usize => room *= 2,
                Err(error) => return Err(self.error("walk", error)),
            }
        }
    }

    /// All entries.
    ///
    /// # Errors
    /// The kernel's.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        self.for_each_batch(|keys, values| {
            entries.extend(keys.iter().copied().zip(values.iter().copied()));
            Ok(())
        })?;
        Ok(entries)
    }

    /// How many entries `counts` says yes to.
    ///
    /// # Errors
    /// The kernel's.
    pub fn count(&self, mut counts: impl FnMut(&V) -> bool) -> Result<u64> {
        let mut n = 0;
        self.for_each_batch(|_, values| {
            n += values.iter().filter(|value| counts(value)).count() as u64;
            Ok(())
        })?;
        Ok(n)
    }
}

/// A memory-mapped array map.
pub struct Array<T> {
    name: &'static str,
    setting: &'static str,
    memory: MappedArray<T>,
    writes: AtomicU64,
}

impl<T: Pod> Array<T> {
    /// Opens and maps the pinned array `name`; `setting` is the flag that sizes it.
    ///
    /// # Errors
    /// Not there, not allowed, not memory-mappable, or another size of value than `T` has.
    pub fn open(bpf_root: &Path, name: &'static str, setting: &'static str) -> Result<Self> {
        let (fd, capacity) = open_pin(bpf_root, name, size_of::<u32>(), size_of::<T>())?;
        let memory = MappedArray::new(fd.as_fd(), capacity).map_err(|source| MapError::Kernel {
            action: "memory-map",
            map: name,
            source,
        })?;
        Ok(Self {
            name,
            setting,
            memory,
            writes: AtomicU64::new(0),
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Number of elements.
    pub fn capacity(&self) -> u32 {
        self.memory.len()
    }

    /// The flag of `shunt run` that sets the capacity.
    pub fn setting(&self) -> &'static str {
        self.setting
    }

    /// One element; `None` beyond the end.
    pub fn get(&self, index: u32) -> Option<T> {
        (index < self.memory.len()).then(|| self.memory.get(index))
    }

    /// Writes an element that nobody reads yet. The system call that publishes it orders it before.
    pub fn set(&self, index: u32, value: T) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.memory.set(index, value);
    }
}

impl Array<u64> {
    /// Sets bits of a word, with release order. Says whether any was clear.
    pub fn set_bits(&self, index: u32, mask: u64) -> bool {
        let word = self.memory.atomic(index);
        if word.load(Ordering::Relaxed) & mask == mask {
            return false;
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
        word.fetch_or(mask, Ordering::Release);
        true
    }
}

impl<A: Octets> Array<SnatSlot<A>> {
    /// Gives a translated source port back that was last used at `seen`, unless a program was first to claim it.
    pub fn release(&self, index: u32, seen: u32) -> bool {
        // 0 is "never used", which every new flow may claim.
        let released = self
            .memory
            .last_seen(index)
            .compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        self.writes.fetch_add(released.into(), Ordering::Relaxed);
        released
    }
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
    pub new_flows: FlowMap<F>,
    /// Owners of translated source ports.
    pub snat: Array<SnatSlot<F::Addr>>,
    /// Addresses that node ports answer on.
    pub node_addrs: Map<F::Addr, u32>,
    /// Backends that are kept for clients.
    pub affinity: Map<AffinityKey<F::Addr>, Affinity>,
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
            new_flows: Map::open(root, names::NEW_FLOWS[i], settings::MAX_NEW_FLOWS)?,
            snat: Array::open(root, names::SNAT[i], settings::MAX_SNAT)?,
            node_addrs: Map::open(root, names::NODE_ADDRS[i], settings::NODEPORT_ADDRESSES)?,
            affinity: Map::open(root, names::AFFINITY[i], settings::MAX_AFFINITY)?,
            members: Map::open(root, names::MEMBERS[i], settings::MAX_BACKENDS)?,
            source_ranges: Map::open(root, names::SOURCE_RANGES[i], settings::MAX_FRONTENDS)?,
            addresses: Map::open(root, names::ADDRESSES[i], settings::MAX_FRONTENDS)?,
        })
    }

    /// Both flow maps: unanswered flows first, so that one that moves during a walk is not missed.
    pub fn flow_maps(&self) -> [&FlowMap<F>; 2] {
        [&self.new_flows, &self.flows]
    }

    /// Gives back the translated source port of a flow that is being deleted, unless another flow owns it by now.
    pub fn release_snat(&self, config: &Config, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) {
        if flow.state & FLOW_SNAT == 0 {
            return;
        }
        let index = snat::index::<F>(
            config,
            flow.snat_port,
            F::words(flow.backend),
            flow.backend_port,
            key.proto,
        );
        let Some(slot) = self.snat.get(index) else { return };
        let owned = slot.client == key.client
            && slot.client_port == key.client_port
            && slot.proto == key.proto
            && slot.frontend == flow.frontend
            && slot.frontend_port == flow.frontend_port
            && slot.backend == flow.backend
            && slot.backend_port == flow.backend_port;
        if owned {
            self.snat.release(index, slot.last_seen);
        }
    }

    fn writes(&self) -> u64 {
        [
            &self.frontends.writes,
            &self.slots.writes,
            &self.flows.writes,
            &self.new_flows.writes,
            &self.snat.writes,
            &self.node_addrs.writes,
            &self.affinity.writes,
            &self.members.writes,
            &self.source_ranges.writes,
            &self.addresses.writes,
        ]
        .into_iter()
        .map(|n| n.load(Ordering::Relaxed))
        .sum()
    }
}

/// Fill of one map, for `shunt status` and metrics.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Usage {
    /// Name of the map.
    pub map: &'static str,
    /// Entries in use.
    pub entries: u64,
    /// Most entries.
    pub capacity: u32,
    /// The flag of `shunt run` that sets the capacity.
    pub setting: &'static str,
}

/// All pinned maps.
pub struct Maps {
    /// IPv4.
    pub v4: PerFamily<V4>,
    /// IPv6.
    pub v6: PerFamily<V6>,
    /// See [`shunt_common::filter`].
    pub filter: Array<u64>,
    /// Backend states by id.
    pub backends: Map<u32, BackendState>,
    /// Services by number.
    pub services: Map<u32, ServiceInfo>,
    /// Flows that wait for their first answer in `flows`, per family.
    pub waiting: Map<u32, u64>,
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
    /// [`MapError::NoAgent`] when there are none, and what [`Map::open`] says.
    pub fn open(bpf_root: &Path) -> Result<Self> {
        // A missing folder and a missing map are the same to a user: no agent got that far.
        let dir = maps_dir(bpf_root);
        if let Err(source) = fs::metadata(&dir) {
            return Err(match source.kind() {
                io::ErrorKind::PermissionDenied => MapError::Permission { path: dir, source },
                _ => MapError::NoAgent {
                    root: bpf_root.into(),
                    path: dir,
                },
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
            filter: Array::open(bpf_root, names::FILTER, "")?,
            backends: Map::open(bpf_root, names::BACKENDS, settings::MAX_BACKENDS)?,
            services: Map::open(bpf_root, names::SERVICES, settings::MAX_FRONTENDS)?,
            waiting: Map::open(bpf_root, names::WAITING, "")?,
            sockets: Map::open(bpf_root, names::SOCKETS, settings::MAX_SOCKETS)?,
            config: Map::open(bpf_root, names::CONFIG, "")?,
            events: open_pin(bpf_root, names::EVENTS, size_of::<u32>(), size_of::<u64>())?.0,
            traffic: open_pin(bpf_root, names::TRAFFIC, size_of::<u32>(), size_of::<Traffic>())?.0,
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
    /// The kernel's.
    pub fn config(&self) -> Result<Config> {
        Ok(self.config.get(&0)?.unwrap_or_default())
    }

    /// Replaces what the programs know of this node, when it differs. Says whether it did.
    ///
    /// # Errors
    /// The kernel's.
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
    /// The kernel's.
    pub fn events(&self) -> Result<Vec<(Event, u64)>> {
        Event::ALL
            .iter()
            .map(|&event| {
                let per_cpu = sys::lookup_per_cpu::<u64>(self.events.as_fd(), &(event as u32), self.cpus);
                let per_cpu = per_cpu.map_err(|source| MapError::Kernel {
                    action: "read",
                    map: names::EVENTS,
                    source,
                })?;
                Ok((event, per_cpu.iter().sum()))
            })
            .collect()
    }

    /// What a backend got and sent, summed over CPUs; zeros where that is not counted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn traffic(&self, backend: u32) -> Result<Traffic> {
        match sys::lookup_per_cpu::<Traffic>(self.traffic.as_fd(), &backend, self.cpus) {
            Ok(per_cpu) => Ok(per_cpu.iter().fold(Traffic::default(), |sum, one| Traffic {
                to_packets: sum.to_packets + one.to_packets,
                to_bytes: sum.to_bytes + one.to_bytes,
                from_packets: sum.from_packets + one.from_packets,
                from_bytes: sum.from_bytes + one.from_bytes,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Traffic::default()),
            Err(source) => Err(MapError::Kernel {
                action: "read",
                map: names::TRAFFIC,
                source,
            }),
        }
    }

    /// Forgets what a backend got and sent.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_traffic(&self, backend: u32) -> Result<()> {
        match sys::delete(self.traffic.as_fd(), &backend) {
            Ok(_was_there) => Ok(()),
            Err(source) => Err(MapError::Kernel {
                action: "delete from",
                map: names::TRAFFIC,
                source,
            }),
        }
    }

    /// Writes to all maps by this process since it opened them: what the kernel was asked to change.
    pub fn writes(&self) -> u64 {
        let shared = [
            &self.filter.writes,
            &self.backends.writes,
            &self.services.writes,
            &self.config.writes,
        ];
        let shared: u64 = shared.into_iter().map(|n| n.load(Ordering::Relaxed)).sum();
        shared + self.v4.writes() + self.v6.writes()
    }

    /// How full every map is. Walks them all, without marking entries as used.
    ///
    /// # Errors
    /// The kernel's.
    pub fn usage(&self) -> Result<Vec<Usage>> {
        fn of<K: Pod, V: Pod>(map: &Map<K, V>, counts: impl FnMut(&V) -> bool) -> Result<Usage> {
            Ok(Usage {
                map: map.name,
                entries: map.count(counts)?,
                capacity: map.capacity,
                setting: map.setting,
            })
        }
        fn family<F: MapFamily>(maps: &PerFamily<F>, usage: &mut Vec<Usage>) -> Result<()> {
            let mut ranges = std::collections::HashSet::new();
            usage.push(of(&maps.frontends, |frontend| {
                ranges.insert((frontend.slot_base, frontend.slot_count));
                true
            })?);
            usage.push(Usage {
                map: maps.slots.name,
                entries: ranges.iter().map(|&(_, count)| u64::from(count)).sum(),
                capacity: maps.slots.capacity(),
                setting: maps.slots.setting,
            });
            usage.push(of(&maps.new_flows, |_| true)?);
            usage.push(of(&maps.flows, |_| true)?);
            let in_use = |&index: &u32| maps.snat.get(index).is_some_and(|slot| slot.last_seen != 0);
            usage.push(Usage {
                map: maps.snat.name,
                entries: (0..maps.snat.capacity()).filter(in_use).count() as u64,
                capacity: maps.snat.capacity(),
                setting: maps.snat.setting,
            });
            usage.push(of(&maps.node_addrs, |_| true)?);
            usage.push(of(&maps.affinity, |_| true)?);
            usage.push(of(&maps.members, |_| true)?);
            usage.push(of(&maps.source_ranges, |_| true)?);
            usage.push(of(&maps.addresses, |_| true)?);
            Ok(())
        }
        let mut usage = Vec::new();
        family(&self.v4, &mut usage)?;
        family(&self.v6, &mut usage)?;
        usage.push(of(&self.backends, |state| *state != BackendState::default())?);
        usage.push(of(&self.services, |_| true)?);
        usage.push(of(&self.sockets, |_| true)?);
        Ok(usage)
    }
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

/// Real maps in a bpf root of their own, for the tests of everything above them.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::atomic::AtomicU32;

    use shunt_common::{
        event::MAX_EVENTS,
        layout::{CLIENT_WORDS, COLLIDED_WORDS, FILTER_WORDS},
    };

    use super::*;

    /// How large the maps are.
    #[derive(Clone, Copy)]
    pub(crate) struct Capacities {
        pub(crate) frontends: u32,
        pub(crate) slots: u32,
        pub(crate) backends: u32,
        pub(crate) flows: u32,
    }

    impl Default for Capacities {
        fn default() -> Self {
            Self {
                frontends: 256,
                slots: 4096,
                backends: 256,
                flows: 1024,
            }
        }
    }

    /// A bpf root that removes itself.
    pub(crate) struct Root(pub(crate) PathBuf);

    impl Root {
        pub(crate) fn new(capacities: Capacities) -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let root = PathBuf::from(format!("/sys/fs/bpf/shunt-test-{}-{number}", std::process::id()));
            fs::create_dir_all(maps_dir(&root)).expect("a bpf file system at /sys/fs/bpf and root");
            let this = Self(root);
            this.family::<V4>(capacities);
            this.family::<V6>(capacities);
            use sys::create::{ARRAY, BPF_F_NO_PREALLOC, HASH, PERCPU_ARRAY, PERCPU_HASH};
            this.make::<u32, u64>(names::FILTER, ARRAY, FILTER_WORDS as u32, sys::BPF_F_MMAPABLE);
            this.make::<u32, u64>(names::CLIENTS, ARRAY, CLIENT_WORDS as u32, 0);
            this.make::<u32, u64>(names::WAITING, ARRAY, 2, 0);
            this.make::<u32, u64>(names::COLLIDED, ARRAY, COLLIDED_WORDS as u32, 0);
            this.make::<u32, BackendState>(names::BACKENDS, ARRAY, capacities.backends, 0);
            this.make::<u32, ServiceInfo>(names::SERVICES, HASH, capacities.frontends, 0);
            this.make::<u64, SocketPeer>(names::SOCKETS, HASH, 1024, 0);
            this.make::<u32, Config>(names::CONFIG, ARRAY, 1, 0);
            this.make::<u32, u64>(names::EVENTS, PERCPU_ARRAY, MAX_EVENTS as u32, 0);
            this.make::<u32, Traffic>(names::TRAFFIC, PERCPU_HASH, capacities.backends, BPF_F_NO_PREALLOC);
            this
        }

        fn family<F: MapFamily>(&self, capacities: Capacities) {
            use sys::create::{ARRAY, BPF_F_NO_PREALLOC, HASH, LPM_TRIE, LRU_HASH};
            let i = F::INDEX;
            let (trie, frontends) = (names::SOURCE_RANGES[i], capacities.frontends);
            self.make::<SourceRangeKey<F::Addr>, u32>(trie, LPM_TRIE, frontends, BPF_F_NO_PREALLOC);
            self.make::<AffinityKey<F::Addr>, Affinity>(names::AFFINITY[i], LRU_HASH, capacities.flows, 0);
            self.make::<MemberKey, u32>(names::MEMBERS[i], HASH, capacities.backends, BPF_F_NO_PREALLOC);
            self.make::<FrontendKey<F::Addr>, Frontend>(names::FRONTENDS[i], HASH, capacities.frontends, 0);
            self.make::<u32, Slot<F::Addr>>(names::SLOTS[i], ARRAY, capacities.slots, sys::BPF_F_MMAPABLE);
            self.make::<FlowKey<F::Addr>, Flow<F::Addr>>(names::FLOWS[i], LRU_HASH, capacities.flows, 0);
            self.make::<FlowKey<F::Addr>, Flow<F::Addr>>(names::NEW_FLOWS[i], LRU_HASH, capacities.flows, 0);
            self.make::<u32, SnatSlot<F::Addr>>(names::SNAT[i], ARRAY, 1024, sys::BPF_F_MMAPABLE);
            self.make::<F::Addr, u32>(names::NODE_ADDRS[i], HASH, 64, 0);
            self.make::<F::Addr, u32>(names::ADDRESSES[i], HASH, capacities.frontends, 0);
        }

        fn make<K, V>(&self, name: &str, map_type: u32, entries: u32, flags: u32) {
            let fd = sys::create::map(map_type, size_of::<K>(), size_of::<V>(), entries, flags).expect(name);
            sys::create::pin(fd.as_fd(), &maps_dir(&self.0).join(name)).expect(name);
        }

        pub(crate) fn maps(&self) -> Maps {
            Maps::open(&self.0).expect("maps just made")
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            // bpffs knows no recursive removal of its own, but unlinks pins like files.
            if let Err(error) = fs::remove_dir_all(&self.0) {
                eprintln!("cannot remove {}: {error}", self.0.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use shunt_common::layout::{SCOPE_EXTERNAL, TCP};

    use super::{
        testing::{Capacities, Root},
        *,
    };

    fn key(n: u16) -> FrontendKey<[u8; 4]> {
        FrontendKey {
            addr: [10, 96, 0, 1],
            port: n,
            proto: TCP,
            scope: SCOPE_EXTERNAL,
            reserved: 0,
        }
    }

    #[test]
    fn a_root_without_an_agent_says_what_to_do() {
        let error = Maps::open(Path::new("/sys/fs/bpf/shunt-nobody"))
            .err()
            .expect("no maps there");
        let message = error.to_string();
        assert!(
            message.contains("no agent has run with --bpf-root /sys/fs/bpf/shunt-nobody"),
            "{message}"
        );
        assert!(!message.contains('\n'));
    }

    #[test]
    fn a_map_of_another_layout_is_not_touched() {
        let root = Root::new(Capacities::default());
        let path = maps_dir(&root.0).join(names::SERVICES);
        fs::remove_file(&path).expect("pin");
        let fd = sys::create::map(sys::create::HASH, 4, 8, 16, 0).expect("map");
        sys::create::pin(fd.as_fd(), &path).expect("pin");
        let message = Maps::open(&root.0).err().expect("wrong value size").to_string();
        assert!(message.contains("the value's size is 8, expected 128"), "{message}");
    }

    #[test]
    fn what_is_written_is_walked_and_deleted_in_batches() {
        let root = Root::new(Capacities {
            frontends: 8192,
            ..Default::default()
        });
        let map = root.maps().v4.frontends;
        for n in 0..5000 {
            let value = Frontend {
                slot_base: u32::from(n),
                ..Default::default()
            };
            map.set(&key(n), &value).expect("room");
        }
        let entries = map.entries().expect("walk");
        assert!(
            entries
                .iter()
                .all(|(key, value)| u32::from(key.port) == value.slot_base)
        );
        let seen: HashSet<u16> = entries.iter().map(|(key, _)| key.port).collect();
        assert_eq!((entries.len(), seen.len()), (5000, 5000));

        // Keys that are not there, first, last and in between, do not stop the deletion of the others.
        let doomed: Vec<_> = (4000..6000).chain([7000]).chain(0..10).map(key).collect();
        assert_eq!(map.delete_all(&doomed).expect("delete"), 1010);
        assert_eq!(map.count(|_| true).expect("walk"), 3990);
        assert!(!map.delete(&key(4000)).expect("delete"));
        assert_eq!(map.get(&key(11)).expect("read").map(|f| f.slot_base), Some(11));
    }

    #[test]
    fn a_full_map_names_its_setting() {
        let root = Root::new(Capacities {
            frontends: 16,
            ..Default::default()
        });
        let map = root.maps().v4.frontends;
        let error = (0..100)
            .find_map(|n| map.set(&key(n), &Frontend::default()).err())
            .expect("16 entries at most");
        assert_eq!(
            error.to_string(),
            "map frontends4 is full (16 entries): start the agent with a larger --max-frontends"
        );
    }

    #[test]
    fn mapped_slots_and_the_kernel_see_one_memory() {
        let root = Root::new(Capacities::default());
        let maps = root.maps();
        // Twelve bytes in a stride of sixteen: a wrong stride would show in the second element.
        for index in 0..10 {
            let slot = Slot {
                addr: [10, 0, 0, index as u8],
                port: 80,
                flags: 0,
                backend: index,
            };
            maps.v4.slots.set(index, slot);
        }
        let by_syscall: Map<u32, Slot<[u8; 4]>> = Map::open(&root.0, names::SLOTS[0], "").expect("open");
        for index in 0..10 {
            let slot = by_syscall.get(&index).expect("read").expect("there");
            assert_eq!((slot.addr[3], slot.backend), (index as u8, index));
        }
        assert_eq!(maps.v4.slots.get(4096), None);
        assert!(maps.filter.set_bits(7, 0b110));
        assert!(!maps.filter.set_bits(7, 0b100));
    }

    #[test]
    fn names_survive_the_map() {
        let longest = "x".repeat(63);
        assert_eq!(name_str(&name_bytes(&longest)), longest);
        assert_eq!(name_str(&name_bytes("")), "");
    }
}
