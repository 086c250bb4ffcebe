//! Manifests in, plans out.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::*;
use crate::{model::Model, plan::Scope};

/// A node that reads manifests.
pub(crate) struct Cluster {
    state: State,
    pub(crate) model: Model,
    files: BTreeMap<PathBuf, String>,
    /// Services that the last change touched.
    pub(crate) touched: BTreeSet<String>,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// A node of another name.
    pub(crate) fn of(node: &str) -> Self {
        Self::with(|config| node.clone_into(&mut config.node_name))
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            paths: Vec::new(),
            service_cidrs: vec![
                "10.96.0.0/12".parse().unwrap(),
                "fd00:96::/108".parse().unwrap(),
            ],
            node_ports: 30_000..=32_767,
            load_balancer_cidrs: Vec::new(),
            node_name: "node-a".to_owned(),
            socket_lb_labels: false,
        };
        change(&mut config);
        Self {
            model: Model::new(NodeFacts {
                name: config.node_name.as_str().into(),
                ..NodeFacts::default()
            }),
            state: State::new(config),
            files: BTreeMap::new(),
            touched: BTreeSet::new(),
        }
    }

    /// Writes a file; returns what the user is told.
    pub(crate) fn write(&mut self, file: &str, text: &str) -> Vec<String> {
        self.files.insert(file.into(), text.to_owned());
        self.read()
    }

    fn remove(&mut self, file: &str) -> Vec<String> {
        self.files.remove(Path::new(file));
        self.read()
    }

    fn read(&mut self) -> Vec<String> {
        let files = self
            .files
            .iter()
            .map(|(path, text)| (path.clone(), Ok(text.clone())))
            .collect();
        self.update(Files {
            files,
            unreadable: Vec::new(),
        })
    }

    fn update(&mut self, files: Files) -> Vec<String> {
        let (events, problems) = self.state.update(files);
        self.touched.clear();
        for event in events {
            self.touched
                .extend(self.model.apply(event).iter().map(ToString::to_string));
        }
        problems
            .iter()
            .chain(&self.model.take_problems())
            .map(ToString::to_string)
            .collect()
    }

    /// The frontends of a Service, one line each; those that are alike in both scopes as one.
    pub(crate) fn plan(&self, service: &str) -> Vec<String> {
        let (namespace, name) = service.split_once('/').unwrap_or(("default", service));
        let plan = self.model.plan(&ObjectName::new(namespace, name));
        let mut lines = Vec::new();
        for pair in plan.frontends.chunks(2) {
            let [internal, external] = pair else {
                panic!("a frontend has two scopes: {pair:?}")
            };
            assert_eq!(
                (internal.id.scope, external.id.scope),
                (Scope::Internal, Scope::External)
            );
            let text = |line: String| line.split_once(' ').unwrap().1.to_owned();
            let both = [internal, external].map(|frontend| text(frontend.to_string()));
            if both[0] == both[1] {
                lines.push(both[0].clone());
            } else {
                lines.extend([internal.to_string(), external.to_string()]);
            }
        }
        lines
    }

    fn service(&self, name: &str) -> &Service {
        let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
        self.model
            .service(&ObjectName::new(namespace, name))
            .unwrap()
    }
}

/// A file from `tests/fixtures`.
fn fixture(name: &str) -> String {
    std::fs::read_to_string(format!(
        "{}/tests/fixtures/{name}",
        env!("CARGO_MANIFEST_DIR")
    ))
    .unwrap()
}

const NONE: [&str; 0] = [];

#[test]
fn kubia_every_type_of_service() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.write("kubia.yaml", &fixture("kubia.yaml")), NONE);
    assert!(cluster.model.is_complete());
    assert_eq!(
        cluster.plan("kubia"),
        [
            "10.111.88.195:80/TCP ClusterIp affinity=10800s -> 10.44.0.11:8080* 10.44.1.11:8080 10.44.1.12:8080",
            "10.111.88.195:443/TCP ClusterIp affinity=10800s -> 10.44.0.11:8443* 10.44.1.11:8443 10.44.1.12:8443",
        ]
    );
    assert_eq!(
        cluster.plan("kubia-nodeport"),
        [
            "10.103.7.50:80/TCP ClusterIp -> 10.44.0.11:8080* 10.44.1.11:8080 10.44.1.12:8080",
            "0.0.0.0:30123/TCP NodePort -> 10.44.0.11:8080* 10.44.1.11:8080 10.44.1.12:8080",
        ]
    );
    // <pending>: as its node port (SPEC F3).
    assert_eq!(
        cluster.plan("kubia-loadbalancer"),
        [
            "10.99.184.62:80/TCP ClusterIp -> 10.44.0.11:8080* 10.44.1.11:8080 10.44.1.12:8080",
            "0.0.0.0:30994/TCP NodePort -> 10.44.0.11:8080* 10.44.1.11:8080 10.44.1.12:8080",
        ]
    );
    assert_eq!(cluster.plan("kubia-headless"), NONE, "SPEC F5");
}

