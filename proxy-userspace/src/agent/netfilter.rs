//! Keeps netfilter's own connection table as `conntrack` of the configuration has it.

use std::time::Duration;

use tracing::{info, warn};

use crate::datapath::netfilter::{self, Netfilter};

/// From one look for the table to the next: it comes with the first rule that asks for it, which
/// may be long after the agent.
const INTERVAL: Duration = Duration::from_secs(30);

/// Sets what is to be set as soon as there is a table, once, and says what could not be.
pub(super) async fn tune(wanted: Netfilter) {
    while !netfilter::is_there() {
        tokio::time::sleep(INTERVAL).await;
    }
    let (set, failed) = netfilter::apply(&wanted);
    if !set.is_empty() {
        info!("netfilter's connection table: {}", set.join(", "));
    }
    if !failed.is_empty() {
        warn!(
            "netfilter's connection table, which kube-proxy would have set: {}: set it with sysctl on the node, add \
             deploy/components/netfilter-conntrack, or say netfilterConntrack: false",
            failed.join(", ")
        );
    }
}
