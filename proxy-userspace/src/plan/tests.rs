//! Which backends a frontend has, row by row: the Service and its endpoints in, frontends out.
//!
//! The node is `node-a` in `zone-a`. An endpoint is written `address condition node`, with hints behind it.

use super::*;
use crate::source::manifests::tests::Cluster;

const NODE: &str = "
kind: Node
metadata: { name: node-a, labels: { topology.kubernetes.io/zone: zone-a } }
";

/// Plans a Service of one port 80 with these endpoints of port 8080.
fn plan(spec: &str, endpoints: &[&str]) -> Vec<String> {
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
        let (address, condition, node) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let conditions = match condition {
            "ready" => "ready: true, serving: true, terminating: false",
            "default" => "",
            "starting" => "ready: false, serving: false, terminating: false",
            "leaving" => "ready: false, serving: true, terminating: true",
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
    let mut cluster = Cluster::new();
    assert_eq!(cluster.write("web.yaml", &text), [""; 0], "{text}");
    cluster.plan("web")
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
        (&["10.0.0.1 ready node-b", "10.0.0.2 starting node-b"][..], "10.0.0.1"),
        (&["10.0.0.1 default node-b", "10.0.0.2 leaving node-b"], "10.0.0.1"),
        (
            &[
                "10.0.0.1 leaving node-b",
                "10.0.0.2 dying node-b",
                "10.0.0.3 starting node-b",
            ],
            "10.0.0.1",
        ),
        (&["10.0.0.1 dying node-b", "10.0.0.2 starting node-b"], ""),
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

#[test]
fn an_endpoint_in_several_slices_is_one() {
    for duplicates in [
        ["10.0.0.1 ready node-a", "10.0.0.1 ready node-a"],
        ["10.0.0.1 ready node-a", "10.0.0.1 starting node-a"],
        ["10.0.0.1 starting node-b", "10.0.0.1 ready node-a"],
    ] {
        assert_eq!(backends("", &duplicates), "10.0.0.1*", "{duplicates:?}");
    }
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
fn hints_keep_internal_flows_near_when_all_endpoints_have_them() {
    for (endpoints, want) in [
        (
            &["10.0.0.1 ready node-a zone-a", "10.0.0.2 ready node-b zone-b"][..],
            "10.0.0.1*",
        ),
        (
            &["10.0.0.1 ready node-a zone-a", "10.0.0.2 ready node-b"],
            "10.0.0.1* 10.0.0.2",
        ),
        (
            &["10.0.0.1 ready node-b zone-b", "10.0.0.2 ready node-b zone-c"],
            "10.0.0.1 10.0.0.2",
        ),
        (
            &["10.0.0.1 ready node-b zone-b zone-a", "10.0.0.2 ready node-b zone-b"],
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
            &["10.0.0.1 leaving node-b zone-a", "10.0.0.2 leaving node-b zone-b"],
            "10.0.0.1 10.0.0.2",
        ),
    ] {
        let lines = plan("type: NodePort", endpoints);
        let internal: Vec<&String> = lines.iter().filter(|line| !line.starts_with("External")).collect();
        for line in internal {
            let got = line.split_once("->").unwrap().1.replace(":8080", "");
            assert_eq!(got.trim(), want, "{endpoints:?}");
        }
    }
    let lines = plan(
        "type: NodePort",
        &["10.0.0.1 ready node-a zone-a", "10.0.0.2 ready node-b zone-b"],
    );
    assert_eq!(
        lines[1], "External 10.96.1.1:80/TCP ClusterIp -> 10.0.0.1:8080* 10.0.0.2:8080",
        "external clients are in no zone"
    );
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
    for frontend in cluster.model.plan(&ObjectName::new("default", "web")).frontends {
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
