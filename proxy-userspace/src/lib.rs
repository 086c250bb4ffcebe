//! The node agent: from Kubernetes objects to entries in the BPF maps.
//!
//! Data flows one way, `source → model → plan → sync`, and each stage costs what the Service
//! touched costs:
//!
//! - [`object`]: the few fields of Services, endpoint slices and Nodes that shunt keeps.
//! - [`source`]: where objects come from: manifests ([`source::manifests`]) or a Kubernetes API
//!   server.
//! - [`model`]: the graph of Services and their endpoints; says which Services an event touched.
//! - [`plan`]: a pure function from one Service and this node's facts to its frontends and
//!   backends.
//! - [`sync`]: brings the pinned maps to the plan, writing only differences.
//! - [`datapath`]: loading, pinning and attaching the BPF programs; typed access to the maps.
//! - [`gc`]: flows that have ended or fallen silent leave the connection tables.
//! - [`healthcheck`]: what load balancers ask on `healthCheckNodePort`; [`health`]: whether this
//!   agent does its work.
//! - [`admin`]: `/healthz`, `/livez` and `/metrics`, over the servers of [`http`], which share
//!   [`connections`]; [`metrics`]: what is counted and measured.
//! - [`report`]: what cannot be served as it is written, to the log, the metrics and the API
//!   server.
//! - [`record`]: what the programs tell tracers, in words.
//! - [`agent`]: the life of the agent, which wires all of it.
//! - [`environment`]: what a kubelet tells containers of Services. [`dns`]: names of Services,
//!   answered from the model.
//! - [`explain`]: what becomes of a packet, and why, by the decision itself.
//! - [`logging`]: the agent's log. [`config`]: what the agent is told to do. [`cli`]: one file per
//!   verb.
pub mod admin;
pub mod agent;
pub mod cli;
pub mod config;
pub mod connections;
pub mod datapath;
pub mod dns;
pub mod environment;
pub mod explain;
pub mod gc;
pub mod health;
pub mod healthcheck;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod object;
pub mod plan;
pub mod record;
pub mod report;
pub mod source;
pub mod sync;
mod yaml;