#[test]
fn whoami_named_target_ports() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.write("whoami.yaml", &fixture("whoami.yaml")), NONE);
    let ip = cluster.service("http-whoami-srv").cluster_ips[0];
    assert_eq!(
        cluster.plan("http-whoami-srv"),
        [
            format!("{ip}:80/TCP ClusterIp -> 10.44.0.1:8080* 10.44.1.1:9080"),
            format!("{ip}:443/TCP ClusterIp -> 10.44.0.1:8443* 10.44.1.1:9443"),
        ]
    );
    // The third turns ready: the Service is touched, its address stays.
    let ready = fixture("whoami.yaml").replace(r#"status: "False""#, r#"status: "True""#);
    assert_eq!(cluster.write("whoami.yaml", &ready), NONE);
    assert_eq!(
        cluster.touched,
        ["default/http-whoami-srv".to_owned()].into()
    );
    assert_eq!(
        cluster.plan("http-whoami-srv")[0],
        format!("{ip}:80/TCP ClusterIp -> 10.44.0.1:8080* 10.44.0.2:8080* 10.44.1.1:9080")
    );
}

#[test]
fn external_endpoints_written_by_hand() {
    let mut cluster = Cluster::new();
    assert_eq!(
        cluster.write("external.yaml", &fixture("external.yaml")),
        NONE
    );
    assert_eq!(
        cluster.plan("external-service"),
        ["10.97.153.150:80/TCP ClusterIp -> 192.0.2.42:9376 198.51.100.22:9376"]
    );
    assert_eq!(cluster.plan("prod/database"), NONE, "SPEC F6");
    assert_eq!(cluster.plan("kube-system/etcd-k8s"), NONE, "SPEC F5");
}

#[test]
fn dns_and_edge() {
    let mut cluster = Cluster::new();
    assert_eq!(
        cluster.write("dns-and-edge.yaml", &fixture("dns-and-edge.yaml")),
        NONE
    );
    assert_eq!(
        cluster.plan("kube-system/kube-dns"),
        [
            "10.96.0.10:53/TCP ClusterIp ->",
            "10.96.0.10:53/UDP ClusterIp ->",
            "10.96.0.10:9153/TCP ClusterIp ->",
        ]
    );
    let service = cluster.service("ingress-nginx/ingress-nginx");
    assert_eq!(service.health_check_node_port, Some(32_765));
    assert_eq!(service.source_ranges, ["203.0.113.0/24".parse().unwrap()]);
    assert_eq!(
        cluster.service("my-nginx-app-svc").ports[0].node_port,
        Some(32_143)
    );
    assert_eq!(
        cluster.service("my-nginx-app-svc").cluster_ips.len(),
        1,
        "allocated"
    );

    // An ingress controller on the other node: outside clients are dropped here, inside ones are
    // served (SPEC P2).
    let pod = "
kind: Pod
metadata: { name: nginx, namespace: ingress-nginx, labels: { app: ingress-nginx } }
spec: { nodeName: node-b, containers: [] }
status: { podIP: 10.44.1.80, conditions: [{ type: Ready, status: 'True' }] }
";
    assert_eq!(cluster.write("pod.yaml", pod), NONE);
    assert_eq!(
        cluster.plan("ingress-nginx/ingress-nginx")[2..],
        [
            "Internal 198.51.100.80:80/TCP LoadBalancer source-ranges -> 10.44.1.80:80",
            "External 198.51.100.80:80/TCP LoadBalancer source-ranges keep-source drop ->",
            "Internal 198.51.100.80:443/TCP LoadBalancer source-ranges -> 10.44.1.80:443",
            "External 198.51.100.80:443/TCP LoadBalancer source-ranges keep-source drop ->",
            "Internal 0.0.0.0:30080/TCP NodePort -> 10.44.1.80:80",
            "External 0.0.0.0:30080/TCP NodePort keep-source drop ->",
            "Internal 0.0.0.0:30443/TCP NodePort -> 10.44.1.80:443",
            "External 0.0.0.0:30443/TCP NodePort keep-source drop ->",
        ]
    );
}

const WEB: &str = "
kind: Service
metadata: { name: web }
spec: { clusterIP: 10.96.1.1, selector: { app: web }, ports: [{ port: 80 }] }
";

fn pod(name: &str, ip: &str) -> String {
    format!(
        "
---
kind: Pod
metadata: {{ name: {name}, labels: {{ app: web }} }}
spec: {{ nodeName: node-b, containers: [] }}
status: {{ podIP: {ip}, conditions: [{{ type: Ready, status: 'True' }}] }}
"
    )
}

#[test]
fn objects_come_change_and_go_with_their_files() {
    let mut cluster = Cluster::new();
    cluster.write("web.yaml", WEB);
    assert_eq!(cluster.plan("web"), ["10.96.1.1:80/TCP ClusterIp ->"]);
    cluster.write(
        "pods.yaml",
        &(pod("a", "10.44.1.1") + &pod("b", "10.44.1.2")),
    );
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:80/TCP ClusterIp -> 10.44.1.1:80 10.44.1.2:80"]
    );
    cluster.write("pods.yaml", &pod("b", "10.44.1.2"));
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:80/TCP ClusterIp -> 10.44.1.2:80"]
    );
    cluster.write(
        "web.yaml",
        &WEB.replace("port: 80", "port: 81, targetPort: 8081"),
    );
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:81/TCP ClusterIp -> 10.44.1.2:8081"]
    );
    cluster.remove("pods.yaml");
    assert_eq!(cluster.plan("web"), ["10.96.1.1:81/TCP ClusterIp ->"]);
    cluster.remove("web.yaml");
    assert_eq!(cluster.touched, ["default/web".to_owned()].into());
    assert_eq!(cluster.plan("web"), NONE);
    cluster.read();
    assert_eq!(
        cluster.touched,
        [].into(),
        "nothing changed, nothing is yielded"
    );
}

