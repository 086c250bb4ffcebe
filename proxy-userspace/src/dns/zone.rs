//! From a question to records: the names of the cluster, as the DNS specification for Kubernetes
//! 1.1.0 has them (<https://github.com/kubernetes/dns/blob/master/docs/specification.md>), and as
//! CoreDNS answers where that is silent.
//!
//! Below `<zone>` (`cluster.local`):
//!
//! | name | records |
//! |---|---|
//! | `<service>.<ns>.svc` | A, AAAA: cluster IPs, or the ready endpoints of a headless Service; CNAME of an ExternalName; SRV: all ports |
//! | `_<port>._<proto>.<service>.<ns>.svc` | SRV of a named port, with the addresses of its targets |
//! | `<hostname>.<service>.<ns>.svc` | A, AAAA, SRV of an endpoint; without a host name its address with dashes |
//! | `<a>-<b>-<c>-<d>.<ns>.pod` | A, AAAA: the address in it |
//! | `dns-version` | TXT `1.1.0` |
//! | the zone itself | SOA, NS |
//!
//! Cluster IPs and endpoints have PTR records. A name that only has names below it exists (NODATA);
//! all others do not (NXDOMAIN). Names outside of the zone are not ours, save short ones
//! (`Zone::short_names`).

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use hickory_proto::rr::{
    Name, RData, Record, RecordType,
    rdata::{CNAME, NS, PTR, SOA, SRV, TXT},
};

use super::index::{EndpointNames, Index, ServiceNames, Target};
use crate::object::{ObjectName, Protocol};

/// Seconds that an answer may be kept by others; CoreDNS's default for this zone.
pub const TTL: u32 = 5;
/// Version of the specification, the answer of `dns-version.<zone>`.
pub const SCHEMA_VERSION: &str = "1.1.0";
/// ExternalName Services that lead to each other are followed so far.
const MAX_CHAIN: usize = 8;
/// Most labels of a name: 255 bytes of them, each with a length.
const MAX_LABELS: usize = 128;

/// The cluster's zone.
#[derive(Debug)]
pub struct Zone {
    /// In lower case.
    origin: Name,
    /// Labels of `origin`.
    labels: Vec<Box<[u8]>>,
    /// Names without the zone are looked up too, bare ones in this namespace. `None`: they are not.
    short_names: Option<Box<[u8]>>,
    /// What `ns.dns.<zone>` is: addresses that the server listens on.
    server: Vec<IpAddr>,
    index: Arc<Index>,
    /// Moves on with each answer of several addresses, so that clients that take the first spread.
    turn: AtomicUsize,
}

/// What the zone says to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Records, and others that help with them.
    Records {
        /// The answer.
        answers: Vec<Record>,
        /// Addresses of the names in it.
        additionals: Vec<Record>,
    },
    /// The name exists, and has no such record. With CNAMEs that led to it.
    NoData(Vec<Record>),
    /// The name does not exist. With CNAMEs that led to it.
    NoName(Vec<Record>),
    /// Others know: the name as asked, or where these CNAMEs lead.
    Elsewhere(Vec<Record>, Name),
    /// Not everything is known yet.
    NotReady,
    /// CNAMEs that do not end.
    Loop,
}

/// A name in lower case, label by label.
struct Labels {
    bytes: [u8; 256],
    ends: [u8; MAX_LABELS],
    count: usize,
}

impl Labels {
    fn new(name: &Name) -> Self {
        let mut labels = Self {
            bytes: [0; 256],
            ends: [0; MAX_LABELS],
            count: 0,
        };
        let mut end = 0;
        for label in name.iter().take(MAX_LABELS) {
            let next = end + label.len();
            // A name of the wire has 255 bytes at most.
            let Some(place) = labels.bytes.get_mut(end..next) else {
                break;
            };
            place.copy_from_slice(label);
            place.make_ascii_lowercase();
            labels.ends[labels.count] = next as u8;
            labels.count += 1;
            end = next;
        }
        labels
    }

    fn get(&self, i: usize) -> &[u8] {
        let begin = match i {
            0 => 0,
            i => usize::from(self.ends[i - 1]),
        };
        &self.bytes[begin..usize::from(self.ends[i])]
    }

    fn all(&self) -> Vec<&[u8]> {
        (0..self.count).map(|i| self.get(i)).collect()
    }
}

