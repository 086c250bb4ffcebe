//! The pinned maps as the decision asks for them, read only: what it would change, it changes in
//! copies.

use std::{
    cell::{Cell, RefCell, UnsafeCell},
    path::Path,
};

use shunt_common::{
    balance::{Clock, Entry, Hooked, Maps, Scratch, Subprogram, Subprograms, run},
    event::Event,
    family::{Family, V4, V6},
    filter,
    layout::*,
    packet::Tuple,
};

use super::{node, overlay::Overlay, socket};
use crate::{
    datapath::maps::{self, MapError, MapFamily, PerFamily},
    gc,
};

/// The pinned maps, with those that only decisions ask for.
pub struct Pinned {
    /// Those that everybody asks for.
    pub maps: maps::Maps,
    clients: maps::Map<u32, u64>,
    shared_ports: maps::Map<u32, u64>,
}

impl Pinned {
    /// Opens all maps under `bpf_root`.
    ///
    /// # Errors
    /// As [`maps::Maps::open`].
    pub fn open(bpf_root: &Path) -> Result<Self, MapError> {
        Ok(Self {
            maps: maps::Maps::open(bpf_root)?,
            clients: maps::Map::open(bpf_root, names::CLIENTS, "")?,
            shared_ports: maps::Map::open(bpf_root, names::SHARED_PORTS, "")?,
        })
    }
}

/// A family that [`Copied`] can be made for.
pub trait CopiedFamily: MapFamily<Words: std::hash::Hash> {
    /// Its maps.
    fn of(maps: &maps::Maps) -> &PerFamily<Self>;
}

impl CopiedFamily for V4 {
    fn of(maps: &maps::Maps) -> &PerFamily<Self> {
        &maps.v4
    }
}

impl CopiedFamily for V6 {
    fn of(maps: &maps::Maps) -> &PerFamily<Self> {
        &maps.v6
    }
}

/// What one decision has asked for and found.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Keys of `frontends` that were looked up, and what stands there.
    pub frontends: Vec<(SeenKey, Option<Frontend>)>,
    /// Backends that a new flow was counted for.
    pub chosen: Vec<u32>,
    /// Events that were counted.
    pub events: Vec<Event>,
    /// What was not readable: the decision went on as if it were not there.
    pub errors: Vec<String>,
}

/// [`FrontendKey`] without its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenKey {
    /// Whether it is a node port's.
    pub any_address: bool,
    /// [`FrontendKey::port`].
    pub port: u16,
    /// [`FrontendKey::scope`].
    pub scope: u8,
}

type Flows<A> = Overlay<FlowKey<A>, Flow<A>>;

/// The maps as one packet and those after it find them. For one thread.
pub struct Copied<'m, F: CopiedFamily> {
    pinned: &'m Pinned,
    of: &'m PerFamily<F>,
    config: Config,
    route_sources: bool,
    forgets: bool,
    /// Index of the device that packets pass; 0: not known.
    device: Cell<u32>,
    now: u32,
    affinity_now: u32,
    words: [Overlay<u32, u64>; 2],
    affinity: [Overlay<AffinityKey<F::Words>, Affinity>; 2],
    flows: [Flows<F::Words>; 2],
    snat: Overlay<u32, SnatSlot<F::Words>>,
    direct: Overlay<DirectKey<F::Words>, u32>,
    bypass: Overlay<DirectKey<F::Words>, u32>,
    backends: Overlay<u32, BackendState>,
    scratch: UnsafeCell<Scratch<F::Words>>,
    lent: Cell<bool>,
    /// What has been asked for since it was last taken.
    pub seen: RefCell<Seen>,
}

/// Index into the pairs of [`Copied`].
const OPEN: usize = 0;
const UNCONFIRMED: usize = 1;
const CLIENT_BITS: usize = 0;
const SHARED_BITS: usize = 1;

