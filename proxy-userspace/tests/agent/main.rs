//! The agent on one node: as a process, and its programs on devices. Needs root.

mod attach;
mod process;
