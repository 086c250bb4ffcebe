//! Manifests and questions in, answers out: through the bytes of both.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType},
};

use super::{
    cache::{Cache, Key},
    forward::{Forwarder, Source, servers_in},
    index::{Index, ServiceNames},
    metrics::Metrics,
    resolve::{Resolver, Response},
    wire::{self, Incoming, MAX_UDP},
    zone::Zone,
};
use crate::{object::ObjectName, source::manifests::tests::Cluster};

/// A cluster of manifests and the server over it.
struct Dns {
    cluster: Cluster,
    index: Arc<Index>,
    resolver: Resolver,
}

const NONE: [&str; 0] = [];

impl Dns {
    fn new() -> Self {
        Self::with_short_names(Some("default"))
    }

    fn with_short_names(namespace: Option<&str>) -> Self {
        let index = Arc::<Index>::default();
        let origin = Name::from_ascii("Cluster.Local").unwrap();
        let server = vec![
            "192.0.2.53".parse().unwrap(),
            "2001:db8::53".parse().unwrap(),
        ];
        let zone = Zone::new(origin, namespace, server, index.clone());
        index.set_complete();
        Self {
            cluster: Cluster::new(),
            index,
            resolver: resolver(zone),
        }
    }

    /// All fixtures.
    fn of_fixtures() -> Self {
        let mut dns = Self::new();
        for file in [
            "kubia.yaml",
            "whoami.yaml",
            "external.yaml",
            "dns-and-edge.yaml",
        ] {
            let path = format!("{}/tests/fixtures/{file}", env!("CARGO_MANIFEST_DIR"));
            assert_eq!(
                dns.write(file, &std::fs::read_to_string(path).unwrap()),
                NONE
            );
        }
        dns.write("names.yaml", NAMES);
        dns
    }

    /// Writes a file; what the change touches goes into the index, and nothing else.
    fn write(&mut self, file: &str, text: &str) -> Vec<String> {
        let problems = self.cluster.write(file, text);
        for touched in &self.cluster.touched {
            let (namespace, name) = touched.split_once('/').unwrap();
            let name = ObjectName::new(namespace, name);
            let names = self.cluster.model.service(&name).map(|service| {
                let slices = self.cluster.model.slices(&name);
                ServiceNames::new(service, slices)
            });
            self.index.set(&name, names);
        }
        problems
    }

    /// What comes of a message; `None`: nothing is sent.
    fn exchange(&self, question: &[u8], limit: Option<u16>) -> Option<Vec<u8>> {
        match wire::read(question) {
            Incoming::Nothing => None,
            Incoming::Refused(reply, _) => Some(reply),
            Incoming::Question(question) => match self.resolver.resolve(&question) {
                Response::Now(reply) => {
                    Some(question.reply(&reply, limit.unwrap_or(question.udp_limit())))
                }
                Response::Later(_) => panic!("{} is asked of others", question.name),
            },
        }
    }

    fn message(&self, name: &str, kind: RecordType) -> Message {
        let reply = self
            .exchange(&question(name, kind).to_vec().unwrap(), Some(u16::MAX))
            .unwrap();
        Message::from_vec(&reply).unwrap()
    }

    /// The code, and the records of an answer in order: `code`, `name TYPE data`, `+ name TYPE
    /// data` of what helps.
    fn ask(&self, name: &str, kind: RecordType) -> Vec<String> {
        let message = self.message(name, kind);
        assert!(message.metadata.authoritative, "{name} {kind}");
        assert_eq!(
            message.queries[0].name().to_string(),
            absolute(name),
            "as it was written"
        );
        for record in message.answers.iter().chain(&message.additionals) {
            assert_eq!((record.ttl, record.dns_class), (5, DNSClass::IN));
        }
        let is_alias =
            |record: &Record| record.record_type() == CNAME && !matches!(kind, CNAME | ANY);
        let is_negative = message.answers.iter().all(is_alias);
        assert_eq!(
            message.authorities.len(),
            usize::from(is_negative),
            "a negative answer has an SOA: {message}"
        );
        for record in &message.authorities {
            let RData::SOA(soa) = &record.data else {
                panic!("{record}")
            };
            assert_eq!((record.ttl, soa.minimum), (5, 5), "RFC 2308, 5");
        }
        let mut lines: Vec<String> = message.answers.iter().map(line).collect();
        lines.sort();
        let mut help: Vec<String> = message
            .additionals
            .iter()
            .map(|record| format!("+ {}", line(record)))
            .collect();
        help.sort();
        let code = match message.metadata.response_code {
            ResponseCode::NoError if lines.is_empty() => vec!["NODATA".to_owned()],
            ResponseCode::NoError => Vec::new(),
            ResponseCode::NXDomain => vec!["NXDOMAIN".to_owned()],
            code => vec![code.to_string()],
        };
        [code, lines, help].concat()
    }

