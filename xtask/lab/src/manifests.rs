//! Pods as they stand in Kubernetes manifests: the lab makes those that the agents read about.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{
    lab::{PodSpec, Port, Sockets},
    protocol::Proto,
};

#[derive(Deserialize)]
struct Object {
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Pod {
    metadata: Metadata,
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    node_name: Option<String>,
    #[serde(default)]
    containers: Vec<Container>,
}

#[derive(Deserialize)]
struct Container {
    #[serde(default)]
    ports: Vec<ContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    container_port: u16,
    protocol: Option<Proto>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    #[serde(rename = "podIP")]
    pod_ip: Option<IpAddr>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: IpAddr,
}

/// The Pods in a file, or in the `.yaml`, `.yml` and `.json` files of a folder, ready or not; other objects are left
/// to the agent.
///
/// # Errors
///
/// Names the file, and the Pod or the place in it, that cannot be read.
pub fn pods(path: &Path) -> Result<Vec<PodSpec>> {
    let mut pods = Vec::new();
    for file in files(path)? {
        let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        pods.extend(parse(&text).with_context(|| format!("{}", file.display()))?);
    }
    Ok(pods)
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("{}", path.display()))? {
        let file = entry.with_context(|| format!("{}", path.display()))?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
        {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn parse(text: &str) -> Result<Vec<PodSpec>> {
    let mut pods = Vec::new();
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(text)?;
    for document in documents.into_iter().filter(|document| !document.is_null()) {
        let object = Object::deserialize(&document).context("a document is no Kubernetes object")?;
        if object.kind.as_deref() == Some("Pod") {
            let pod = Pod::deserialize(&document).with_context(|| {
                let name = document.pointer("/metadata/name").and_then(serde_json::Value::as_str);
                format!("Pod {}", name.unwrap_or("without metadata.name"))
            })?;
            pods.push(spec(pod)?);
        }
    }
    Ok(pods)
}

fn spec(pod: Pod) -> Result<PodSpec> {
    let name = pod.metadata.name;
    let Some(node) = pod.spec.node_name else {
        bail!("Pod {name}: spec.nodeName is missing: set it to a node of the lab")
    };
    let mut ips: Vec<IpAddr> = pod.status.pod_ips.into_iter().map(|ip| ip.ip).collect();
    if let Some(ip) = pod.status.pod_ip.filter(|ip| !ips.contains(ip)) {
        ips.insert(0, ip);
    }
    if ips.is_empty() {
        bail!("Pod {name}: status.podIPs is missing: the agent would not know its addresses");
    }
    let ports = pod.spec.containers.iter().flat_map(|container| &container.ports);
    let ports = ports
        .map(|port| Port {
            proto: port.protocol.unwrap_or(Proto::Tcp),
            number: port.container_port,
        })
        .collect();
    Ok(PodSpec {
        name,
        node,
        ips,
        ports,
        sockets: Sockets::Hooked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: &str = r#"
kind: Service
metadata: { name: web }
---
---
kind: Pod
metadata: { name: web-1, namespace: default }
spec:
  nodeName: node-a
  containers:
    - ports: [{ containerPort: 8080 }, { containerPort: 53, protocol: UDP }]
status: { podIP: 10.44.0.1, podIPs: [{ ip: 10.44.0.1 }, { ip: "fd44:0:0:a::1" }], conditions: [] }
"#;

    #[test]
    fn pods_are_found_among_other_objects() {
        let pods = parse(PODS).unwrap();
        let expected = PodSpec {
            name: "web-1".to_owned(),
            node: "node-a".to_owned(),
            ips: vec!["10.44.0.1".parse().unwrap(), "fd44:0:0:a::1".parse().unwrap()],
            ports: vec![Port::tcp(8080), Port::udp(53)],
            sockets: Sockets::Hooked,
        };
        assert_eq!(pods, [expected]);
    }

    #[test]
    fn a_pod_without_a_node_is_named() {
        let error = parse("{ kind: Pod, metadata: { name: web-1 }, spec: {} }").unwrap_err();
        assert!(format!("{error:#}").contains("Pod web-1: spec.nodeName"), "{error:#}");
    }
}
