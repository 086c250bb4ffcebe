//! A connection whose backend does not answer, or refuses, finds another one while the client still
//! sends its SYN.
//!
//! The client's own retransmissions are the clock. When a backend has answered neither a SYN nor
//! its first retransmission, the next SYN goes to another backend, and the one that failed is in
//! *quarantine* for that client: it gets no first SYNs of it for a while
//! ([`Config::quarantine`](crate::layout::Config::quarantine)), which doubles each time that it fails
//! again. When the while is over one SYN *probes* it; its first answer ends the matter. When all
//! backends are in quarantine, the choice is as ever.
//!
//! A refusal (RST, ICMP unreachable) is held back while another backend is left that has not failed
//! of late: the client sends its SYN again, as if the first had been lost, and that goes to the
//! other one. When none is left the client hears it at once. A backend that refuses is passed over
//! for the shortest quarantine: refusing costs the client one retransmission at most, and whoever
//! refuses may listen again at any moment.
//!
//! What one client, or somebody in its name, has seen moves that client alone, a pod or a network
//! outside: whoever makes up sources takes a backend from nobody. The next answer to anybody's SYN
//! ends all of it.
//!
//! A flow that was answered never moves, and with no backend in quarantine the choice is what it is
//! without this module.

mod pick;
mod progress;
mod quarantine;
mod refusal;
mod resent;

pub use self::quarantine::{socket_slot, source};
pub(crate) use self::{
    pick::{avoid_quarantined, look_at_slot_here, pick_other_backend_here},
    progress::Progress,
    quarantine::{answered, is_for, is_open},
    refusal::{end, hold_back_here, is_held_back, refuses},
    resent::{Moved, Syn, classify_syn, move_on},
};