/// What one step comes to.
enum Found {
    Records(Vec<Record>, Vec<Record>),
    NoData,
    NoName,
    Alias(Arc<str>),
}

impl Zone {
    /// A zone over an index. `short_names`: the namespace of bare names, if names without the zone
    /// are looked up at all.
    pub fn new(
        origin: Name,
        short_names: Option<&str>,
        server: Vec<IpAddr>,
        index: Arc<Index>,
    ) -> Self {
        let mut origin = origin.to_lowercase();
        origin.set_fqdn(true);
        Self {
            labels: origin.iter().map(Into::into).collect(),
            origin,
            short_names: short_names.map(|namespace| namespace.as_bytes().into()),
            server,
            index,
            turn: AtomicUsize::new(0),
        }
    }

    /// Its name.
    pub fn origin(&self) -> &Name {
        &self.origin
    }

    /// Answers a question of class IN.
    pub fn answer(&self, name: &Name, kind: RecordType) -> Answer {
        let mut chain = Vec::new();
        let mut name = name.clone();
        loop {
            let Some(found) = self.find(&name, kind) else {
                return Answer::Elsewhere(chain, name);
            };
            if !self.index.is_complete() {
                return Answer::NotReady;
            }
            match found {
                Found::Records(mut answers, additionals) => {
                    if !chain.is_empty() {
                        chain.append(&mut answers);
                        answers = chain;
                    }
                    return Answer::Records {
                        answers,
                        additionals,
                    };
                }
                Found::NoData => return Answer::NoData(chain),
                Found::NoName => return Answer::NoName(chain),
                Found::Alias(alias) => {
                    let Ok(mut target) = Name::from_ascii(&*alias) else {
                        return Answer::NoName(chain);
                    };
                    target.set_fqdn(true);
                    chain.push(record(name, RData::CNAME(CNAME(target.clone()))));
                    if matches!(kind, RecordType::CNAME | RecordType::ANY) {
                        return Answer::Records {
                            answers: chain,
                            additionals: Vec::new(),
                        };
                    }
                    if chain.len() > MAX_CHAIN {
                        return Answer::Loop;
                    }
                    name = target;
                }
            }
        }
    }

    /// SOA of what a negative answer about a name says how long it holds: [`TTL`].
    pub fn soa(&self, name: &Name) -> Record {
        let labels = Labels::new(name);
        let reverse = ["in-addr", "ip6"].iter().find(|kind| {
            labels.count >= 2
                && labels.get(labels.count - 1) == b"arpa"
                && labels.get(labels.count - 2) == kind.as_bytes()
        });
        let owner = match reverse {
            Some(kind) => self.name([kind.as_bytes(), b"arpa"], false),
            None => self.origin.clone(),
        };
        let soa = SOA::new(
            self.name([&b"ns"[..], b"dns"], true),
            self.name([&b"hostmaster"[..]], true),
            self.index.serial(),
            7200,
            1800,
            86_400,
            TTL,
        );
        record(owner, RData::SOA(soa))
    }

    /// `None`: not a name of ours.
    fn find(&self, name: &Name, kind: RecordType) -> Option<Found> {
        let labels = Labels::new(name);
        let all = labels.all();
        if let Some(rest) = self.inside(&all) {
            return Some(self.find_inside(rest, name, kind));
        }
        if let [.., _, b"arpa"] = all[..] {
            return self.find_address(&all, name, kind);
        }
        let namespace = self.short_names.as_deref()?;
        let (service, namespace): (&[u8], &[u8]) = match all[..] {
            [service] => (service, namespace),
            [service, namespace] | [service, namespace, b"svc"] => (service, namespace),
            _ => return None,
        };
        // What the cluster does not have may be somebody's elsewhere.
        let service = self.index.service(service, namespace)?;
        Some(self.of_service(&service, name, kind))
    }