#[test]
fn a_broken_file_goes_on_serving_its_last_good_content() {
    let mut cluster = Cluster::new();
    let good = WEB.to_owned() + &pod("a", "10.44.1.1");
    cluster.write("web.yaml", &good);
    let before = cluster.plan("web");

    // No YAML any more: nobody knows which object it was.
    let broken = good.replace(
        "spec: { nodeName: node-b, containers: [] }",
        "spec: { nodeName: node-b",
    );
    assert_eq!(
        cluster.write("web.yaml", &broken),
        [
            "web.yaml:10: no valid YAML: while parsing a flow mapping, did not find expected ',' or '}'; \
          what was read before goes on serving"
        ]
    );
    assert_eq!(
        (cluster.plan("web"), cluster.touched.len()),
        (before.clone(), 0)
    );
    assert_eq!(cluster.read(), NONE, "told once");

    // A field of the wrong type.
    assert_eq!(
        cluster.write("web.yaml", &good.replace("port: 80", "port: http")),
        [
            "web.yaml:4: Service default/web: spec.ports[0].port: wants a whole number; what was read before goes on serving"
        ]
    );
    assert_eq!(
        (cluster.plan("web"), cluster.touched.len()),
        (before.clone(), 0)
    );

    // A value that an API server would not take.
    assert_eq!(
        cluster.write("web.yaml", &good.replace("port: 80", "port: 70000")),
        [
            "web.yaml:4: Service default/web: spec.ports[0].port: 70000 is no port; use 1 to 65535; \
          the Service as it was before goes on serving"
        ]
    );
    assert_eq!(
        (cluster.plan("web"), cluster.touched.len()),
        (before.clone(), 0)
    );

    // A file that cannot be read.
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let problems = cluster.update(Files {
        files: vec![("web.yaml".into(), Err(denied))],
        unreadable: Vec::new(),
    });
    assert_eq!(
        problems,
        ["web.yaml: cannot be read, its last content goes on serving: permission denied"]
    );
    assert_eq!(
        (cluster.plan("web"), cluster.touched.len()),
        (before.clone(), 0)
    );

    // Good again.
    assert_eq!(
        cluster.write("web.yaml", &good.replace("port: 80", "port: 82")),
        NONE
    );
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:82/TCP ClusterIp -> 10.44.1.1:82"]
    );
}

