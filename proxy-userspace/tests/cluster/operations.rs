//! What an operator sees of an agent that follows an API server: health, metrics and Events (SPEC
//! A2, S1). Needs root.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use shunt_apiserver::{ApiServer, Kind, Refusal};
use shunt_lab::{Agent, AgentOptions, Dial, Lab, PodSpec, Port, Proto, Sockets};

/// The fabric, as seen from the nodes.
const SERVER: &str = "192.168.50.1:6443";
/// Longest wait for something that should come at once.
const PATIENCE: Duration = Duration::from_secs(20);
const HEALTHZ: u16 = 10_256;
const METRICS: u16 = 10_249;
const NODE: &str = "node-a";
const APP: u16 = 8080;

struct World {
    agent: Agent,
    api: ApiServer,
    lab: Lab,
}

impl World {
    /// A cluster whose agent has not been started yet.
    fn new(extra: &[&str]) -> Self {
        Self::with_xdp("native", extra)
    }

    fn with_xdp(xdp: &str, extra: &[&str]) -> Self {
        let lab = Lab::new().unwrap();
        let fabric = lab.ns("fabric").unwrap();
        let address: SocketAddr = SERVER.parse().unwrap();
        let api = ApiServer::start_with(address, move || fabric.run(|| TcpListener::bind(address)))
            .unwrap();
        api.apply(node(&lab, &[]));
        let options = AgentOptions::kubeconfig(&api.kubeconfig())
            .xdp(xdp)
            .args(extra)
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agent = lab.agent(NODE, &options).unwrap();
        Self { agent, api, lab }
    }

    fn start(extra: &[&str]) -> Self {
        Self::new(extra).started()
    }

    fn started(mut self) -> Self {
        self.agent.spawn().unwrap();
        self.agent.wait_ready().unwrap();
        self
    }

    /// Status, headers in lower case and body, asked by a process on the node. `None` when nobody
    /// answers.
    fn get(&self, ip: impl Into<IpAddr>, port: u16, path: &str) -> Option<(u16, String, String)> {
        let to = SocketAddr::new(ip.into(), port);
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        self.lab.ns(NODE).unwrap().run(move || {
            let mut stream = TcpStream::connect(to).ok()?;
            stream
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            stream.write_all(request.as_bytes()).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            let (head, body) = text.split_once("\r\n\r\n")?;
            let status = head.split(' ').nth(1)?.parse().ok()?;
            Some((status, head.to_lowercase(), body.to_owned()))
        })
    }

    fn scrape(&self) -> Scrape {
        let (status, head, body) = self.get(Ipv4Addr::LOCALHOST, METRICS, "/metrics").unwrap();
        assert_eq!(status, 200);
        assert!(
            head.contains("\r\ncontent-type: application/openmetrics-text; version=1.0.0"),
            "{head}"
        );
        assert!(body.ends_with("# EOF\n"), "{body}");
        Scrape(body)
    }

