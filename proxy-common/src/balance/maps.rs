//! What decisions ask of the maps, and of the kernel around them.

use super::{Clock, Entry, Scratch};
use crate::{event::Event, family::Family, layout::*, packet::Tuple};

/// What a socket has dialled that the socket hook connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hooked<A> {
    /// The frontend's address.
    pub frontend: A,
    /// The frontend's port, host order.
    pub frontend_port: u16,
    /// Index into `backends`.
    pub backend: u32,
}

/// The maps, as far as decisions need them: the kernel's, or `std` ones in tests.
pub trait Maps<F: Family>: Clock {
    /// The node's configuration.
    fn config(&self) -> Option<&Config>;
    /// Whether a bit of `filter` is set.
    fn filter(&self, bit: u32) -> bool;
    /// Whether a bit of `clients` is set.
    fn client(&self, bit: u32) -> bool;
    /// Sets a bit of `clients`.
    fn set_client(&self, bit: u32);
    /// A frontend.
    fn frontend(&self, key: &FrontendKey<F::Words>) -> Option<Frontend>;
    /// A slot.
    fn slot(&self, index: u32) -> Option<Slot<F::Words>>;
    /// Whether node ports answer on this address.
    fn is_node_addr(&self, addr: &F::Words) -> bool;
    /// An entry of `affinity`.
    fn affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>>;
    /// Adds to `affinity`; `false` when there is an entry by now, or the map refuses.
    fn add_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool;
    /// An entry of `new_affinity`.
    fn new_affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>>;
    /// Adds to `new_affinity`; `false` when there is an entry by now, or the map refuses.
    fn add_new_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool;
    /// Removes from `new_affinity`.
    fn remove_new_affinity(&self, key: &AffinityKey<F::Words>);
    /// Replaces the value of an entry of either, unless another CPU was first.
    fn replace_affinity(&self, entry: Entry<'_, Affinity>, old: &Affinity, new: &Affinity) -> bool;
    /// The index of a backend's slot, if it is a member of the slots.
    fn member(&self, key: &MemberKey) -> Option<u32>;
    /// Whether a source is in one of a Service's `source_ranges`; the prefix is as long as can be.
    fn in_source_ranges(&self, key: &SourceRangeKey<F::Words>) -> bool;
    /// The `ADDRESS_*` bits of an address; 0 for one that no Service has.
    fn address(&self, addr: &F::Words) -> u32;
    /// The ports of a datagram in fragments.
    fn fragment(&self, key: &FragmentKey<F::Words>) -> Option<FragmentPorts>;
    /// Notes the ports of a datagram in fragments.
    fn add_fragment(&self, key: &FragmentKey<F::Words>, ports: &FragmentPorts);
    /// Forgets the ports of a datagram in fragments, if they are noted.
    fn remove_fragment(&self, key: &FragmentKey<F::Words>);
    /// An entry of `flows`.
    fn flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>>;
    /// Adds to `flows`; `false` when the map refuses.
    fn add_flow(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool;
    /// Removes from `flows`.
    fn remove_flow(&self, key: &FlowKey<F::Words>);
    /// Whether few enough flows wait in `flows` for both sides to speak that one more may.
    fn may_wait(&self) -> bool;
    /// Notes that one more flow waits there, or one less.
    fn add_half_open(&self, more: i64);
    /// An entry of `unconfirmed`.
    fn unconfirmed_flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>>;
    /// Adds to `unconfirmed`; `false` when the map refuses.
    fn add_unconfirmed(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool;
    /// Removes from `unconfirmed`.
    fn remove_unconfirmed(&self, key: &FlowKey<F::Words>);
    /// An entry of `direct`: when a packet of it left last, in ticks ([`TICK_NS`]).
    fn direct(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>>;
    /// Adds to `direct`.
    fn add_direct(&self, key: &DirectKey<F::Words>, now: u32);
    /// An entry of `bypass`: when something went to a backend itself last, in ticks ([`TICK_NS`]).
    fn bypass(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>>;
    /// Adds to `bypass`.
    fn add_bypass(&self, key: &DirectKey<F::Words>, now: u32);
    /// A slot of `snat`.
    fn snat(&self, index: u32) -> Option<Entry<'_, SnatSlot<F::Words>>>;
    /// Sets a SNAT slot's `last_seen` and `owner` from the first to the second pair, unless another
    /// CPU was first.
    fn claim(&self, slot: Entry<'_, SnatSlot<F::Words>>, old: (u32, u32), new: (u32, u32)) -> bool;
    /// Whether a socket of this node would get packets of this tuple (a reply's: from the backend
    /// to the node).
    fn socket_takes(&self, reply: &Tuple<F::Words>) -> bool;
    /// Whether a packet that comes in is of a connection that a socket of this node has: TCP in any
    /// state but LISTEN, UDP that is connected.
    fn socket_owns(&self, packet: &Tuple<F::Words>) -> bool;
    /// Whether a packet that a process of this node sends bears the addresses and ports of its own
    /// socket: it is not translated yet. `false` also where nobody knows the sender.
    fn is_senders_own(&self, packet: &Tuple<F::Words>) -> bool;
    /// What the packet's sender dialled, if the socket hook has connected it to where the packet
    /// goes; `None` also where nobody knows the sender.
    fn hooked(&self, packet: &Tuple<F::Words>) -> Option<Hooked<F::Words>>;
    /// The source address that the node's routes give to a packet of this tuple, as `MASQUERADE`
    /// would choose it; `None` where they cannot be asked, or have none.
    fn route_source(&self, tuple: &Tuple<F::Words>) -> Option<F::Words>;
    /// Memory of this program run's own.
    #[expect(
        clippy::mut_from_ref,
        reason = "per-CPU memory, asked for once in a run"
    )]
    fn scratch(&self) -> Option<&mut Scratch<F::Words>>;
    /// Whether a bit of `shared_ports` is set: flows to two frontends share a client's port.
    fn port_is_shared(&self, bit: u32) -> bool;
    /// Sets a bit of `shared_ports`.
    fn set_port_shared(&self, bit: u32);
    /// `BACKEND_*` bits.
    fn backend_flags(&self, backend: u32) -> u16;
    /// An entry of `backends`.
    fn backend(&self, backend: u32) -> Option<Entry<'_, BackendState>>;
    /// Takes the right to answer a packet of this tuple with one of the node's own
    /// ([`crate::answer_limit`]); `false` is counted.
    fn may_answer(&self, answered: &Tuple<F::Words>) -> bool;
    /// Counts a new flow of a backend, under the hook that runs.
    fn count_flow(&self, backend: u32);
    /// Counts a flow that no source port towards its backend was left for.
    fn count_snat_refused(&self, backend: u32);
    /// Counts an event.
    fn count(&self, event: Event);
}
