//! The agent on one node: as a process, and its programs on devices. Needs root.

mod attach;
mod kube_proxy;
mod process;
mod reload;
mod servers;
