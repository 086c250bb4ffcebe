//! The built-in DNS beside CoreDNS: the same objects from one API server, the same questions,
//! record by record. What differs is listed, and meant.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, SocketAddr, TcpListener},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::Message,
    rr::{RData, RecordType},
};
use serde_json::{Value, json};
use shunt_apiserver::ApiServer;
use shunt_lab::{AgentOptions, Lab, NetNs, Sockets};
use tempfile::TempDir;

use super::{Server, over_udp};

const API: &str = "192.168.50.1:6443";
/// Where the node's CoreDNS listens.
const COREDNS: &str = "127.0.0.1:5300";
/// Whom the agent asks for names of others.
const UPSTREAM: &str = "192.0.2.200";
/// Longest wait for either to know all objects.
const PATIENCE: Duration = Duration::from_secs(30);
const TYPES: [RecordType; 8] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::SRV,
    RecordType::CNAME,
    RecordType::TXT,
    RecordType::MX,
    RecordType::NS,
    RecordType::SOA,
];

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The Services of the fixtures.
fn fixtures() -> Vec<Value> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let mut services = Vec::new();
    for name in ["dns-and-edge", "external", "kubia", "story", "whoami"] {
        let text = fs::read_to_string(format!("{folder}/{name}.yaml")).unwrap();
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        services.extend(
            objects
                .into_iter()
                .filter(|object| object["kind"] == "Service"),
        );
    }
    // As a real server fills it in.
    let ports = services
        .iter_mut()
        .filter_map(|service| service["spec"]["ports"].as_array_mut());
    for port in ports.flatten() {
        if port["protocol"].is_null() {
            port["protocol"] = json!("TCP");
        }
    }
    services
}

/// Services of every kind that names are made for, besides the fixtures'.
fn services() -> Vec<Value> {
    let of = |name: &str, spec: Value| {
        let metadata = json!({ "name": name, "namespace": "team" });
        json!({ "kind": "Service", "metadata": metadata, "spec": spec })
    };
    let ports = json!([
        { "name": "http", "port": 80, "protocol": "TCP" },
        { "name": "dns", "port": 53, "protocol": "UDP" },
    ]);
    vec![
        of(
            "dual",
            json!({ "clusterIP": "10.96.50.1", "clusterIPs": ["10.96.50.1", "fd96::5001"], "ports": ports }),
        ),
        of(
            "six",
            json!({ "clusterIP": "fd96::5002", "clusterIPs": ["fd96::5002"], "ports": [{ "port": 80, "protocol": "TCP" }] }),
        ),
        of(
            "nobody",
            json!({ "clusterIP": "10.96.50.3", "clusterIPs": ["10.96.50.3"], "ports": ports }),
        ),
        of(
            "pods",
            json!({ "clusterIP": "None", "clusterIPs": ["None"], "ports": ports }),
        ),
        of(
            "early",
            json!({ "clusterIP": "None", "clusterIPs": ["None"], "publishNotReadyAddresses": true, "ports": ports }),
        ),
        of(
            "none",
            json!({ "clusterIP": "None", "clusterIPs": ["None"], "ports": ports }),
        ),
        of(
            "elsewhere",
            json!({ "type": "ExternalName", "externalName": "www.example.com" }),
        ),
    ]
}

/// Slices of the headless ones: with and without host names, ready and not.
fn slices() -> Vec<Value> {
    let of = |service: &str, family: &str, endpoints: Value| {
        json!({
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-{}", family.to_lowercase()), "namespace": "team",
                "labels": { "kubernetes.io/service-name": service },
            },
            "addressType": family,
            "ports": [
                { "name": "http", "port": 8080, "protocol": "TCP" },
                { "name": "dns", "port": 5353, "protocol": "UDP" },
            ],
            "endpoints": endpoints,
        })
    };
    let ready = json!({ "ready": true });
    let unready = json!({ "ready": false });
    vec![
        of(
            "dual",
            "IPv4",
            json!([{ "addresses": ["10.244.0.9"], "conditions": ready }]),
        ),
        of(
            "pods",
            "IPv4",
            json!([
                { "addresses": ["10.244.0.10"], "hostname": "zero", "conditions": ready },
                { "addresses": ["10.244.0.11"], "conditions": ready },
                { "addresses": ["10.244.0.12"], "hostname": "two", "conditions": unready },
            ]),
        ),
        of(
            "pods",
            "IPv6",
            json!([
                { "addresses": ["fd44::10"], "hostname": "zero", "conditions": ready },
                { "addresses": ["fd44::11"], "conditions": ready },
            ]),
        ),
        of(
            "early",
            "IPv4",
            json!([
                { "addresses": ["10.244.0.20"], "hostname": "zero", "conditions": ready },
                { "addresses": ["10.244.0.21"], "hostname": "one", "conditions": unready },
            ]),
        ),
    ]
}

/// The name that an address has in the reverse zones.
fn reverse(ip: &str) -> String {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa.")
        }
        IpAddr::V6(ip) => {
            let nibbles = u128::from(ip);
            let digits: Vec<String> = (0..32)
                .map(|n| format!("{:x}", nibbles >> (4 * n) & 0xf))
                .collect();
            format!("{}.ip6.arpa.", digits.join("."))
        }
    }
}

