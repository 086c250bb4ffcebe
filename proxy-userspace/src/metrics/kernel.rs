//! What the maps and counters of the datapath hold, read at every scrape.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use shunt_common::layout::{Traffic, names};

use super::flows::{HOOKS, ServicePort, Totals};
use crate::{
    datapath::maps::{Maps, SnatUse, Usage},
    health::Health,
};

/// The families as kube-proxy names them.
pub(super) const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// The datapath of one agent.
pub(super) struct Kernel {
    maps: Arc<Maps>,
    health: Health,
    totals: Mutex<Totals>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "maps under {}", self.maps.root().display())
    }
}

impl Kernel {
    pub(super) fn new(maps: Arc<Maps>, health: Health, services: u32) -> Self {
        Self {
            maps,
            health,
            totals: Mutex::new(Totals::new(services)),
        }
    }

    fn encode_health(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let seconds = |time: Option<SystemTime>| {
            let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            since.map_or(0.0, |since| since.as_secs_f64())
        };
        let truth = |is: bool| ConstGauge::new(f64::from(u8::from(is)));
        for (name, help, value) in [
            (
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "When a change last came from the source, seconds since 1970.",
                self.health.last_queued(),
            ),
            (
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When changes were last brought into the maps, seconds since 1970.",
                self.health.last_programmed(),
            ),
        ] {
            let families = FAMILIES.map(|family| ([("ip_family", family)], seconds(value)));
            gauges(encoder, name, help, families.into_iter())?;
        }
        for (name, help, value) in [
            (
                "shunt_agent_live",
                "Whether the maps hold all there is and the programs are attached by this agent.",
                truth(self.health.is_live()),
            ),
            (
                "shunt_node_leaving",
                "Whether the Node is being taken out of the cluster.",
                truth(!self.health.node_stays()),
            ),
        ] {
            value.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }

    fn encode_maps(&self, encoder: &mut DescriptorEncoder, usage: &[Usage]) -> fmt::Result {
        let entries = usage
            .iter()
            .map(|usage| ([("map", usage.map)], usage.entries));
        gauges(
            encoder,
            "shunt_map_entries",
            "Entries of a BPF map in use.",
            entries,
        )?;
        let capacities = usage
            .iter()
            .map(|usage| ([("map", usage.map)], u64::from(usage.capacity)));
        gauges(
            encoder,
            "shunt_map_capacity",
            "Most entries of a BPF map; a full connection table gives up its oldest.",
            capacities,
        )?;
        let tables = [
            ("unconfirmed", names::UNCONFIRMED),
            ("established", names::FLOWS),
        ];
        let flows = tables.iter().flat_map(|&(table, maps)| {
            ["IPv4", "IPv6"]
                .into_iter()
                .zip(maps)
                .filter_map(move |(family, map)| {
                    let usage = usage.iter().find(|usage| usage.map == map)?;
                    Some(([("family", family), ("table", table)], usage.entries))
                })
        });
        gauges(
            encoder,
            "shunt_conntrack_entries",
            "Flows in the connection tables.",
            flows,
        )
    }

    fn encode_snat(&self, encoder: &mut DescriptorEncoder, snat: &SnatUse) -> fmt::Result {
        let used = FAMILIES
            .into_iter()
            .zip(snat.busiest)
            .map(|(family, ports)| ([("family", family)], ports));
        gauges(
            encoder,
            "shunt_snat_ports_used",
            "Translated source ports towards the backend that has most of them in use.",
            used,
        )?;
        let (name, help) = (
            "shunt_snat_ports_supply",
            "Translated source ports that each backend has.",
        );
        ConstGauge::new(f64::from(snat.supply)).encode(encoder.encode_descriptor(
            name,
            help,
            None,
            MetricType::Gauge,
        )?)
    }

    /// New flows by Service port and hook; a Service that nobody has dialled yet has no sample.
    fn encode_services(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = totals.read(&self.maps) {
            tracing::warn!("metrics: {error}");
            return Ok(());
        }
        let quarantined = totals
            .quarantined()
            .iter()
            .map(|(port, &backends)| (own_labels(port), backends));
        gauges(
            encoder,
            "shunt_service_quarantined_backends",
            "Backends of a Service port that left connections unanswered and have not answered since.",
            quarantined,
        )?;
        let all = totals.quarantined().values().sum::<u64>();
        let help = "Such backends of all Services.";
        ConstGauge::new(all as f64).encode(encoder.encode_descriptor(
            "shunt_quarantined_backends",
            help,
            None,
            MetricType::Gauge,
        )?)?;
        let totals = totals.sums();
        let flows = totals.iter().flat_map(|(port, counts)| {
            let hooks = HOOKS.iter().zip(counts.flows);
            hooks.map(move |(hook, flows)| (labels(port, "hook", hook), flows))
        });
        counters(
            encoder,
            "shunt_service_flows",
            "New flows to backends of a Service port, by the hook that chose the backend.",
            flows,
        )?;
        let refused = totals.iter().filter_map(|(port, counts)| {
            (counts.snat_refused != 0).then_some((own_labels(port), counts.snat_refused))
        });
        counters(
            encoder,
            "shunt_service_snat_refused",
            "Flows to backends of a Service port that were refused for lack of a source port.",
            refused,
        )?;
        // Without --count-traffic there are no samples: zeros would be lies.
        let carried = || {
            totals
                .iter()
                .filter(|(_, counts)| counts.traffic != Traffic::default())
        };
        let packets = carried().flat_map(|(port, counts)| {
            let Traffic {
                to_packets,
                from_packets,
                ..
            } = counts.traffic;
            directions(port, to_packets, from_packets)
        });
        counters(
            encoder,
            "shunt_service_packets",
            "Packets of a Service port that the packet path carried (--count-traffic).",
            packets,
        )?;
        let bytes = carried().flat_map(|(port, counts)| {
            let Traffic {
                to_bytes,
                from_bytes,
                ..
            } = counts.traffic;
            directions(port, to_bytes, from_bytes)
        });
        counters(
            encoder,
            "shunt_service_bytes",
            "Bytes of those packets, IP headers included.",
            bytes,
        )
    }
}

/// The labels of a Service port; empty for the sum of those that have no samples of their own.
fn own_labels(port: &ServicePort) -> [(&'static str, String); 4] {
    let [namespace, service, number, protocol, _] = labels(port, "", "");
    [namespace, service, number, protocol]
}

/// The labels of a Service port, and one more.
fn labels(port: &ServicePort, name: &'static str, value: &str) -> [(&'static str, String); 5] {
    let or_empty = |text: String| match port.is_others() {
        true => String::new(),
        false => text,
    };
    [
        ("namespace", port.service.namespace.to_string()),
        ("service", port.service.name.to_string()),
        ("port", or_empty(port.port.to_string())),
        ("protocol", or_empty(port.protocol.to_string())),
        (name, value.to_owned()),
    ]
}

fn directions(port: &ServicePort, to: u64, from: u64) -> [([(&'static str, String); 5], u64); 2] {
    [
        (labels(port, "direction", "to-backend"), to),
        (labels(port, "direction", "from-backend"), from),
    ]
}

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        self.encode_health(&mut encoder)?;
        // What cannot be read leaves the rest.
        match self.maps.usage() {
            Ok(usage) => self.encode_maps(&mut encoder, &usage)?,
            Err(error) => tracing::warn!("metrics: {error}"),
        }
        match self.maps.snat_use() {
            Ok(snat) => self.encode_snat(&mut encoder, &snat)?,
            Err(error) => tracing::warn!("metrics: {error}"),
        }
        match self.maps.events() {
            Ok(events) => {
                let events = events
                    .iter()
                    .map(|(event, n)| ([("event", event.name())], *n));
                let help = "What the datapath counts, drops and refusals by their reason.";
                counters(&mut encoder, "shunt_events", help, events)?;
            }
            Err(error) => tracing::warn!("metrics: {error}"),
        }
        self.encode_services(&mut encoder)
    }
}

fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// `name` without `_total`, which is added.
fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
