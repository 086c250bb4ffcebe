//! How long a flow may be silent before nobody misses it: for the programs, which hand its source
//! port to another one, and for the agent, which deletes it.
//!
//! Names, meanings and defaults are those of kube-proxy's `conntrack` settings, and of
//! `nf_conntrack` where kube-proxy leaves the kernel's alone
//! (<https://kubernetes.io/docs/reference/config-api/kube-proxy-config.v1alpha1/#kubeproxy-config-k8s-io-v1alpha1-KubeProxyConntrackConfiguration>,
//! <https://docs.kernel.org/networking/nf_conntrack-sysctl.html>).

use crate::layout::{
    FLOW_BACKEND_FIN, FLOW_CLIENT_FIN, FLOW_CONFIRMED, FLOW_HALF_OPEN, FLOW_RESET, FLOW_SEEN_REPLY,
    FLOW_SNAT, TCP, TICK_NS, Timeouts, UDP,
};

/// Both FINs.
pub(crate) const FINISHED: u32 = FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;

/// Whole ticks ([`TICK_NS`]) that are not shorter than some seconds.
pub const fn ticks(seconds: u64) -> u32 {
    let ticks = (seconds as u128 * 1_000_000_000).div_ceil(TICK_NS as u128);
    if ticks < u32::MAX as u128 {
        ticks as u32
    } else {
        u32::MAX
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_established: ticks(24 * 60 * 60),
            tcp_close_wait: ticks(60 * 60),
            tcp_unanswered: ticks(60),
            closed: ticks(10),
            time_wait: ticks(60),
            udp: ticks(30),
            udp_stream: ticks(120),
            sctp_established: ticks(210),
        }
    }
}

/// Both sides have sent FIN, or either RST.
#[inline(always)]
pub fn is_closed(state: u32) -> bool {
    state & FLOW_RESET != 0 || state & FINISHED == FINISHED
}

/// Whether only one side may be there: nobody has answered, or the client of a TCP connection has
/// not acknowledged the answer.
#[inline(always)]
pub fn is_unconfirmed(proto: u8, state: u32) -> bool {
    // Connections that were in `flows` before they were answered are noted there by the one bit,
    // others by the other.
    let half_open =
        state & FLOW_HALF_OPEN != 0 || state & (FLOW_SNAT | FLOW_CONFIRMED) == FLOW_SNAT;
    state & FLOW_SEEN_REPLY == 0 || (proto == TCP && half_open)
}

/// Whether a source port of such a flow may be given to another when ports are short: nobody else
/// may be there, or it is over, or it was one question and its answer.
#[inline(always)]
pub fn may_be_given_up(proto: u8, state: u32) -> bool {
    is_closed(state)
        || is_unconfirmed(proto, state)
        || (proto == UDP && state & FLOW_CONFIRMED == 0)
}

impl Timeouts {
    /// Ticks that a flow of this protocol in this state (`FLOW_*` bits) may be silent.
    #[inline(always)]
    pub fn of(&self, proto: u8, state: u32) -> u32 {
        if is_closed(state) {
            return self.closed;
        }
        if proto == UDP {
            return if state & FLOW_CONFIRMED != 0 {
                self.udp_stream
            } else {
                self.udp
            };
        }
        if is_unconfirmed(proto, state) {
            self.tcp_unanswered
        } else if proto != TCP {
            self.sctp_established
        } else if state & FINISHED != 0 {
            self.tcp_close_wait
        } else {
            self.tcp_established
        }
    }

    /// The same for the source port that the flow's packets have towards the backend.
    #[inline(always)]
    pub fn of_port(&self, proto: u8, state: u32) -> u32 {
        if state & (FLOW_RESET | FINISHED) == FINISHED {
            self.time_wait
        } else {
            self.of(proto, state)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::SCTP;

    #[test]
    fn how_long_a_flow_may_be_silent() {
        let timeouts = Timeouts::default();
        for (proto, state, seconds) in [
            (TCP, 0, 60),
            (TCP, FLOW_SEEN_REPLY, 86_400),
            (TCP, FLOW_SEEN_REPLY | FLOW_CONFIRMED, 86_400),
            (TCP, FLOW_SEEN_REPLY | FLOW_HALF_OPEN, 60),
            (TCP, FLOW_SEEN_REPLY | FLOW_SNAT, 60),
            (TCP, FLOW_SEEN_REPLY | FLOW_SNAT | FLOW_CONFIRMED, 86_400),
            (TCP, FLOW_SEEN_REPLY | FLOW_CLIENT_FIN, 3600),
            (TCP, FLOW_SEEN_REPLY | FLOW_BACKEND_FIN, 3600),
            (TCP, FLOW_SEEN_REPLY | FINISHED, 10),
            (TCP, FLOW_RESET, 10),
            (TCP, FLOW_SEEN_REPLY | FLOW_RESET, 10),
            (UDP, 0, 30),
            (UDP, FLOW_SEEN_REPLY, 30),
            (UDP, FLOW_SEEN_REPLY | FLOW_CONFIRMED, 120),
            (SCTP, 0, 60),
            (SCTP, FLOW_SEEN_REPLY, 210),
        ] {
            assert_eq!(
                timeouts.of(proto, state),
                ticks(seconds),
                "protocol {proto}, state {state:#b}"
            );
        }
    }

    #[test]
    fn ticks_are_not_shorter_than_seconds() {
        assert_eq!((ticks(0), ticks(1), ticks(30)), (0, 1, 28));
        assert!(u64::from(ticks(86_400)) * TICK_NS >= 86_400 * 1_000_000_000);
        assert_eq!(ticks(u64::MAX), u32::MAX);
    }
}
