//! SPEC L8: a backend does not answer a SYN, or refuses it, and the client's next SYN finds another
//! one. Needs root.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use shunt_lab::{Agent, AgentOptions, Answer, Client, Dial, Lab, PodSpec, Port, Proto, Sockets};
use tempfile::TempDir;

const APP: u16 = 8080;
/// The one that fails first; on another node than the clients.
const BAD: &str = "web-b";
const PODS: [(&str, &str); 3] = [("web-a", "node-a"), (BAD, "node-b"), ("web-c", "node-b")];
/// Services over the same pods: by number, the last byte of their cluster IPs.
const SERVICES: [(u8, &str, &str); 3] =
    [(1, "web", ""), (2, "off", "false"), (3, "sockets", "true")];
const SILENCE: Duration = Duration::from_secs(3);
/// Linux sends a SYN again after one second, and after one more.
const RETRANSMISSION: Duration = Duration::from_secs(1);

/// What a pod makes of a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Answers,
    Silent,
    Resets,
    Unreachable,
}

struct Cluster {
    agents: Vec<Agent>,
    lab: Lab,
    _manifests: TempDir,
}

impl Cluster {
    fn start(xdp: &str) -> Self {
        let lab = Lab::new().unwrap();
        for (pod, node) in PODS {
            lab.add_pod(&PodSpec::new(pod, node, &[Port::tcp(APP)]))
                .unwrap();
            // Every SYN gets its error.
            let ratelimits = [("ipv4.icmp_ratelimit", "0"), ("ipv6.icmp.ratelimit", "0")];
            lab.ns(pod).unwrap().sysctl(&ratelimits).unwrap();
        }
        for pod in ["packets", "hooked"] {
            lab.add_pod(&PodSpec::new(pod, "node-a", &[])).unwrap();
        }
        let manifests = TempDir::new().unwrap();
        let mut documents = Vec::new();
        for (number, name, retry) in SERVICES {
            documents.push(format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, annotations: {{ {} }} }}\nspec:\n  type: NodePort\n  \
                 clusterIP: 10.96.0.{number}\n  clusterIPs: [10.96.0.{number}, 'fd96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  \
                 ports: [{{ name: t, port: 80, nodePort: {} }}]\n",
                match retry {
                    "" => String::new(),
                    value => format!("shunt.dev/retry: '{value}'"),
                },
                node_port(number),
            ));
            for v6 in [false, true] {
                let endpoints = PODS.map(|(pod, node)| {
                    let ips = lab.ips(pod).unwrap();
                    let ip = ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
                    format!(
                        "{{ addresses: ['{ip}'], nodeName: {node}, conditions: {{ ready: true }} }}"
                    )
                });
                let family = if v6 { 6 } else { 4 };
                documents.push(format!(
                    "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: {name}-{family}, labels: {{ \
                     kubernetes.io/service-name: {name} }} }}\naddressType: IPv{family}\nports: [{{ name: t, protocol: TCP, \
                     port: {APP} }}]\nendpoints: [{}]\n",
                    endpoints.join(", "),
                ));
            }
        }
        fs::write(manifests.path().join("all.yaml"), documents.join("---\n")).unwrap();
        let options = AgentOptions::manifests(manifests.path())
            .xdp(xdp)
            .args(&["--retry-silence", &SILENCE.as_secs().to_string()])
            .shunt(env!("CARGO_BIN_EXE_shunt"))
            .small_maps();
        let agents = ["node-a", "node-b"].map(|node| lab.start_agent(node, &options).unwrap());
        Self {
            agents: agents.into(),
            lab,
            _manifests: manifests,
        }
    }

    /// Sets what a pod makes of SYNs; connections that are open go on.
    fn set(&self, pod: &str, mood: Mood) {
        let verdict = match mood {
            Mood::Answers => "accept",
            Mood::Silent => "drop",
            Mood::Resets => "reject with tcp reset",
            Mood::Unreachable => "reject with icmpx type host-unreachable",
        };
        let rules = format!(
            "table inet mood\ndelete table inet mood\ntable inet mood {{\nchain in {{\ntype filter hook input priority 0\n\
             tcp dport {APP} tcp flags & (syn | ack) == syn {verdict}\n}}\n}}"
        );
        self.lab.ns(pod).unwrap().output("nft", &[&rules]).unwrap();
    }

    fn set_all(&self, mood: Mood) {
        PODS.iter().for_each(|(pod, _)| self.set(pod, mood));
    }

    fn client(&self, name: &str, sockets: Sockets) -> Client {
        self.lab.client(name, sockets).unwrap()
    }

    /// Where clients whose sockets no hook sees find a Service.
    fn ways(&self, number: u8) -> Vec<(Client, SocketAddr)> {
        let mut ways = Vec::new();
        for v6 in [false, true] {
            ways.push((
                self.client("packets", Sockets::Unhooked),
                cluster_ip(number, v6),
            ));
            let node = self.lab.node_ips("node-a").unwrap()[usize::from(v6)];
            let to = SocketAddr::new(node, node_port(number));
            ways.push((self.client("client", Sockets::Unhooked), to));
        }
        ways
    }

    /// What `shunt backends` on node-a says of a Service.
    fn rows(&self, service: &str) -> Vec<Value> {
        let rows = self.agents[0].json(&["backends", service]).unwrap();
        rows.as_array().unwrap().clone()
    }

    /// The row of a pod behind a Service.
    fn row(&self, service: &str, pod: &str, v6: bool) -> Value {
        let ips = self.lab.ips(pod).unwrap();
        let ip = ips
            .iter()
            .find(|ip| ip.is_ipv6() == v6)
            .unwrap()
            .to_string();
        let is_it = |row: &Value| row["address"] == ip.as_str();
        self.rows(service).into_iter().find(is_it).unwrap()
    }

    /// What node-a knows of flows and backends, for a failure's message.
    fn flows(&self) -> String {
        ["conntrack", "backends", "status"]
            .map(|verb| {
                String::from_utf8_lossy(&self.agents[0].cli(&[verb]).unwrap().stdout).into_owned()
            })
            .join("\n")
    }

    fn events(&self, name: &str) -> u64 {
        self.agents[0].json(&["status"]).unwrap()["events"][name]
            .as_u64()
            .unwrap_or(0)
    }

    /// All answer again, and what was silent has been tried.
    fn heal(&self, client: &Client, to: SocketAddr) {
        self.set_all(Mood::Answers);
        let began = Instant::now();
        let is_left = |row: &Value| {
            let address: IpAddr = row["address"].as_str().unwrap().parse().unwrap();
            address.is_ipv6() == to.is_ipv6() && !row["quarantine"].is_null()
        };
        while self.rows("web").iter().any(is_left) {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{to}: not tried again"
            );
            // Each dial may be the one that tries it; the command line costs more than they do.
            for _ in 0..4 {
                dial(client, to).unwrap();
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn cluster_ip(number: u8, v6: bool) -> SocketAddr {
    let ip: IpAddr = format!("{}{number}", ["10.96.0.", "fd96::"][usize::from(v6)])
        .parse()
        .unwrap();
    SocketAddr::new(ip, 80)
}

fn node_port(number: u8) -> u16 {
    30_080 + u16::from(number)
}

fn dial(client: &Client, to: SocketAddr) -> Result<Answer, shunt_lab::DialError> {
    client.once(Proto::Tcp, to, &Dial::within(Duration::from_secs(8)))
}

/// One backend fails in whatever way: no client fails, and one at most waits for it.
fn clients_find_another_backend(xdp: &str, bad: &str) {
    let cluster = Cluster::start(xdp);
    for (client, to) in &cluster.ways(1) {
        let case = |mood: Mood| format!("{bad} {mood:?}: {to} from {}", client.name());
        for (mood, slowest) in [(Mood::Silent, 2), (Mood::Resets, 1), (Mood::Unreachable, 1)] {
            let open = loop {
                let conn = client.open(Proto::Tcp, *to, &Dial::default()).unwrap();
                if conn.ask("first").unwrap().server == bad {
                    break conn;
                }
            };
            let retries = cluster.events("retry");
            let held = cluster.events("refusal_held");
            cluster.set(bad, mood);
            let mut waited = None;
            for _ in 0..64 {
                let answer =
                    dial(client, *to).unwrap_or_else(|error| panic!("{}: {error}", case(mood)));
                assert_ne!(answer.server, bad);
                assert_eq!(answer.peer, *to);
                // Not by the latency alone: a busy machine has slow ones too.
                if cluster.events("retry") > retries {
                    waited = Some(answer.latency);
                    break;
                }
            }
            let waited = waited.expect("the one that fails is chosen first by some");
            let least = RETRANSMISSION * slowest;
            assert!(
                waited > least - RETRANSMISSION / 5 && waited < least + RETRANSMISSION,
                "{}: {waited:?}",
                case(mood)
            );
            let silent = &cluster.row("web", bad, to.is_ipv6())["quarantine"];
            assert_eq!(silent["failures"], 1, "{}", case(mood));
            let remaining = Duration::from_millis(silent["remainingMs"].as_u64().unwrap());
            assert!(
                remaining > Duration::ZERO && remaining <= SILENCE,
                "{remaining:?}"
            );
            for _ in 0..12 {
                let answer = dial(client, *to).unwrap_or_else(|error| {
                    panic!(
                        "{}: {error}; node-a's flows:\n{}",
                        case(mood),
                        cluster.flows()
                    )
                });
                assert!(
                    answer.latency < RETRANSMISSION,
                    "{}: {answer:?}",
                    case(mood)
                );
            }
            assert_eq!(cluster.events("retry"), retries + 1, "{}", case(mood));
            let refused = u64::from(mood != Mood::Silent);
            assert_eq!(
                cluster.events("refusal_held"),
                held + refused,
                "{}",
                case(mood)
            );
            assert_eq!(
                open.ask("still there?").unwrap().server,
                bad,
                "an open connection stays"
            );
            cluster.heal(client, *to);
            let mut servers: Vec<String> =
                (0..64).map(|_| dial(client, *to).unwrap().server).collect();
            servers.sort();
            servers.dedup();
            assert_eq!(servers.len(), 3, "{}: all are back", case(mood));
        }
    }
}

#[test]
fn clients_find_another_backend_with_xdp() {
    clients_find_another_backend("native", BAD);
}

#[test]
fn clients_find_another_backend_without_xdp() {
    clients_find_another_backend("off", BAD);
}

/// Its refusals leave by the device that the client's packets came in through, and no source is
/// translated.
#[test]
fn clients_find_another_backend_than_one_on_their_node() {
    clients_find_another_backend("native", "web-a");
}

/// When all refuse, the first client has tried them all, and the next one hears it at once.
fn a_refusal_by_all_is_heard(xdp: &str) {
    let cluster = Cluster::start(xdp);
    for (client, to) in &cluster.ways(1) {
        // An ICMP error that is back while `connect` still holds its socket is nothing to Linux
        // (`tcp_v4_err`): the next one is.
        for (mood, limits) in [
            (Mood::Resets, [RETRANSMISSION * 3, RETRANSMISSION / 2]),
            (Mood::Unreachable, [RETRANSMISSION * 7; 2]),
        ] {
            cluster.set_all(mood);
            for limit in limits {
                let began = Instant::now();
                let error = dial(client, *to).unwrap_err();
                assert!(
                    !error.is_timeout(),
                    "{mood:?}: {to} from {}: {error}",
                    client.name()
                );
                assert!(mood == Mood::Unreachable || error.is_refused(), "{error}");
                assert!(
                    began.elapsed() < limit,
                    "{mood:?}: {to} from {}: {:?}",
                    client.name(),
                    began.elapsed()
                );
            }
            cluster.heal(client, *to);
        }
    }
}

#[test]
fn a_refusal_by_all_is_heard_with_xdp() {
    a_refusal_by_all_is_heard("native");
}

#[test]
fn a_refusal_by_all_is_heard_without_xdp() {
    a_refusal_by_all_is_heard("off");
}

/// Annotation `shunt.dev/retry`: `false` leaves clients with their backend; `true` takes pods'
/// sockets in, and leaves the node's own to their hook.
#[test]
fn services_decide_by_annotation() {
    let cluster = Cluster::start("native");
    let patient = Dial::within(Duration::from_millis(3500));
    let fails = |client: &Client, to: SocketAddr, dials: usize| {
        (0..dials).any(|_| {
            let dialled = client.once(Proto::Tcp, to, &patient);
            dialled.is_err_and(|error| {
                assert!(error.is_timeout(), "{to}: {error}");
                true
            })
        })
    };
    for v6 in [false, true] {
        let hooked = cluster.client("hooked", Sockets::Hooked);
        let host = cluster.client("node-a", Sockets::Hooked);
        let before = cluster.row("sockets", BAD, v6)["flows"].clone();
        for _ in 0..16 {
            dial(&host, cluster_ip(3, v6)).unwrap();
        }
        let flows = &cluster.row("sockets", BAD, v6)["flows"];
        assert!(
            flows["socket"].as_u64() > before["socket"].as_u64(),
            "{flows}"
        );
        assert_eq!(flows["tc"], before["tc"]);

        cluster.set(BAD, Mood::Silent);
        for (client, to) in cluster.ways(2) {
            if to.is_ipv6() == v6 {
                assert!(fails(&client, to, 64), "{to} from {}", client.name());
            }
        }
        assert!(cluster.row("off", BAD, v6)["quarantine"].is_null());
        assert!(
            fails(&hooked, cluster_ip(1, v6), 64),
            "a socket stays where it was led to"
        );
        assert!(!fails(&hooked, cluster_ip(3, v6), 24));
        let silent =
            |service| cluster.row(service, BAD, v6)["quarantine"]["failures"].as_u64() >= Some(1);
        assert!(silent("sockets"));

        // While it is known to be silent the hook leads nobody to it. Clients whose packets are
        // seen have found that out, each for itself.
        let (packets, _) = &cluster.ways(1)[usize::from(v6) * 2];
        for (number, service, finds) in [(1, "web", packets), (3, "sockets", &hooked)] {
            for _ in 0..64 {
                if silent(service)
                    && cluster.row(service, BAD, v6)["quarantine"]["remainingMs"].as_u64()
                        > Some(1500)
                {
                    break;
                }
                dial(finds, cluster_ip(number, v6)).unwrap();
            }
            let before = cluster.row(service, BAD, v6)["flows"]["socket"].clone();
            let began = Instant::now();
            for client in [&hooked, &host] {
                for _ in 0..24 {
                    dial(client, cluster_ip(number, v6)).unwrap();
                }
            }
            assert!(
                began.elapsed() < RETRANSMISSION,
                "{service}: {:?}",
                began.elapsed()
            );
            assert_eq!(cluster.row(service, BAD, v6)["flows"]["socket"], before);
        }

        cluster.set(BAD, Mood::Resets);
        for (client, to) in cluster.ways(2) {
            if to.is_ipv6() == v6 {
                let refused = |_| dial(&client, to).is_err_and(|error| error.is_refused());
                assert!((0..64).any(refused), "{to} from {}", client.name());
            }
        }
        cluster.set_all(Mood::Answers);
    }
}
