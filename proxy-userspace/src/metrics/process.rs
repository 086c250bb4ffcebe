//! `process_*`, as all Prometheus clients have them
//! (<https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>). Lengths and
//! units: `proc_pid_stat(5)`.

use std::fs;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

/// The process that asks.
#[derive(Debug)]
pub(super) struct Process;

/// Its part of `/proc/self/stat`, in the units of there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    /// User and system time, clock ticks.
    cpu: u64,
    /// Clock ticks since boot.
    start: u64,
    /// Bytes.
    virtual_memory: u64,
    /// Pages.
    resident: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The second field, a name in parentheses, may hold anything.
        let rest = text.rsplit_once(')')?.1;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Numbered from 1 in the manual, of which two are cut off here.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu: field(14)? + field(15)?,
            start: field(22)?,
            virtual_memory: field(23)?,
            resident: field(24)?,
        })
    }
}

/// When the machine was booted, seconds since 1970.
fn boot_time() -> Option<u64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("btime ")?.parse().ok())
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let stat = fs::read_to_string("/proc/self/stat").ok();
        let ticks = clock_ticks_per_second() as f64;
        if let Some(stat) = stat.and_then(|text| Stat::parse(&text)) {
            let cpu = ConstCounter::new(stat.cpu as f64 / ticks);
            let help = "User and system time of the agent.";
            cpu.encode(encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                MetricType::Counter,
            )?)?;
            let resident = stat.resident.saturating_mul(page_size() as u64);
            gauge(
                &mut encoder,
                "process_resident_memory_bytes",
                "Memory of the agent.",
                resident as f64,
            )?;
            let size = stat.virtual_memory as f64;
            gauge(
                &mut encoder,
                "process_virtual_memory_bytes",
                "Address space of the agent.",
                size,
            )?;
            if let Some(boot) = boot_time() {
                let start = boot as f64 + stat.start as f64 / ticks;
                let help = "When the agent was started, seconds since 1970.";
                gauge(&mut encoder, "process_start_time_seconds", help, start)?;
            }
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // One of them reads the folder.
            let open = open.count().saturating_sub(1);
            gauge(&mut encoder, "process_open_fds", "Open files.", open as f64)?;
        }
        let most = getrlimit(Resource::Nofile).current;
        let most = most.map_or(f64::INFINITY, |most| most as f64);
        gauge(&mut encoder, "process_max_fds", "Most open files.", most)
    }
}

fn gauge(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    value: f64,
) -> Result<(), std::fmt::Error> {
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_move_the_fields() {
        let line = "7 (a) b) (c) S 1 7 7 0 -1 4194560 100 0 0 0 20 30 0 0 20 0 3 0 5000 4096000 250 18446744073709551615";
        let stat = Stat {
            cpu: 50,
            start: 5000,
            virtual_memory: 4_096_000,
            resident: 250,
        };
        assert_eq!(Stat::parse(line), Some(stat));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
    }
}
