//! A cluster of network namespaces on one kernel: nodes, pods, outside clients and an agent per
//! node.
//!
//! ```text
//!  client (203.0.113.10)          node-a (192.168.50.11)             node-b (192.168.50.12)
//!     eth0                        ┌ eth0    veth-web-1 … ┐            ┌ eth0    veth-web-2 … ┐
//!      │                          │            │ eth0    │            │            │ eth0    │
//!  ┌─ wan0 ──── fabric ──── lan0 ─┘        pod web-1     │            │        pod web-2     │
//!  └───────────────────────────┴───────────────────────────────────────┘
//! ```
//!
//! The *fabric* namespace is the router between the nodes' LAN (`lan0`) and the outside (`wan0`).
//! Pods are joined to their node as a CNI does it, routed or bridged ([`Cni`]); other networks than
//! the one drawn are data ([`Network`]). Processes run in cgroups, so that their sockets are seen
//! by the node's socket hooks or not ([`Sockets`]).
//!
//! Clients and pods are processes of their own, because cgroup membership is a property of a
//! process: any program that links this crate becomes such a process when it is started with the
//! right variable set (see [`worker`]), so there is no helper binary to find.
//!
//! Everything is removed when the [`Lab`] is dropped, on panic too; [`Lab::sweep_stale`] removes
//! what killed runs left.

mod agent;
mod capabilities;
mod cgroup;
mod client;
mod kubelet;
mod lab;
pub mod manifests;
mod mounts;
mod netns;
mod probe;
mod protocol;
mod registry;
mod skip;
mod tunnel;
pub mod worker;

pub use agent::{Agent, AgentOptions, find_shunt, mount_bpffs};
pub use cgroup::mount_point as cgroup_mount_point;
pub use client::{Client, Conn, Many};
pub use kubelet::Kubelet;
pub use lab::{
    Cni, Lab, LabBuilder, NETWORKS, NODE_LAN_V4, NODE_LAN_V6, Network, Overlay, PLAIN, PodLink,
    PodSpec, Port, Sockets, pod_cidrs,
};
pub use netns::NetNs;
pub use protocol::{Answer, Dial, DialError, Proto, Stage};
pub use registry::{Owner, RUN_VARIABLE, UniqueName, owner, remove_pins};
pub use skip::{SKIPPED, peer, peer_variable};
pub use worker::has_sctp;