    /// The labels before the zone's.
    fn inside<'l, 'b>(&self, all: &'l [&'b [u8]]) -> Option<&'l [&'b [u8]]> {
        let (rest, zone) = all.split_at_checked(all.len().checked_sub(self.labels.len())?)?;
        zone.iter()
            .zip(&self.labels)
            .all(|(a, b)| *a == &**b)
            .then_some(rest)
    }

    fn find_inside(&self, rest: &[&[u8]], name: &Name, kind: RecordType) -> Found {
        match rest {
            [] => self.of_apex(name, kind),
            [b"dns-version"] => match kind {
                RecordType::TXT | RecordType::ANY => {
                    let text = TXT::new(vec![SCHEMA_VERSION.to_owned()]);
                    Found::Records(vec![record(name.clone(), RData::TXT(text))], Vec::new())
                }
                _ => Found::NoData,
            },
            [b"dns"] | [b"svc"] | [b"pod"] => Found::NoData,
            [b"ns", b"dns"] => self.addresses(name, self.server.iter().copied(), kind),
            [namespace, b"svc"] => match self.index.has_namespace(namespace) {
                true => Found::NoData,
                false => Found::NoName,
            },
            // Pods may be in a namespace without Services.
            [_, b"pod"] => Found::NoData,
            [pod, _, b"pod"] => match dashed(pod) {
                Some(address) => self.addresses(name, [address], kind),
                None => Found::NoName,
            },
            [service, namespace, b"svc"] => match self.index.service(service, namespace) {
                Some(service) => self.of_service(&service, name, kind),
                None => Found::NoName,
            },
            [below, service, namespace, b"svc"] => match self.index.service(service, namespace) {
                Some(service) => self.below_service(below, &service, name, kind),
                None => Found::NoName,
            },
            [port, protocol, service, namespace, b"svc"] => {
                match self.index.service(service, namespace) {
                    Some(service) => self.of_port(port, protocol, &service, name, kind),
                    None => Found::NoName,
                }
            }
            _ => Found::NoName,
        }
    }

    fn of_apex(&self, name: &Name, kind: RecordType) -> Found {
        match kind {
            RecordType::SOA | RecordType::ANY => Found::Records(vec![self.soa(name)], Vec::new()),
            RecordType::NS => {
                let server = self.name([&b"ns"[..], b"dns"], true);
                let additionals = self
                    .server
                    .iter()
                    .map(|ip| address(server.clone(), *ip))
                    .collect();
                Found::Records(
                    vec![record(name.clone(), RData::NS(NS(server)))],
                    additionals,
                )
            }
            _ => Found::NoData,
        }
    }

    fn of_service(&self, service: &ServiceNames, name: &Name, kind: RecordType) -> Found {
        match &service.target {
            Target::Name(alias) => Found::Alias(alias.clone()),
            // "If there are no ready endpoints for the headless Service, the answer should be
            // NXDOMAIN" (2.4.1).
            Target::Endpoints if service.groups.is_empty() => Found::NoName,
            Target::ClusterIps(ips) if ips.is_empty() => Found::NoData,
            // A name for each of them; asked for by those that look for peers (`SRV` of the bare
            // name), and answered by CoreDNS.
            _ if kind == RecordType::SRV => self.servers(service, name, |_, _| true),
            Target::Endpoints => self.addresses(
                name,
                service.endpoints().map(|(endpoint, _)| endpoint.address),
                kind,
            ),
            Target::ClusterIps(ips) => self.addresses(name, ips.iter().copied(), kind),
        }
    }

    /// An endpoint, or the protocol of named ports.
    fn below_service(
        &self,
        below: &[u8],
        service: &ServiceNames,
        name: &Name,
        kind: RecordType,
    ) -> Found {
        if let Some(protocol) = protocol_of(below) {
            let is_of = |port: &str, other: Protocol| other == protocol && !port.is_empty();
            return match has_port(service, is_of) {
                true => Found::NoData,
                false => Found::NoName,
            };
        }
        let mut named = service
            .endpoints()
            .filter(|(endpoint, _)| is_called(endpoint, below))
            .peekable();
        if named.peek().is_none() {
            return Found::NoName;
        }
        if kind != RecordType::SRV {
            return self.addresses(name, named.map(|(endpoint, _)| endpoint.address), kind);
        }
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        for (endpoint, ports) in named {
            for port in ports {
                answers.push(server(name.clone(), port.port, name.clone()));
            }
            additionals.push(address(name.clone(), endpoint.address));
        }
        finish(answers, additionals)
    }

    fn of_port(
        &self,
        port: &[u8],
        protocol: &[u8],
        service: &ServiceNames,
        name: &Name,
        kind: RecordType,
    ) -> Found {
        let (Some(port), Some(protocol)) = (port.strip_prefix(b"_"), protocol_of(protocol)) else {
            return Found::NoName;
        };
        let is_it = |name: &str, other: Protocol| {
            other == protocol && !name.is_empty() && name.as_bytes() == port
        };
        if !has_port(service, is_it) {
            return Found::NoName;
        }
        match kind {
            RecordType::SRV | RecordType::ANY => self.servers(service, name, is_it),
            _ => Found::NoData,
        }
    }

    /// SRV records of the ports that `is_it` says yes to, with the addresses of their targets.
    fn servers(
        &self,
        service: &ServiceNames,
        owner: &Name,
        is_it: impl Fn(&str, Protocol) -> bool,
    ) -> Found {
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        if let Target::ClusterIps(ips) = &service.target {
            let target = self.service_name(&service.name);
            for port in service
                .ports
                .iter()
                .filter(|port| is_it(&port.name, port.protocol))
            {
                answers.push(server(owner.clone(), port.number, target.clone()));
            }
            if !answers.is_empty() {
                additionals.extend(ips.iter().map(|ip| address(target.clone(), *ip)));
            }
        } else {
            let mut seen = BTreeSet::new();
            for (endpoint, ports) in service.endpoints() {
                let target = self.endpoint_name(endpoint, &service.name);
                let before = answers.len();
                for port in ports.iter().filter(|port| is_it(&port.name, port.protocol)) {
                    answers.push(server(owner.clone(), port.port, target.clone()));
                }
                if answers.len() > before && seen.insert(endpoint.address) {
                    additionals.push(address(target, endpoint.address));
                }
            }
        }
        finish(answers, additionals)
    }

    /// A name of the reverse tree; `None`: of an address that is not in the cluster's names.
    fn find_address(&self, all: &[&[u8]], name: &Name, kind: RecordType) -> Option<Found> {
        let pointers = self.index.pointers(reverse(all)?)?;
        if !matches!(kind, RecordType::PTR | RecordType::ANY) {
            return Some(Found::NoData);
        }
        // A cluster IP's own name is the only one.
        let own: Vec<_> = pointers
            .iter()
            .filter(|pointer| pointer.endpoint.is_none())
            .collect();
        let shown = if own.is_empty() {
            pointers.iter().collect()
        } else {
            own
        };
        let to_record = |pointer: &super::index::Pointer| {
            let target = match &pointer.endpoint {
                Some(endpoint) => self.endpoint_name(endpoint, &pointer.service),
                None => self.service_name(&pointer.service),
            };
            record(name.clone(), RData::PTR(PTR(target)))
        };
        Some(finish(
            shown.into_iter().map(to_record).collect(),
            Vec::new(),
        ))
    }

    /// Those of the family that is asked for, each once, from another one on each time.
    fn addresses(
        &self,
        name: &Name,
        all: impl IntoIterator<Item = IpAddr>,
        kind: RecordType,
    ) -> Found {
        let wanted = |ip: &IpAddr| match kind {
            RecordType::A => ip.is_ipv4(),
            RecordType::AAAA => ip.is_ipv6(),
            RecordType::ANY => true,
            _ => false,
        };
        let mut ips: Vec<IpAddr> = all.into_iter().filter(wanted).collect();
        if ips.len() > 1 {
            ips.sort_unstable();
            ips.dedup();
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % ips.len();
            ips.rotate_left(turn);
        }
        finish(
            ips.into_iter()
                .map(|ip| address(name.clone(), ip))
                .collect(),
            Vec::new(),
        )
    }

    fn service_name(&self, service: &ObjectName) -> Name {
        self.name(
            [
                service.name.as_bytes(),
                service.namespace.as_bytes(),
                b"svc",
            ],
            true,
        )
    }

    fn endpoint_name(&self, endpoint: &EndpointNames, service: &ObjectName) -> Name {
        let dashed;
        let label = match &endpoint.hostname {
            Some(hostname) => hostname.as_bytes(),
            None => {
                dashed = with_dashes(endpoint.address);
                dashed.as_bytes()
            }
        };
        self.name(
            [
                label,
                service.name.as_bytes(),
                service.namespace.as_bytes(),
                b"svc",
            ],
            true,
        )
    }

    /// A name of these labels, in the zone or at the root. Those that come here are Kubernetes's
    /// own, and none is too long for a label; where one is too long for a name, what is left is the
    /// zone.
    fn name<'l>(&'l self, labels: impl IntoIterator<Item = &'l [u8]>, in_zone: bool) -> Name {
        let zone =
            self.labels
                .iter()
                .map(|label| &**label)
                .take(if in_zone { usize::MAX } else { 0 });
        Name::from_labels(labels.into_iter().chain(zone)).unwrap_or_else(|_| self.origin.clone())
    }
}

