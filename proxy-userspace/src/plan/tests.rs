//! Which backends a frontend has, row by row: the Service and its endpoints in, frontends out.
//!
//! The node is `node-a` in `zone-a`. An endpoint is written `address condition node`, with hints
//! behind it.

use super::*;
use crate::source::manifests::tests::Cluster;

const NODE: &str = "
kind: Node
metadata: { name: node-a, labels: { topology.kubernetes.io/zone: zone-a } }
";

/// Plans a Service of one port 80 with these endpoints of port 8080.
fn plan(spec: &str, endpoints: &[&str]) -> Vec<String> {
    let text = service_text(spec, endpoints);
    let mut cluster = Cluster::new();
    assert_eq!(cluster.write("web.yaml", &text), [""; 0], "{text}");
    cluster.plan("web")
}

fn service_text(spec: &str, endpoints: &[&str]) -> String {
    let mut text = format!(
        "kind: Service\nmetadata: {{ name: web }}\nspec: {{ clusterIP: 10.96.1.1, ports: [{{ port: 80{} }}], {spec} }}\n---{NODE}",
        if spec.contains("type: NodePort") {
            ", nodePort: 30080"
        } else {
            ""
        },
    );
    for (i, endpoint) in endpoints.iter().enumerate() {
        let mut words = endpoint.split(' ');
        let (address, condition, node) = (
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap(),
        );
        let conditions = match condition {
            "ready" => "ready: true, serving: true, terminating: false",
            "default" => "",
            "starting" => "ready: false, serving: false, terminating: false",
            "leaving" => "ready: false, serving: true, terminating: true",
            "going" => "ready: false, terminating: true",
            "unready" => "ready: false",
            "dying" => "ready: false, serving: false, terminating: true",
            other => panic!("no such condition: {other}"),
        };
        let (mut zones, mut nodes) = (String::new(), String::new());
        for hint in words {
            match hint.starts_with("zone") {
                true => zones += &format!("{{ name: {hint} }},"),
                false => nodes += &format!("{{ name: {hint} }},"),
            }
        }
        text += &format!(
            "---\nkind: EndpointSlice\nmetadata: {{ name: web-{i}, labels: {{ kubernetes.io/service-name: web }} }}\n\
             addressType: IPv4\nports: [{{ port: 8080 }}]\nendpoints:\n- addresses: [{address}]\n  nodeName: {node}\n  \
             conditions: {{ {conditions} }}\n  hints: {{ forZones: [{zones}], forNodes: [{nodes}] }}\n"
        );
    }
    text
}

/// The backends of the first frontend.
fn backends(spec: &str, endpoints: &[&str]) -> String {
    let lines = plan(spec, endpoints);
    lines[0]
        .split_once("->")
        .unwrap()
        .1
        .replace(":8080", "")
        .trim()
        .to_owned()
}

#[test]
fn only_ready_endpoints_get_new_flows_and_else_those_that_still_serve() {
    for (endpoints, want) in [
        (
            &["10.0.0.1 ready node-b", "10.0.0.2 starting node-b"][..],
            "10.0.0.1",
        ),
        (
            &["10.0.0.1 default node-b", "10.0.0.2 leaving node-b"],
            "10.0.0.1",
        ),
        (
            &[
                "10.0.0.1 leaving node-b",
                "10.0.0.2 dying node-b",
                "10.0.0.3 starting node-b",
            ],
            "10.0.0.1",
        ),
        (&["10.0.0.1 dying node-b", "10.0.0.2 starting node-b"], ""),
        // What is left out of `serving` is true: an endpoint that goes is the last resort, one that
        // is not ready is not.
        (
            &["10.0.0.1 going node-b", "10.0.0.2 ready node-b"],
            "10.0.0.2",
        ),
        (
            &["10.0.0.1 going node-b", "10.0.0.2 starting node-b"],
            "10.0.0.1",
        ),
        (
            &["10.0.0.1 unready node-b", "10.0.0.2 going node-b"],
            "10.0.0.2",
        ),
        (&["10.0.0.1 unready node-b"], ""),
        (&[], ""),
    ] {
        assert_eq!(backends("", endpoints), want, "{endpoints:?}");
    }
    assert_eq!(
        backends(
            "publishNotReadyAddresses: true",
            &["10.0.0.1 starting node-b", "10.0.0.2 dying node-b"]
        ),
        "10.0.0.1 10.0.0.2"
    );
}