/// All that is asked.
fn questions(services: &[Value], slices: &[Value]) -> BTreeSet<(String, RecordType)> {
    let zone = "cluster.local.";
    let mut names: BTreeSet<String> = ["", "svc.", "team.svc.", "default.svc.", "nowhere.svc."]
        .map(|prefix| format!("{prefix}{zone}"))
        .into();
    for prefix in [
        "pod.",
        "team.pod.",
        "nowhere.pod.",
        "10-244-0-10.team.pod.",
        "10-244-0-10.nowhere.pod.",
        "999-0-0-1.team.pod.",
        "dns-version.",
        "missing.team.svc.",
        "missing.nowhere.svc.",
        "missing.",
        "a.b.c.d.e.svc.",
        "DUAL.Team.SVC.",
        "*.team.svc.",
    ] {
        names.insert(format!("{prefix}{zone}"));
    }
    let mut addresses = BTreeSet::from(["10.96.99.99".to_owned(), "192.0.2.9".to_owned()]);
    for service in services {
        let [name, namespace] =
            ["name", "namespace"].map(|field| service["metadata"][field].as_str());
        let whole = format!(
            "{}.{}.svc.{zone}",
            name.unwrap(),
            namespace.unwrap_or("default")
        );
        for prefix in [
            "_http._tcp.",
            "_dns._udp.",
            "_dns._tcp.",
            "_dns-tcp._tcp.",
            "_https._tcp.",
            "_http._udp.",
            "_http.",
            "_tcp.",
            "zero.",
            "one.",
            "two.",
            "10-244-0-11.",
            "fd44--11.",
            "missing.",
        ] {
            names.insert(format!("{prefix}{whole}"));
        }
        names.insert(whole);
        let ips = service["spec"]["clusterIPs"].as_array();
        addresses.extend(
            ips.into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .filter(|ip| *ip != "None")
                .map(str::to_owned),
        );
    }
    for slice in slices {
        for endpoint in slice["endpoints"].as_array().unwrap() {
            addresses.insert(endpoint["addresses"][0].as_str().unwrap().to_owned());
        }
    }
    let reversed = addresses
        .iter()
        .map(|ip| (reverse(ip), RecordType::PTR))
        .collect::<Vec<_>>();
    names
        .into_iter()
        .flat_map(|name| TYPES.map(|kind| (name.clone(), kind)))
        .chain(reversed)
        .collect()
}

/// What an answer says, line by line: its code, its records with their TTLs, and whether it names
/// the zone's authority.
fn told(message: &Message) -> Vec<String> {
    let mut lines: Vec<String> = message
        .answers
        .iter()
        .map(|record| {
            let name = record.name.to_ascii().to_lowercase();
            let data = match &record.data {
                // Weights are anybody's choice, and CoreDNS counts servers of two families twice.
                RData::SRV(srv) => format!("{} {} {}", srv.priority, srv.port, srv.target),
                // Its serial is the time.
                RData::SOA(soa) => format!("{} {} {}", soa.mname, soa.rname, soa.minimum),
                data => data.to_string(),
            };
            format!("{name} {} {data}", record.ttl)
        })
        .collect();
    lines.sort();
    lines.insert(0, format!("{:?}", message.metadata.response_code));
    if message
        .authorities
        .iter()
        .any(|record| record.record_type() == RecordType::SOA)
    {
        lines.push("authority".to_owned());
    }
    lines
}

fn ask(ns: &NetNs, server: SocketAddr, name: &str, kind: RecordType) -> Vec<String> {
    let answer = over_udp(ns, server, name, kind);
    told(&answer.unwrap_or_else(|error| panic!("{server} {name} {kind}: {error}")))
}

fn coredns(lab: &Lab, program: &std::path::Path, api: &ApiServer, folder: &TempDir) -> Running {
    let config = folder.path().join("Corefile");
    fs::write(
        &config,
        format!(
            "cluster.local:5300 in-addr.arpa:5300 ip6.arpa:5300 {{\n    bind 127.0.0.1\n    errors\n    \
             kubernetes cluster.local in-addr.arpa ip6.arpa {{\n        kubeconfig {}\n        \
             pods insecure\n        ttl 5\n        fallthrough in-addr.arpa ip6.arpa\n    }}\n}}\n",
            api.kubeconfig().display()
        ),
    )
    .unwrap();
    let mut command = lab.command("node-a", Sockets::Unhooked, program).unwrap();
    command
        .arg("-conf")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
    Running(command.spawn().unwrap())
}

