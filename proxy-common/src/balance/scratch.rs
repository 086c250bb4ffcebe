//! Memory of a program run's own.

use super::{opaque::Opaque, search::Search};
use crate::{
    failover::Progress,
    layout::{DirectKey, Flow, FlowKey, Frontend, FrontendKey, Slot, SnatSlot},
    packet::Tuple,
    slow_path::Context,
    verdict::{Arrival, PortUse, Translation},
};

/// Memory for the path of few packets: the BPF stack holds 512 bytes for a whole chain of calls,
/// and an IPv6 flow with its keys has more.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scratch<A> {
    pub(crate) arrival: Arrival<A>,
    /// Where the packet goes, after [`Verdict::Translate`](crate::verdict::Verdict::Translate).
    pub translation: Translation<A>,
    pub(crate) key: FlowKey<A>,
    pub(super) own_port: FlowKey<A>,
    pub(super) direct: DirectKey<A>,
    pub(crate) frontend_key: FrontendKey<A>,
    pub(crate) frontend: Frontend,
    /// The backend for the flow.
    pub(crate) chosen: Slot<A>,
    pub(crate) flow: Flow<A>,
    pub(crate) reply: Tuple<A>,
    pub(super) slot: SnatSlot<A>,
    pub(crate) search: Search,
    pub(crate) failover: Progress,
    /// What is known of the client's port.
    pub(super) port_use: Opaque<PortUse>,
    /// Whether the flow is written over one that is over.
    pub(super) over: Opaque<bool>,
    /// Whether the packet goes to another backend than the one that its socket is connected to: then
    /// `arrival` names the frontend meanwhile.
    pub(super) redirected: Opaque<bool>,
    /// With `redirected`: where the packet was sent to.
    pub(super) sent_to: (A, u16),
    /// What was counted for the packet, one bit for each [`Event`](crate::event::Event).
    pub counted: u64,
    /// Of a packet on the slow path.
    pub(crate) slow: Context<A>,
}