/// SPEC B8: of those with one address the one that serves best counts, with all that is said of it
/// and nothing of the others.
#[test]
fn one_address_in_several_endpoints_is_the_one_that_serves() {
    let other = "10.0.0.9 ready node-b zone-b";
    for (twins, spec, want) in [
        (
            ["10.0.0.1 ready node-a", "10.0.0.1 ready node-a"],
            "",
            "10.0.0.1* 10.0.0.9",
        ),
        (
            ["10.0.0.1 ready node-a", "10.0.0.1 starting node-a"],
            "",
            "10.0.0.1* 10.0.0.9",
        ),
        // A pod that hangs in termination on one node, its successor on another.
        (
            ["10.0.0.1 dying node-b", "10.0.0.1 ready node-a"],
            "",
            "10.0.0.1* 10.0.0.9",
        ),
        (
            ["10.0.0.1 dying node-a", "10.0.0.1 ready node-b"],
            "",
            "10.0.0.1 10.0.0.9",
        ),
        (
            ["10.0.0.1 leaving node-a", "10.0.0.1 ready node-b"],
            "",
            "10.0.0.1 10.0.0.9",
        ),
        (
            ["10.0.0.1 unready node-a", "10.0.0.1 ready node-b"],
            "",
            "10.0.0.1 10.0.0.9",
        ),
        // Published though not ready, both of them: the one that stays.
        (
            ["10.0.0.1 leaving node-a", "10.0.0.1 starting node-b"],
            "publishNotReadyAddresses: true",
            "10.0.0.1 10.0.0.9",
        ),
        // Hints of the one that does not serve are not united either.
        (
            [
                "10.0.0.1 dying node-b zone-a",
                "10.0.0.1 ready node-b zone-b",
            ],
            "",
            "10.0.0.1 10.0.0.9",
        ),
        (
            [
                "10.0.0.1 dying node-b zone-b",
                "10.0.0.1 ready node-b zone-a",
            ],
            "",
            "10.0.0.1",
        ),
        (
            [
                "10.0.0.1 dying node-b node-a zone-b",
                "10.0.0.1 ready node-b zone-b",
            ],
            "",
            "10.0.0.1 10.0.0.9",
        ),
    ] {
        for order in [[twins[0], twins[1], other], [twins[1], twins[0], other]] {
            assert_eq!(backends(spec, &order), want, "{order:?}");
        }
    }
    // Alone, the last resort: the one that still serves.
    for order in [
        ["10.0.0.1 starting node-a", "10.0.0.1 leaving node-b"],
        ["10.0.0.1 leaving node-b", "10.0.0.1 starting node-a"],
    ] {
        assert_eq!(backends("", &order), "10.0.0.1", "{order:?}");
    }
    // Policy Local goes by the node of the one that serves.
    let local =
        |twins: &[&str]| plan("type: NodePort, externalTrafficPolicy: Local", twins)[2].clone();
    assert_eq!(
        local(&["10.0.0.1 dying node-a", "10.0.0.1 ready node-b"]),
        "External 0.0.0.0:30080/TCP NodePort keep-source drop ->"
    );
    assert_eq!(
        local(&["10.0.0.1 dying node-b", "10.0.0.1 ready node-a"]),
        "External 0.0.0.0:30080/TCP NodePort keep-source -> 10.0.0.1:8080*"
    );
}