/// Whether a Service, or one of its endpoints, has a port that `is_it` says yes to.
fn has_port(service: &ServiceNames, is_it: impl Fn(&str, Protocol) -> bool) -> bool {
    service
        .ports
        .iter()
        .any(|port| is_it(&port.name, port.protocol))
        || service.target == Target::Endpoints
            && service
                .groups
                .iter()
                .flat_map(|group| group.ports.iter())
                .any(|port| is_it(&port.name, port.protocol))
}

/// Whether an endpoint has this label, in lower case.
fn is_called(endpoint: &EndpointNames, label: &[u8]) -> bool {
    match &endpoint.hostname {
        Some(hostname) => hostname.as_bytes().eq_ignore_ascii_case(label),
        None => with_dashes(endpoint.address).as_bytes() == label,
    }
}

fn protocol_of(label: &[u8]) -> Option<Protocol> {
    match label {
        b"_tcp" => Some(Protocol::Tcp),
        b"_udp" => Some(Protocol::Udp),
        b"_sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// `10-0-0-1`, `2001-db8--1`.
fn with_dashes(address: IpAddr) -> String {
    let text = address.to_string();
    text.replace(['.', ':'], "-")
}

/// The address in a pod's name, in any way of writing an IPv6 address down.
fn dashed(label: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(label).ok()?;
    let v4 = text.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| text.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6))
        .ok()
}

