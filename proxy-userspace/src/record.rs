//! What tracers are told ([`crate::datapath::trace`]), for people and scripts: numbers as names.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use anyhow::Context;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use shunt_common::{
    event::Event,
    layout::{
        TCP, TRACE_AT_SOCKET, TRACE_AT_TC, TRACE_HAS_BACKEND, TRACE_HAS_SERVICE, TRACE_HAS_SOURCE,
        TraceRecord, UDP,
    },
};

use crate::datapath::{
    maps::{Maps, service_name, service_names},
    rtnl, trace,
};

/// One decision, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// RFC 3339, to a tick of the kernel's.
    pub time: String,
    /// What it is: see [`shunt_common::trace::TraceKind`].
    pub kind: &'static str,
    /// `TCP`, `UDP`, `SCTP`, `ICMP` or `other`.
    pub protocol: String,
    /// Who sent it; `None` at sockets, which have no address yet, and where nobody has looked.
    pub source: Option<SocketAddr>,
    /// What it was sent to, or dialled; `None`: nobody has looked.
    pub destination: Option<SocketAddr>,
    /// `namespace/name`, where a frontend was found.
    pub service: Option<String>,
    /// Where it goes, where that is known.
    pub backend: Option<SocketAddr>,
    /// What the backend sees as the source, where that is translated.
    pub translated_source: Option<SocketAddr>,
    /// `socket`, `tc` or `xdp`.
    pub hook: &'static str,
    /// The device by which it came in.
    pub device: Option<String>,
    /// What was counted, as `shunt status` and the metrics call it.
    pub events: Vec<&'static str>,
}

fn address(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// An address as records and filters have it.
pub fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What numbers mean here.
pub struct Names<'a> {
    maps: &'a Maps,
    services: HashMap<u32, (String, String)>,
    devices: HashMap<u32, String>,
    /// What a time of the kernel's is more at the wall, in ns.
    wall: i128,
}

impl<'a> Names<'a> {
    /// As the maps say now.
    ///
    /// # Errors
    /// The kernel's, when Services cannot be listed: `EPERM` without `CAP_BPF`.
    pub fn new(maps: &'a Maps) -> anyhow::Result<Self> {
        Ok(Self {
            maps,
            services: service_names(maps)?,
            devices: HashMap::new(),
            wall: Timestamp::now().as_nanosecond() - i128::from(trace::now()),
        })
    }

    fn service(&mut self, number: u32) -> anyhow::Result<String> {
        if !self.services.contains_key(&number) {
            self.services = service_names(self.maps)?;
        }
        let (namespace, name) = service_name(&self.services, number);
        Ok(format!("{namespace}/{name}"))
    }

    fn device(&mut self, index: u32) -> String {
        let name = || match rtnl::device_name(index) {
            Ok(Some(name)) => name,
            _ => format!("#{index}"),
        };
        self.devices.entry(index).or_insert_with(name).clone()
    }

    /// What a record says.
    ///
    /// # Errors
    /// As [`Self::new`], for a Service that is not known yet; a time that no calendar has.
    pub fn line(&mut self, record: &TraceRecord<[u8; 16]>) -> anyhow::Result<Line> {
        let has = |flag| record.flags & flag != 0;
        let time = Timestamp::from_nanosecond(self.wall + i128::from(record.time))
            .context("a time that no calendar has")?;
        Ok(Line {
            time: format!("{time:.3}"),
            kind: record.kind().name(),
            protocol: match record.proto {
                TCP => "TCP",
                UDP => "UDP",
                shunt_common::layout::SCTP => "SCTP",
                1 | 58 => "ICMP",
                _ => "other",
            }
            .to_owned(),
            source: (record.hook != TRACE_AT_SOCKET && record.src != [0; 16])
                .then(|| SocketAddr::new(address(record.src), record.src_port)),
            destination: (record.dst != [0; 16])
                .then(|| SocketAddr::new(address(record.dst), record.dst_port)),
            service: match has(TRACE_HAS_SERVICE) {
                true => Some(self.service(record.service)?),
                false => None,
            },
            backend: has(TRACE_HAS_BACKEND)
                .then(|| SocketAddr::new(address(record.backend), record.backend_port)),
            translated_source: has(TRACE_HAS_SOURCE)
                .then(|| SocketAddr::new(address(record.snat), record.snat_port)),
            hook: match record.hook {
                TRACE_AT_SOCKET => "socket",
                TRACE_AT_TC => "tc",
                _ => "xdp",
            },
            device: (record.device != 0).then(|| self.device(record.device)),
            events: Event::ALL
                .iter()
                .filter(|event| record.events & event.bit() != 0)
                .map(|event| event.name())
                .collect(),
        })
    }
}

impl Line {
    /// One line for people; its parts that are always there have a place of their own.
    pub fn text(&self) -> String {
        let clock = self.time.get(11..23).unwrap_or(&self.time);
        let mut text = format!("{clock} {:<8}{:<5}", self.kind, self.protocol);
        text += &self.path();
        text += &format!("  {}", self.place());
        let plain = [
            Event::SocketFlow,
            Event::TcFlow,
            Event::XdpFlow,
            Event::Retry,
        ];
        let why: Vec<&str> = (self.events.iter().copied())
            .filter(|name| !plain.iter().any(|event| event.name() == *name))
            .collect();
        if !why.is_empty() {
            text += &format!("  {}", why.join(", "));
        }
        text
    }

    /// Who sends it to whom, as far as that is known.
    pub fn path(&self) -> String {
        let mut text = String::new();
        if let Some(source) = self.source {
            text += &format!("{source} > ");
        }
        if let Some(destination) = self.destination {
            text += &destination.to_string();
        }
        if let Some(service) = &self.service {
            text += &format!(" {service}");
        }
        if let Some(backend) = self.backend {
            text += &format!(" > {backend}");
        }
        if let Some(source) = self.translated_source {
            text += &format!(" from {source}");
        }
        text
    }

    /// Where it was seen.
    pub fn place(&self) -> String {
        match &self.device {
            Some(device) => format!("{} {device}", self.hook),
            None => self.hook.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_common::trace::TraceKind;

    use super::*;

    #[test]
    fn a_line_fits_a_hundred_columns() {
        let socket = |text: &str| Some(text.parse().unwrap());
        let line = Line {
            time: "2026-11-28T05:47:01.123Z".to_owned(),
            kind: TraceKind::Refused.name(),
            protocol: "TCP".to_owned(),
            source: socket("203.0.113.10:40000"),
            destination: socket("10.96.0.1:80"),
            service: Some("default/kubia".to_owned()),
            backend: None,
            translated_source: None,
            hook: "tc",
            device: Some("eth0".to_owned()),
            events: vec![Event::NoBackend.name()],
        };
        assert_eq!(
            line.text(),
            "05:47:01.123 refused TCP  203.0.113.10:40000 > 10.96.0.1:80 default/kubia  tc eth0  no_backend"
        );
        assert!(line.text().len() <= 100);
    }
}