#[test]
fn a_mistake_from_the_start_takes_nothing_from_the_rest() {
    let mut cluster = Cluster::new();
    let text = "
kind: Service
metadata: { name: a }
spec:
  clusterIP: 10.96.1.1
  ports:
  - { name: good, port: 80 }
  - { name: none, port: 0 }
  - { name: huge, port: 65536 }
  - { name: icmp, port: 1, protocol: ICMP }
---
kind: Service
metadata: { name: 'b' }
spec: [
---
kind: Service
metadata: { name: c }
spec: { clusterIP: 10.96.1.3, ports: [{ port: 80 }] }
";
    assert_eq!(
        cluster.write("all.yaml", text),
        [
            "all.yaml:8: Service default/a: spec.ports[1].port: 0 is no port; use 1 to 65535",
            "all.yaml:9: Service default/a: spec.ports[2].port: 65536 is no port; use 1 to 65535",
            "all.yaml:10: Service default/a: spec.ports[3].protocol: \"ICMP\" is no protocol; use TCP, UDP or SCTP",
            "all.yaml:14: no valid YAML: unclosed bracket '['",
        ]
    );
    assert_eq!(cluster.plan("a"), ["10.96.1.1:80/TCP ClusterIp ->"]);
    assert_eq!(cluster.plan("c"), ["10.96.1.3:80/TCP ClusterIp ->"]);
}

#[test]
fn an_object_that_stands_twice_counts_where_it_comes_first() {
    let mut cluster = Cluster::new();
    cluster.write("b.yaml", WEB);
    assert_eq!(
        cluster.write(
            "c.yaml",
            &format!("\n\n{}", WEB.replace("10.96.1.1", "10.96.1.2"))
        ),
        [
            "c.yaml:4: Service default/web: stands in b.yaml:2 as well, which counts; remove one of them"
        ]
    );
    assert_eq!(cluster.plan("web"), ["10.96.1.1:80/TCP ClusterIp ->"]);
    assert_eq!(cluster.remove("b.yaml"), NONE);
    assert_eq!(cluster.plan("web"), ["10.96.1.2:80/TCP ClusterIp ->"]);
}

#[test]
fn pods_are_endpoints_by_the_endpoint_controllers_rules() {
    let mut cluster = Cluster::new();
    let selected = |name: &str, more: &str, status: &str| {
        format!(
            "\n---\nkind: Pod\nmetadata: {{ name: {name}, labels: {{ app: web, x: y }}{more} }}\n\
             spec: {{ nodeName: node-a, containers: [] }}\nstatus: {{ {status} }}\n"
        )
    };
    let ready = "conditions: [{ type: Ready, status: 'True' }]";
    let deleted = ", deletionTimestamp: 2026-01-01T00:00:00Z";
    let pods = [
        selected("ready", "", &format!("podIP: 10.44.0.1, {ready}")),
        selected(
            "both",
            "",
            &format!("podIPs: [{{ ip: 10.44.0.2 }}, {{ ip: 'fd00::2' }}], {ready}"),
        ),
        selected("unready", "", "podIP: 10.44.0.3"),
        selected("leaving", deleted, &format!("podIP: 10.44.0.4, {ready}")),
        selected("starting", "", "phase: Pending"),
        selected(
            "done",
            "",
            &format!("podIP: 10.44.0.6, phase: Succeeded, {ready}"),
        ),
        selected(
            "failed",
            "",
            &format!("podIP: 10.44.0.7, phase: Failed, {ready}"),
        ),
        selected(
            "elsewhere",
            ", namespace: other",
            &format!("podIP: 10.44.0.8, {ready}"),
        ),
        selected("other", "", &format!("podIP: 10.44.0.9, {ready}"))
            .replace("app: web", "app: not-web"),
    ];
    let dual = WEB.replace(
        "clusterIP: 10.96.1.1",
        "clusterIPs: [10.96.1.1, 'fd00:96::1']",
    );
    assert_eq!(
        cluster.write("all.yaml", &(dual.clone() + &pods.concat())),
        NONE
    );
    assert_eq!(
        cluster.plan("web"),
        [
            "10.96.1.1:80/TCP ClusterIp -> 10.44.0.1:80* 10.44.0.2:80*",
            "[fd00:96::1]:80/TCP ClusterIp -> [fd00::2]:80*",
        ]
    );
    // Nobody is ready but one that leaves and still serves (SPEC B3).
    assert_eq!(
        cluster.write("all.yaml", &(dual.clone() + &pods[2..4].concat())),
        NONE
    );
    assert_eq!(
        cluster.plan("web")[0],
        "10.96.1.1:80/TCP ClusterIp -> 10.44.0.4:80*"
    );
    // SPEC B4.
    let published = dual.replace("selector", "publishNotReadyAddresses: true, selector");
    assert_eq!(
        cluster.write("all.yaml", &(published + &pods.concat())),
        NONE
    );
    assert_eq!(
        cluster.plan("web")[0],
        "10.96.1.1:80/TCP ClusterIp -> 10.44.0.1:80* 10.44.0.2:80* 10.44.0.3:80* 10.44.0.4:80*"
    );
}

#[test]
fn an_endpoint_slice_by_hand_goes_before_endpoints() {
    let mut cluster = Cluster::new();
    let service = "kind: Service\nmetadata: { name: db }\nspec: { clusterIP: 10.96.1.1, ports: [{ port: 80 }] }\n";
    let endpoints = "---\nkind: Endpoints\nmetadata: { name: db }\nsubsets: [{ addresses: [{ ip: 192.0.2.1 }], notReadyAddresses: [{ ip: 192.0.2.2 }], ports: [{ port: 1 }] }]\n";
    let slice = "---\nkind: EndpointSlice\nmetadata: { name: db-1, labels: { kubernetes.io/service-name: db } }\naddressType: IPv4\nports: [{ port: 2 }]\nendpoints: [{ addresses: [192.0.2.3] }]\n";
    cluster.write("all.yaml", &format!("{service}{endpoints}"));
    assert_eq!(
        cluster.plan("db"),
        ["10.96.1.1:80/TCP ClusterIp -> 192.0.2.1:1"]
    );
    cluster.write("all.yaml", &format!("{service}{endpoints}{slice}"));
    assert_eq!(
        cluster.plan("db"),
        ["10.96.1.1:80/TCP ClusterIp -> 192.0.2.3:2"]
    );
}

#[test]
fn forbidden_endpoints_are_skipped_with_a_warning() {
    let mut cluster = Cluster::new();
    let text = "\
kind: Service
metadata: { name: db }
spec: { clusterIP: 10.96.1.1, ports: [{ port: 80 }] }
---
kind: EndpointSlice
metadata: { name: db-1, labels: { kubernetes.io/service-name: db } }
addressType: IPv4
ports: [{ port: 2 }]
endpoints:
- addresses: [192.0.2.3]
- addresses: [127.0.0.1]
- addresses: [169.254.169.254]
- addresses: [224.0.0.1]
- addresses: [0.0.0.0]
- addresses: ['::ffff:127.0.0.1']
- addresses: ['2001:db8::1']
- addresses: [db.example.com]
---
kind: EndpointSlice
metadata: { name: db-2, labels: { kubernetes.io/service-name: db } }
addressType: FQDN
ports: [{ port: 2 }]
endpoints: [{ addresses: [db.example.com] }]
---
kind: EndpointSlice
metadata: { name: db-3 }
addressType: IPv4
endpoints: []
---
kind: Service
metadata: { name: other }
spec: { clusterIP: 10.96.1.2, ports: [{ port: 80 }] }
---
kind: Endpoints
metadata: { name: other }
subsets: [{ addresses: [{ ip: 10.96.1.1 }, { ip: 192.0.2.4 }], ports: [{ port: 80 }] }]
";
    let skipped = "which the API forbids for endpoints; it is skipped";
    assert_eq!(
        cluster.write("db.yaml", text),
        [
            format!("db.yaml:11: EndpointSlice default/db-1: endpoints[1].addresses[0]: 127.0.0.1 is a loopback address, {skipped}"),
            format!("db.yaml:12: EndpointSlice default/db-1: endpoints[2].addresses[0]: 169.254.169.254 is a link-local address, {skipped}"),
            format!("db.yaml:13: EndpointSlice default/db-1: endpoints[3].addresses[0]: 224.0.0.1 is a multicast address, {skipped}"),
            format!("db.yaml:14: EndpointSlice default/db-1: endpoints[4].addresses[0]: 0.0.0.0 is the unspecified address, {skipped}"),
            format!("db.yaml:15: EndpointSlice default/db-1: endpoints[5].addresses[0]: 127.0.0.1 is a loopback address, {skipped}"),
            "db.yaml:16: EndpointSlice default/db-1: endpoints[6].addresses[0]: 2001:db8::1 is not of addressType IPv4".to_owned(),
            "db.yaml:17: EndpointSlice default/db-1: endpoints[7].addresses[0]: \"db.example.com\" is no IP address".to_owned(),
            "db.yaml:21: EndpointSlice default/db-2: addressType: FQDN cannot be a backend of a Service; the slice is skipped".to_owned(),
            "db.yaml:26: EndpointSlice default/db-3: metadata.labels: names no Service; add the label kubernetes.io/service-name".to_owned(),
            "EndpointSlice default/other (Endpoints subset 0, IPv4): endpoints: 10.96.1.1 is the cluster IP of Service default/db; a Service cannot stand behind a Service, it is skipped".to_owned(),
        ]
    );
    assert_eq!(
        cluster.plan("db"),
        ["10.96.1.1:80/TCP ClusterIp -> 192.0.2.3:2"]
    );
    assert_eq!(
        cluster.plan("other"),
        ["10.96.1.2:80/TCP ClusterIp -> 192.0.2.4:80"]
    );
}

#[test]
fn what_is_somebody_elses_is_left_alone() {
    for label in [
        "service.kubernetes.io/service-proxy-name: other",
        "service.kubernetes.io/headless: ''",
    ] {
        let mut cluster = Cluster::new();
        let text = WEB.replace("name: web", &format!("name: web, labels: {{ {label} }}"));
        assert_eq!(cluster.write("web.yaml", &text), NONE);
        assert_eq!(cluster.plan("web"), NONE, "{label}");
        // The label may come later.
        cluster.write("web.yaml", WEB);
        assert_eq!(cluster.plan("web").len(), 1);
        cluster.write("web.yaml", &text);
        assert_eq!(cluster.plan("web"), NONE, "{label}");
    }
}

#[test]
fn load_balancer_addresses() {
    let mut cluster = Cluster::new();
    let text = "
kind: Service
metadata: { name: web }
spec: { type: LoadBalancer, clusterIP: 10.96.1.1, allocateLoadBalancerNodePorts: false, externalIPs: [192.0.2.9], ports: [{ port: 80 }] }
status:
  loadBalancer:
    ingress: [{ ip: 198.51.100.1 }, { ip: 198.51.100.2, ipMode: Proxy }, { ip: 198.51.100.3, ipMode: VIP }, { hostname: lb.example.com }]
";
    assert_eq!(cluster.write("web.yaml", text), NONE);
    assert_eq!(
        cluster.plan("web"),
        [
            "10.96.1.1:80/TCP ClusterIp ->",
            "192.0.2.9:80/TCP ExternalIp ->",
            "198.51.100.1:80/TCP LoadBalancer ->",
            "198.51.100.3:80/TCP LoadBalancer ->",
        ]
    );
    // Ranges that let nobody in must not let everybody in.
    let problems = cluster.write(
        "web.yaml",
        &text.replace("ports:", "loadBalancerSourceRanges: [10.0.0.0/33], ports:"),
    );
    assert_eq!(problems.len(), 2, "{problems:?}");
    let mut fresh = Cluster::new();
    fresh.write(
        "web.yaml",
        &text.replace("ports:", "loadBalancerSourceRanges: [10.0.0.0/33], ports:"),
    );
    assert_eq!(
        fresh.plan("web")[2..],
        [
            "198.51.100.1:80/TCP LoadBalancer source-ranges ->",
            "198.51.100.3:80/TCP LoadBalancer source-ranges ->",
        ]
    );
}

/// One warning names object and field, and the default is served.
#[test]
fn policies_that_make_no_sense_are_named_and_get_their_default() {
    let written = |spec: &str| {
        let mut cluster = Cluster::new();
        let spec =
            format!("type: LoadBalancer, clusterIP: 10.96.1.1, ports: [{{ port: 80 }}], {spec}");
        let status = "status: { loadBalancer: { ingress: [{ ip: 198.51.100.1 }] } }\n";
        let problems = cluster.write("web.yaml", &(bare("web", &spec) + status));
        (problems, cluster.service("web").clone())
    };
    let (none, plain) = written("externalIPs: []");
    assert_eq!(none, NONE);
    let affine = Service {
        affinity_secs: Some(10_800),
        ..plain.clone()
    };
    let ranged = Service {
        source_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        limits_sources: [true; 2],
        masquerade: false,
        ..plain.clone()
    };
    let timeout = |secs: &str| {
        format!(
            "sessionAffinity: ClientIP, sessionAffinityConfig: {{ clientIP: {{ timeoutSeconds: {secs} }} }}"
        )
    };
    for (spec, field, served) in [
        (
            timeout("0"),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0",
            &affine,
        ),
        (
            timeout("-1"),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: -1",
            &affine,
        ),
        (
            timeout("86401"),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401",
            &affine,
        ),
        (
            "sessionAffinity: Cookie".into(),
            "spec.sessionAffinity: \"Cookie\"",
            &plain,
        ),
        (
            "externalTrafficPolicy: Near".into(),
            "spec.externalTrafficPolicy: \"Near\"",
            &plain,
        ),
        (
            "internalTrafficPolicy: Near".into(),
            "spec.internalTrafficPolicy: \"Near\"",
            &plain,
        ),
        (
            "trafficDistribution: Near".into(),
            "spec.trafficDistribution: \"Near\"",
            &plain,
        ),
        (
            "loadBalancerSourceRanges: [10.0.0.0/8, 10.1.2.3/33]".into(),
            "spec.loadBalancerSourceRanges[1]: \"10.1.2.3/33\"",
            &ranged,
        ),
    ] {
        let (problems, service) = written(&spec);
        assert_eq!(problems.len(), 1, "{spec}: {problems:?}");
        assert!(
            problems[0].contains(&format!("Service default/web: {field}")),
            "{spec}: {problems:?}"
        );
        assert_eq!(service, *served, "{spec}");
    }

    let mut cluster = Cluster::new();
    let slice = "
kind: EndpointSlice
metadata: { name: web-1, labels: { kubernetes.io/service-name: web } }
addressType: IPv4
ports: [{ port: 8080 }]
endpoints: [{ addresses: [10.44.0.1], hints: { forZones: [{ name: '' }], forNodes: [{ name: node-b }] } }]
";
    let problems = cluster.write(
        "web.yaml",
        &(bare("web", "clusterIP: 10.96.1.1, ports: [{ port: 80 }]") + "---" + slice),
    );
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0]
            .contains("EndpointSlice default/web-1: endpoints[0].hints.forZones[0].name: is empty"),
        "{problems:?}"
    );
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:80/TCP ClusterIp -> 10.44.0.1:8080"]
    );
}

