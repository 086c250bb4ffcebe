//! A node on the host: `std` maps in place of the kernel's.

use std::{
    cell::{Cell, RefCell, UnsafeCell},
    collections::{HashMap, HashSet},
    hash::Hash,
    ptr::NonNull,
};

use shunt_common::{
    balance::{Clock, Entry, Hooked, Maps, Scratch, Subprogram, Subprograms, run},
    event::Event,
    family::Family,
    filter,
    layout::*,
    packet::Tuple,
};

type HookedBy<A> = RefCell<HashMap<Tuple<A>, Hooked<A>>>;
type Flows<A> = RefCell<HashMap<FlowKey<A>, Box<Flow<A>>>>;

/// A node: its maps, its clock, its sockets.
pub(crate) struct Node<F: Family> {
    pub(crate) config: Config,
    pub(crate) filter: RefCell<HashSet<u32>>,
    pub(crate) frontends: RefCell<HashMap<FrontendKey<F::Words>, Frontend>>,
    pub(crate) slots: RefCell<Vec<Slot<F::Words>>>,
    pub(crate) addresses: RefCell<HashMap<F::Words, u32>>,
    pub(crate) fragments: RefCell<HashMap<FragmentKey<F::Words>, FragmentPorts>>,
    pub(crate) affinity: RefCell<HashMap<AffinityKey<F::Words>, Box<Affinity>>>,
    pub(crate) new_affinity: RefCell<HashMap<AffinityKey<F::Words>, Box<Affinity>>>,
    pub(crate) members: RefCell<HashMap<MemberKey, u32>>,
    /// Backends, each at the index that is its id.
    pub(crate) ids: RefCell<Vec<(F::Words, u16)>>,
    pub(crate) source_ranges: RefCell<HashSet<SourceRangeKey<F::Words>>>,
    pub(crate) flows: Flows<F::Words>,
    pub(crate) unconfirmed: Flows<F::Words>,
    pub(crate) snat: RefCell<HashMap<u32, Box<SnatSlot<F::Words>>>>,
    pub(crate) shared_ports: RefCell<HashSet<u32>>,
    pub(crate) direct: RefCell<HashMap<DirectKey<F::Words>, Box<u32>>>,
    pub(crate) bypass: RefCell<HashMap<DirectKey<F::Words>, Box<u32>>>,
    pub(crate) clients: RefCell<HashSet<u32>>,
    /// Flows that wait for an answer in `flows`, and how many may.
    pub(crate) half_open: Cell<i64>,
    pub(crate) max_half_open: Cell<i64>,
    pub(crate) backends: RefCell<HashMap<u32, Box<BackendState>>>,
    /// The source address that routes give on the way to others.
    pub(crate) route_sources: RefCell<HashMap<F::Words, F::Words>>,
    /// Tuples that a socket of the node would take.
    pub(crate) sockets: RefCell<HashSet<Tuple<F::Words>>>,
    /// Tuples of packets that are of a socket's own connection.
    pub(crate) connections: RefCell<HashSet<Tuple<F::Words>>>,
    /// Tuples that the sockets of the node's processes have, as their packets bear them.
    pub(crate) senders: RefCell<HashSet<Tuple<F::Words>>>,
    /// Backends that are no endpoints any more.
    pub(crate) gone: RefCell<HashSet<u32>>,
    /// What sockets dialled that the hook connected, by their packets.
    pub(crate) hooked: HookedBy<F::Words>,
    pub(crate) events: RefCell<Vec<Event>>,
    scratch: UnsafeCell<Scratch<F::Words>>,
    pub(crate) now: Cell<u32>,
}

