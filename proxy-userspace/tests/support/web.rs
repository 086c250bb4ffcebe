//! The Service `web`: a ClusterIP and a node port, of both families, for TCP and UDP. Its endpoints
//! are written by hand.

use std::{fs, path::Path};

use shunt_lab::Lab;

/// What its pods listen on.
pub(crate) const APP: u16 = 8080;
pub(crate) const NODE_PORT: u16 = 30080;
pub(crate) const CLUSTER_IPS: [&str; 2] = ["10.96.0.1", "fd96::1"];

pub(crate) fn service() -> String {
    let port = |proto: &str| {
        format!(
            "{{ name: {proto}, protocol: {proto}, port: 80, targetPort: {APP}, nodePort: {NODE_PORT} }}"
        )
    };
    let [v4, v6] = CLUSTER_IPS;
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: web }}\nspec:\n  type: NodePort\n  clusterIP: {v4}\n  \
         clusterIPs: [{v4}, '{v6}']\n  ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]\n  ports: [{}, {}]\n",
        port("TCP"),
        port("UDP"),
    )
}

/// The slices of these pods, each with its node and its conditions other than ready.
pub(crate) fn slices(lab: &Lab, pods: &[(&str, &str, &str)]) -> String {
    let of_family = |(family, v6): (&str, bool)| {
        let endpoint = |(pod, node, conditions): &(&str, &str, &str)| {
            let ips = lab.ips(pod).unwrap();
            let ip = ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
            format!("{{ addresses: ['{ip}'], nodeName: {node}, conditions: {{ {conditions} }} }}")
        };
        let endpoints: Vec<String> = pods.iter().map(endpoint).collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: web-{}, labels: {{ \
             kubernetes.io/service-name: web }} }}\naddressType: {family}\nports: [{{ name: TCP, protocol: TCP, port: {APP} }}, \
             {{ name: UDP, protocol: UDP, port: {APP} }}]\nendpoints: [{}]\n",
            family.to_lowercase(),
            endpoints.join(", "),
        )
    };
    [("IPv4", false), ("IPv6", true)]
        .map(of_family)
        .join("---\n")
}

/// Writes a manifest in one step, as agents that follow it need.
pub(crate) fn write(folder: &Path, file: &str, text: &str) {
    let path = folder.join(file);
    let hidden = path.with_extension("new");
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, path).unwrap();
}
