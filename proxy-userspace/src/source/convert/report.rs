//! Fields that objects have in common, checked.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;

use super::decimal;
use crate::object::{ObjectName, Problem, Protocol, Retry, TrafficPolicy};

/// Annotation of a Service: `false`, and no connection tries another backend; `true`, and those of
/// pods' sockets do too ([`Retry`]).
pub const ANNOTATION_RETRY: &str = "shunt.dev/retry";

/// Collects the problems of one object.
pub(super) struct Report<'a> {
    pub(super) kind: &'static str,
    pub(super) name: &'a ObjectName,
    pub(super) problems: &'a mut Vec<Problem>,
}

impl Report<'_> {
    pub(super) fn push(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.problems
            .push(Problem::new(self.kind, self.name, field, message));
    }

    /// Says something about a field that is served as it is written.
    pub(super) fn warn(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.problems
            .push(Problem::warning(self.kind, self.name, field, message));
    }

    pub(super) fn port(&mut self, field: impl FnOnce() -> String, port: i32) -> Option<u16> {
        match u16::try_from(port) {
            Ok(port) if port != 0 => Some(port),
            _ => {
                self.push(field(), format!("{port} is no port; use 1 to 65535"));
                None
            }
        }
    }

    pub(super) fn protocol(
        &mut self,
        field: impl FnOnce() -> String,
        protocol: Option<&str>,
    ) -> Option<Protocol> {
        match protocol {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(other) => {
                self.push(
                    field(),
                    format!("{other:?} is no protocol; use TCP, UDP or SCTP"),
                );
                None
            }
        }
    }

    pub(super) fn policy(&mut self, field: &str, policy: Option<&str>) -> TrafficPolicy {
        match policy {
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some("Local") => TrafficPolicy::Local,
            Some(other) => {
                self.push(
                    field,
                    format!(
                        "{other:?} is no traffic policy; use Cluster or Local (Cluster is served)"
                    ),
                );
                TrafficPolicy::Cluster
            }
        }
    }

    pub(super) fn retry(&mut self, annotation: Option<&str>) -> Retry {
        match annotation.map(str::trim) {
            None => Retry::Packets,
            Some("true") => Retry::Sockets,
            Some("false") => Retry::Off,
            Some(other) => {
                self.push(
                    format!("metadata.annotations[{ANNOTATION_RETRY}]"),
                    format!("{other:?} is neither \"true\" nor \"false\" (served as if it were not there)"),
                );
                Retry::Packets
            }
        }
    }

    /// Names of zones or nodes; one that is empty is nobody's.
    pub(super) fn hints<'t>(
        &mut self,
        field: impl Fn(usize) -> String,
        names: impl Iterator<Item = &'t str>,
    ) -> BTreeSet<Arc<str>> {
        let mut hints = BTreeSet::new();
        for (j, name) in names.enumerate() {
            match name {
                "" => self.push(
                    field(j),
                    "is empty; name a zone or node, or leave the hint out (it is not followed)",
                ),
                name => drop(hints.insert(name.into())),
            }
        }
        hints
    }

    pub(super) fn ip(&mut self, field: impl FnOnce() -> String, text: &str) -> Option<IpAddr> {
        match decimal::ip(text) {
            Some((ip, false)) => Some(ip),
            Some((ip, true)) => {
                self.warn(field(), leading_zeros(text, &ip));
                Some(ip)
            }
            None => {
                self.push(field(), format!("{text:?} is no IP address"));
                None
            }
        }
    }

    /// A network.
    pub(super) fn net(&mut self, field: impl FnOnce() -> String, text: &str) -> Option<IpNet> {
        match decimal::net(text) {
            Some((net, false)) => Some(net),
            Some((net, true)) => {
                self.warn(field(), leading_zeros(text, &net));
                Some(net)
            }
            None => {
                self.push(
                    field(),
                    format!("{text:?} is no CIDR such as 203.0.113.0/24; nobody is let in by it"),
                );
                None
            }
        }
    }

    /// An address that clients may dial. The API forbids external IPs what it forbids endpoints,
    /// and leaves a load balancer whatever its controller found (`ValidateLoadBalancerStatus`).
    pub(super) fn frontend_ip(
        &mut self,
        field: impl Fn() -> String,
        text: &str,
        may_be_link_local: bool,
    ) -> Option<IpAddr> {
        let ip = self.ip(&field, text)?;
        match forbidden(ip) {
            None => Some(ip),
            Some(LINK_LOCAL) if may_be_link_local => Some(ip),
            Some(what) => {
                self.push(
                    field(),
                    format!("{ip} is {what}; no Service can be reached there"),
                );
                None
            }
        }
    }

    /// An address that may stand behind a Service (SPEC B6).
    pub(super) fn backend_ip(&mut self, field: impl Fn() -> String, text: &str) -> Option<IpAddr> {
        let ip = self.ip(&field, text)?;
        match forbidden(ip) {
            None => Some(ip),
            Some(what) => {
                self.push(
                    field(),
                    format!("{ip} is {what}, which the API forbids for endpoints; it is skipped"),
                );
                None
            }
        }
    }
}

/// What to say of a number such as 010, which is eight to others.
fn leading_zeros(text: &str, read: &dyn fmt::Display) -> String {
    format!("{text:?} has leading zeros; write {read}, as which it is served")
}

const LINK_LOCAL: &str = "a link-local address";

/// What is wrong with an address as an endpoint or a frontend, if anything: the API's rule for both
/// (`ValidateEndpointIP`), and all of multicast.
fn forbidden(ip: IpAddr) -> Option<&'static str> {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if ip.is_unspecified() {
        Some("the unspecified address")
    } else if ip.is_loopback() {
        Some("a loopback address")
    } else if link_local {
        Some(LINK_LOCAL)
    } else if ip.is_multicast() {
        Some("a multicast address")
    } else if ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some("the broadcast address")
    } else {
        None
    }
}
