//! The large steps of the decision, as functions that the kernel's verifier looks at once.
//!
//! The verifier follows every call of an ordinary function anew, with all that it knows of the
//! arguments, so a step that is called from several places, or in a loop, costs many times its
//! size. A *global* function (in BTF's words) is verified once for each program, by its signature
//! alone, and what it returns is any number to its callers. So such a step is given nothing but the
//! program's context: it takes its input from [`Scratch`] and leaves its output there.
//!
//! The numbers that they return are typed again by the functions that call them.

use super::{Maps, Scratch};
use crate::family::Family;

/// A step that is a global function in the kernel. [`run`](super::run) has the table of what they
/// do and return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subprogram {
    /// A packet that no established flow explains.
    Decide,
    /// The frontend that it is for.
    LookUp,
    /// The packet's flow, if it is in `flows` under the key in [`Scratch`].
    Explains,
    /// The same for `unconfirmed`.
    Unconfirmed,
    /// Takes the source port that the search stands at.
    TakePort,
    /// Looks at the next few source ports.
    LookAtPorts,
    /// Looks at the next one.
    LookAtPort,
    /// Finds a backend that the connection has not tried.
    PickOtherBackend,
    /// Looks at the next slot for it.
    LookAtSlot,
    /// Judges a refusal.
    HoldBack,
}

/// Maps that are seen by a packet program, which has [`Subprogram`]s.
pub trait Subprograms<F: Family>: Maps<F> {
    /// Calls a subprogram, which works on `scratch`; returns what [`run`](super::run) does.
    fn call(&self, subprogram: Subprogram, scratch: &mut Scratch<F::Words>) -> u32;
}