    /// Whether others are asked.
    fn is_elsewhere(&self, name: &str, kind: RecordType) -> bool {
        let Incoming::Question(question) = wire::read(&question(name, kind).to_vec().unwrap())
        else {
            panic!()
        };
        matches!(self.resolver.resolve(&question), Response::Later(_))
    }
}

/// Over a zone, with somebody to ask for other names.
fn resolver(zone: Zone) -> Resolver {
    let others = Source::Given(vec!["192.0.2.1:53".parse().unwrap()]);
    let forwarder = Forwarder::new(others, Vec::new(), Metrics::default());
    Resolver::new(zone, Rc::new(forwarder), Metrics::default())
}

fn absolute(name: &str) -> String {
    format!("{}.", name.trim_end_matches('.'))
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(
        Name::from_ascii(absolute(name)).unwrap(),
        kind,
    ));
    message
}

fn line(record: &Record) -> String {
    format!("{} {} {}", record.name, record.record_type(), record.data)
}

use RecordType::{A, AAAA, ANY, CNAME, MX, NS, PTR, SOA, SRV, TXT};

/// What the fixtures lack: both families, host names, all endpoints, several ports, ExternalNames
/// that lead on.
const NAMES: &str = "
kind: Service
metadata: { name: dual, namespace: web }
spec: { clusterIPs: [10.96.5.5, 'fd00:96::5'], ports: [{ name: http, port: 80 }, { name: dns, port: 53, protocol: UDP }] }
---
kind: Service
metadata: { name: db, namespace: web }
spec: { clusterIP: None, ports: [{ name: sql, port: 5432 }] }
---
kind: EndpointSlice
apiVersion: discovery.k8s.io/v1
metadata: { name: db-4, namespace: web, labels: { kubernetes.io/service-name: db, service.kubernetes.io/headless: '' } }
addressType: IPv4
ports: [{ name: sql, port: 5432 }]
endpoints:
  - { addresses: [10.44.9.1], hostname: db-0 }
  - { addresses: [10.44.9.2], hostname: db-1 }
  - { addresses: [10.44.9.3], hostname: db-2, conditions: { ready: false } }
---
kind: EndpointSlice
apiVersion: discovery.k8s.io/v1
metadata: { name: db-6, namespace: web, labels: { kubernetes.io/service-name: db, service.kubernetes.io/headless: '' } }
addressType: IPv6
ports: [{ name: sql, port: 5432 }]
endpoints: [{ addresses: ['fd00:44::1'], hostname: db-0 }, { addresses: ['fd00:44::9'] }]
---
kind: Service
metadata: { name: all, namespace: web }
spec: { clusterIP: None, publishNotReadyAddresses: true, ports: [] }
---
kind: EndpointSlice
apiVersion: discovery.k8s.io/v1
metadata: { name: all-1, namespace: web, labels: { kubernetes.io/service-name: all } }
addressType: IPv4
endpoints: [{ addresses: [10.44.9.7], conditions: { ready: false } }, { addresses: [10.44.9.8] }]
---
kind: Service
metadata: { name: none, namespace: web }
spec: { clusterIP: None, ports: [{ name: http, port: 80 }] }
---
kind: Service
metadata: { name: alias, namespace: web }
spec: { type: ExternalName, externalName: Dual.web.svc.cluster.local. }
---
kind: Service
metadata: { name: round, namespace: web }
spec: { type: ExternalName, externalName: trip.web.svc.cluster.local }
---
kind: Service
metadata: { name: trip, namespace: web }
spec: { type: ExternalName, externalName: round.web.svc.cluster.local }
---
kind: Service
metadata: { name: others, namespace: web, labels: { service.kubernetes.io/service-proxy-name: mesh } }
spec: { clusterIP: 10.96.5.6, ports: [{ name: http, port: 80 }] }
---
kind: Service
metadata: { name: kubernetes, namespace: default }
spec: { clusterIP: 10.96.0.1, ports: [{ name: https, port: 443 }] }
---
kind: Pod
metadata: { name: pod-1, namespace: web, labels: { app: named } }
spec: { hostname: one, subdomain: named, containers: [] }
status: { podIPs: [{ ip: 10.44.9.21 }], conditions: [{ type: Ready, status: 'True' }] }
---
kind: Pod
metadata: { name: pod-2, namespace: web, labels: { app: named } }
spec: { hostname: two, subdomain: other, containers: [] }
status: { podIPs: [{ ip: 10.44.9.22 }], conditions: [{ type: Ready, status: 'True' }] }
---
kind: Service
metadata: { name: named, namespace: web }
spec: { clusterIP: None, selector: { app: named }, ports: [{ port: 80 }] }
";