#[test]
fn the_annotation_of_retries_decides_or_is_named() {
    let written = |value: &str| {
        let mut cluster = Cluster::new();
        let problems = cluster.write(
            "web.yaml",
            &format!(
                "kind: Service\nmetadata: {{ name: web, annotations: {{ shunt.dev/retry: '{value}' }} }}\nspec: {{ \
                 clusterIP: 10.96.1.1, ports: [{{ port: 80 }}, {{ name: u, port: 80, protocol: UDP }}] }}\n"
            ),
        );
        (problems, cluster.plan("web"))
    };
    let plan = |tcp: &str, udp: &str| {
        [
            format!("10.96.1.1:80/TCP ClusterIp{tcp} ->"),
            format!("10.96.1.1:80/UDP ClusterIp{udp} ->"),
        ]
        .to_vec()
    };
    assert_eq!(
        written("false"),
        (Vec::new(), plan(" no-retry", " no-retry"))
    );
    // Datagrams are not sent again by the kernel: their sockets stay where they are.
    assert_eq!(written("true"), (Vec::new(), plan(" packets-only", "")));
    let (problems, served) = written("often");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains(
            "Service default/web: metadata.annotations[shunt.dev/retry]: \"often\" is neither"
        ),
        "{problems:?}"
    );
    assert_eq!(served, plan("", ""));
}