    /// A Service of both families in front of one pod, `web-1` on the node; its cluster IPs.
    fn serve_web(&self, spec: Value) -> Vec<IpAddr> {
        let pod = PodSpec::new("web-1", NODE, &[Port::tcp(APP), Port::udp(APP)]);
        self.lab.add_pod(&pod).unwrap();
        self.lab
            .add_pod(&PodSpec::new("client-1", NODE, &[]))
            .unwrap();
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
            "spec": {
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [{ "name": "t", "port": 80 }, { "name": "u", "protocol": "UDP", "port": 53 }],
            },
        });
        for (field, value) in spec.as_object().unwrap() {
            service["spec"][field] = value.clone();
        }
        self.api.apply(service);
        self.set_endpoint(NODE, &Timestamp::now().to_string());
        let service = self.api.get(Kind::Services, "default", "web").unwrap();
        let ips = service["spec"]["clusterIPs"].as_array().unwrap().iter();
        ips.map(|ip| ip.as_str().unwrap().parse().unwrap())
            .collect()
    }

    /// Puts `web-1` behind the Service, and says where it is and when that was.
    fn set_endpoint(&self, node: &str, time: &str) {
        for (family, ip) in ["IPv4", "IPv6"].iter().zip(self.lab.ips("web-1").unwrap()) {
            self.api.apply(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "name": format!("web-{}", family.to_lowercase()), "namespace": "default",
                    "labels": { "kubernetes.io/service-name": "web" },
                    "annotations": { "endpoints.kubernetes.io/last-change-trigger-time": time },
                },
                "ports": [
                    { "name": "t", "protocol": "TCP", "port": APP },
                    { "name": "u", "protocol": "UDP", "port": APP },
                ],
                "endpoints": [{ "addresses": [ip], "nodeName": node }],
            }));
        }
    }

    fn status(&self, path: &str) -> Option<u16> {
        Some(self.get(Ipv4Addr::LOCALHOST, HEALTHZ, path)?.0)
    }

    fn wait_for_status(&self, path: &str, status: Option<u16>) {
        let began = Instant::now();
        while self.status(path) != status {
            assert!(
                began.elapsed() < PATIENCE,
                "{path} is {:?}, not {status:?}: {}",
                self.status(path),
                self.agent.output()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What `/metrics` says.
struct Scrape(String);

impl Scrape {
    /// The value of a sample; 0 when there is none.
    fn value(&self, sample: &str) -> f64 {
        let line = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// The sum of all samples that begin so.
    fn sum(&self, prefix: &str) -> f64 {
        let of = self.0.lines().filter(|line| line.starts_with(prefix));
        of.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
            .sum()
    }
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn node(lab: &Lab, taints: &[&str]) -> Value {
    let addresses = lab.node_ips(NODE).unwrap();
    let addresses = addresses.map(|address| json!({ "type": "InternalIP", "address": address }));
    let taints: Vec<Value> = taints
        .iter()
        .map(|key| json!({ "key": key, "effect": "NoSchedule" }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE },
        "spec": { "taints": taints }, "status": { "addresses": addresses },
    })
}

/// A2: load balancers are told when the Node is being taken away, by each of its three signs, and
/// when it is not after all; the kubelet is not told anything of it.
#[test]
fn healthz_follows_the_node_and_livez_does_not() {
    let world = World::start(&[]);
    world.wait_for_status("/healthz", Some(200));
    for ip in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
    ]
    .into_iter()
    .chain(world.lab.node_ips(NODE).unwrap())
    {
        let (status, head, body) = world.get(ip, HEALTHZ, "/healthz").unwrap();
        assert_eq!(status, 200, "{ip}");
        assert!(
            head.contains("\r\ncontent-type: application/json\r\n"),
            "{head}"
        );
        assert!(
            head.contains("\r\nx-content-type-options: nosniff\r\n"),
            "{head}"
        );
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["nodeEligible"], true);
        assert_eq!(body["lastUpdated"], body["currentTime"]);
        assert_eq!(
            (&body["healthy"], &body["status"]["IPv4"]["healthy"]),
            (&json!(true), &json!(true))
        );
    }
    let leaves = |why: &str| {
        world.wait_for_status("/healthz", Some(503));
        assert_eq!(world.status("/livez"), Some(200), "{why}");
        assert_eq!(world.status("/readyz"), Some(200), "{why}");
    };

    world
        .api
        .apply(node(&world.lab, &["ToBeDeletedByClusterAutoscaler"]));
    leaves("tainted");
    let (.., body) = world.get(Ipv4Addr::LOCALHOST, HEALTHZ, "/healthz").unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["nodeEligible"], false);
    world
        .api
        .apply(node(&world.lab, &["node.kubernetes.io/unschedulable"]));
    world.wait_for_status("/healthz", Some(200));

    let mut going = node(&world.lab, &[]);
    going["metadata"]["deletionTimestamp"] = json!("2026-11-21T00:00:00Z");
    world.api.apply(going);
    leaves("with a deletionTimestamp");
    world.api.delete(Kind::Nodes, "", NODE);
    leaves("gone");
    world.api.apply(node(&world.lab, &[]));
    world.wait_for_status("/healthz", Some(200));
}

/// A2: an agent that waits for its API server is alive and not ready; load balancers are sent
/// elsewhere on a new node, and not where an earlier agent's datapath goes on.
#[test]
fn a_start_that_waits_is_alive_but_not_ready() {
    let mut world = World::new(&[]);
    world.api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
        "spec": { "ports": [{ "port": 80 }] },
    }));
    world.api.close().unwrap();
    world.agent.spawn().unwrap();
    world.wait_for_status("/livez", Some(200));
    assert_eq!(world.status("/readyz"), Some(503));
    assert_eq!(world.status("/healthz"), Some(503));
    world.api.open().unwrap();
    world.agent.wait_ready().unwrap();
    world.wait_for_status("/readyz", Some(200));
    assert_eq!(world.status("/healthz"), Some(200));

    world.agent.stop().unwrap();
    assert_eq!(world.status("/livez"), None);
    world.api.close().unwrap();
    world.agent.spawn().unwrap();
    world.wait_for_status("/readyz", Some(503));
    assert_eq!(world.status("/healthz"), Some(200));
}