/// Rows D2, F5, F6, F7: every kind of record, and what is not there.
#[test]
fn the_names_of_the_cluster() {
    let dns = Dns::of_fixtures();
    let zone = "cluster.local";
    for (name, kind, expected) in [
        // A Service with a cluster IP (2.3).
        (
            "kubia.default.svc",
            A,
            &["kubia.default.svc.Z. A 10.111.88.195"][..],
        ),
        ("kubia.default.svc", AAAA, &["NODATA"]),
        ("kubia.default.svc", MX, &["NODATA"]),
        (
            "kubernetes.default.svc",
            A,
            &["kubernetes.default.svc.Z. A 10.96.0.1"],
        ),
        ("dual.web.svc", A, &["dual.web.svc.Z. A 10.96.5.5"]),
        ("dual.web.svc", AAAA, &["dual.web.svc.Z. AAAA fd00:96::5"]),
        (
            "dual.web.svc",
            ANY,
            &[
                "dual.web.svc.Z. A 10.96.5.5",
                "dual.web.svc.Z. AAAA fd00:96::5",
            ],
        ),
        // Letters make no difference, and come back as they were written.
        (
            "KUBIA.Default.sVc",
            A,
            &["KUBIA.Default.sVc.Z. A 10.111.88.195"],
        ),
        // Another proxy's has its name (F7).
        ("others.web.svc", A, &["others.web.svc.Z. A 10.96.5.6"]),
        (
            "_http._tcp.dual.web.svc",
            SRV,
            &[
                "_http._tcp.dual.web.svc.Z. SRV 0 100 80 dual.web.svc.Z.",
                "+ dual.web.svc.Z. A 10.96.5.5",
                "+ dual.web.svc.Z. AAAA fd00:96::5",
            ],
        ),
        (
            "_dns._udp.dual.web.svc",
            SRV,
            &[
                "_dns._udp.dual.web.svc.Z. SRV 0 100 53 dual.web.svc.Z.",
                "+ dual.web.svc.Z. A 10.96.5.5",
                "+ dual.web.svc.Z. AAAA fd00:96::5",
            ],
        ),
        (
            "dual.web.svc",
            SRV,
            &[
                "dual.web.svc.Z. SRV 0 50 53 dual.web.svc.Z.",
                "dual.web.svc.Z. SRV 0 50 80 dual.web.svc.Z.",
                "+ dual.web.svc.Z. A 10.96.5.5",
                "+ dual.web.svc.Z. AAAA fd00:96::5",
            ],
        ),
        ("_dns._tcp.dual.web.svc", SRV, &["NXDOMAIN"]),
        ("_http._tcp.dual.web.svc", A, &["NODATA"]),
        ("_tcp.dual.web.svc", A, &["NODATA"]),
        ("_sctp.dual.web.svc", A, &["NXDOMAIN"]),
        ("http._tcp.dual.web.svc", SRV, &["NXDOMAIN"]),
        // An unnamed port has none (2.3.2).
        ("_._tcp.kubia-nodeport.default.svc", SRV, &["NXDOMAIN"]),
        ("_tcp.kubia-nodeport.default.svc", SRV, &["NXDOMAIN"]),
        // A headless one (2.4).
        (
            "kubia-headless.default.svc",
            A,
            &[
                "kubia-headless.default.svc.Z. A 10.44.0.11",
                "kubia-headless.default.svc.Z. A 10.44.1.11",
                "kubia-headless.default.svc.Z. A 10.44.1.12",
            ],
        ),
        (
            "db.web.svc",
            A,
            &["db.web.svc.Z. A 10.44.9.1", "db.web.svc.Z. A 10.44.9.2"],
        ),
        (
            "db.web.svc",
            AAAA,
            &[
                "db.web.svc.Z. AAAA fd00:44::1",
                "db.web.svc.Z. AAAA fd00:44::9",
            ],
        ),
        ("db-0.db.web.svc", A, &["db-0.db.web.svc.Z. A 10.44.9.1"]),
        (
            "db-0.db.web.svc",
            AAAA,
            &["db-0.db.web.svc.Z. AAAA fd00:44::1"],
        ),
        ("db-1.db.web.svc", AAAA, &["NODATA"]),
        ("db-2.db.web.svc", A, &["NXDOMAIN"]),
        (
            "fd00-44--9.db.web.svc",
            AAAA,
            &["fd00-44--9.db.web.svc.Z. AAAA fd00:44::9"],
        ),
        ("10-44-9-1.db.web.svc", A, &["NXDOMAIN"]),
        (
            "10-44-1-11.kubia-headless.default.svc",
            A,
            &["10-44-1-11.kubia-headless.default.svc.Z. A 10.44.1.11"],
        ),
        (
            "db-0.db.web.svc",
            SRV,
            &[
                "db-0.db.web.svc.Z. SRV 0 100 5432 db-0.db.web.svc.Z.",
                "+ db-0.db.web.svc.Z. A 10.44.9.1",
                "+ db-0.db.web.svc.Z. AAAA fd00:44::1",
            ][..],
        ),
        (
            "_sql._tcp.db.web.svc",
            SRV,
            &[
                "_sql._tcp.db.web.svc.Z. SRV 0 33 5432 db-0.db.web.svc.Z.",
                "_sql._tcp.db.web.svc.Z. SRV 0 33 5432 db-1.db.web.svc.Z.",
                "_sql._tcp.db.web.svc.Z. SRV 0 33 5432 fd00-44--9.db.web.svc.Z.",
                "+ db-0.db.web.svc.Z. A 10.44.9.1",
                "+ db-0.db.web.svc.Z. AAAA fd00:44::1",
                "+ db-1.db.web.svc.Z. A 10.44.9.2",
                "+ fd00-44--9.db.web.svc.Z. AAAA fd00:44::9",
            ],
        ),
        ("_port._tcp.etcd-k8s.kube-system.svc", A, &["NODATA"]),
        ("none.web.svc", A, &["NXDOMAIN"]),
        ("_http._tcp.none.web.svc", SRV, &["NXDOMAIN"]),
        (
            "all.web.svc",
            A,
            &["all.web.svc.Z. A 10.44.9.7", "all.web.svc.Z. A 10.44.9.8"],
        ),
        // A pod's host name, below the Service of its subdomain.
        (
            "one.named.web.svc",
            A,
            &["one.named.web.svc.Z. A 10.44.9.21"],
        ),
        ("two.named.web.svc", A, &["NXDOMAIN"]),
        (
            "10-44-9-22.named.web.svc",
            A,
            &["10-44-9-22.named.web.svc.Z. A 10.44.9.22"],
        ),
        // ExternalName (2.5).
        (
            "alias.web.svc",
            A,
            &[
                "alias.web.svc.Z. CNAME dual.web.svc.Z.",
                "dual.web.svc.Z. A 10.96.5.5",
            ],
        ),
        (
            "alias.web.svc",
            CNAME,
            &["alias.web.svc.Z. CNAME dual.web.svc.Z."],
        ),
        (
            "alias.web.svc",
            MX,
            &["alias.web.svc.Z. CNAME dual.web.svc.Z."],
        ),
        ("x.alias.web.svc", A, &["NXDOMAIN"]),
        (
            "database.prod.svc",
            CNAME,
            &["database.prod.svc.Z. CNAME db.example.com."],
        ),
        // Pods.
        (
            "10-44-9-1.web.pod",
            A,
            &["10-44-9-1.web.pod.Z. A 10.44.9.1"],
        ),
        ("10-44-9-1.web.pod", AAAA, &["NODATA"]),
        (
            "fd00-44--9.web.pod",
            AAAA,
            &["fd00-44--9.web.pod.Z. AAAA fd00:44::9"],
        ),
        ("10-44-9-256.web.pod", A, &["NXDOMAIN"]),
        ("web.pod", A, &["NODATA"]),
        ("pod", A, &["NODATA"]),
        // The zone.
        ("dns-version", TXT, &["dns-version.Z. TXT 1.1.0"]),
        ("dns-version", A, &["NODATA"]),
        ("ns.dns", A, &["ns.dns.Z. A 192.0.2.53"]),
        ("ns.dns", AAAA, &["ns.dns.Z. AAAA 2001:db8::53"]),
        ("dns", A, &["NODATA"]),
        ("svc", A, &["NODATA"]),
        ("web.svc", A, &["NODATA"]),
        ("nowhere.svc", A, &["NXDOMAIN"]),
        ("nobody.web.svc", A, &["NXDOMAIN"]),
        ("kubia.nowhere.svc", A, &["NXDOMAIN"]),
        ("a.b._tcp.dual.web.svc", A, &["NXDOMAIN"]),
        ("else", A, &["NXDOMAIN"]),
        // As a search list asks for them.
        ("kubia.default.svc.cluster.local", A, &["NXDOMAIN"]),
        ("www.example.com.default.svc", A, &["NXDOMAIN"]),
    ] {
        let expected: Vec<String> = expected
            .iter()
            .map(|line| line.replace(".Z.", ".cluster.local."))
            .collect();
        assert_eq!(
            dns.ask(&format!("{name}.{zone}"), kind),
            expected,
            "{name} {kind}"
        );
    }
    assert_eq!(dns.ask("cluster.local", A), ["NODATA"]);
    assert_eq!(
        dns.ask("cluster.local", NS),
        [
            "cluster.local. NS ns.dns.cluster.local.",
            "+ ns.dns.cluster.local. A 192.0.2.53",
            "+ ns.dns.cluster.local. AAAA 2001:db8::53",
        ]
    );
    let soa = dns.ask("cluster.local", SOA);
    assert!(
        soa.len() == 1
            && soa[0]
                .starts_with("cluster.local. SOA ns.dns.cluster.local. hostmaster.cluster.local."),
        "{soa:?}"
    );
    // A loop of names ends.
    let round = dns.message("round.web.svc.cluster.local", A);
    assert_eq!(round.metadata.response_code, ResponseCode::ServFail);
}

