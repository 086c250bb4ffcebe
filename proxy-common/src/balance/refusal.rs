//! Refusals of SYNs: held back while another backend may answer ([`crate::failover`]), else told to
//! the client.

use super::{
    Maps, Scratch, Subprograms,
    owner::{is_noteworthy, note},
    reply::{answering_slowly, snat_reply_arriving},
};
use crate::{
    failover,
    family::Family,
    packet::{RST, Tuple},
    verdict::{InScratch, Lookup, Step, Verdict},
};

/// [`departing`](super::departing)'s second half: the refusal of a SYN, on its way out, and what is
/// to be noted.
#[inline(always)]
pub fn refused<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> Verdict {
    scratch.counted = 0;
    scratch.arrival.tuple = *tuple;
    scratch.arrival.tcp_flags = tcp_flags;
    if tcp_flags & RST == 0 {
        note(maps, scratch);
        return Verdict::Pass;
    }
    refuse_leaving(maps, scratch)
}

/// Notes the packet in `scratch.arrival`, if it is to be noted ([`owner`](super::owner)).
#[inline(always)]
pub(crate) fn note_leaving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    if is_noteworthy(maps, &scratch.arrival.tuple, scratch.arrival.tcp_flags) {
        note(maps, scratch);
    }
}

#[inline(never)]
pub(crate) fn refuse_leaving<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Verdict {
    if failover::is_held_back(maps, scratch, true) {
        return Verdict::Drop;
    }
    failover::end(maps, scratch);
    match answering_slowly(maps, scratch) {
        Step::Break(verdict) => verdict,
        Step::Continue(()) => Verdict::Pass,
    }
}

/// The refusal of a SYN to a translated source, where it arrives.
#[inline(always)]
pub(super) fn refuse_arriving<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Verdict {
    if failover::is_held_back(maps, scratch, false) {
        return Verdict::Drop;
    }
    failover::end(maps, scratch);
    answer_arriving(maps, scratch)
}

#[inline(never)]
fn answer_arriving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Verdict {
    let Some(config) = maps.config() else {
        return Verdict::Pass;
    };
    match snat_reply_arriving(maps, config, &scratch.arrival) {
        Lookup::Translate(translation) => {
            scratch.translation = translation;
            Verdict::Translate(InScratch)
        }
        _ => Verdict::Pass,
    }
}