/// A2: a port in use costs one line and no traffic; the agent listens as soon as it is free.
#[test]
fn a_port_in_use_is_said_once_and_tried_again() {
    let mut world = World::new(&[]);
    let taken = world
        .lab
        .ns(NODE)
        .unwrap()
        .run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, HEALTHZ)))
        .unwrap();
    world.agent.spawn().unwrap();
    world.agent.wait_ready().unwrap();
    let said = "--healthz-bind-address: cannot listen on 0.0.0.0:10256: Address already in use";
    world.agent.wait_for(said, PATIENCE).unwrap();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(world.agent.output().matches("cannot listen").count(), 1);
    drop(taken);
    world.wait_for_status("/healthz", Some(200));
    world
        .agent
        .wait_for(
            "--healthz-bind-address: listening on 0.0.0.0:10256 now",
            PATIENCE,
        )
        .unwrap();
}

/// Every query of the dashboard and of the alerts names metrics and events that a scrape has.
fn what_is_asked_for_is_there(scrape: &Scrape) {
    let read = |path: &str| {
        let path = format!("{}/../deploy/{path}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    let dashboard: Value = serde_json::from_str(&read("grafana/shunt.json")).unwrap();
    let alerts = read("components/alerts/prometheus-rule.yaml");
    let alerts: Value = serde_saphyr::from_str(&alerts).unwrap();
    let all = |of: &Value| of.as_array().unwrap().clone();
    let mut queries: Vec<Value> = all(&dashboard["panels"])
        .iter()
        .flat_map(|panel| all(&panel["targets"]))
        .collect();
    assert!(queries.len() >= 15, "{queries:?}");
    queries.extend(all(&alerts["spec"]["groups"][0]["rules"]));

    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    // Of some there is no sample while there is nothing to tell.
    let there: BTreeSet<String> = scrape
        .0
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .map(|(name, kind)| match kind {
            "counter" => format!("{name}_total"),
            "histogram" => format!("{name}_bucket"),
            _ => name.to_owned(),
        })
        .collect();
    for query in queries {
        let query = query["expr"].as_str().unwrap();
        let names: Vec<&str> = query
            .split(|c| !is_of_name(c))
            .filter(|word| {
                ["shunt_", "kubeproxy_", "process_", "rest_client_"]
                    .iter()
                    .any(|of| word.starts_with(of))
            })
            .collect();
        assert!(!names.is_empty(), "{query}");
        for name in names {
            assert!(
                there.contains(name),
                "{name} of {query} is not in {there:?}"
            );
        }
        // Reasons that the datapath does not know would be drawn as nothing.
        let events = query.split("event=~\"").skip(1);
        for event in events.flat_map(|rest| rest.split('"').next().unwrap().split('|')) {
            let sample = format!("shunt_events_total{{event=\"{event}\"}}");
            assert!(scrape.0.contains(&sample), "{event}");
        }
    }
}

/// A2: connections that were made are counted for their Service, by hook, IPv4 and IPv6, TCP and
/// UDP, and a pod that is replaced does not take its count with it.
#[test]
fn flows_of_a_service_are_counted() {
    let world = World::start(&[]);
    let ips = world.serve_web(json!({ "type": "NodePort" }));
    assert_eq!(ips.len(), 2);
    let hooked = world.lab.client("client-1", Sockets::Hooked).unwrap();
    let packets = world.lab.client("client-1", Sockets::Unhooked).unwrap();
    wait_until("a backend", || {
        hooked.tcp(SocketAddr::new(ips[1], 80)).is_ok()
    });
    wait_until("a backend", || {
        hooked.tcp(SocketAddr::new(ips[0], 80)).is_ok()
    });
    let sample = |port: u16, protocol: &str, hook: &str| {
        format!(
            "shunt_service_flows_total{{namespace=\"default\",service=\"web\",port=\"{port}\",protocol=\"{protocol}\",hook=\"{hook}\"}}"
        )
    };
    let before = world.scrape();
    for &ip in &ips {
        for _ in 0..3 {
            hooked.tcp(SocketAddr::new(ip, 80)).unwrap();
        }
        for _ in 0..2 {
            packets.tcp(SocketAddr::new(ip, 80)).unwrap();
        }
        packets.udp(SocketAddr::new(ip, 53)).unwrap();
    }
    let after = world.scrape();
    let more = |port, protocol: &str, hook: &str| {
        let sample = sample(port, protocol, hook);
        after.value(&sample) - before.value(&sample)
    };
    assert_eq!(more(80, "TCP", "socket"), 6.0, "{}", after.0);
    assert_eq!(more(80, "TCP", "tc"), 4.0, "{}", after.0);
    assert_eq!(more(53, "UDP", "tc"), 2.0, "{}", after.0);
    // The client is on the backend's node: nothing is translated.
    assert_eq!(after.value("shunt_snat_ports_used{family=\"IPv4\"}"), 0.0);
    for family in ["IPv4", "IPv6"] {
        assert!(after.sum(&format!("shunt_conntrack_entries{{family=\"{family}\"")) > 0.0);
    }
    assert!(after.value("shunt_map_entries{map=\"frontends4\"}") >= 4.0);
    assert!(after.value("shunt_map_capacity{map=\"flows6\"}") > 1000.0);
    let tc = "shunt_events_total{event=\"tc_flow\"}";
    assert_eq!(after.value(tc) - before.value(tc), 6.0);
    what_is_asked_for_is_there(&after);

    // All endpoints leave: what was counted stays.
    world
        .api
        .delete(Kind::EndpointSlices, "default", "web-ipv4");
    world
        .api
        .delete(Kind::EndpointSlices, "default", "web-ipv6");
    let refused = "shunt_events_total{event=\"no_backend\"}";
    wait_until("a refusal", || {
        ips.iter()
            .all(|&ip| hooked.tcp(SocketAddr::new(ip, 80)).is_err())
            && world.scrape().value(refused) >= 2.0
    });
    let later = world.scrape();
    assert_eq!(
        later.value(&sample(80, "TCP", "tc")),
        after.value(&sample(80, "TCP", "tc"))
    );
    world.api.delete(Kind::Services, "default", "web");
    wait_until("no samples of a Service that is gone", || {
        !world.scrape().0.contains("service=\"web\"")
    });
}

/// A2: which Service's backends do not answer is in the metrics, and how many samples there are is
/// bounded.
#[test]
fn quarantined_backends_are_counted_and_samples_bounded() {
    let world = World::start(&["--metrics-services", "1"]);
    let ips = world.serve_web(json!({}));
    let pod = world.lab.client("client-1", Sockets::Unhooked).unwrap();
    for &ip in &ips {
        wait_until("a backend", || pod.tcp(SocketAddr::new(ip, 80)).is_ok());
    }
    let web = "shunt_service_flows_total{namespace=\"default\",service=\"web\"";
    assert!(world.scrape().sum(web) >= 2.0);
    assert_eq!(world.scrape().value("shunt_quarantined_backends"), 0.0);

    world.api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "shut", "namespace": "default" },
        "spec": { "ipFamilyPolicy": "PreferDualStack", "ports": [{ "port": 80 }] },
    }));
    for (family, ip) in ["IPv4", "IPv6"].iter().zip(world.lab.ips("web-1").unwrap()) {
        world.api.apply(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "name": format!("shut-{}", family.to_lowercase()), "namespace": "default",
                "labels": { "kubernetes.io/service-name": "shut" },
            },
            // Nobody listens there.
            "ports": [{ "name": "", "protocol": "TCP", "port": 9 }],
            "endpoints": [{
                "addresses": [ip], "nodeName": NODE, "conditions": { "ready": true },
            }],
        }));
    }
    let shut = world.api.get(Kind::Services, "default", "shut").unwrap();
    let ips = shut["spec"]["clusterIPs"].as_array().unwrap().iter();
    let ips: Vec<IpAddr> = ips
        .map(|ip| ip.as_str().unwrap().parse().unwrap())
        .collect();
    wait_until("a refusal by each backend", || {
        for &ip in &ips {
            assert!(pod.tcp(SocketAddr::new(ip, 80)).is_err());
        }
        world.scrape().value("shunt_quarantined_backends") == 2.0
    });
    let scrape = world.scrape();
    let others = "{namespace=\"\",service=\"\",port=\"\",protocol=\"\"";
    assert_eq!(
        scrape.value(&format!("shunt_service_quarantined_backends{others}}}")),
        2.0,
        "{}",
        scrape.0
    );
    assert!(scrape.sum(&format!("shunt_service_flows_total{others}")) >= 2.0);
    assert!(!scrape.0.contains("service=\"shut\""), "{}", scrape.0);
}