/// The way back from address to name (2.3.3, 2.4.3).
#[test]
fn addresses_have_names() {
    let dns = Dns::of_fixtures();
    for (name, expected) in [
        (
            "195.88.111.10.in-addr.arpa",
            &["195.88.111.10.in-addr.arpa. PTR kubia.default.svc.cluster.local."][..],
        ),
        (
            "1.9.44.10.IN-ADDR.arpa",
            &["1.9.44.10.IN-ADDR.arpa. PTR db-0.db.web.svc.cluster.local."],
        ),
        (
            "11.1.44.10.in-addr.arpa",
            &["11.1.44.10.in-addr.arpa. PTR 10-44-1-11.kubia-headless.default.svc.cluster.local."],
        ),
    ] {
        assert_eq!(dns.ask(name, PTR), expected);
        assert_eq!(dns.ask(name, A), ["NODATA"]);
    }
    let v6 = format!("5.0.0.0{}.6.9.0.0.0.0.d.f.ip6.arpa", ".0".repeat(20));
    assert_eq!(
        dns.ask(&v6, PTR),
        [format!("{v6}. PTR dual.web.svc.cluster.local.")]
    );
    let negative = dns.message(&v6, A);
    assert_eq!(negative.authorities[0].name.to_string(), "ip6.arpa.");
    for name in [
        // Not ready; nobody's; not whole; not the way it is written.
        "3.9.44.10.in-addr.arpa",
        "1.2.0.192.in-addr.arpa",
        "44.10.in-addr.arpa",
        "01.9.44.10.in-addr.arpa",
        "in-addr.arpa",
        "5.0.ip6.arpa",
    ] {
        assert!(dns.is_elsewhere(name, PTR), "{name}");
    }
}