impl<'m, F: CopiedFamily> Copied<'m, F> {
    /// The maps as they are now. `route_sources`: whether programs of this kernel ask the routes
    /// for the source of a translated packet.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    pub fn new(pinned: &'m Pinned, route_sources: bool) -> Result<Self, MapError> {
        Ok(Self {
            pinned,
            of: F::of(&pinned.maps),
            config: pinned.maps.config()?,
            route_sources,
            forgets: false,
            device: Cell::default(),
            now: gc::now_in(TICK_NS).max(1),
            affinity_now: gc::now_in(AFFINITY_TICK_NS),
            words: Default::default(),
            affinity: Default::default(),
            flows: Default::default(),
            snat: Overlay::default(),
            direct: Overlay::default(),
            bypass: Overlay::default(),
            backends: Overlay::default(),
            // SAFETY: all zeros are a value of every field.
            scratch: UnsafeCell::new(unsafe { std::mem::zeroed() }),
            lent: Cell::default(),
            seen: RefCell::default(),
        })
    }

    /// The same maps without the flows that are in them.
    pub fn without_flows(mut self) -> Self {
        self.forgets = true;
        self
    }

    /// What has been asked for since the last call.
    pub fn take_seen(&self) -> Seen {
        self.seen.take()
    }

    /// The time that decisions are made at, in [`TICK_NS`].
    pub fn tick(&self) -> u32 {
        self.now
    }

    /// Says by which device packets pass from here on.
    pub(super) fn pass(&self, device: u32) {
        self.device.set(device);
    }

    /// Gives the scratch back: the next packet is another run of a program.
    pub fn next_packet(&self) {
        self.lent.set(false);
    }

    /// The value, or `None` and a note of why not.
    fn read<T>(&self, read: Result<Option<T>, MapError>) -> Option<T> {
        read.unwrap_or_else(|error| {
            self.seen.borrow_mut().errors.push(error.to_string());
            None
        })
    }

    /// Whether the node's socket that would get a packet is connected; `None`: there is none.
    fn socket(&self, packet: &Tuple<F::Words>) -> Option<bool> {
        let found = socket::of(&node::tuple::<F>(packet), self.device.get());
        found.unwrap_or_else(|error| {
            let note = format!("this node's sockets cannot be asked for (sock_diag): {error}");
            self.seen.borrow_mut().errors.push(note);
            None
        })
    }

    fn bit(&self, which: usize, bit: u32) -> bool {
        let map = [&self.pinned.clients, &self.pinned.shared_ports][which];
        let (word, mask) = filter::word_and_mask(bit);
        let entry = self.words[which].get(word, || self.read(map.get(&word)));
        entry.is_some_and(|entry| entry.read() & mask != 0)
    }

    fn set_bit(&self, which: usize, bit: u32) {
        let (word, mask) = filter::word_and_mask(bit);
        self.bit(which, bit);
        if let Some(entry) = self.words[which].get(word, || None) {
            entry.write(&(entry.read() | mask));
        }
    }

    fn flow_in(&self, which: usize, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        self.flows[which].get(*key, || {
            if self.forgets {
                return None;
            }
            let map = [&self.of.flows, &self.of.unconfirmed][which];
            self.read(map.get(&flow_key::<F>(key))).map(|flow| Flow {
                frontend: F::words(flow.frontend),
                backend: F::words(flow.backend),
                snat: F::words(flow.snat),
                frontend_port: flow.frontend_port,
                backend_port: flow.backend_port,
                snat_port: flow.snat_port,
                state: flow.state,
                backend_id: flow.backend_id,
                last_seen: flow.last_seen,
                epoch: flow.epoch,
                unanswered_since: flow.unanswered_since,
                reserved: 0,
                tried: flow.tried,
                reserved2: 0,
            })
        })
    }

    fn affinity_in(
        &self,
        which: usize,
        key: &AffinityKey<F::Words>,
    ) -> Option<Entry<'_, Affinity>> {
        self.affinity[which].get(*key, || {
            let map = [&self.of.affinity, &self.of.new_affinity][which];
            self.read(map.get(&AffinityKey {
                client: F::bytes(key.client),
                service: key.service,
                set: key.set,
                netns: key.netns,
            }))
        })
    }
}

/// The key as it stands in the map.
fn flow_key<F: Family>(key: &FlowKey<F::Words>) -> FlowKey<F::Addr> {
    FlowKey {
        client: F::bytes(key.client),
        frontend: F::bytes(key.frontend),
        client_port: key.client_port,
        frontend_port: key.frontend_port,
        proto: key.proto,
        reserved: key.reserved,
        reserved2: key.reserved2,
    }
}