#[test]
fn external_policy_local() {
    const BOTH: &str = "type: NodePort, externalTrafficPolicy: Local";
    let node_port = |endpoints: &[&str]| plan(BOTH, endpoints)[1..].to_vec();
    assert_eq!(
        node_port(&["10.0.0.1 ready node-a", "10.0.0.2 ready node-b"]),
        [
            "Internal 0.0.0.0:30080/TCP NodePort -> 10.0.0.1:8080* 10.0.0.2:8080",
            "External 0.0.0.0:30080/TCP NodePort keep-source -> 10.0.0.1:8080*",
        ]
    );
    assert_eq!(
        node_port(&["10.0.0.1 leaving node-a", "10.0.0.2 ready node-b"])[1],
        "External 0.0.0.0:30080/TCP NodePort keep-source -> 10.0.0.1:8080*",
        "a local one that still serves goes before ready ones elsewhere"
    );
    assert_eq!(
        node_port(&["10.0.0.2 ready node-b"])[1],
        "External 0.0.0.0:30080/TCP NodePort keep-source drop ->",
        "none local: dropped"
    );
    assert_eq!(
        node_port(&["10.0.0.2 leaving node-b"])[1],
        "External 0.0.0.0:30080/TCP NodePort keep-source drop ->",
        "some elsewhere, if only just"
    );
    assert_eq!(
        node_port(&["10.0.0.2 starting node-b"]),
        [
            "Internal 0.0.0.0:30080/TCP NodePort ->",
            "External 0.0.0.0:30080/TCP NodePort keep-source ->"
        ],
        "none anywhere: refused"
    );
    assert_eq!(
        plan(BOTH, &["10.0.0.2 ready node-b"])[0],
        "10.96.1.1:80/TCP ClusterIp -> 10.0.0.2:8080",
        "the cluster IP has the other policy"
    );
}

#[test]
fn internal_policy_local() {
    const LOCAL: &str = "type: NodePort, internalTrafficPolicy: Local";
    assert_eq!(
        plan(LOCAL, &["10.0.0.1 ready node-a", "10.0.0.2 ready node-b"]),
        [
            "10.96.1.1:80/TCP ClusterIp -> 10.0.0.1:8080*",
            "0.0.0.0:30080/TCP NodePort -> 10.0.0.1:8080* 10.0.0.2:8080",
        ]
    );
    assert_eq!(
        plan(LOCAL, &["10.0.0.2 ready node-b"])[0],
        "10.96.1.1:80/TCP ClusterIp ->",
        "none local: refused, as if there were none"
    );
}

#[test]
fn hints_keep_flows_near_when_all_endpoints_have_them() {
    for (endpoints, want) in [
        (
            &[
                "10.0.0.1 ready node-a zone-a",
                "10.0.0.2 ready node-b zone-b",
            ][..],
            "10.0.0.1*",
        ),
        (
            &["10.0.0.1 ready node-a zone-a", "10.0.0.2 ready node-b"],
            "10.0.0.1* 10.0.0.2",
        ),
        (
            &[
                "10.0.0.1 ready node-b zone-b",
                "10.0.0.2 ready node-b zone-c",
            ],
            "10.0.0.1 10.0.0.2",
        ),
        (
            &[
                "10.0.0.1 ready node-b zone-b zone-a",
                "10.0.0.2 ready node-b zone-b",
            ],
            "10.0.0.1",
        ),
        // What is not ready has no say.
        (
            &["10.0.0.1 ready node-b zone-a", "10.0.0.2 starting node-b"],
            "10.0.0.1",
        ),
        // Node hints go before zone hints, and where they do not fit zone hints count.
        (
            &[
                "10.0.0.1 ready node-a zone-a node-a",
                "10.0.0.2 ready node-b zone-a node-b",
            ],
            "10.0.0.1*",
        ),
        (
            &[
                "10.0.0.1 ready node-c zone-a node-c",
                "10.0.0.2 ready node-b zone-b node-b",
            ],
            "10.0.0.1",
        ),
        // Nobody is ready: hints do not count.
        (
            &[
                "10.0.0.1 leaving node-b zone-a",
                "10.0.0.2 leaving node-b zone-b",
            ],
            "10.0.0.1 10.0.0.2",
        ),
    ] {
        // Clients inside and outside alike, or there would be two lines for one.
        let lines = plan("type: NodePort, externalIPs: [192.0.2.1]", endpoints);
        assert_eq!(lines.len(), 3, "{lines:?}");
        for line in lines {
            let got = line.split_once("->").unwrap().1.replace(":8080", "");
            assert_eq!(got.trim(), want, "{endpoints:?}");
        }
    }
    // Policy Local goes before hints, for those whom it concerns.
    let lines = plan(
        "type: NodePort, externalTrafficPolicy: Local",
        &[
            "10.0.0.1 ready node-b zone-a",
            "10.0.0.2 ready node-a zone-b",
        ],
    );
    assert_eq!(
        lines[1..],
        [
            "Internal 0.0.0.0:30080/TCP NodePort -> 10.0.0.1:8080",
            "External 0.0.0.0:30080/TCP NodePort keep-source -> 10.0.0.2:8080*",
        ]
    );
}

