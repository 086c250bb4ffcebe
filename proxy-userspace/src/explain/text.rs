//! What is found, in words, and what to do about it.

use std::{io, net::IpAddr};

use shunt_common::{event::Event, layout::*};

use super::node;

/// Why a packet ends, and what to do about it; empty: nothing.
pub(super) fn of_event(event: Event) -> (&'static str, &'static str) {
    match event {
        Event::NoBackend => (
            "the frontend has no backend",
            "look whether its pods are ready and match its selector: `kubectl get endpointslices`",
        ),
        Event::PolicyDrop => (
            "the traffic policy is Local and no backend is on this node",
            "dial a node that has one (load balancers: by the health check port), or use policy Cluster",
        ),
        Event::SnatExhausted => (
            "every source port towards the backend belongs to an open flow",
            "give more with --snat-ports, or add backends",
        ),
        Event::NoSourceAddress => (
            "client and backend are both elsewhere, and this node has no address of their family to translate the \
             source to",
            "give the node an address of that family, or name one with --node-ip",
        ),
        Event::SnatLimited => (
            "source ports towards the backend are short, and the client's network or its Service has its share",
            "look who has so many connections: `shunt conntrack list`; or add backends",
        ),
        Event::SourceDenied => (
            "the source is in none of the Service's loadBalancerSourceRanges",
            "add it to spec.loadBalancerSourceRanges if it is meant to be let in",
        ),
        Event::UnknownPort => (
            "no Service has this port of the cluster IP",
            "`shunt services` lists the ports that there are",
        ),
        Event::UnknownAddress => (
            "the address lies in the Service range and no Service has it",
            "`shunt services` lists what there is; a new Service is in the maps in a moment",
        ),
        Event::BackendGone => (
            "the connection's backend is gone and does not answer: the client is told by a reset",
            "",
        ),
        Event::RefusalHeld => (
            "the backend refused and another is left to try: the client is not told",
            "",
        ),
        Event::RewriteFailed => ("its headers could not be rewritten", ""),
        Event::FragmentLost => ("the first fragment of its datagram was not seen", ""),
        other => (other.describe(), ""),
    }
}

/// Policies of a frontend's entry.
pub(super) fn policies(frontend: &Frontend, scope: u8) -> Vec<String> {
    let mut policies = Vec::new();
    let keeps = frontend.flags & FRONTEND_KEEP_SOURCE != 0;
    if keeps && scope == SCOPE_EXTERNAL {
        policies.push("externalTrafficPolicy Local: backends of this node only, which see the client's address".to_owned());
    }
    if frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
        policies.push("loadBalancerSourceRanges".to_owned());
    }
    if frontend.flags & FRONTEND_AFFINITY != 0 {
        policies.push(format!(
            "sessionAffinity ClientIP for {} s",
            frontend.affinity_secs
        ));
    }
    if frontend.flags & FRONTEND_NO_RETRY != 0 {
        policies.push("a backend that does not answer is not replaced".to_owned());
    }
    policies
}

/// A backend's state, and the reason.
pub(super) fn state(state: &BackendState, now: u32, eligible: bool, local: bool) -> String {
    if !eligible {
        return if local {
            "not for this client: the policy has others".to_owned()
        } else {
            "not for this client: policy Local, on another node".to_owned()
        };
    }
    if state.flags & BACKEND_GONE != 0 {
        return "gone: it is no endpoint any more".to_owned();
    }
    if state.flags & BACKEND_SERVING == 0 {
        return "does not serve: neither ready nor serving while it ends".to_owned();
    }
    if state.failures == 0 {
        return "eligible".to_owned();
    }
    let left = state.quarantined_until.wrapping_sub(now).cast_signed();
    let times = match state.failures {
        1 => "once".to_owned(),
        n => format!("{n} times in a row"),
    };
    if left > 0 {
        let seconds = left as f64 * AFFINITY_TICK_NS as f64 / 1e9;
        format!(
            "quarantined for {seconds:.1} s: it left a connection unanswered, or refused it, {times}"
        )
    } else {
        format!("to be tried by the next connection: it did not answer {times}")
    }
}

/// Why there is no way for a packet.
pub(super) fn way(error: &io::Error, to: IpAddr, from: IpAddr, device: &str) -> String {
    if node::is_return_path(error, from, device) {
        return format!(
            "rp_filter drops what comes in from {from} by {device}: the way back leads elsewhere; sysctl \
             net.ipv4.conf.{device}.rp_filter=2"
        );
    }
    format!("{to} cannot be reached from here: {}", no_route(error))
}

/// An error of a route's look-up.
pub(super) fn no_route(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH) => "the routes know no way".to_owned(),
        Some(libc::EHOSTUNREACH) => {
            "the routes say unreachable, or the node does not forward".to_owned()
        }
        Some(libc::EACCES) => "a route prohibits it".to_owned(),
        Some(libc::EINVAL) => {
            "a route drops it (blackhole), or the source is impossible".to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_in_quarantine_says_for_how_long() {
        let mut backend = BackendState {
            flags: BACKEND_SERVING,
            failures: 2,
            quarantined_until: 1_000 + 596,
            ..BackendState::default()
        };
        assert!(state(&backend, 1_000, true, true).starts_with("quarantined for 10.0 s"));
        assert!(state(&backend, 2_000, true, true).starts_with("to be tried"));
        backend.failures = 0;
        assert_eq!(state(&backend, 1_000, true, true), "eligible");
        assert!(state(&backend, 1_000, false, false).contains("another node"));
    }
}
