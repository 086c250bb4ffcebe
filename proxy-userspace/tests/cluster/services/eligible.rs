//! Who is a backend, and who is a frontend at all.

use super::*;

/// A hand-written slice of one Service.
fn slice(name: &str, service: &str, endpoints: &[String]) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: {name}, labels: {{ kubernetes.io/service-name: {service} }} }}\n\
         addressType: IPv4\nports: [{{ name: t, port: {APP}, protocol: TCP }}, {{ name: u, port: {APP}, protocol: UDP }}]\n\
         endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

/// B1, B2, B3, B4, B6, F3 and F7: who is a backend, and who is a frontend at all.
#[test]
fn only_eligible_endpoints_are_reached() {
    let cluster = Cluster::start("native", &[]);
    let [a, b, c] = ["web-a", "web-b", "web-c"].map(|pod| cluster.ip(pod, false));
    let endpoint = |ip: IpAddr, conditions: &str| {
        format!("{{ addresses: ['{ip}'], conditions: {{ {conditions} }} }}")
    };
    let bare = |name: &str, number: u8| {
        service(name, number, "").replace(&format!("  selector: {{ app: {name} }}\n"), "")
    };
    let ready = "ready: true";
    let leaving = "ready: false, serving: true, terminating: true";
    let labelled = bare("foreign", 15).replace(
        "name: foreign",
        "name: foreign, labels: { service.kubernetes.io/service-proxy-name: other }",
    );
    let forbidden: IpAddr = "127.0.0.1".parse().unwrap();
    cluster.write("rows.yaml", &[
        bare("union", 10),
        slice("union-1", "union", &[endpoint(a, ""), endpoint(b, ready)]),
        slice("union-2", "union", &[endpoint(b, ready), endpoint(c, ready)]),
        bare("some", 11),
        slice("some-1", "some", &[endpoint(a, ready), endpoint(b, "ready: false"), endpoint(c, leaving)]),
        bare("last", 12),
        slice("last-1", "last", &[endpoint(b, "ready: false"), endpoint(c, leaving)]),
        bare("hand", 13),
        format!(
            "apiVersion: v1\nkind: Endpoints\nmetadata: {{ name: hand }}\nsubsets: [{{ addresses: [{{ ip: '{b}' }}], \
             ports: [{{ name: t, port: {APP} }}, {{ name: u, port: {APP}, protocol: UDP }}] }}]\n"
        ),
        bare("odd", 14),
        slice("odd-1", "odd", &[endpoint(forbidden, ready), endpoint(c, ready)]),
        labelled,
        slice("foreign-1", "foreign", &[endpoint(a, ready)]),
        bare("early", 16).replace("spec:\n", "spec:\n  publishNotReadyAddresses: true\n"),
        slice("early-1", "early", &[endpoint(b, "ready: false")]),
        service("proxied", 17, "  type: LoadBalancer\n")
            + "status: { loadBalancer: { ingress: [{ ip: 198.51.100.17, ipMode: Proxy }] } }\n",
    ]);
    cluster.agents[0]
        .wait_for("odd-1", Duration::from_secs(5))
        .unwrap();
    let rows: [(u8, &[&str]); 6] = [
        (10, &["web-a", "web-b", "web-c"]),
        (11, &["web-a"]),
        (12, &["web-c"]),
        (13, &["web-b"]),
        (14, &["web-c"]),
        (16, &["web-b"]),
    ];
    let short = Dial {
        connected: true,
        ..Dial::within(Duration::from_millis(500))
    };
    for name in ["hooked", "packets", "client"] {
        let client = cluster.client(name);
        wait_until("the rows are served", || {
            client
                .once(Proto::Tcp, at("10.96.0.16", 80), &short)
                .is_ok()
        });
        for proto in BOTH {
            for (number, servers) in rows {
                every_backend(
                    &client,
                    proto,
                    at(&format!("10.96.0.{number}"), 80),
                    servers,
                    |_| (),
                );
            }
            for nobodys in ["10.96.0.15", "198.51.100.17"] {
                assert!(
                    client.once(proto, at(nobodys, 80), &short).is_err(),
                    "{proto} {nobodys} from {name}"
                );
            }
        }
    }
}