/// A2: with --count-traffic a Service's packets and bytes are counted, both ways and in both
/// families, by tc, on its fast path too, and by XDP; each once, though XDP may leave a packet to
/// tc. Without, there are no samples.
#[test]
fn traffic_of_a_service_is_counted_where_that_is_asked_for() {
    for (xdp, fast_path) in [
        ("off", "off"),
        ("off", "on"),
        ("native", "off"),
        ("native", "on"),
    ] {
        let world =
            World::with_xdp(xdp, &["--count-traffic", "on", "--fast-path", fast_path]).started();
        let ips = world.serve_web(json!({ "type": "NodePort" }));
        let clients =
            ["client-1", "client"].map(|name| world.lab.client(name, Sockets::Unhooked).unwrap());
        let sample = |what: &str, direction: &str| {
            format!(
                "shunt_service_{what}_total{{namespace=\"default\",service=\"web\",port=\"53\",protocol=\"UDP\",direction=\"{direction}\"}}"
            )
        };
        let large = Dial {
            padding: 1000,
            ..Dial::default()
        };
        for (n, (&ip, client)) in ips
            .iter()
            .flat_map(|ip| clients.iter().map(move |client| (ip, client)))
            .enumerate()
        {
            wait_until("a backend", || client.tcp(SocketAddr::new(ip, 80)).is_ok());
            client
                .once(Proto::Udp, SocketAddr::new(ip, 53), &large)
                .unwrap();
            let scrape = world.scrape();
            let so_far = (n + 1) as f64;
            for direction in ["to-backend", "from-backend"] {
                assert_eq!(
                    scrape.value(&sample("packets", direction)),
                    so_far,
                    "{ip}, XDP {xdp}, fast path {fast_path}: {}",
                    scrape.0
                );
                let bytes = scrape.value(&sample("bytes", direction));
                assert!(
                    (1000.0 * so_far..1500.0 * so_far).contains(&bytes),
                    "{ip}: {bytes}"
                );
            }
        }
    }
    let world = World::start(&[]);
    let ips = world.serve_web(json!({}));
    let pod = world.lab.client("client-1", Sockets::Unhooked).unwrap();
    wait_until("a backend", || pod.tcp(SocketAddr::new(ips[0], 80)).is_ok());
    assert!(!world.scrape().0.contains("shunt_service_packets_total{"));
}

