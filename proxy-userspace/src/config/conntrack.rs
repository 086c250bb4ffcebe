//! After how long a silent flow is over: `--conntrack-*`.

use std::time::Duration;

use jiff::SignedDuration;
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
    /// # Errors
    /// One line that names the setting that makes no sense.
    pub fn check(&self) -> anyhow::Result<()> {
        for (flag, duration) in [
            ("--conntrack-tcp-timeout-established", self.tcp_established),
            ("--conntrack-tcp-timeout-close-wait", self.tcp_close_wait),
            ("--conntrack-udp-timeout", self.udp),
            ("--conntrack-udp-timeout-stream", self.udp_stream),
        ] {
            check(duration).map_err(|what| anyhow::anyhow!("{flag} {duration:?}: {what}"))?;
        }
        anyhow::ensure!(
            self.udp <= self.udp_stream,
            "--conntrack-udp-timeout {:?} is longer than --conntrack-udp-timeout-stream {:?}: give a stream as long at least",
            self.udp,
            self.udp_stream
        );
        Ok(())
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

fn check(duration: Duration) -> Result<Duration, &'static str> {
    if (SHORTEST..=LONGEST).contains(&duration) {
        Ok(duration)
    } else {
        Err("give a duration from 5s to 8784h, as in 24h, 1h30m or 90s")
    }
}

/// A duration as Go writes it: `24h0m0s`, `90s`.
///
/// # Errors
/// Says what is wanted.
pub fn parse(text: &str) -> Result<Duration, String> {
    let duration: Option<SignedDuration> = text.parse().ok();
    // What is negative or none is too short as well.
    let duration = duration
        .and_then(|duration| duration.try_into().ok())
        .unwrap_or_default();
    Ok(check(duration)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_programs() {
        assert_eq!(Conntrack::default().ticks(), Timeouts::default());
        Conntrack::default().check().unwrap();
    }

    #[test]
    fn durations_are_written_as_in_go() {
        for (text, seconds) in [
            ("24h0m0s", 86_400),
            ("1h30m", 5400),
            ("90s", 90),
            ("5s", 5),
            ("1.5h", 5400),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_one_clear_error() {
        for text in [
            "0",
            "0s",
            "1s",
            "-5m",
            "24",
            "1d2",
            "10000h",
            "999999999999999999999h",
            "soon",
            "",
        ] {
            assert!(
                parse(text).unwrap_err().starts_with("give a duration from 5s"),
                "{text}"
            );
        }
        let with = |change: fn(&mut Conntrack)| {
            let mut conntrack = Conntrack::default();
            change(&mut conntrack);
            conntrack.check().unwrap_err().to_string()
        };
        let error = with(|c| c.udp = Duration::from_secs(300));
        assert!(
            error.starts_with("--conntrack-udp-timeout 300s is longer than"),
            "{error}"
        );
        let error = with(|c| c.tcp_close_wait = Duration::ZERO);
        assert!(
            error.starts_with("--conntrack-tcp-timeout-close-wait 0ns: give"),
            "{error}"
        );
    }
}