/// The same of a connection that is no Service's.
fn direct_key<F: Family>(key: &DirectKey<F::Words>) -> DirectKey<F::Addr> {
    DirectKey {
        peer: F::bytes(key.peer),
        local: F::bytes(key.local),
        peer_port: key.peer_port,
        local_port: key.local_port,
        proto: key.proto,
    }
}

impl<F: CopiedFamily> Clock for Copied<'_, F> {
    fn now(&self) -> u32 {
        self.now
    }

    fn affinity_now(&self) -> u32 {
        self.affinity_now
    }

    // The kernel's jiffies are not told. Other than the programs', so that every entry is looked
    // at closely.
    fn epoch(&self) -> u16 {
        0
    }
}

impl<F: CopiedFamily> Maps<F> for Copied<'_, F> {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn filter(&self, bit: u32) -> bool {
        let (word, mask) = filter::word_and_mask(bit);
        let word = self.pinned.maps.filter.get(word);
        word.is_some_and(|word| word & mask != 0)
    }

    fn client(&self, bit: u32) -> bool {
        self.bit(CLIENT_BITS, bit)
    }

    fn set_client(&self, bit: u32) {
        self.set_bit(CLIENT_BITS, bit);
    }

    fn frontend(&self, key: &FrontendKey<F::Words>) -> Option<Frontend> {
        let found = self.read(self.of.frontends.get(&FrontendKey {
            addr: F::bytes(key.addr),
            port: key.port,
            proto: key.proto,
            scope: key.scope,
            reserved: key.reserved,
        }));
        let key = SeenKey {
            any_address: key.addr == F::UNSPECIFIED,
            port: key.port,
            scope: key.scope,
        };
        self.seen.borrow_mut().frontends.push((key, found));
        found
    }

    fn slot(&self, index: u32) -> Option<Slot<F::Words>> {
        self.of.slots.get(index).map(|slot| Slot {
            addr: F::words(slot.addr),
            port: slot.port,
            flags: slot.flags,
            backend: slot.backend,
        })
    }

    fn is_node_addr(&self, addr: &F::Words) -> bool {
        self.read(self.of.node_addrs.get(&F::bytes(*addr)))
            .is_some()
    }

    fn affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>> {
        self.affinity_in(OPEN, key)
    }

    fn add_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool {
        let free = self.affinity_in(OPEN, key).is_none();
        if free {
            self.affinity[OPEN].set(*key, *value);
        }
        free
    }

    fn new_affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>> {
        self.affinity_in(UNCONFIRMED, key)
    }

    fn add_new_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool {
        let free = self.affinity_in(UNCONFIRMED, key).is_none();
        if free {
            self.affinity[UNCONFIRMED].set(*key, *value);
        }
        free
    }

    fn remove_new_affinity(&self, key: &AffinityKey<F::Words>) {
        self.affinity[UNCONFIRMED].remove(*key);
    }

    fn replace_affinity(&self, entry: Entry<'_, Affinity>, old: &Affinity, new: &Affinity) -> bool {
        let same = entry.read() == *old;
        if same {
            entry.write(new);
        }
        same
    }

    fn member(&self, key: &MemberKey) -> Option<u32> {
        self.read(self.of.members.get(key))
    }

    fn in_source_ranges(&self, key: &SourceRangeKey<F::Words>) -> bool {
        let found = self.of.source_ranges.get(&SourceRangeKey {
            prefix_len: key.prefix_len,
            service: key.service,
            addr: F::bytes(key.addr),
        });
        self.read(found).is_some()
    }

    fn address(&self, addr: &F::Words) -> u32 {
        self.read(self.of.addresses.get(&F::bytes(*addr)))
            .unwrap_or_default()
    }

    // Fragments are no question of this module's.
    fn fragment(&self, _key: &FragmentKey<F::Words>) -> Option<FragmentPorts> {
        None
    }

    fn add_fragment(&self, _key: &FragmentKey<F::Words>, _ports: &FragmentPorts) {}

    fn remove_fragment(&self, _key: &FragmentKey<F::Words>) {}

    fn flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        self.flow_in(OPEN, key)
    }

    fn add_flow(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool {
        self.flows[OPEN].set(*key, *flow);
        true
    }

    fn remove_flow(&self, key: &FlowKey<F::Words>) {
        self.flows[OPEN].remove(*key);
    }

    // Where a flow is noted makes no difference to its first packets.
    fn may_wait(&self) -> bool {
        true
    }

    fn add_half_open(&self, _more: i64) {}

    fn unconfirmed_flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        self.flow_in(UNCONFIRMED, key)
    }

    fn add_unconfirmed(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool {
        self.flows[UNCONFIRMED].set(*key, *flow);
        true
    }

    fn remove_unconfirmed(&self, key: &FlowKey<F::Words>) {
        self.flows[UNCONFIRMED].remove(*key);
    }

    fn snat(&self, index: u32) -> Option<Entry<'_, SnatSlot<F::Words>>> {
        self.snat.get(index, || {
            self.of.snat.get(index).map(|slot| SnatSlot {
                client: F::words(slot.client),
                frontend: F::words(slot.frontend),
                backend: F::words(slot.backend),
                snat: F::words(slot.snat),
                client_port: slot.client_port,
                frontend_port: slot.frontend_port,
                backend_port: slot.backend_port,
                snat_port: slot.snat_port,
                last_seen: slot.last_seen,
                owner: slot.owner,
                state: slot.state,
                backend_id: slot.backend_id,
                epoch: slot.epoch,
                proto: slot.proto,
                reserved: 0,
                reserved2: 0,
            })
        })
    }

    fn claim(&self, slot: Entry<'_, SnatSlot<F::Words>>, old: (u32, u32), new: (u32, u32)) -> bool {
        slot.claim_alone(old, new)
    }

    fn socket_takes(&self, reply: &Tuple<F::Words>) -> bool {
        self.socket(reply).is_some()
    }

    fn is_senders_own(&self, _packet: &Tuple<F::Words>) -> bool {
        // What is asked about is what somebody sends.
        true
    }

    fn hooked(&self, _packet: &Tuple<F::Words>) -> Option<Hooked<F::Words>> {
        // Whose packet it is, nobody says.
        None
    }

    fn socket_owns(&self, packet: &Tuple<F::Words>) -> bool {
        self.socket(packet) == Some(true)
    }

    fn direct(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>> {
        self.direct.get(*key, || {
            self.read(self.of.direct.get(&direct_key::<F>(key)))
        })
    }

    fn add_direct(&self, key: &DirectKey<F::Words>, now: u32) {
        self.direct.set(*key, now);
    }

    fn bypass(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>> {
        self.bypass.get(*key, || {
            self.read(self.of.bypass.get(&direct_key::<F>(key)))
        })
    }

    fn add_bypass(&self, key: &DirectKey<F::Words>, now: u32) {
        self.bypass.set(*key, now);
    }

    fn route_source(&self, tuple: &Tuple<F::Words>) -> Option<F::Words> {
        if !self.route_sources {
            return None;
        }
        let source = node::route_source(&node::tuple::<F>(tuple))?;
        F::octets(source).map(F::words)
    }

    fn scratch(&self) -> Option<&mut Scratch<F::Words>> {
        assert!(!self.lent.replace(true), "asked for once in a run");
        // SAFETY: lent once until `next_packet`, whose callers have returned from the decision.
        Some(unsafe { &mut *self.scratch.get() })
    }

    fn port_is_shared(&self, bit: u32) -> bool {
        self.bit(SHARED_BITS, bit)
    }

    fn set_port_shared(&self, bit: u32) {
        self.set_bit(SHARED_BITS, bit);
    }

    fn backend_flags(&self, backend: u32) -> u16 {
        self.backend(backend)
            .map_or(0, |entry: Entry<'_, BackendState>| entry.read().flags)
    }

    fn backend(&self, backend: u32) -> Option<Entry<'_, BackendState>> {
        self.backends.get(backend, || {
            self.read(self.pinned.maps.backends.get(&backend))
        })
    }

    fn may_answer(&self, _answered: &Tuple<F::Words>) -> bool {
        true
    }

    fn count_flow(&self, backend: u32) {
        self.seen.borrow_mut().chosen.push(backend);
    }

    fn count_snat_refused(&self, _backend: u32) {}

    fn count(&self, event: Event) {
        self.seen.borrow_mut().events.push(event);
    }
}

impl<F: CopiedFamily> Subprograms<F> for Copied<'_, F> {
    fn call(&self, subprogram: Subprogram, scratch: &mut Scratch<F::Words>) -> u32 {
        run(self, scratch, subprogram)
    }
}