/// Without a search list: `svc`, `svc.ns`, `svc.ns.svc`, and only where there is such a Service.
#[test]
fn short_names_are_found_without_a_search_list() {
    let dns = Dns::of_fixtures();
    for (name, address) in [
        ("kubia", "10.111.88.195"),
        ("kubia.", "10.111.88.195"),
        ("kubia.default", "10.111.88.195"),
        ("kubia.default.svc", "10.111.88.195"),
        ("Dual.Web", "10.96.5.5"),
    ] {
        assert_eq!(
            dns.ask(name, A),
            [format!("{} A {address}", absolute(name))]
        );
    }
    for name in [
        "dual",
        "kubia.web",
        "example.com",
        "kubia.default.pod",
        "a.b.c.d",
        "com",
        ".",
    ] {
        assert!(dns.is_elsewhere(name, A), "{name}");
    }
    let strict = Dns::with_short_names(None);
    assert!(
        strict.is_elsewhere("kubia.default", A),
        "a Service cannot stand in for others' names unless asked for"
    );
}

/// A change is in the next answer; what a Service had and has no more leaves nothing behind.
#[test]
fn a_change_is_in_the_next_answer() {
    let mut dns = Dns::new();
    let service = |ip: &str| {
        format!(
            "kind: Service\nmetadata: {{ name: a, namespace: team }}\nspec: {{ clusterIP: {ip}, ports: [{{ port: 80 }}] }}\n"
        )
    };
    let slice = |addresses: &str| {
        format!(
            "---\nkind: EndpointSlice\napiVersion: discovery.k8s.io/v1\n\
             metadata: {{ name: a-1, namespace: team, labels: {{ kubernetes.io/service-name: a }} }}\n\
             addressType: IPv4\nports: [{{ port: 80 }}]\nendpoints: [{addresses}]\n"
        )
    };
    let name = "a.team.svc.cluster.local";
    assert_eq!(dns.ask(name, A), ["NXDOMAIN"]);
    assert_eq!(dns.ask("team.svc.cluster.local", A), ["NXDOMAIN"]);
    dns.write("a.yaml", &service("10.96.7.1"));
    assert_eq!(dns.ask(name, A), ["a.team.svc.cluster.local. A 10.96.7.1"]);
    assert_eq!(dns.ask("team.svc.cluster.local", A), ["NODATA"]);
    dns.write("a.yaml", &service("10.96.7.2"));
    assert_eq!(dns.ask(name, A), ["a.team.svc.cluster.local. A 10.96.7.2"]);
    assert!(dns.is_elsewhere("1.7.96.10.in-addr.arpa", PTR));
    // Headless, and endpoints that come and go.
    dns.write("a.yaml", &service("None"));
    assert_eq!(dns.ask(name, A), ["NXDOMAIN"]);
    assert!(dns.is_elsewhere("2.7.96.10.in-addr.arpa", PTR));
    for addresses in [
        &["10.44.0.1"][..],
        &["10.44.0.1", "10.44.0.2"],
        &["10.44.0.2"],
    ] {
        let endpoints: Vec<String> = addresses
            .iter()
            .map(|ip| format!("{{ addresses: [{ip}] }}"))
            .collect();
        dns.write("a.yaml", &(service("None") + &slice(&endpoints.join(", "))));
        let expected: Vec<String> = addresses
            .iter()
            .map(|ip| format!("a.team.svc.cluster.local. A {ip}"))
            .collect();
        assert_eq!(dns.ask(name, A), expected);
        assert_eq!(
            dns.is_elsewhere("1.0.44.10.in-addr.arpa", PTR),
            !addresses.contains(&"10.44.0.1")
        );
    }
    dns.write("a.yaml", "");
    assert_eq!(dns.ask(name, A), ["NXDOMAIN"]);
    assert_eq!(dns.ask("team.svc.cluster.local", A), ["NXDOMAIN"]);
    assert!(dns.is_elsewhere("2.0.44.10.in-addr.arpa", PTR));
    assert!(dns.index.is_empty());
}

