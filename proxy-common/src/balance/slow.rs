//! [`arriving`](super::arriving) and [`leaving`](super::leaving) for packets that are not plain ([`crate::odd`]): the same
//! decisions, in less of the stack.

use super::{
    Maps, Outcome, Quick, Scratch, Subprograms, answering, client_key,
    decide::{Step, decide},
    explains, may_be_frontend,
    refusal::refuse_leaving,
    reply::snat_reply_arriving,
};
use crate::{
    address::{self, Stranger},
    family::Family,
    filter,
    packet::SYN,
    retry, snat,
};

/// [`arriving`](super::arriving) of the packet in `scratch.arrival`, for those that are not in a hurry. A translation is left
/// in `scratch`.
#[inline(always)]
pub(crate) fn arriving_slowly<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let step = established_slowly(maps, scratch) as u32;
    scratch.search.flag.set(step);
    match scratch.search.flag.get() {
        0 => Outcome::Pass,
        1 => Outcome::Translate,
        2 => Outcome::Refuse,
        3 => Outcome::Drop,
        _ => decide(maps, scratch),
    }
}

/// [`established`](super::established) in the same way. [`Step::Open`]: undecided.
#[inline(never)]
fn established_slowly<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    let Some(config) = maps.config() else {
        return Step::Pass;
    };
    let tuple = &scratch.arrival.tuple;
    if snat::in_range(config, tuple.dst_port)
        && maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
    {
        match snat_reply_arriving(maps, config, &scratch.arrival) {
            Quick::Pass => {}
            Quick::Translate(translation) => {
                scratch.translation = translation;
                return Step::Translate;
            }
            Quick::Undecided => return Step::Open,
        }
    }
    if !may_be_frontend::<F>(maps, tuple) {
        return match address::unknown_port(maps, tuple.dst) {
            Stranger::Pass => Step::Pass,
            Stranger::Refuse => Step::Refuse,
            Stranger::Drop => Step::Drop,
        };
    }
    scratch.key = client_key::<F>(tuple);
    let is_syn = scratch.arrival.tcp_flags & SYN != 0;
    if let Some(flow) = maps.flow(&scratch.key)
        && !(is_syn && retry::is_open(flow.read().state))
        && explains(maps, scratch)
    {
        return Step::Translate;
    }
    Step::Open
}

/// [`leaving`](super::leaving) in the same way.
#[inline(always)]
pub(crate) fn leaving_slowly<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    match answered_slowly(maps, scratch) {
        Step::Pass => Outcome::Pass,
        Step::Translate => Outcome::Translate,
        _ => refuse_leaving(maps, scratch),
    }
}

/// [`answering`] in the same way. [`Step::Open`]: undecided.
// It has returned when a refusal is judged, which asks it again: Linux 6.1 has no stack for two of it.
#[inline(never)]
pub(super) fn answered_slowly<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    match answering::<F, M>(maps, &scratch.arrival.tuple, scratch.arrival.tcp_flags) {
        Quick::Pass => Step::Pass,
        Quick::Translate(translation) => {
            scratch.translation = translation;
            Step::Translate
        }
        Quick::Undecided => Step::Open,
    }
}
