//! How often this node answers by itself (SPEC H4): refusals, resets and echo replies.
//!
//! Whoever can send from made-up sources could otherwise have this node send to any host as much as
//! comes in. The limit is the generic cell rate algorithm of
//! [ITU-T I.371](https://www.itu.int/rec/T-REC-I.371): one time a bucket, that at which the next
//! answer would be due if all were sent evenly; an answer may be early by a burst.

/// A limit: answers are due in even steps, and a burst of them may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Nanoseconds from one answer to the next.
    pub interval_ns: u64,
    /// Answers that may come at once after a pause.
    pub burst: u64,
}

/// To one address: 50 at once, then 10 in a second.
pub const PER_DESTINATION: Limit = Limit {
    interval_ns: 100_000_000,
    burst: 50,
};

/// To all addresses of a family together: 1,000 in a second, 100 of them at once.
pub const IN_ALL: Limit = Limit {
    interval_ns: 1_000_000,
    burst: 100,
};

impl Limit {
    /// When the answer after this one is due, `None` if this one comes too early.
    ///
    /// `due` is what this returned for the one before (0: there was none), `now` a time in ns
    /// of the same clock.
    #[inline(always)]
    pub fn next(&self, due: u64, now: u64) -> Option<u64> {
        let due = due.max(now);
        let early = due - now;
        (early <= self.interval_ns * (self.burst - 1)).then_some(due + self.interval_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the answers at these times are sent.
    fn sent(limit: Limit, times: impl Iterator<Item = u64>) -> usize {
        let mut due = 0;
        times
            .filter(|&now| match limit.next(due, now) {
                Some(next) => {
                    due = next;
                    true
                }
                None => false,
            })
            .count()
    }

    #[test]
    fn a_burst_then_an_even_rate() {
        let start = 1 << 40;
        assert_eq!(sent(PER_DESTINATION, (0..1000).map(|_| start)), 50);
        // A thousand a second for ten seconds: the burst, and ten a second.
        let times = (0..10_000).map(|i| start + i * 1_000_000);
        assert_eq!(sent(PER_DESTINATION, times), 50 + 99);
        let times = (0..100_000).map(|i| start + i * 10_000);
        assert_eq!(sent(IN_ALL, times), 100 + 999);
    }

    #[test]
    fn a_pause_gives_the_burst_back_and_no_more() {
        let start = 1 << 40;
        let pause = start + 3_600_000_000_000;
        let times = (0..60).map(|_| start).chain((0..60).map(|_| pause));
        assert_eq!(sent(PER_DESTINATION, times), 100);
    }
}
