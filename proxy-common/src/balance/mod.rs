//! The decision: what becomes of a packet, at whichever hook it is seen.
//!
//! A flow is one entry, keyed by the client's side ([`FlowKey`](crate::layout::FlowKey)). A packet towards a frontend is
//! recognised where it **arrives** at the node, its reply where it **leaves** towards the client, by tuple alone; so
//! replies that are bridged at layer 2 are caught as well.
//!
//! ```text
//!                  arrives ([`arriving`])                     leaves ([`leaving`])
//! client → backend C:cp → F:fp  becomes  C:sp → B:bp          C:sp → B:bp  becomes  N:sp → B:bp   (SNAT only)
//! backend → client B:bp → N:sp  becomes  B:bp → C:sp (SNAT)   B:bp → C:sp  becomes  F:fp → C:cp
//! ```
//!
//! Source translation is split so that the kernel never sees one of its own addresses as the source of an arriving
//! packet (which it would drop as martian), and netfilter in between sees one connection. XDP, which sends packets on
//! itself, does both halves at once ([`Arrival::sends_on`]). Without SNAT `sp` is `cp`, and only the frontend's side
//! changes.
//!
//! Packets of open flows are the matter of `forward` and `reply`. All others go through `decide`: `choose` finds the
//! frontend and a backend, `open` makes the flow, and `source_port` finds a source port where one is due.

mod choose;
mod decide;
mod entry;
mod flow;
mod forward;
mod maps;
mod open;
mod refusal;
mod reply;
mod scratch;
mod slow;
mod source_port;
mod subprogram;

pub use self::{
    choose::socket_frontend,
    decide::undecided,
    entry::{Entry, Tracked},
    forward::established,
    maps::Maps,
    refusal::refused,
    reply::answering,
    scratch::Scratch,
    subprogram::{Subprogram, Subprograms},
};
pub(crate) use self::{
    choose::{affinity_key, look_up, may_be_frontend},
    flow::{client_key, collided_bit, shared_key, snat_slot},
    forward::{explains, unconfirmed},
    scratch::Opaque,
    slow::{arriving_slowly, leaving_slowly},
};
use crate::{family::Family, packet::Tuple, retry};

/// Where packets come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// A device of a pod on this node.
    Pod,
    /// A device of the node: the network.
    Network,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<A> {
    /// Not ours.
    Pass,
    /// Ours, with a new tuple.
    Translate(Translation<A>),
    /// Ours, and there is no backend: answer with port unreachable.
    Refuse,
    /// Ours, and not allowed or not possible.
    Drop,
    /// Of a connection whose backend is no more: answer with a reset ([`crate::reset`]).
    Reset,
}

/// A packet's new tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<A> {
    /// What the packet carries from here on.
    pub tuple: Tuple<A>,
    /// The receiver is on this node: hand the packet to the kernel, do not send it on.
    pub local: bool,
    /// Whose traffic the packet is.
    pub counted: Counted,
}

/// Whose traffic a packet is. Of the two halves of a translation one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Index into `backends`; [`Self::NOBODY`]: the other half counts.
    pub backend: u32,
    /// It comes from the backend.
    pub reply: bool,
}

impl Counted {
    /// No backend: not counted here.
    pub const NOBODY: u32 = u32::MAX;
    /// Counted by the other half, or nobody's.
    pub const ELSEWHERE: Self = Self {
        backend: Self::NOBODY,
        reply: false,
    };

    #[inline(always)]
    const fn reply(backend: u32) -> Self {
        Self { backend, reply: true }
    }
}

/// A packet that arrives, and the circumstances.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<A> {
    /// What it carries.
    pub tuple: Tuple<A>,
    /// TCP flags; 0 for UDP; for SCTP those that mean what its first chunk does.
    pub tcp_flags: u8,
    /// Where it came in.
    pub from: From,
    /// The hook sends packets for other nodes on by itself, so both halves of the translation are due.
    pub sends_on: bool,
}

/// What becomes of a packet, as far as open flows tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quick<A> {
    /// Not ours.
    Pass,
    /// Of an open flow.
    Translate(Translation<A>),
    /// It may open one, or tells that nobody will: see [`undecided`] and [`refused`].
    Undecided,
}

/// [`Verdict`], with the translation left in [`Scratch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// Not ours.
    Pass,
    /// Ours: [`Scratch::translation`].
    Translate,
    /// Ours, and there is no backend.
    Refuse,
    /// Ours, and not allowed or not possible.
    Drop,
    /// Of a connection whose backend is no more: answer with a reset.
    Reset,
}

impl core::convert::From<u32> for Outcome {
    #[inline(always)]
    fn from(number: u32) -> Self {
        match number {
            0 => Self::Pass,
            1 => Self::Translate,
            2 => Self::Refuse,
            3 => Self::Drop,
            _ => Self::Reset,
        }
    }
}

/// What a [`Subprogram`] does, and the number of what it found: [`Outcome`]s, and 0 or 1 for no or yes.
#[inline(always)]
pub fn run<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>, subprogram: Subprogram) -> u32 {
    match subprogram {
        Subprogram::Decide => decide::decide_here(maps, scratch) as u32,
        Subprogram::LookUp => choose::look_up_here(maps, scratch) as u32,
        Subprogram::TakePort => source_port::take_port_here(maps, scratch).into(),
        Subprogram::LookAtPort => {
            source_port::look_here(maps, scratch);
            0
        }
        Subprogram::Explains => forward::explains_here(maps, scratch).into(),
        Subprogram::Unconfirmed => forward::unconfirmed_here(maps, scratch).into(),
        Subprogram::Probe => retry::probe_here(maps, scratch).into(),
        Subprogram::PickOther => retry::other_here(maps, scratch).into(),
        Subprogram::HoldBack => retry::hold_back_here(maps, scratch).into(),
    }
}

/// A packet that arrives at the node through a device.
#[inline(always)]
pub fn arriving<F: Family, M: Subprograms<F>>(maps: &M, arrival: &Arrival<F::Words>) -> Verdict<F::Words> {
    match established(maps, arrival) {
        Quick::Pass => Verdict::Pass,
        Quick::Translate(to) => Verdict::Translate(to),
        Quick::Undecided => {
            let Some(scratch) = maps.scratch() else {
                return Verdict::Pass;
            };
            match undecided(maps, scratch, arrival) {
                Outcome::Pass => Verdict::Pass,
                Outcome::Translate => Verdict::Translate(scratch.translation),
                Outcome::Refuse => Verdict::Refuse,
                Outcome::Drop => Verdict::Drop,
                Outcome::Reset => Verdict::Reset,
            }
        }
    }
}

/// A packet that leaves the node, or goes to one of its pods, through a device.
#[inline(always)]
pub fn leaving<F: Family, M: Subprograms<F>>(maps: &M, tuple: &Tuple<F::Words>, tcp_flags: u8) -> Verdict<F::Words> {
    match answering(maps, tuple, tcp_flags) {
        Quick::Pass => Verdict::Pass,
        Quick::Translate(to) => Verdict::Translate(to),
        Quick::Undecided => {
            let Some(scratch) = maps.scratch() else {
                return Verdict::Pass;
            };
            match refused(maps, scratch, tuple, tcp_flags) {
                Outcome::Translate => Verdict::Translate(scratch.translation),
                Outcome::Drop => Verdict::Drop,
                _ => Verdict::Pass,
            }
        }
    }
}