/// A2: what kube-proxy's dashboards and alerts ask for is there by kube-proxy's names, with its
/// buckets, and is true.
#[test]
fn kube_proxys_metrics_are_there() {
    let world = World::start(&[]);
    world.serve_web(json!({ "internalTrafficPolicy": "Local" }));
    let count = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"}";
    wait_until("programming latency", || world.scrape().value(count) >= 2.0);
    let scrape = world.scrape();
    assert_eq!(
        scrape.value("kubeproxy_sync_proxy_rules_endpoint_changes_total"),
        2.0
    );
    assert_eq!(
        scrape.value("kubeproxy_sync_proxy_rules_endpoint_changes_pending"),
        0.0
    );
    assert_eq!(
        scrape.value("kubeproxy_sync_proxy_rules_service_changes_total"),
        1.0
    );
    assert_eq!(
        scrape.value("kubeproxy_sync_proxy_rules_service_changes_pending"),
        0.0
    );
    for (name, buckets, first, last) in [
        ("sync_proxy_rules_duration_seconds", 15, "0.001", "16.384"),
        ("network_programming_duration_seconds", 80, "0.25", "300.0"),
    ] {
        let bucket =
            |bound: &str| format!("kubeproxy_{name}_bucket{{le=\"{bound}\",ip_family=\"IPv4\"}}");
        assert_eq!(
            scrape
                .0
                .matches(&format!("kubeproxy_{name}_bucket"))
                .count(),
            2 * (buckets + 1),
            "{name}, of both families"
        );
        for bound in [first, last, "+Inf"] {
            assert!(scrape.0.contains(&bucket(bound)), "{}", bucket(bound));
        }
        let count = scrape.value(&format!("kubeproxy_{name}_count{{ip_family=\"IPv4\"}}"));
        assert!(count >= 2.0);
        assert_eq!(scrape.value(&bucket(last)), count, "within seconds");
    }
    let now = Timestamp::now().as_second() as f64;
    for name in ["last_queued_timestamp_seconds", "last_timestamp_seconds"] {
        for family in ["IPv4", "IPv6"] {
            let time = scrape.value(&format!(
                "kubeproxy_sync_proxy_rules_{name}{{ip_family=\"{family}\"}}"
            ));
            assert!((now - time).abs() < 60.0, "{name}: {time}");
        }
    }

    // A pod on another node is no local endpoint, and a change of a minute ago took a minute.
    let policy = "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\",ip_family=\"IPv6\"}";
    assert_eq!(scrape.value(policy), 0.0);
    let long_ago = Timestamp::now() - SignedDuration::from_secs(90);
    world.set_endpoint("node-b", &long_ago.to_string());
    wait_until("no local endpoint", || world.scrape().value(policy) == 1.0);
    wait_until("two more", || {
        world.scrape().value(count) == scrape.value(count) + 2.0
    });
    let sum = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv6\"}";
    let more = world.scrape().value(sum) - scrape.value(sum);
    assert!((180.0..240.0).contains(&more), "{more}");

    // The same objects with another time of change: nothing was programmed.
    world.set_endpoint("node-b", &Timestamp::now().to_string());
    world.wait_for_status("/healthz", Some(200));
    assert_eq!(world.scrape().value(count), scrape.value(count) + 2.0);
    world.status("/livez");
    let scrape = world.scrape();
    assert!(scrape.value("kubeproxy_proxy_healthz_total{code=\"200\"}") >= 1.0);
    assert!(scrape.value("kubeproxy_proxy_livez_total{code=\"200\"}") >= 1.0);
    assert!(
        scrape.value(&format!(
            "rest_client_requests_total{{code=\"200\",method=\"GET\",host=\"{SERVER}\"}}"
        )) >= 3.0
    );
    let took =
        format!("rest_client_request_duration_seconds_count{{verb=\"GET\",host=\"{SERVER}\"}}");
    assert!(scrape.value(&took) >= 3.0, "{}", scrape.0);
    let bucket = "rest_client_request_duration_seconds_bucket{le=\"60.0\"";
    assert!(scrape.sum(bucket) >= scrape.value(&took));
    // Every batch that kube-proxy's metric counts, and its wait.
    assert_eq!(
        scrape.value("shunt_event_lag_seconds_count"),
        scrape.value("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}")
    );
    assert!(
        scrape.value("shunt_event_lag_seconds_sum")
            >= scrape.value("kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family=\"IPv4\"}")
    );
    assert_eq!(scrape.value("shunt_snat_ports_supply"), 64_512.0);
    let version = env!("CARGO_PKG_VERSION");
    assert!(scrape.0.lines().any(|line| {
        line.starts_with("kubernetes_build_info{")
            && line.contains(&format!("git_version=\"v{version}\""))
            && line.ends_with(" 1")
    }));
    for (path, kind, has) in [
        (
            "/configz",
            "application/json",
            "\"kubeproxy.config.k8s.io\":{",
        ),
        ("/flagz", "text/plain", "\nnode-name=node-a\n"),
        ("/statusz", "text/plain", "\nUp: 0 hr 0"),
    ] {
        let (status, head, body) = world.get(Ipv4Addr::LOCALHOST, METRICS, path).unwrap();
        assert_eq!(status, 200, "{path}");
        assert!(
            head.contains(&format!("content-type: {kind}")),
            "{path}: {head}"
        );
        assert!(body.contains(has), "{path}: {body}");
    }
    assert_eq!(scrape.value("shunt_agent_live"), 1.0);
    assert!(scrape.value("process_resident_memory_bytes") > 1e6);
    assert!(scrape.value("process_cpu_seconds_total") > 0.0);
    assert!((now - scrape.value("process_start_time_seconds")).abs() < 120.0);
    assert!(scrape.0.contains(concat!(
        "shunt_build_info{version=\"",
        env!("CARGO_PKG_VERSION"),
        "\""
    )));

    let text = |path| {
        world
            .get(Ipv4Addr::LOCALHOST, METRICS, path)
            .map(|(status, _, body)| (status, body))
    };
    assert_eq!(text("/healthz"), Some((200, "ok".to_owned())));
    assert_eq!(text("/proxyMode"), Some((200, "shunt".to_owned())));
    assert_eq!(text("/debug/pprof/").unwrap().0, 404);
    let [node_ip, _] = world.lab.node_ips(NODE).unwrap();
    assert!(
        world.get(node_ip, METRICS, "/metrics").is_none(),
        "on loopback only"
    );
}