/// A Service that leaves everything to be allocated.
fn bare(name: &str, spec: &str) -> String {
    format!("---\nkind: Service\nmetadata: {{ name: {name} }}\nspec: {{ {spec} }}\n")
}

#[test]
fn allocation_does_not_depend_on_what_else_comes_and_goes() {
    let lb =
        |config: &mut Config| config.load_balancer_cidrs = vec!["198.51.100.0/24".parse().unwrap()];
    let spec = "type: LoadBalancer, ports: [{ port: 80 }, { name: tls, port: 443 }]";
    let mut first = Cluster::with(lb);
    assert_eq!(first.write("b.yaml", &bare("web", spec)), NONE);
    let alone = first.service("web").clone();
    assert!(
        "10.96.0.0/12"
            .parse::<IpNet>()
            .unwrap()
            .contains(&alone.cluster_ips[0])
    );
    assert!(
        "198.51.100.0/24"
            .parse::<IpNet>()
            .unwrap()
            .contains(&alone.load_balancer_ips[0])
    );
    let node_ports: BTreeSet<u16> = alone
        .ports
        .iter()
        .map(|port| port.node_port.unwrap())
        .collect();
    assert!(
        node_ports.len() == 2
            && node_ports
                .iter()
                .all(|port| (30_000..=32_767).contains(port))
    );

    let others: String = (0..50).map(|i| bare(&format!("a{i}"), spec)).collect();
    assert_eq!(first.write("a.yaml", &others), NONE);
    assert_eq!(*first.service("web"), alone, "others came");
    assert_eq!(first.touched.len(), 50, "and only they were touched");
    first.remove("a.yaml");
    assert_eq!(*first.service("web"), alone, "others went");

    let mut second = Cluster::with(lb);
    second.write("x.yaml", &bare("web", spec));
    assert_eq!(
        *second.service("web"),
        alone,
        "another agent comes to the same"
    );
}