/// Until everything is known nothing is denied.
#[test]
fn nothing_is_denied_before_everything_is_known() {
    let index = Arc::<Index>::default();
    let zone = Zone::new(
        Name::from_ascii("cluster.local").unwrap(),
        None,
        Vec::new(),
        index.clone(),
    );
    let resolver = resolver(zone);
    let code = || {
        let message = question("kubia.default.svc.cluster.local", A)
            .to_vec()
            .unwrap();
        let Incoming::Question(question) = wire::read(&message) else {
            panic!()
        };
        let Response::Now(reply) = resolver.resolve(&question) else {
            panic!()
        };
        reply.code
    };
    assert_eq!(code(), ResponseCode::ServFail);
    index.set_complete();
    assert_eq!(code(), ResponseCode::NXDomain);
}

/// 300 endpoints: 512 bytes, what EDNS0 says, and all of it over TCP.
#[test]
fn what_does_not_fit_is_cut_and_the_answer_says_so() {
    let mut dns = Dns::new();
    let endpoints: Vec<String> = (0..300)
        .map(|n| format!("{{ addresses: [10.45.{}.{}] }}", n / 200, n % 200 + 1))
        .collect();
    dns.write(
        "a.yaml",
        &format!(
            "kind: Service\nmetadata: {{ name: many }}\nspec: {{ clusterIP: None, ports: [{{ name: http, port: 80 }}] }}\n---\n\
             kind: EndpointSlice\napiVersion: discovery.k8s.io/v1\n\
             metadata: {{ name: many-1, labels: {{ kubernetes.io/service-name: many }} }}\n\
             addressType: IPv4\nports: [{{ name: http, port: 80 }}]\nendpoints: [{}]\n",
            endpoints.join(", ")
        ),
    );
    let name = "many.default.svc.cluster.local";
    let with_edns = |size: u16| {
        let mut message = question(name, A);
        let mut edns = Edns::new();
        edns.set_max_payload(size).set_dnssec_ok(true);
        message.set_edns(edns);
        message.to_vec().unwrap()
    };
    for (question, limit, at_least) in [
        (question(name, A).to_vec().unwrap(), 512, 25),
        (with_edns(512), 512, 25),
        (with_edns(100), 512, 25),
        (with_edns(1000), 1000, 55),
        (with_edns(65_000), MAX_UDP, 70),
    ] {
        let bytes = dns.exchange(&question, None).unwrap();
        let reply = Message::from_vec(&bytes).unwrap();
        assert!(
            bytes.len() <= usize::from(limit),
            "{} of {limit}",
            bytes.len()
        );
        assert!(reply.metadata.truncation);
        // Some resolvers take what is there.
        assert!(
            (at_least..300).contains(&reply.answers.len()),
            "{} of {limit}",
            reply.answers.len()
        );
        let asked = Message::from_vec(&question).unwrap();
        assert_eq!(
            reply.edns.is_some(),
            asked.edns.is_some(),
            "RFC 6891, 6.1.1"
        );
        if let Some(edns) = reply.edns {
            assert_eq!((edns.max_payload(), edns.version()), (MAX_UDP, 0));
            assert!(edns.flags().dnssec_ok, "RFC 3225, 3");
        }
    }
    let whole = dns.message(name, A);
    assert_eq!(
        (whole.answers.len(), whole.metadata.truncation),
        (300, false)
    );
    // What only helps is left out without a word (RFC 2181, 9).
    let asked = question(&format!("_http._tcp.{name}"), SRV)
        .to_vec()
        .unwrap();
    let all = Message::from_vec(&dns.exchange(&asked, Some(u16::MAX)).unwrap()).unwrap();
    assert_eq!(
        (
            all.answers.len(),
            all.additionals.len(),
            all.metadata.truncation
        ),
        (300, 300, false)
    );
    let room = all.to_vec().unwrap().len() - 100;
    let without =
        Message::from_vec(&dns.exchange(&asked, u16::try_from(room).ok()).unwrap()).unwrap();
    assert_eq!(
        (
            without.answers.len(),
            without.additionals.len(),
            without.metadata.truncation
        ),
        (300, 0, false)
    );
}

