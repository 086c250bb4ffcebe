//! The BPF programs, loaded into this kernel and run with one packet at a time. Needs root.

mod explained;
mod odd;
mod packets;
mod traced;

#[path = "../support/loaded.rs"]
mod loaded;
