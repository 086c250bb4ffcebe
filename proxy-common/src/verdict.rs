//! The words of the decision: where a packet is seen, what can become of it, and what is asked
//! next.

use core::ops::ControlFlow;

use crate::packet::Tuple;

/// Who sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Origin {
    /// A pod on this node: the device is the pod's.
    Pod,
    /// The network: the device is the node's.
    Network,
    /// A process of this node: the packet leaves through the device.
    Process,
}

/// Where a packet is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It comes in through a device, or from a process of this node.
    Ingress(Origin),
    /// It leaves through one.
    Egress,
}

/// What becomes of a packet. `T` says where it goes if it is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<T = InScratch> {
    /// Not ours: it goes on as it is.
    Pass,
    /// It gets another tuple.
    Translate(T),
    /// It is for a Service that nobody is behind: answered with port unreachable ([`crate::icmp`]).
    Refuse,
    /// It is not allowed, or nothing can be done for it.
    Drop,
    /// It is of a connection whose backend is no more: answered with a reset ([`crate::reset`]).
    Reset,
}

/// The translation stands in [`Scratch::translation`](crate::balance::Scratch::translation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InScratch;

impl Verdict {
    /// The verdict's number, for a subprogram to return.
    #[inline(always)]
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Pass => 0,
            Self::Translate(InScratch) => 1,
            Self::Refuse => 2,
            Self::Drop => 3,
            Self::Reset => 4,
        }
    }

    /// The verdict of a number that a subprogram has returned.
    #[inline(always)]
    pub(crate) fn of_number(number: u32) -> Self {
        match number {
            0 => Self::Pass,
            1 => Self::Translate(InScratch),
            2 => Self::Refuse,
            3 => Self::Drop,
            _ => Self::Reset,
        }
    }

    /// The verdict with its translation.
    #[inline(always)]
    pub(crate) fn with<A>(self, translation: Translation<A>) -> Verdict<Translation<A>> {
        match self {
            Self::Pass => Verdict::Pass,
            Self::Translate(InScratch) => Verdict::Translate(translation),
            Self::Refuse => Verdict::Refuse,
            Self::Drop => Verdict::Drop,
            Self::Reset => Verdict::Reset,
        }
    }
}

/// What the decision does next: it ends with a verdict, or goes on with what was found.
pub(crate) type Step<T = ()> = ControlFlow<Verdict, T>;

/// The number of "go on", behind all verdicts'.
const CONTINUE: u32 = 5;

/// A step's number, for a subprogram to return.
#[inline(always)]
pub(crate) fn step_number(step: Step) -> u32 {
    match step {
        Step::Break(verdict) => verdict.number(),
        Step::Continue(()) => CONTINUE,
    }
}

/// The step of a number that a subprogram has returned.
#[inline(always)]
pub(crate) fn step_of_number(number: u32) -> Step {
    match number {
        CONTINUE => Step::Continue(()),
        verdict => Step::Break(Verdict::of_number(verdict)),
    }
}

/// What two look-ups say of a client's port. Almost all connections need no more of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum PortUse {
    /// No flow uses it.
    Free,
    /// A connection to the same frontend that is over, and is opened anew.
    Over,
    /// A closer look is due.
    Unclear,
}

/// What the flow tables say of a packet. Almost all packets need no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup<A> {
    /// No flow explains it, and it opens none.
    Unmatched,
    /// Of an open flow.
    Translate(Translation<A>),
    /// It may open a flow, or tells that nobody will: see [`undecided`](crate::balance::undecided)
    /// and [`refused`](crate::balance::refused).
    Undecided,
}

/// A packet's new tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<A> {
    /// What the packet carries from here on.
    pub tuple: Tuple<A>,
    /// The receiver is on this node: hand the packet to the kernel, do not send it on.
    pub local: bool,
    /// The receiver is a process of this node that dialled by packets: it gets the packet by the
    /// loopback device.
    pub process: bool,
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
    pub(crate) const fn reply(backend: u32) -> Self {
        Self {
            backend,
            reply: true,
        }
    }
}

/// A packet that comes in, and the circumstances.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<A> {
    /// What it carries.
    pub tuple: Tuple<A>,
    /// TCP flags; 0 for UDP; for SCTP those that mean what its first chunk does.
    pub tcp_flags: u8,
    /// Who sent it.
    pub origin: Origin,
    /// The hook sends packets for other nodes on by itself, so both halves of the translation are
    /// due.
    pub sends_on: bool,
}
