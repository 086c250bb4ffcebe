//! After how long a silent flow is over: `--conntrack-*`.

use std::time::Duration;

use shunt_common::{layout::Timeouts, timeouts::ticks};

/// Shortest: the time that a flow was last seen is up to 2.6 s old, and is told in ticks of 1.07 s.
const SHORTEST: Duration = Duration::from_secs(5);
/// Longest: more than any connection lives, and far from where ticks end.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// Time-outs with kube-proxy's defaults; where it leaves the kernel's alone, those of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conntrack {
    /// TCP, both sides have spoken.
    pub tcp_established: Duration,
    /// TCP, one side has sent FIN.
    pub tcp_close_wait: Duration,
    /// UDP, until the client has sent again after an answer.
    pub udp: Duration,
    /// UDP, from then on.
    pub udp_stream: Duration,
}

impl Default for Conntrack {
    fn default() -> Self {
        Self {
            tcp_established: Duration::from_secs(24 * 60 * 60),
            tcp_close_wait: Duration::from_secs(60 * 60),
            udp: Duration::from_secs(30),
            udp_stream: Duration::from_secs(120),
        }
    }
}

impl Conntrack {
    /// Brings what cannot be to the nearest that can; one line for each, with what became of it.
    pub fn clamp(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        for (flag, field, duration) in [
            (
                "tcp-timeout-established",
                "tcpEstablishedTimeout",
                &mut self.tcp_established,
            ),
            (
                "tcp-timeout-close-wait",
                "tcpCloseWaitTimeout",
                &mut self.tcp_close_wait,
            ),
            ("udp-timeout", "udpTimeout", &mut self.udp),
            (
                "udp-timeout-stream",
                "udpStreamTimeout",
                &mut self.udp_stream,
            ),
        ] {
            let clamped = (*duration).clamp(SHORTEST, LONGEST);
            if clamped != *duration {
                said.push(format!(
                    "conntrack.{field} (--conntrack-{flag}) {duration:?}: shunt's flows last from {SHORTEST:?} to {} h: taken as {clamped:?}",
                    LONGEST.as_secs() / 3600
                ));
                *duration = clamped;
            }
        }
        if self.udp > self.udp_stream {
            said.push(format!(
                "conntrack.udpStreamTimeout (--conntrack-udp-timeout-stream) {:?}: shorter than udpTimeout: taken as {:?}",
                self.udp_stream, self.udp
            ));
            self.udp_stream = self.udp;
        }
        said
    }

    /// What the programs and the collector go by.
    pub fn ticks(&self) -> Timeouts {
        let ticks = |duration: Duration| ticks(duration.as_secs());
        Timeouts {
            tcp_established: ticks(self.tcp_established),
            tcp_close_wait: ticks(self.tcp_close_wait),
            udp: ticks(self.udp),
            udp_stream: ticks(self.udp_stream),
            ..Timeouts::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_programs() {
        assert_eq!(Conntrack::default().ticks(), Timeouts::default());
        assert_eq!(Conntrack::default().clamp(), Vec::<String>::new());
    }

    /// What kube-proxy accepts is no reason not to start.
    #[test]
    fn what_cannot_be_is_brought_to_what_can_and_said_once() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let secs = Duration::from_secs;
        type Case = (
            fn(&mut Conntrack, Duration),
            Duration,
            fn(&Conntrack) -> Duration,
            Duration,
            &'static str,
        );
        let cases: [Case; 5] = [
            (
                |c, d| c.tcp_established = d,
                secs(1),
                |c| c.tcp_established,
                secs(5),
                "conntrack.tcpEstablishedTimeout (--conntrack-tcp-timeout-established) 1s: shunt's flows last from 5s to 8784 h: taken as 5s",
            ),
            (
                |c, d| c.tcp_close_wait = d,
                Duration::from_millis(10),
                |c| c.tcp_close_wait,
                secs(5),
                "conntrack.tcpCloseWaitTimeout (--conntrack-tcp-timeout-close-wait) 10ms: shunt's",
            ),
            (
                |c, d| c.udp_stream = d,
                hours(10_000),
                |c| c.udp_stream,
                hours(8784),
                "conntrack.udpStreamTimeout (--conntrack-udp-timeout-stream) 36000000s: shunt's",
            ),
            (
                |c, d| c.udp = d,
                secs(4),
                |c| c.udp,
                secs(5),
                "conntrack.udpTimeout (--conntrack-udp-timeout) 4s: shunt's",
            ),
            (
                |c, d| c.udp = d,
                secs(300),
                |c| c.udp_stream,
                secs(300),
                "conntrack.udpStreamTimeout (--conntrack-udp-timeout-stream) 120s: shorter than udpTimeout: taken as 300s",
            ),
        ];
        for (set, given, get, wanted, said) in cases {
            let mut conntrack = Conntrack::default();
            set(&mut conntrack, given);
            let warnings = conntrack.clamp();
            assert!(
                matches!(&warnings[..], [one] if one.starts_with(said)),
                "{warnings:?}"
            );
            assert_eq!(get(&conntrack), wanted, "{said}");
            assert!(conntrack.clamp().is_empty());
        }
    }
}
