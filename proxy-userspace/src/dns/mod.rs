//! The built-in cluster DNS (`--dns`): names of Services and endpoints, answered from the model.
//!
//! - [`index`]: what Services are called; brought up to date by the agent, Service by Service.
//! - [`zone`]: from a question to records, as the DNS specification for Kubernetes has it.
//! - [`wire`]: messages, EDNS0, truncation.
//! - [`resolve`]: from the zone, or from others: [`forward`] asks them, [`cache`] keeps what they
//!   say.
//! - [`server`]: sockets. [`metrics`]: what is counted.
//!
//! hickory-proto reads and writes messages; the server is our own, because hickory-server answers
//! from a socket on all addresses with whatever source the route has, starts a task without bound
//! for each datagram, and logs two lines for each.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, thread};

use anyhow::Context;
use hickory_proto::rr::Name;
use tokio::{runtime, sync::oneshot, task::LocalSet};
use tracing::{info, warn};

pub mod cache;
pub mod forward;
pub mod index;
pub mod metrics;
pub mod resolve;
pub mod server;
pub mod wire;
pub mod zone;

#[cfg(test)]
mod tests;

pub use forward::Source;
pub use index::{Index, ServiceNames};
pub use metrics::Metrics;
pub use wire::PORT;

use forward::Forwarder;
use resolve::Resolver;
use server::Listeners;
use zone::Zone;

/// Where the node's own servers stand.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What the server is told to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--dns`.
    pub addresses: Vec<SocketAddr>,
    /// `--dns-zone`, as a name or without a dot at its end.
    pub zone: String,
    /// `--dns-namespace`; `None`: names without the zone are not looked up.
    pub short_names: Option<String>,
    /// `--dns-upstream`, or where the node's own servers stand.
    pub others: Source,
    /// `bindAddressHardFail`.
    pub hard_fail: bool,
}

/// Listens and answers until it fails.
///
/// # Errors
/// A zone that is no name; with [`Config::hard_fail`], when it cannot listen; when its thread
/// cannot be started, or ends.
pub async fn serve(config: Config, index: Arc<Index>, metrics: Metrics) -> anyhow::Result<()> {
    let origin =
        Name::from_ascii(&config.zone).with_context(|| format!("--dns-zone {}", config.zone))?;
    let listeners = listen(&config).await?;
    let addresses: Vec<SocketAddr> = listeners
        .iter()
        .filter_map(|listener| listener.address().ok())
        .collect();
    let shown: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    info!(
        "--dns: answering for {} on {}",
        config.zone,
        shown.join(" and ")
    );
    let (ended, end) = oneshot::channel();
    thread::Builder::new()
        .name("dns".to_owned())
        .spawn(move || {
            let result = run(config, origin, listeners, &addresses, index, metrics);
            // Nobody listens when the agent ends.
            let _ = ended.send(result);
        })
        .context("cannot start a thread")?;
    end.await
        .context("the DNS server has failed")?
        .context("the DNS server")
}

/// Everything on this thread, until it fails.
fn run(
    config: Config,
    origin: Name,
    listeners: Vec<Listeners>,
    addresses: &[SocketAddr],
    index: Arc<Index>,
    metrics: Metrics,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let own = addresses
        .iter()
        .map(SocketAddr::ip)
        .filter(|ip| !ip.is_unspecified());
    let zone = Zone::new(origin, config.short_names.as_deref(), own.collect(), index);
    let forwarder = Rc::new(Forwarder::new(
        config.others,
        addresses.to_vec(),
        metrics.clone(),
    ));
    let resolver = Rc::new(Resolver::new(zone, forwarder.clone(), metrics));
    LocalSet::new().block_on(&runtime, async {
        tokio::task::spawn_local(forwarder.watch());
        server::serve(listeners, resolver).await
    })
}

/// Tries until the ports are free: one warning names what is in the way, and one line says when it
/// works.
async fn listen(config: &Config) -> anyhow::Result<Vec<Listeners>> {
    let mut listeners = Vec::new();
    for address in &config.addresses {
        let mut failures = 0;
        loop {
            match Listeners::bind(*address) {
                Ok(mut bound) => {
                    listeners.append(&mut bound);
                    break;
                }
                Err(error) if config.hard_fail => {
                    anyhow::bail!("--dns: {}", cannot_listen(*address, &error))
                }
                Err(error) => {
                    failures += 1;
                    // The first may be of a listener that is just being closed.
                    if failures == 2 {
                        warn!(
                            "--dns: {}; it is tried again",
                            cannot_listen(*address, &error)
                        );
                    }
                }
            }
            tokio::time::sleep(crate::http::RETRY).await;
        }
    }
    Ok(listeners)
}

/// Says why it cannot listen and what to do.
fn cannot_listen(address: SocketAddr, error: &io::Error) -> String {
    let advice = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another server has the port: stop that one, or give this one another address"
        }
        io::ErrorKind::AddrNotAvailable => "no device of this node has that address",
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 take the capability NET_BIND_SERVICE: add it to the container's \
             securityContext.capabilities, or give another port"
        }
        _ => "nobody can resolve names here",
    };
    format!("cannot listen on {address}: {error}; {advice}")
}