#[test]
fn what_a_manifest_asks_for_is_not_given_to_others() {
    let small = |config: &mut Config| {
        config.service_cidrs = vec!["10.96.0.0/30".parse().unwrap()];
        config.node_ports = 30_000..=30_001;
    };
    let mut cluster = Cluster::with(small);
    let spec = "type: NodePort, ports: [{ port: 80 }]";
    cluster.write("a.yaml", &bare("a", spec));
    let (ip, port) = (
        cluster.service("a").cluster_ips[0],
        cluster.service("a").ports[0].node_port.unwrap(),
    );
    let asks =
        format!("type: NodePort, clusterIP: {ip}, ports: [{{ port: 80, nodePort: {port} }}]");
    assert_eq!(cluster.write("b.yaml", &bare("b", &asks)), NONE);
    let (a, b) = (cluster.service("a").clone(), cluster.service("b").clone());
    assert_eq!((b.cluster_ips[0], b.ports[0].node_port), (ip, Some(port)));
    assert_ne!(a.cluster_ips[0], ip);
    assert_ne!(a.ports[0].node_port, Some(port));
    // There are two of each: the third gets none, and is told which setting to change.
    assert_eq!(
        cluster.write("c.yaml", &bare("c", spec)),
        [
            "Service default/c: spec.clusterIP: is missing and the IPv4 range is full; give a larger --service-cidr",
            "Service default/c: spec.ports[0].nodePort: is missing and all of 30000-30001 are taken; give a larger range",
        ]
    );
    assert_eq!(*cluster.service("a"), a, "nobody loses anything by it");
}

#[test]
fn families_are_those_that_are_asked_for() {
    for (spec, want) in [
        ("", "4"),
        ("ipFamilies: [IPv6],", "6"),
        ("ipFamilies: [IPv6, IPv4],", "64"),
        ("ipFamilyPolicy: PreferDualStack,", "46"),
        (
            "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6],",
            "64",
        ),
        ("ipFamilyPolicy: SingleStack,", "4"),
        ("clusterIP: 'fd00:96::5',", "6"),
        (
            "clusterIP: 'fd00:96::5', ipFamilyPolicy: PreferDualStack,",
            "64",
        ),
    ] {
        let mut cluster = Cluster::new();
        assert_eq!(
            cluster.write(
                "web.yaml",
                &bare("web", &format!("{spec} ports: [{{ port: 80 }}]"))
            ),
            NONE
        );
        let ips = &cluster.service("web").cluster_ips;
        let families: String = ips
            .iter()
            .map(|ip| if ip.is_ipv6() { '6' } else { '4' })
            .collect();
        assert_eq!(families, want, "{spec}");
    }
    let v4 = |config: &mut Config| config.service_cidrs.truncate(1);
    let ports = "ports: [{ port: 80 }]";
    assert_eq!(
        Cluster::with(v4).write(
            "a.yaml",
            &bare("a", &format!("ipFamilyPolicy: PreferDualStack, {ports}"))
        ),
        NONE
    );
    assert_eq!(
        Cluster::with(v4).write(
            "a.yaml",
            &bare("a", &format!("ipFamilyPolicy: RequireDualStack, {ports}"))
        ),
        [
            "Service default/a: spec.clusterIP: is missing and there is no IPv6 range to take it from; write it down or give --service-cidr"
        ]
    );
}

#[test]
fn a_list_of_ten_thousand_services_gets_ten_thousand_addresses() {
    let mut cluster = Cluster::new();
    let items: String = (0..10_000)
        .map(|i| format!("- {{ kind: Service, metadata: {{ name: s{i} }}, spec: {{ ports: [{{ port: 80 }}] }} }}\n"))
        .collect();
    assert_eq!(
        cluster.write("all.yaml", &format!("kind: List\nitems:\n{items}")),
        NONE
    );
    let distinct: HashSet<IpAddr> = cluster
        .model
        .services()
        .map(|service| service.cluster_ips[0])
        .collect();
    assert_eq!(distinct.len(), 10_000);
}

#[test]
fn one_node_port_for_both_protocols_of_a_port() {
    let mut cluster = Cluster::new();
    let spec =
        "type: NodePort, ports: [{ name: t, port: 53 }, { name: u, port: 53, protocol: UDP }]";
    assert_eq!(cluster.write("dns.yaml", &bare("dns", spec)), NONE);
    let ports = &cluster.service("dns").ports;
    assert_eq!(ports[0].node_port, ports[1].node_port);
}

#[test]
fn the_own_node_tells_zone_and_addresses() {
    let mut cluster = Cluster::new();
    cluster.write("web.yaml", &(WEB.to_owned() + &pod("a", "192.0.2.7")));
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:80/TCP ClusterIp -> 192.0.2.7:80"]
    );
    let node = |name: &str| {
        format!(
            "kind: Node\nmetadata: {{ name: {name}, labels: {{ topology.kubernetes.io/zone: z1 }} }}\n\
             status: {{ addresses: [{{ type: InternalIP, address: 192.0.2.7 }}, {{ type: Hostname, address: {name} }}] }}\n"
        )
    };
    cluster.write("node.yaml", &node("node-b"));
    assert_eq!(cluster.model.node().zone, None, "another's");
    cluster.write("node.yaml", &node("node-a"));
    assert_eq!(cluster.model.node().zone.as_deref(), Some("z1"));
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:80/TCP ClusterIp -> 192.0.2.7:80*"]
    );
    cluster.remove("node.yaml");
    assert_eq!(
        cluster.plan("web"),
        ["10.96.1.1:80/TCP ClusterIp -> 192.0.2.7:80"]
    );
}