impl<F: Family<Words: Hash>> Node<F> {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            config,
            filter: RefCell::default(),
            frontends: RefCell::default(),
            slots: RefCell::default(),
            addresses: RefCell::default(),
            fragments: RefCell::default(),
            affinity: RefCell::default(),
            new_affinity: RefCell::default(),
            members: RefCell::default(),
            ids: RefCell::default(),
            source_ranges: RefCell::default(),
            flows: RefCell::default(),
            unconfirmed: RefCell::default(),
            snat: RefCell::default(),
            shared_ports: RefCell::default(),
            clients: RefCell::default(),
            half_open: Cell::default(),
            max_half_open: Cell::default(),
            backends: RefCell::default(),
            route_sources: RefCell::default(),
            sockets: RefCell::default(),
            connections: RefCell::default(),
            senders: RefCell::default(),
            gone: RefCell::default(),
            hooked: RefCell::default(),
            direct: RefCell::default(),
            bypass: RefCell::default(),
            events: RefCell::default(),
            // SAFETY: all zeros is a value of every field.
            scratch: UnsafeCell::new(unsafe { std::mem::zeroed() }),
            // The first tick there is: the node has just booted.
            now: Cell::new(1),
        }
    }

    /// Adds a frontend and its backends: address, port, and whether they are on this node.
    pub(crate) fn serve(
        &self,
        addr: F::Words,
        port: u16,
        proto: u8,
        backends: &[(F::Words, u16, bool)],
    ) {
        self.serve_as(Frontend::default(), addr, port, proto, backends);
    }

    pub(crate) fn serve_as(
        &self,
        frontend: Frontend,
        addr: F::Words,
        port: u16,
        proto: u8,
        backends: &[(F::Words, u16, bool)],
    ) {
        let mut slots = self.slots.borrow_mut();
        let mut ids = self.ids.borrow_mut();
        let frontend = Frontend {
            slot_base: slots.len() as u32,
            slot_count: backends.len() as u32,
            ..frontend
        };
        for &(addr, port, local) in backends {
            let known = ids.iter().position(|&id| id == (addr, port));
            let backend = known.unwrap_or(ids.len()) as u32;
            if known.is_none() {
                ids.push((addr, port));
            }
            let member = MemberKey {
                slot_base: frontend.slot_base,
                backend,
            };
            self.members.borrow_mut().insert(member, slots.len() as u32);
            slots.push(Slot {
                addr,
                port,
                flags: u16::from(local) * BACKEND_LOCAL,
                backend,
            });
            self.filter.borrow_mut().extend([
                filter::backend::<F>(addr, port, proto),
                filter::backend_port(port),
            ]);
        }
        self.filter.borrow_mut().extend(if addr == F::UNSPECIFIED {
            vec![filter::node_port(port)]
        } else {
            vec![
                filter::frontend::<F>(addr, port, proto),
                filter::service::<F>(addr),
            ]
        });
        for scope in [SCOPE_INTERNAL, SCOPE_EXTERNAL] {
            self.frontends.borrow_mut().insert(
                FrontendKey {
                    addr,
                    port,
                    proto,
                    scope,
                    reserved: 0,
                },
                frontend,
            );
        }
    }
}

fn entry<'m, T: Copy>(value: Option<&mut Box<T>>) -> Option<Entry<'m, T>> {
    // SAFETY: boxes of the maps stay where they are until the test removes them, which no test does
    // while it holds one.
    value.map(|value| unsafe { Entry::new(NonNull::from(&mut **value)) })
}

impl<F: Family<Words: Hash>> Clock for Node<F> {
    fn now(&self) -> u32 {
        self.now.get()
    }
    fn affinity_now(&self) -> u32 {
        (u64::from(self.now.get()) * TICK_NS / AFFINITY_TICK_NS) as u32
    }
    fn epoch(&self) -> u16 {
        self.now.get() as u16
    }
}

