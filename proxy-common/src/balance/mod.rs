//! The decision: what becomes of a packet, at whichever hook it is seen.
//!
//! A flow is one entry, keyed by the client's side ([`FlowKey`](crate::layout::FlowKey)). A packet
//! towards a frontend is recognised where it **arrives** at the node, its reply where it **leaves**
//! towards the client, by tuple alone; so replies that are bridged at layer 2 are caught as well.
//!
//! ```text
//!                  arrives ([`arriving`])                     leaves ([`leaving`])
//! client → backend C:cp → F:fp  becomes  C:sp → B:bp          C:sp → B:bp  becomes  N:sp → B:bp   (SNAT only)
//! backend → client B:bp → N:sp  becomes  B:bp → C:sp (SNAT)   B:bp → C:sp  becomes  F:fp → C:cp
//! ```
//!
//! Source translation is split so that the kernel never sees one of its own addresses as the source
//! of an arriving packet (which it would drop as martian), and netfilter in between sees one
//! connection. XDP, which sends packets on itself, does both halves at once
//! ([`Arrival::sends_on`]). Without SNAT `sp` is `cp`, and only the frontend's side changes.
//!
//! Packets of open flows are the matter of `forward` and `reply`. All others go through `decide`:
//! `choose` finds the frontend and a backend, `open` makes the flow, and `source_port` finds a
//! source port where one is due. What they say to each other are the types of [`crate::verdict`].

mod bypass;
mod choose;
mod clock;
mod decide;
mod entry;
mod flow;
mod forward;
mod maps;
mod opaque;
mod open;
mod owner;
mod port_use;
mod refusal;
mod reply;
mod scratch;
mod search;
mod source_address;
mod source_port;
mod stale;
mod subprogram;
mod translated;

pub use self::{
    bypass::port_collides,
    choose::socket_frontend,
    clock::Clock,
    decide::undecided,
    entry::{Entry, Tracked},
    forward::{established, looped, sent},
    maps::{Hooked, Maps},
    refusal::refused,
    reply::{answering, departing},
    scratch::Scratch,
    subprogram::{Subprogram, Subprograms},
};
pub(crate) use self::{
    choose::{affinity_key, look_up, may_be_frontend},
    decide::decide,
    flow::{client_key, returns_here, shared_key, shared_port_bit, snat_slot},
    forward::{explains, unconfirmed},
    opaque::Opaque,
    refusal::{note_leaving, refuse_leaving},
    reply::{answering_slowly, snat_reply_arriving},
    search::Search,
};
use crate::{
    failover,
    family::Family,
    packet::Tuple,
    verdict::{Arrival, Lookup, Origin, Translation, Verdict, step_number},
};

/// What a [`Subprogram`] does, and the number of what it found: of a verdict, of a step, or 0 or 1
/// for no or yes.
#[inline(always)]
pub fn run<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    subprogram: Subprogram,
) -> u32 {
    match subprogram {
        Subprogram::Decide => decide::decide_here(maps, scratch).number(),
        Subprogram::LookUp => step_number(choose::look_up_here(maps, scratch)),
        Subprogram::Explains => forward::explains_here(maps, scratch).into(),
        Subprogram::Unconfirmed => forward::unconfirmed_here(maps, scratch).into(),
        Subprogram::TakePort => source_port::take_port_here(maps, scratch).into(),
        Subprogram::LookAtPorts => source_port::look_at_ports_here(maps, scratch).into(),
        Subprogram::LookAtPort => source_port::look_at_port_here(maps, scratch).into(),
        Subprogram::PickOtherBackend => failover::pick_other_backend_here(maps, scratch).into(),
        Subprogram::LookAtSlot => failover::look_at_slot_here(maps, scratch).into(),
        Subprogram::HoldBack => failover::hold_back_here(maps, scratch).into(),
    }
}

/// A packet that arrives at the node through a device.
#[inline(always)]
pub fn arriving<F: Family, M: Subprograms<F>>(
    maps: &M,
    arrival: &Arrival<F::Words>,
) -> Verdict<Translation<F::Words>> {
    let lookup = match established(maps, arrival) {
        Lookup::Unmatched
            if arrival.origin == Origin::Process
                && port_collides(maps, &arrival.tuple, arrival.tcp_flags) =>
        {
            Lookup::Undecided
        }
        lookup => lookup,
    };
    match lookup {
        Lookup::Unmatched => Verdict::Pass,
        Lookup::Translate(to) => Verdict::Translate(to),
        Lookup::Undecided => match maps.scratch() {
            Some(scratch) => undecided(maps, scratch, arrival).with(scratch.translation),
            None => Verdict::Pass,
        },
    }
}

/// A packet that leaves the node, or goes to one of its pods, through a device.
#[inline(always)]
pub fn leaving<F: Family, M: Subprograms<F>>(
    maps: &M,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> Verdict<Translation<F::Words>> {
    match departing(maps, tuple, tcp_flags) {
        Lookup::Unmatched => Verdict::Pass,
        Lookup::Translate(to) => Verdict::Translate(to),
        Lookup::Undecided => match maps.scratch() {
            Some(scratch) => refused(maps, scratch, tuple, tcp_flags).with(scratch.translation),
            None => Verdict::Pass,
        },
    }
}