/// A client that takes the first address gets another one each time.
#[test]
fn addresses_take_turns() {
    let dns = Dns::of_fixtures();
    let first = || {
        dns.message("kubia-headless.default.svc.cluster.local", A)
            .answers[0]
            .data
            .to_string()
    };
    let firsts: std::collections::BTreeSet<String> = (0..3).map(|_| first()).collect();
    assert_eq!(firsts.len(), 3, "{firsts:?}");
}

/// What cannot be read, and what is not for us.
#[test]
fn malformed_and_foreign_messages() {
    let dns = Dns::of_fixtures();
    let good = question("kubia.default.svc.cluster.local", A);
    let bytes = good.to_vec().unwrap();
    let code = |bytes: &[u8]| {
        let reply = Message::from_vec(&dns.exchange(bytes, None)?).unwrap();
        assert_eq!(
            (reply.metadata.id, reply.metadata.message_type),
            (7, MessageType::Response)
        );
        Some(reply.metadata.response_code)
    };
    let with = |change: fn(&mut Message)| {
        let mut message = good.clone();
        change(&mut message);
        message.to_vec().unwrap()
    };
    assert_eq!(code(&bytes), Some(ResponseCode::NoError));
    for end in 12..bytes.len() {
        assert_eq!(code(&bytes[..end]), Some(ResponseCode::FormErr), "{end}");
    }
    for end in 0..12 {
        assert_eq!(code(&bytes[..end]), None, "{end}: nothing to answer to");
    }
    assert_eq!(
        code(&with(
            |message| message.metadata.message_type = MessageType::Response
        )),
        None
    );
    let two = with(|message| {
        message.add_query(Query::query(Name::root(), A));
    });
    assert_eq!(code(&two), Some(ResponseCode::FormErr));
    assert_eq!(
        code(&with(|message| message.queries.clear())),
        Some(ResponseCode::FormErr)
    );
    assert_eq!(
        code(&with(|message| message.metadata.op_code = OpCode::Notify)),
        Some(ResponseCode::NotImp)
    );
    assert_eq!(
        code(&with(|message| message.metadata.op_code = OpCode::Update)),
        Some(ResponseCode::NotImp)
    );
    let chaos = with(|message| {
        message.queries[0].set_query_class(DNSClass::CH);
    });
    assert_eq!(code(&chaos), Some(ResponseCode::Refused));
    let transfer = with(|message| {
        message.queries[0].set_query_type(RecordType::AXFR);
    });
    assert_eq!(code(&transfer), Some(ResponseCode::Refused));
    let later = with(|message| {
        let mut edns = Edns::new();
        edns.set_version(1);
        message.set_edns(edns);
    });
    // One number, two names.
    assert_eq!(
        code(&later).map(u16::from),
        Some(u16::from(ResponseCode::BADVERS))
    );
    // A name of more than 255 bytes, and one that points to itself.
    let mut long = bytes[..12].to_vec();
    for _ in 0..5 {
        long.push(63);
        long.extend([b'a'; 63]);
    }
    long.extend([0, 0, 1, 0, 1]);
    assert_eq!(code(&long), Some(ResponseCode::FormErr));
    let mut circle = bytes[..12].to_vec();
    circle.extend([0xc0, 12, 0, 1, 0, 1]);
    assert_eq!(code(&circle), Some(ResponseCode::FormErr));
}