/// S1: who looks at an object that cannot be served finds an Event about it, one for all nodes and
/// all that is told again; what can be served is not held up.
#[test]
fn objects_that_cannot_be_served_get_events() {
    let mut world = World::start(&[]);
    let ips = world.serve_web(json!({}));
    let events = || world.api.list(Kind::Events);
    let bad_slice = |address: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "bad", "namespace": "default",
                "labels": { "kubernetes.io/service-name": "web" },
            },
            "ports": [{ "name": "t", "protocol": "TCP", "port": APP }],
            "endpoints": [{ "addresses": [address] }],
        })
    };
    world.api.faults(|faults| {
        faults.refuse = Some(Refusal::status(429).retry_after(1).of(Kind::Events))
    });
    world.api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "odd", "namespace": "default" },
        "spec": { "sessionAffinity": "Cookie", "ports": [{ "port": 80 }] },
    }));
    world.api.apply(bad_slice("127.0.0.1"));
    wait_until("attempts", || {
        world.api.requests("POST /apis/events.k8s.io/") >= 2
    });
    assert_eq!(events(), [Value::Null; 0]);
    let hooked = world.lab.client("client-1", Sockets::Hooked).unwrap();
    wait_until("a backend", || {
        hooked.tcp(SocketAddr::new(ips[0], 80)).is_ok()
    });
    world.api.faults(|faults| faults.refuse = None);
    wait_until("two Events", || events().len() == 2);
    let about = |kind: &str| {
        let mut of_kind = events();
        of_kind.retain(|event| event["regarding"]["kind"] == kind);
        assert_eq!(of_kind.len(), 1, "{of_kind:?}");
        of_kind.remove(0)
    };
    let event = about("Service");
    let odd = world.api.get(Kind::Services, "default", "odd").unwrap();
    assert!(odd["metadata"]["uid"].is_string());
    assert_eq!(event["regarding"]["uid"], odd["metadata"]["uid"]);
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["reportingInstance"], NODE);
    assert_eq!(
        event["note"],
        "spec.sessionAffinity: \"Cookie\" is no affinity; use None or ClientIP (None is served)"
    );
    let event = about("EndpointSlice");
    assert_eq!(event["regarding"]["name"], "bad");
    assert!(
        event["note"]
            .as_str()
            .unwrap()
            .contains("127.0.0.1 is a loopback address"),
        "{event}"
    );
    let problems = |kind: &str| {
        world
            .scrape()
            .value(&format!("shunt_object_problems_total{{kind=\"{kind}\"}}"))
    };
    assert_eq!((problems("Service"), problems("EndpointSlice")), (1.0, 1.0));

    // The same mistake again, and a new agent that finds it: nothing new to tell.
    world.api.apply(bad_slice("127.0.0.1"));
    world.agent.stop().unwrap();
    world.api.forget_requests();
    world.agent.spawn().unwrap();
    world.agent.wait_ready().unwrap();
    wait_until("both told again", || {
        world.api.requests("POST /apis/events.k8s.io/") == 2
    });
    thread::sleep(Duration::from_millis(500));
    assert_eq!(world.api.list(Kind::Events).len(), 2);
    assert_eq!(world.api.requests("POST /apis/events.k8s.io/"), 2);
}

