//! Refusals of SYNs: held back while another backend may answer ([`crate::retry`]), else told to the client.

use super::{
    Maps, Outcome, Quick, Scratch, Subprograms, decide::Step, reply::snat_reply_arriving, slow::answered_slowly,
};
use crate::{family::Family, packet::Tuple, retry};

/// [`answering`](super::answering)'s second half: the refusal of a SYN, on its way out.
#[inline(always)]
pub fn refused<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> Outcome {
    scratch.arrival.tuple = *tuple;
    scratch.arrival.tcp_flags = tcp_flags;
    refuse_leaving(maps, scratch)
}

#[inline(never)]
pub(super) fn refuse_leaving<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    if retry::is_held_back(maps, scratch, true) {
        return Outcome::Drop;
    }
    retry::end(maps, scratch);
    match answered_slowly(maps, scratch) {
        Step::Translate => Outcome::Translate,
        _ => Outcome::Pass,
    }
}

/// The refusal of a SYN to a translated source, where it arrives.
#[inline(always)]
pub(super) fn refuse_arriving<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    if retry::is_held_back(maps, scratch, false) {
        return Outcome::Drop;
    }
    retry::end(maps, scratch);
    tell_arriving(maps, scratch)
}

#[inline(never)]
fn tell_arriving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let Some(config) = maps.config() else {
        return Outcome::Pass;
    };
    match snat_reply_arriving(maps, config, &scratch.arrival) {
        Quick::Translate(translation) => {
            scratch.translation = translation;
            Outcome::Translate
        }
        _ => Outcome::Pass,
    }
}
