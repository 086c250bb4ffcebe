//! What time it is.

/// The kernel's clocks, or a test's.
pub trait Clock {
    /// `CLOCK_MONOTONIC` in [`TICK_NS`](crate::layout::TICK_NS), at least 1.
    fn now(&self) -> u32;
    /// `CLOCK_MONOTONIC` in [`AFFINITY_TICK_NS`](crate::layout::AFFINITY_TICK_NS).
    fn affinity_now(&self) -> u32;
    /// A clock that costs next to nothing and says no more than whether time has passed: see
    /// [`Flow::epoch`](crate::layout::Flow::epoch).
    fn epoch(&self) -> u16;
}
