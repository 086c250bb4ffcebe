//! What is known of a packet on the slow path, and what is left to its hook.

use crate::{extension::Path, packet::Tuple};

/// What is left to the hook for a packet that was seen here, and rewritten by then if it had to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on.
    Pass,
    /// A process of this node gets it, by the loopback device.
    Deliver,
    /// A process of this node has sent it to a backend, and the way there is to be found.
    Send,
    /// It is not allowed, or nothing can be done for it.
    Drop,
    /// It is its own answer now, and goes back to where it came from.
    SendBack,
    /// Nobody takes it: it is answered with port unreachable. Its [`headers`](super::headers) say
    /// about what.
    Refuse,
}

/// What is known of the packet at hand; part of [`Scratch`](crate::balance::Scratch).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<A> {
    /// Where its payload stands.
    pub(crate) path: Path,
    /// An ICMP error's: where the quoted packet's payload stands.
    pub(super) quoted: Path,
    /// Its addresses; ports where it has any.
    pub(super) tuple: Tuple<A>,
    /// An ICMP error's: what an answer to the quoted packet would carry.
    pub(super) answer: Tuple<A>,
    /// An ICMP error's: what that answer would become.
    pub(super) becomes: Tuple<A>,
}