impl<F: Family<Words: Hash>> Maps<F> for Node<F> {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn filter(&self, bit: u32) -> bool {
        self.filter.borrow().contains(&bit)
    }
    fn frontend(&self, key: &FrontendKey<F::Words>) -> Option<Frontend> {
        self.frontends.borrow().get(key).copied()
    }
    fn slot(&self, index: u32) -> Option<Slot<F::Words>> {
        self.slots.borrow().get(index as usize).copied()
    }
    fn is_node_addr(&self, addr: &F::Words) -> bool {
        F::words(F::config(&self.config).node) == *addr
    }
    fn affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>> {
        entry(self.affinity.borrow_mut().get_mut(key))
    }
    fn add_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool {
        let mut affinity = self.affinity.borrow_mut();
        let free = !affinity.contains_key(key);
        affinity.entry(*key).or_insert_with(|| Box::new(*value));
        free
    }
    fn new_affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>> {
        entry(self.new_affinity.borrow_mut().get_mut(key))
    }
    fn add_new_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool {
        let mut affinity = self.new_affinity.borrow_mut();
        let free = !affinity.contains_key(key);
        affinity.entry(*key).or_insert_with(|| Box::new(*value));
        free
    }
    fn remove_new_affinity(&self, key: &AffinityKey<F::Words>) {
        self.new_affinity.borrow_mut().remove(key);
    }
    fn replace_affinity(&self, entry: Entry<'_, Affinity>, old: &Affinity, new: &Affinity) -> bool {
        let same = entry.read() == *old;
        if same {
            entry.write(new);
        }
        same
    }
    fn member(&self, key: &MemberKey) -> Option<u32> {
        self.members.borrow().get(key).copied()
    }
    fn in_source_ranges(&self, key: &SourceRangeKey<F::Words>) -> bool {
        self.source_ranges.borrow().contains(key)
    }
    fn address(&self, addr: &F::Words) -> u32 {
        self.addresses.borrow().get(addr).copied().unwrap_or(0)
    }
    fn fragment(&self, key: &FragmentKey<F::Words>) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }
    fn add_fragment(&self, key: &FragmentKey<F::Words>, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }
    fn remove_fragment(&self, key: &FragmentKey<F::Words>) {
        self.fragments.borrow_mut().remove(key);
    }
    fn route_source(&self, tuple: &Tuple<F::Words>) -> Option<F::Words> {
        self.route_sources.borrow().get(&tuple.dst).copied()
    }
    fn flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        entry(self.flows.borrow_mut().get_mut(key))
    }
    fn add_flow(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool {
        self.flows.borrow_mut().insert(*key, Box::new(*flow));
        true
    }
    fn unconfirmed_flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        entry(self.unconfirmed.borrow_mut().get_mut(key))
    }
    fn add_unconfirmed(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool {
        self.unconfirmed.borrow_mut().insert(*key, Box::new(*flow));
        true
    }
    fn remove_flow(&self, key: &FlowKey<F::Words>) {
        self.flows.borrow_mut().remove(key);
    }
    fn remove_unconfirmed(&self, key: &FlowKey<F::Words>) {
        self.unconfirmed.borrow_mut().remove(key);
    }
    fn snat(&self, index: u32) -> Option<Entry<'_, SnatSlot<F::Words>>> {
        if index >= self.config.snat_entries {
            return None;
        }
        let mut slots = self.snat.borrow_mut();
        // SAFETY: all zeros is a slot that was never used.
        let slot = slots
            .entry(index)
            .or_insert_with(|| Box::new(unsafe { std::mem::zeroed() }));
        entry(Some(slot))
    }
    fn claim(&self, slot: Entry<'_, SnatSlot<F::Words>>, old: (u32, u32), new: (u32, u32)) -> bool {
        slot.claim_alone(old, new)
    }
    fn socket_takes(&self, reply: &Tuple<F::Words>) -> bool {
        self.sockets.borrow().contains(reply)
    }
    fn socket_owns(&self, packet: &Tuple<F::Words>) -> bool {
        self.connections.borrow().contains(packet)
    }
    fn is_senders_own(&self, packet: &Tuple<F::Words>) -> bool {
        self.senders.borrow().contains(packet)
    }
    fn hooked(&self, packet: &Tuple<F::Words>) -> Option<Hooked<F::Words>> {
        self.hooked.borrow().get(packet).copied()
    }
    fn direct(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>> {
        entry(self.direct.borrow_mut().get_mut(key))
    }
    fn add_direct(&self, key: &DirectKey<F::Words>, now: u32) {
        self.direct.borrow_mut().insert(*key, Box::new(now));
    }
    fn bypass(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>> {
        entry(self.bypass.borrow_mut().get_mut(key))
    }
    fn add_bypass(&self, key: &DirectKey<F::Words>, now: u32) {
        self.bypass.borrow_mut().insert(*key, Box::new(now));
    }
    fn scratch(&self) -> Option<&mut Scratch<F::Words>> {
        // SAFETY: one packet at a time, as on a CPU.
        Some(unsafe { &mut *self.scratch.get() })
    }
    fn port_is_shared(&self, bit: u32) -> bool {
        self.shared_ports.borrow().contains(&bit)
    }
    fn set_port_shared(&self, bit: u32) {
        self.shared_ports.borrow_mut().insert(bit);
    }
    fn may_wait(&self) -> bool {
        self.half_open.get() < self.max_half_open.get()
    }
    fn add_half_open(&self, more: i64) {
        self.half_open.set(self.half_open.get() + more);
    }
    fn client(&self, bit: u32) -> bool {
        self.clients.borrow().contains(&bit)
    }
    fn set_client(&self, bit: u32) {
        self.clients.borrow_mut().insert(bit);
    }
    fn may_answer(&self, _answered: &Tuple<F::Words>) -> bool {
        true
    }
    fn count_flow(&self, _backend: u32) {}
    fn count_snat_refused(&self, backend: u32) {
        let mut backends = self.backends.borrow_mut();
        backends.entry(backend).or_default().snat_refused += 1;
    }
    fn count(&self, event: Event) {
        self.events.borrow_mut().push(event);
    }
    fn backend_flags(&self, backend: u32) -> u16 {
        if self.gone.borrow().contains(&backend) {
            BACKEND_GONE
        } else {
            BACKEND_SERVING
        }
    }
    fn backend(&self, backend: u32) -> Option<Entry<'_, BackendState>> {
        let mut backends = self.backends.borrow_mut();
        entry(Some(backends.entry(backend).or_default()))
    }
}

impl<F: Family<Words: Hash>> Subprograms<F> for Node<F> {
    fn call(&self, subprogram: Subprogram, scratch: &mut Scratch<F::Words>) -> u32 {
        run(self, scratch, subprogram)
    }
}