#[test]
fn a_folder_that_cannot_be_read_keeps_what_is_known_of_it() {
    let mut cluster = Cluster::new();
    cluster.write("dir/web.yaml", WEB);
    let problems = cluster.update(Files {
        files: Vec::new(),
        unreadable: vec![(
            "dir".into(),
            std::io::Error::from(std::io::ErrorKind::PermissionDenied),
        )],
    });
    assert_eq!(
        problems,
        ["dir: cannot be read, its last content goes on serving: permission denied"]
    );
    assert_eq!(cluster.plan("web").len(), 1);
}

/// Waits for the next batch, and plans it.
async fn next(events: &mut mpsc::Receiver<Vec<Event>>, model: &mut Model) {
    let batch = tokio::time::timeout(Duration::from_secs(10), events.recv());
    for event in batch
        .await
        .expect("an event within ten seconds")
        .expect("the source runs")
    {
        model.apply(event);
    }
}

#[tokio::test]
async fn files_and_folders_are_watched() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    std::fs::create_dir_all(folder.join("sub")).unwrap();
    let single = dir.path().join("single.yaml");
    std::fs::write(&single, WEB).unwrap();
    std::fs::write(folder.join("notes.txt"), "no: [yaml").unwrap();
    std::fs::write(folder.join(".hidden.yaml"), "no: [yaml").unwrap();
    let source = Manifests::new(Config {
        paths: vec![folder.clone(), single.clone()],
        ..Cluster::new().state.config
    });
    let (tx, mut rx) = mpsc::channel(16);
    let run = tokio::spawn(source.run(tx));
    let mut model = Model::new(NodeFacts::default());
    let web = ObjectName::new("default", "web");
    let backends = |model: &Model| {
        model
            .plan(&web)
            .frontends
            .first()
            .map(|frontend| frontend.backends.len())
    };
    next(&mut rx, &mut model).await;
    assert!(model.is_complete());
    assert_eq!(backends(&model), Some(0));

    // A new file in a sub-folder, a replaced file (as editors do), a folder that appears, and
    // removal.
    std::fs::write(folder.join("sub/pod.yaml"), pod("a", "10.44.1.1")).unwrap();
    next(&mut rx, &mut model).await;
    assert_eq!(backends(&model), Some(1));
    let new = dir.path().join("new");
    std::fs::write(&new, WEB.replace("port: 80", "port: 81")).unwrap();
    std::fs::rename(&new, &single).unwrap();
    next(&mut rx, &mut model).await;
    assert_eq!(model.plan(&web).frontends[0].id.port, 81);
    std::fs::create_dir(folder.join("late")).unwrap();
    std::fs::write(folder.join("late/pod.json"), r#"{"kind":"Pod","metadata":{"name":"b","labels":{"app":"web"}},"status":{"podIP":"10.44.1.2","conditions":[{"type":"Ready","status":"True"}]}}"#).unwrap();
    next(&mut rx, &mut model).await;
    assert_eq!(backends(&model), Some(2));
    std::fs::remove_dir_all(folder.join("sub")).unwrap();
    next(&mut rx, &mut model).await;
    assert_eq!(backends(&model), Some(1));
    std::fs::remove_file(&single).unwrap();
    next(&mut rx, &mut model).await;
    assert_eq!(backends(&model), None);

    drop(rx);
    run.await.unwrap().expect("ends when nobody listens");
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_and_read_once() {
    // As a kubelet lays it out, and changes it: files are links through `..data`, which is
    // exchanged as a whole.
    let dir = tempfile::tempdir().unwrap();
    let lay_out = |version: &str, port: &str| {
        std::fs::create_dir(dir.path().join(version)).unwrap();
        std::fs::write(
            dir.path().join(version).join("web.yaml"),
            WEB.replace("80", port),
        )
        .unwrap();
        std::os::unix::fs::symlink(version, dir.path().join("..data_tmp")).unwrap();
        std::fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
    };
    lay_out("..2026_1", "80");
    std::os::unix::fs::symlink("..data/web.yaml", dir.path().join("web.yaml")).unwrap();
    assert_eq!(
        files::list(&[dir.path().to_owned()]).0,
        [dir.path().join("web.yaml")]
    );
    for path in [dir.path().to_owned(), dir.path().join("web.yaml")] {
        let source = Manifests::new(Config {
            paths: vec![path.clone()],
            ..Cluster::new().state.config
        });
        let (tx, mut rx) = mpsc::channel(16);
        let run = tokio::spawn(source.run(tx));
        let mut model = Model::new(NodeFacts::default());
        let port = |model: &Model| {
            model.plan(&ObjectName::new("default", "web")).frontends[0]
                .id
                .port
        };
        next(&mut rx, &mut model).await;
        let before = port(&model);
        let version = if before == 80 {
            ("..2026_2", "81")
        } else {
            ("..2026_3", "82")
        };
        lay_out(version.0, version.1);
        next(&mut rx, &mut model).await;
        assert_eq!(port(&model), before + 1, "{}", path.display());
        drop(rx);
        run.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_path_that_is_not_there_is_an_error_at_the_start() {
    let source = Manifests::new(Config {
        paths: vec!["/no/such/folder".into()],
        ..Cluster::new().state.config
    });
    let error = source.run(mpsc::channel(1).0).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "--manifests /no/such/folder: give a file or folder that can be read"
    );
}