/// SPEC B5: nodes of one zone choose alike for a client from outside, whatever the order in which
/// they learned of endpoints.
#[test]
fn nodes_of_a_zone_have_the_same_table_for_clients_from_outside() {
    let endpoints = [
        "10.0.0.1 ready node-a zone-a",
        "10.0.0.2 ready node-b zone-a",
        "10.0.0.3 ready node-c zone-b",
    ];
    let text = service_text("type: NodePort", &endpoints);
    let choice = |node: &str| {
        let mut cluster = Cluster::of(node);
        let text = text.replace("name: node-a, labels", &format!("name: {node}, labels"));
        assert_eq!(cluster.write("web.yaml", &text), [""; 0]);
        let plan = cluster.model.plan(&ObjectName::new("default", "web"));
        let external = plan
            .frontends
            .iter()
            .find(|frontend| {
                frontend.kind == FrontendKind::NodePort && frontend.id.scope == Scope::External
            })
            .unwrap();
        assert_eq!(external.table, Table::Maglev);
        external
            .backends
            .iter()
            .map(|backend| backend.address.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(choice("node-a"), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(choice("node-b"), choice("node-a"));
}

/// A table of addresses and ranges by family: which load balancer frontends there are and which of
/// them are limited, and what the user is told.
#[test]
fn addresses_and_source_ranges_go_by_family() {
    const V4: &str = "10.96.1.1";
    const V6: &str = "'fd00:96::1'";
    const NO_IPV6: &str = "has no IPv6 range, so it limits no IPv6 client";
    const NO_IPV4: &str = "has no IPv4 range, so it limits no IPv4 client";
    let both = format!("{V4}, {V6}");
    let addresses = "198.51.100.1, 2001:db8::9";
    for (cluster_ips, ranges, want, problems) in [
        // Of a family that the Service is not of: left to their owner.
        (V4, "", "198.51.100.1", &[][..]),
        (V6, "", "2001:db8::9", &[]),
        (&both, "", "198.51.100.1 2001:db8::9", &[]),
        // Everybody.
        (&both, "0.0.0.0/0", "198.51.100.1 2001:db8::9", &[]),
        (&both, "'::/0'", "198.51.100.1 2001:db8::9", &[]),
        (&both, "0.0.0.0/0, '::/0'", "198.51.100.1 2001:db8::9", &[]),
        (
            &both,
            "0.0.0.0/0, 10.0.0.0/8",
            "198.51.100.1 2001:db8::9",
            &[],
        ),
        // Each family by itself.
        (
            &both,
            "10.0.0.0/8, 'fd00::/8'",
            "198.51.100.1! 2001:db8::9!",
            &[],
        ),
        (
            &both,
            "0.0.0.0/0, 'fd00::/8'",
            "198.51.100.1 2001:db8::9!",
            &[],
        ),
        (
            &both,
            "10.0.0.0/8, '::/0'",
            "198.51.100.1! 2001:db8::9",
            &[],
        ),
        (&both, "10.0.0.0/8", "198.51.100.1! 2001:db8::9", &[NO_IPV6]),
        (&both, "'fd00::/8'", "198.51.100.1 2001:db8::9!", &[NO_IPV4]),
        (V4, "10.0.0.0/8", "198.51.100.1!", &[]),
        (V4, "'fd00::/8'", "198.51.100.1", &[NO_IPV4]),
        (V6, "10.0.0.0/8", "2001:db8::9", &[NO_IPV6]),
        // What cannot be read keeps the families closed that nothing else is said of.
        (
            &both,
            "10.0.0.0/33",
            "198.51.100.1! 2001:db8::9!",
            &[
                "\"10.0.0.0/33\" is no CIDR",
                "no IPv4 client is let in",
                "no IPv6 client is let in",
            ],
        ),
        (
            &both,
            "10.0.0.0/8, nobody",
            "198.51.100.1! 2001:db8::9!",
            &["\"nobody\" is no CIDR", "no IPv6 client is let in"],
        ),
        (
            &both,
            "0.0.0.0/0, nobody",
            "198.51.100.1 2001:db8::9!",
            &["\"nobody\" is no CIDR", "no IPv6 client is let in"],
        ),
        (
            V4,
            "10.0.0.0/8, nobody",
            "198.51.100.1!",
            &["\"nobody\" is no CIDR"],
        ),
        // Leading zeros.
        (
            V4,
            "010.0.0.0/08",
            "198.51.100.1!",
            &["write 10.0.0.0/8, as which it is served"],
        ),
    ] {
        let text = format!(
            "kind: Service\nmetadata: {{ name: web }}\nspec: {{ type: LoadBalancer, allocateLoadBalancerNodePorts: false, \
             clusterIPs: [{cluster_ips}], loadBalancerSourceRanges: [{ranges}], ports: [{{ port: 80 }}] }}\n\
             status: {{ loadBalancer: {{ ingress: [{}] }} }}\n",
            addresses
                .split(", ")
                .map(|ip| format!("{{ ip: '{ip}' }}"))
                .collect::<Vec<_>>()
                .join(", ")
        );
        let mut cluster = Cluster::new();
        let messages = cluster.write("web.yaml", &text);
        assert_eq!(messages.len(), problems.len(), "{ranges}: {messages:?}");
        for part in problems {
            let is_said = |message: &String| {
                message.contains("spec.loadBalancerSourceRanges") && message.contains(part)
            };
            assert!(
                messages.iter().any(is_said),
                "{ranges}: {part}: {messages:?}"
            );
        }
        let lines = cluster.plan("web");
        let served: Vec<String> = lines
            .iter()
            .filter(|line| line.contains("LoadBalancer"))
            .map(|line| {
                let limited = if line.contains("source-ranges") {
                    "!"
                } else {
                    ""
                };
                let address = line.split_once(":80/").unwrap().0.trim_matches(['[', ']']);
                format!("{address}{limited}")
            })
            .collect();
        assert_eq!(served.join(" "), want, "{cluster_ips} {ranges}");
    }
    // External IPs likewise, and what they are not of does not take an address away from anybody.
    let text = "
kind: Service
metadata: { name: a }
spec: { clusterIP: 10.96.1.1, externalIPs: [192.0.2.1, '2001:db8::1'], ports: [{ port: 80 }] }
---
kind: Service
metadata: { name: b }
spec: { clusterIP: 'fd00:96::1', externalIPs: ['2001:db8::1', 192.0.2.1], ports: [{ port: 80 }] }
";
    let mut cluster = Cluster::new();
    assert_eq!(cluster.write("all.yaml", text), [""; 0]);
    assert_eq!(
        cluster.plan("a"),
        [
            "10.96.1.1:80/TCP ClusterIp ->",
            "192.0.2.1:80/TCP ExternalIp ->"
        ]
    );
    assert_eq!(
        cluster.plan("b"),
        [
            "[2001:db8::1]:80/TCP ExternalIp ->",
            "[fd00:96::1]:80/TCP ClusterIp ->"
        ]
    );
}

/// Which addresses are served in which field, and how they are read.
#[test]
fn special_addresses_and_leading_zeros() {
    let served = |cluster_ip: &str, external: &str, balancer: &str| {
        let text = format!(
            "kind: Service\nmetadata: {{ name: web }}\nspec: {{ type: LoadBalancer, allocateLoadBalancerNodePorts: false, \
             clusterIP: '{cluster_ip}', externalIPs: [{external}], ports: [{{ port: 80 }}] }}\n\
             status: {{ loadBalancer: {{ ingress: [{balancer}] }} }}\n"
        );
        let mut cluster = Cluster::new();
        let problems = cluster.write("web.yaml", &text);
        let lines = cluster
            .plan("web")
            .iter()
            .map(|line| line.split_once(":80/").unwrap().0.to_owned())
            .collect::<Vec<_>>();
        (lines.join(" "), problems.len())
    };
    for (cluster_ip, external, balancer, want) in [
        (
            "10.96.1.1",
            "",
            "{ ip: 169.254.7.7 }",
            ("10.96.1.1 169.254.7.7", 0),
        ),
        ("10.96.1.1", "169.254.7.7", "", ("10.96.1.1", 1)),
        ("10.96.1.1", "", "{ ip: 127.0.0.1 }", ("10.96.1.1", 1)),
        ("10.96.1.1", "", "{ ip: 0.0.0.0 }", ("10.96.1.1", 1)),
        ("10.96.1.1", "", "{ ip: 224.0.0.1 }", ("10.96.1.1", 1)),
        (
            "fd00:96::1",
            "",
            "{ ip: 'fe80::7' }",
            ("[fd00:96::1] [fe80::7]", 0),
        ),
        ("fd00:96::1", "'fe80::7'", "", ("[fd00:96::1]", 1)),
        (
            "10.96.1.1",
            "",
            "{ ip: 198.51.100.1, ipMode: VIP }",
            ("10.96.1.1 198.51.100.1", 0),
        ),
        (
            "10.96.1.1",
            "",
            "{ ip: 198.51.100.1, ipMode: Proxy }",
            ("10.96.1.1", 0),
        ),
        (
            "10.96.1.1",
            "",
            "{ ip: 198.51.100.1, ipMode: Later }",
            ("10.96.1.1", 1),
        ),
        (
            "10.096.001.01",
            "192.0.2.07",
            "{ ip: 198.051.100.001 }",
            ("10.96.1.1 192.0.2.7 198.51.100.1", 3),
        ),
    ] {
        let got = served(cluster_ip, external, balancer);
        assert_eq!(
            (got.0.as_str(), got.1),
            want,
            "{cluster_ip} {external} {balancer}"
        );
    }
}

#[test]
fn cluster_ips_have_one_slot_per_backend_and_the_others_maglev_tables() {
    let text = "
kind: Service
metadata: { name: web }
spec: { type: NodePort, clusterIP: 10.96.1.1, externalIPs: [192.0.2.1], ports: [{ port: 80, nodePort: 30080 }] }
";
    let mut cluster = Cluster::new();
    cluster.write("web.yaml", text);
    for frontend in cluster
        .model
        .plan(&ObjectName::new("default", "web"))
        .frontends
    {
        let want = match frontend.kind {
            FrontendKind::ClusterIp => Table::Direct,
            _ => Table::Maglev,
        };
        assert_eq!(frontend.table, want, "{frontend}");
    }
}

#[test]
fn every_frontend_takes_the_backends_of_its_family() {
    let text = "
kind: Service
metadata: { name: web }
spec:
  type: NodePort
  clusterIPs: [10.96.1.1, 'fd00:96::1']
  externalIPs: ['2001:db8::1']
  ports: [{ port: 80, nodePort: 30080 }]
---
kind: Endpoints
metadata: { name: web }
subsets: [{ addresses: [{ ip: 10.0.0.1 }, { ip: 'fd00::1' }], ports: [{ port: 8080 }] }]
";
    let mut cluster = Cluster::new();
    cluster.write("web.yaml", text);
    assert_eq!(
        cluster.plan("web"),
        [
            "10.96.1.1:80/TCP ClusterIp -> 10.0.0.1:8080",
            "[2001:db8::1]:80/TCP ExternalIp -> [fd00::1]:8080",
            "[fd00:96::1]:80/TCP ClusterIp -> [fd00::1]:8080",
            "0.0.0.0:30080/TCP NodePort -> 10.0.0.1:8080",
            "[::]:30080/TCP NodePort -> [fd00::1]:8080",
        ]
    );
    // A single-stack Service has its node port in its family only.
    cluster.write("web.yaml", &text.replace("10.96.1.1, ", ""));
    assert_eq!(cluster.plan("web").len(), 3);
}

#[test]
fn ports_are_joined_by_name_and_protocol() {
    let text = "
kind: Service
metadata: { name: dns }
spec:
  clusterIP: 10.96.1.1
  ports: [{ name: dns, port: 53, protocol: UDP }, { name: dns-tcp, port: 53 }, { name: sctp, port: 53, protocol: SCTP }]
---
kind: EndpointSlice
metadata: { name: dns-1, labels: { kubernetes.io/service-name: dns } }
addressType: IPv4
ports: [{ name: dns, port: 5353, protocol: UDP }, { name: dns-tcp, port: 5354 }, { name: sctp, port: 5355 }, { name: more, port: 1 }]
endpoints: [{ addresses: [10.0.0.1] }]
";
    let mut cluster = Cluster::new();
    assert_eq!(cluster.write("dns.yaml", text), [""; 0]);
    assert_eq!(
        cluster.plan("dns"),
        [
            "10.96.1.1:53/TCP ClusterIp -> 10.0.0.1:5354",
            "10.96.1.1:53/UDP ClusterIp -> 10.0.0.1:5353",
            // The slice has TCP by that name.
            "10.96.1.1:53/SCTP ClusterIp ->",
        ]
    );
}