/// Waits until a server knows a Service.
fn wait_for(ns: &NetNs, server: SocketAddr) {
    let begin = Instant::now();
    let name = "dual.team.svc.cluster.local.";
    while !over_udp(ns, server, name, RecordType::A).is_ok_and(|answer| !answer.answers.is_empty())
    {
        assert!(begin.elapsed() < PATIENCE, "{server} does not know {name}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// D2, D1: names, records and codes are CoreDNS's, but for what [`reason`] lists.
#[test]
#[ignore = "cargo xtask test --peers"]
fn names_are_answered_as_coredns_answers_them() {
    let program = match shunt_lab::peer("coredns") {
        Ok(program) => program,
        Err(reason) => shunt_lab::skip!("{reason}"),
    };
    let lab = Lab::new().unwrap();
    let fabric = lab.ns("fabric").unwrap();
    let address: SocketAddr = API.parse().unwrap();
    let api =
        ApiServer::start_with(address, move || fabric.run(|| TcpListener::bind(address))).unwrap();
    let mut all = [fixtures(), services()].concat();
    let slices = slices();
    api.apply(json!({ "kind": "Node", "metadata": { "name": "node-a" } }));
    for namespace in ["default", "kube-system", "team", "ingress-nginx", "prod"] {
        api.apply(json!({ "kind": "Namespace", "metadata": { "name": namespace } }));
    }
    api.apply_all(all.iter().chain(&slices).cloned());
    all = api.list(shunt_apiserver::Kind::Services);

    let folder = TempDir::new().unwrap();
    let _coredns = coredns(&lab, &program, &api, &folder);
    let upstream_ip: IpAddr = UPSTREAM.parse().unwrap();
    lab.add_outside("upstream", &[upstream_ip], &[]).unwrap();
    let _upstream = Server::start(&lab.ns("upstream").unwrap(), &[upstream_ip], 1);
    let options = AgentOptions::kubeconfig(&api.kubeconfig())
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps()
        .args(&["--dns", "0.0.0.0", "--dns-upstream", UPSTREAM]);
    let _agent = lab.start_agent("node-a", &options).unwrap();
    let ns = lab.ns("node-a").unwrap();
    let node = lab.node_ips("node-a").unwrap()[0];
    let [ours, theirs] = [SocketAddr::new(node, 53), COREDNS.parse().unwrap()];
    wait_for(&ns, ours);
    wait_for(&ns, theirs);

    let questions = questions(&all, &slices);
    let mut meant = BTreeMap::<&str, usize>::new();
    let mut differences = Vec::new();
    for (name, kind) in &questions {
        let [our, their] = [ours, theirs].map(|server| ask(&ns, server, name, *kind));
        if our == their {
            continue;
        }
        match reason(name, *kind, &our, &their) {
            Some(reason) => *meant.entry(reason).or_default() += 1,
            None => {
                differences.push(format!(
                    "{name} {kind}\n  shunt   {our:?}\n  CoreDNS {their:?}"
                ));
            }
        }
    }
    println!(
        "{} questions, {} differences",
        questions.len(),
        differences.len()
    );
    for (reason, count) in &meant {
        println!("{count:5} meant: {reason}");
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Why a difference is meant.
fn reason(
    name: &str,
    kind: RecordType,
    ours: &[String],
    theirs: &[String],
) -> Option<&'static str> {
    let code = |told: &[String], code: &str| told[0] == code;
    let [our_records, their_records] =
        [ours, theirs].map(|told| told.iter().skip(1).filter(|line| *line != "authority"));
    let (our_records, their_records): (Vec<_>, Vec<_>) =
        (our_records.collect(), their_records.collect());
    let labels: Vec<&str> = name.split('.').collect();
    if name.ends_with(".arpa.") {
        if our_records.is_empty() && their_records.is_empty() {
            return Some("nobody's here: of the upstream server's answer, or of none");
        }
        return match name {
            "9.0.244.10.in-addr.arpa." => {
                Some("the specification names endpoints of headless Services only")
            }
            "21.0.244.10.in-addr.arpa." => Some(EARLY),
            _ => None,
        };
    }
    if name == "cluster.local." && kind == RecordType::NS {
        return Some("the zone has a name server, also before kube-dns is made");
    }
    if name.starts_with("dns-version.")
        && ours.iter().chain(theirs).any(|line| line.contains("1.1.0"))
    {
        return Some("every TTL is 5 s");
    }
    if name.ends_with(".pod.cluster.local.") && kind == RecordType::SRV {
        return Some("pods have addresses, no ports");
    }
    if labels.contains(&"nowhere") {
        return Some("Namespaces are not watched: any may have pods");
    }
    if kind == RecordType::SOA && code(ours, "NXDomain") && theirs == ["NoError", "authority"] {
        return Some("a name that is not there is not there for SOA either");
    }
    if code(ours, "NoError")
        && our_records.is_empty()
        && code(theirs, "NXDomain")
        && (name.starts_with("_tcp.") || labels.len() <= 5 || kind == RecordType::TXT)
    {
        return Some("a name exists if there are others below it (RFC 8020)");
    }
    if name.starts_with('_') && matches!(kind, RecordType::A | RecordType::AAAA) {
        return Some("ports have SRV records, no addresses");
    }
    if our_records
        .first()
        .is_some_and(|line| line.ends_with(".example.com."))
    {
        return Some("an ExternalName's CNAME is the answer to every type, and followed");
    }
    if name.contains("early.team.") {
        return Some(EARLY);
    }
    None
}

const EARLY: &str = "publishNotReadyAddresses is the Service's, whoever wrote its slices";
