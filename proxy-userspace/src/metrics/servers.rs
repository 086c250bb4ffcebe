//! The connections of the agent's own HTTP servers.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::connections::Connections;

/// All of them.
#[derive(Debug)]
pub(super) struct Servers(pub(super) Connections);

impl Collector for Servers {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let open = ConstGauge::new(self.0.open() as f64);
        let help = "Connections of the agent's health and metrics servers.";
        open.encode(encoder.encode_descriptor(
            "shunt_server_connections",
            help,
            None,
            MetricType::Gauge,
        )?)?;
        let evicted = ConstCounter::new(self.0.evicted());
        let help = "Connections that were closed because others came and these asked for nothing.";
        evicted.encode(encoder.encode_descriptor(
            "shunt_server_connections_evicted",
            help,
            None,
            MetricType::Counter,
        )?)
    }
}
