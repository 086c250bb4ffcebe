//! What the agent is told to do: [`Settings`], resolved once at the start.
//!
//! Flags ([`flags`]) stand over our own document in the file of `--config`, that over the document
//! of kube-proxy's kind, and that over the defaults. Every layer writes what it names into the
//! settings of the layer below, and nothing else.

mod changes;
pub mod conntrack;
pub mod dns;
mod file;
pub mod flags;
mod kube_proxy;
pub mod kube_proxy_flags;
mod own;
mod review;
mod settings;
mod values;

pub use changes::Changes;
pub use settings::{
    DEFAULT_BPF_ROOT, DatapathLog, HEALTHZ_PORT, Logging, METRICS_PORT, SERVICE_CIDRS, Settings,
};
pub use values::PortRange;

#[cfg(test)]
mod tests;