/// Whatever comes in, what goes out can be read and is no longer than it may be.
#[test]
fn noise_does_no_harm() {
    use proptest::prelude::*;
    let dns = Dns::of_fixtures();
    let seed = question("_sql._tcp.db.web.svc.cluster.local", SRV)
        .to_vec()
        .unwrap();
    proptest!(|(noise in proptest::collection::vec((0..64_usize, any::<u8>()), 0..6), tail in proptest::collection::vec(any::<u8>(), 0..40))| {
        let mut bytes = seed.clone();
        bytes.extend(tail);
        for (at, byte) in noise {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Incoming::Question(question) = wire::read(&bytes)
            && let Response::Now(reply) = dns.resolver.resolve(&question)
        {
            let out = question.reply(&reply, question.udp_limit());
            prop_assert!(out.len() <= usize::from(MAX_UDP));
            prop_assert!(Message::from_vec(&out).is_ok());
        }
    });
}

/// An ExternalName that is none is told by name, and the rest serves.
#[test]
fn external_names_that_are_none_are_told() {
    let mut dns = Dns::new();
    let service = |name: &str, external: &str| {
        format!(
            "kind: Service\nmetadata: {{ name: {name} }}\nspec: {{ type: ExternalName, externalName: {external} }}\n---\n"
        )
    };
    let problems = dns.write(
        "a.yaml",
        &(service("a", "''")
            + &service("b", "192.0.2.1")
            + &service("c", "'not a name'")
            + &service("d", "Example.COM.")),
    );
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert_eq!(
        problems[1],
        "a.yaml:7: Service default/b: spec.externalName: \"192.0.2.1\" is an address, which no name can stand for; use a \
         Service without selector and an EndpointSlice"
    );
    assert_eq!(
        dns.ask("d.default.svc.cluster.local", CNAME),
        ["d.default.svc.cluster.local. CNAME example.com."]
    );
    assert_eq!(dns.ask("b.default.svc.cluster.local", CNAME), ["NXDOMAIN"]);
}

#[test]
fn servers_of_resolv_conf() {
    let text = "# a comment\nsearch example.com\nnameserver 192.0.2.1\n  nameserver\t2001:db8::1 \nnameserver2 192.0.2.9\n\
                nameserver example.com\nnameserver fe80::1%7\nnameserver 192.0.2.4\noptions ndots:5\n";
    let servers: Vec<String> = servers_in(text).iter().map(ToString::to_string).collect();
    assert_eq!(
        servers,
        ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%7]:53"],
        "three at most"
    );
}

/// For as long as the answer says, and no longer; what is left of it is told.
#[test]
fn answers_of_others_are_kept_while_they_hold() {
    let key = |name: &str| Key {
        name: Name::from_ascii(name).unwrap(),
        kind: A,
        dnssec_ok: false,
        checking_disabled: false,
    };
    let soa = |ttl: u32, minimum: u32| {
        let name = || Name::from_ascii("example.com.").unwrap();
        let soa = hickory_proto::rr::rdata::SOA::new(name(), name(), 1, 2, 3, 4, minimum);
        Record::from_rdata(name(), ttl, RData::SOA(soa))
    };
    let answer = |code: ResponseCode, ttls: &[u32], authorities: &[Record]| {
        let mut message = question("www.example.com", A).into_response();
        message.metadata.response_code = code;
        for ttl in ttls {
            let data = RData::A(std::net::Ipv4Addr::new(192, 0, 2, 1).into());
            message.add_answer(Record::from_rdata(
                Name::from_ascii("www.example.com.").unwrap(),
                *ttl,
                data,
            ));
        }
        message.add_authorities(authorities.iter().cloned());
        message
    };
    use ResponseCode::{NXDomain, NoError, Refused, ServFail};
    for (message, lifetime) in [
        (answer(NoError, &[300, 60], &[]), 60),
        (answer(NoError, &[100_000], &[]), 3600),
        (answer(NoError, &[0], &[]), 0),
        (answer(NXDomain, &[], &[soa(600, 30)]), 30),
        (answer(NXDomain, &[], &[soa(20, 30)]), 20),
        (answer(NoError, &[], &[soa(90_000, 90_000)]), 1800),
        (answer(NoError, &[], &[]), 0),
        (answer(NXDomain, &[], &[]), 0),
        (answer(ServFail, &[], &[soa(600, 30)]), 0),
        (answer(Refused, &[60], &[]), 0),
    ] {
        let mut cache = Cache::default();
        let begin = Instant::now();
        cache.insert(key("a."), &message, begin);
        assert_eq!(cache.is_empty(), lifetime == 0, "{message}");
        if lifetime > 0 {
            let late = begin + Duration::from_secs(lifetime - 1);
            let kept = cache.get(&key("a."), late).unwrap();
            for (kept, given) in kept.answers.iter().zip(&message.answers) {
                assert_eq!(u64::from(kept.ttl), u64::from(given.ttl) - (lifetime - 1));
            }
            assert!(cache.get(&key("b."), late).is_none());
            assert!(
                cache
                    .get(&key("a."), begin + Duration::from_secs(lifetime))
                    .is_none()
            );
        }
    }
    // However many are asked for, it has a bound; one that is asked for stays.
    let mut cache = Cache::default();
    let begin = Instant::now();
    let message = answer(NoError, &[300], &[]);
    cache.insert(key("first."), &message, begin);
    for n in 0..10_000 {
        cache.insert(key(&format!("n{n}.")), &message, begin);
        assert!(cache.get(&key("first."), begin).is_some());
    }
    assert_eq!(cache.len(), 8192);
}