/// The address that a whole name of the reverse tree stands for.
fn reverse(labels: &[&[u8]]) -> Option<IpAddr> {
    match labels {
        [d, c, b, a, b"in-addr", b"arpa"] => {
            let mut octets = [0; 4];
            for (octet, label) in octets.iter_mut().zip([a, b, c, d]) {
                let text = std::str::from_utf8(label).ok()?;
                // Another way of writing it is another name.
                let plain = text == "0" || !text.starts_with(['0', '+']);
                *octet = text.parse().ok().filter(|_| plain)?;
            }
            Some(Ipv4Addr::from(octets).into())
        }
        [nibbles @ .., b"ip6", b"arpa"] if nibbles.len() == 32 => {
            let mut address = 0_u128;
            for label in nibbles.iter().rev() {
                let [digit] = label else { return None };
                address = address << 4 | u128::from(char::from(*digit).to_digit(16)?);
            }
            Some(Ipv6Addr::from(address).into())
        }
        _ => None,
    }
}

fn record(name: Name, data: RData) -> Record {
    Record::from_rdata(name, TTL, data)
}

fn address(name: Name, ip: IpAddr) -> Record {
    record(
        name,
        match ip {
            IpAddr::V4(ip) => RData::A(ip.into()),
            IpAddr::V6(ip) => RData::AAAA(ip.into()),
        },
    )
}

/// The weight is set when their number is known.
fn server(name: Name, port: u16, target: Name) -> Record {
    record(name, RData::SRV(SRV::new(0, 0, port, target)))
}

/// No records are NODATA. A server with addresses of both families is one record (RFC 2181, section
/// 5). Servers share a weight of 100, as CoreDNS has it.
fn finish(mut answers: Vec<Record>, additionals: Vec<Record>) -> Found {
    if answers.is_empty() {
        return Found::NoData;
    }
    let mut seen = HashSet::new();
    answers.retain(|record| match &record.data {
        RData::SRV(srv) => seen.insert((srv.port, srv.target.clone())),
        _ => true,
    });
    let weight = u16::try_from(100 / answers.len()).unwrap_or(0).max(1);
    for record in &mut answers {
        if let RData::SRV(srv) = &mut record.data {
            srv.weight = weight;
        }
    }
    Found::Records(answers, additionals)
}