/// S1: without permission to write Events there is one line that says so, and all goes on.
#[test]
fn events_that_may_not_be_written_cost_one_line() {
    let world = World::start(&[]);
    world
        .api
        .faults(|faults| faults.refuse = Some(Refusal::status(403).of(Kind::Events)));
    for name in ["odd", "strange"] {
        world.api.apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "default" },
            "spec": { "sessionAffinity": "Cookie", "ports": [{ "port": 80 }] },
        }));
    }
    wait_until("both tried", || {
        world.api.requests("POST /apis/events.k8s.io/") == 2
    });
    let said = "allow create on events of events.k8s.io (ClusterRole)";
    world.agent.wait_for(said, PATIENCE).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(
        world
            .agent
            .output()
            .matches("Events cannot be written")
            .count(),
        1
    );
    world.wait_for_status("/livez", Some(200));
}

/// S1: what this node alone cannot do for a Service is an Event of its own, which names the node.
#[test]
fn a_health_check_port_in_use_is_an_event_of_this_node() {
    const PORT: u16 = 32_001;
    let world = World::start(&[]);
    let ns = world.lab.ns(NODE).unwrap();
    let taken = ns
        .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))
        .unwrap();
    world.serve_web(json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": PORT,
    }));
    wait_until("an Event", || !world.api.list(Kind::Events).is_empty());
    let event = world.api.list(Kind::Events).remove(0);
    assert_eq!(event["regarding"]["name"], "web");
    assert_eq!(
        event["note"],
        format!(
            "on node {NODE}: spec.healthCheckNodePort: cannot listen on 0.0.0.0:{PORT}: Address already in use (os error 98); \
             load balancers cannot see this node's endpoints; free the port or choose another, it is tried again"
        )
    );
    drop(taken);
    let status = || Some(world.get(Ipv4Addr::LOCALHOST, PORT, "/")?.0);
    wait_until("an answer", || status() == Some(200));
}
