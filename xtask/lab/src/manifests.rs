//! Pods and hand-written endpoints as they stand in Kubernetes manifests: the lab makes what the
//! agents read about.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    lab::{Lab, PodSpec, Port, Sockets},
    protocol::Proto,
};

/// A host outside of the cluster, which a Service without selector names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutsideSpec {
    /// The endpoint's `hostname`, or the Service and its address.
    pub name: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// What its server listens on.
    pub ports: Vec<Port>,
}

/// What manifests say there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifests {
    /// Every Pod, ready or not.
    pub pods: Vec<PodSpec>,
    /// Endpoints with addresses that are no Pod's, no node's, and usable at all.
    pub outside: Vec<OutsideSpec>,
}

impl Manifests {
    /// Reads a file, or the `.yaml`, `.yml` and `.json` files of a folder.
    ///
    /// # Errors
    ///
    /// Names the file, and the object or the place in it, that cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let mut manifests = Self::default();
        let mut endpoints = Vec::new();
        for file in files(path)? {
            let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
            manifests.pods.extend(
                parse(&text, &mut endpoints).with_context(|| format!("{}", file.display()))?,
            );
        }
        manifests.outside = outside(&manifests.pods, endpoints);
        Ok(manifests)
    }

    /// Brings `lab` from what `before` said to what these say: what is gone or changed is removed,
    /// what is new is made.
    ///
    /// # Errors
    ///
    /// As [`Self::make`] and [`Lab::remove`].
    pub fn follow(&self, before: &Self, lab: &Lab) -> Result<()> {
        let pods = before
            .pods
            .iter()
            .filter(|pod| !self.pods.contains(pod))
            .map(|pod| &pod.name);
        let hosts = before
            .outside
            .iter()
            .filter(|host| !self.outside.contains(host))
            .map(|host| &host.name);
        for name in pods.chain(hosts).filter(|name| lab.has(name)) {
            lab.remove(name)?;
        }
        self.make(lab)
    }

    /// Makes in `lab` what it does not have yet; nothing is removed.
    ///
    /// # Errors
    ///
    /// As [`Lab::add_pod`] and [`Lab::add_outside`].
    pub fn make(&self, lab: &Lab) -> Result<()> {
        lab.add_pods(&self.pods)?;
        for host in self.outside.iter().filter(|host| !lab.has(&host.name)) {
            lab.add_outside(&host.name, &host.ips, &host.ports)?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Object {
    kind: Option<String>,
}

/// The parts that an EndpointSlice and a subset of Endpoints have in common.
#[derive(Deserialize)]
struct Subset {
    #[serde(default, alias = "addresses")]
    endpoints: Vec<Endpoint>,
    #[serde(default)]
    ports: Vec<SlicePort>,
}

#[derive(Deserialize)]
struct Endpoints {
    #[serde(default)]
    subsets: Vec<Subset>,
}

#[derive(Deserialize)]
struct Endpoint {
    /// Of a slice; names instead of addresses in slices of type FQDN.
    #[serde(default)]
    addresses: Vec<String>,
    /// Of Endpoints.
    ip: Option<String>,
    hostname: Option<String>,
}

#[derive(Deserialize)]
struct SlicePort {
    port: Option<u16>,
    protocol: Option<String>,
}

/// A port that the lab has a server for; for others (SCTP) there is none.
pub(crate) fn known_port(number: Option<u16>, protocol: Option<&str>) -> Option<Port> {
    let proto = match protocol {
        None | Some("TCP") => Proto::Tcp,
        Some("UDP") => Proto::Udp,
        Some(_) => return None,
    };
    Some(Port {
        proto,
        number: number?,
    })
}

impl Subset {
    /// Adds every address with every port.
    fn list(self, object: &str, endpoints: &mut Vec<EndpointPort>) {
        for endpoint in self.endpoints {
            let addresses = endpoint.addresses.iter().chain(&endpoint.ip);
            for ip in addresses.filter_map(|address| address.parse::<IpAddr>().ok()) {
                let by_address = || format!("{object}-{}", ip.to_string().replace(['.', ':'], "-"));
                let name = endpoint.hostname.clone().unwrap_or_else(by_address);
                let ports = self
                    .ports
                    .iter()
                    .filter_map(|port| known_port(port.port, port.protocol.as_deref()));
                endpoints.extend(ports.map(|port| EndpointPort {
                    name: name.clone(),
                    ip,
                    port,
                }));
            }
        }
    }
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
    protocol: Option<String>,
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

pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("{}", path.display()))? {
        let file = entry.with_context(|| format!("{}", path.display()))?.path();
        if file.extension().is_some_and(|extension| {
            extension == "yaml" || extension == "yml" || extension == "json"
        }) {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// An address and port of an Endpoints object or a slice.
struct EndpointPort {
    name: String,
    ip: IpAddr,
    port: Port,
}

/// The objects of a file.
pub(crate) fn documents(file: &Path) -> Result<Vec<Value>> {
    let read =
        || -> Result<Vec<Value>> { Ok(serde_saphyr::from_multiple(&fs::read_to_string(file)?)?) };
    let mut documents = read().with_context(|| format!("{}", file.display()))?;
    documents.retain(|document| !document.is_null());
    Ok(documents)
}

fn parse(text: &str, endpoints: &mut Vec<EndpointPort>) -> Result<Vec<PodSpec>> {
    let mut pods = Vec::new();
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    for document in documents.into_iter().filter(|document| !document.is_null()) {
        let object =
            Object::deserialize(&document).context("a document is no Kubernetes object")?;
        let name = document
            .pointer("/metadata/name")
            .and_then(Value::as_str)
            .unwrap_or("without metadata.name");
        match object.kind.as_deref() {
            // The kubelet gives it a status, and an address ([`crate::Kubelet`]).
            Some("Pod") if document.get("status").is_none() => {}
            Some("Pod") => {
                pods.push(spec(
                    Pod::deserialize(&document).with_context(|| format!("Pod {name}"))?,
                )?);
            }
            Some("EndpointSlice") => {
                let subset = Subset::deserialize(&document)
                    .with_context(|| format!("EndpointSlice {name}"))?;
                subset.list(name, endpoints);
            }
            Some("Endpoints") => {
                let object = Endpoints::deserialize(&document)
                    .with_context(|| format!("Endpoints {name}"))?;
                object
                    .subsets
                    .into_iter()
                    .for_each(|subset| subset.list(name, endpoints));
            }
            _ => {}
        }
    }
    Ok(pods)
}

/// Endpoints that have to be made, joined to hosts by name.
fn outside(pods: &[PodSpec], endpoints: Vec<EndpointPort>) -> Vec<OutsideSpec> {
    let mut hosts: BTreeMap<String, (BTreeSet<IpAddr>, BTreeSet<Port>)> = BTreeMap::new();
    for endpoint in endpoints {
        if is_outside(endpoint.ip) && !pods.iter().any(|pod| pod.ips.contains(&endpoint.ip)) {
            let (ips, ports) = hosts.entry(endpoint.name).or_default();
            ips.insert(endpoint.ip);
            ports.insert(endpoint.port);
        }
    }
    let mut taken = BTreeSet::new();
    hosts
        .into_iter()
        .map(|(name, (ips, ports))| OutsideSpec {
            name,
            ips: ips.into_iter().filter(|&ip| taken.insert(ip)).collect(),
            ports: ports.into_iter().collect(),
        })
        .filter(|host| !host.ips.is_empty())
        .collect()
}

/// Whether an outside host can have the address: it is no node's, in no pod CIDR, and not one that
/// Kubernetes forbids.
fn is_outside(ip: IpAddr) -> bool {
    let special = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast();
    let here = match ip {
        IpAddr::V4(ip) => {
            let octets = ip.octets();
            ip.is_link_local()
                || ip == Ipv4Addr::BROADCAST
                || octets[..2] == [10, 44]
                || octets[..3] == [192, 168, 50]
        }
        IpAddr::V6(ip) => {
            ip.is_unicast_link_local() || [0xfd44, 0xfd50].contains(&Ipv6Addr::segments(&ip)[0])
        }
    };
    !special && !here
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
    let ports = pod
        .spec
        .containers
        .iter()
        .flat_map(|container| &container.ports);
    let ports = ports
        .filter_map(|port| known_port(Some(port.container_port), port.protocol.as_deref()))
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
        let pods = parse(PODS, &mut Vec::new()).unwrap();
        let expected = PodSpec {
            name: "web-1".to_owned(),
            node: "node-a".to_owned(),
            ips: vec![
                "10.44.0.1".parse().unwrap(),
                "fd44:0:0:a::1".parse().unwrap(),
            ],
            ports: vec![Port::tcp(8080), Port::udp(53)],
            sockets: Sockets::Hooked,
        };
        assert_eq!(pods, [expected]);
    }

    #[test]
    fn a_pod_without_a_node_is_named() {
        let error = parse(
            "{ kind: Pod, metadata: { name: web-1 }, spec: {}, status: {} }",
            &mut Vec::new(),
        )
        .unwrap_err();
        assert!(
            format!("{error:#}").contains("Pod web-1: spec.nodeName"),
            "{error:#}"
        );
    }

    #[test]
    fn hand_written_endpoints_are_outside_hosts() {
        let text = r#"
kind: EndpointSlice
metadata: { name: db-4 }
addressType: IPv4
ports: [{ port: 5432 }]
endpoints:
  - { addresses: [203.0.113.41], hostname: db }
  - { addresses: [127.0.0.1] }
  - { addresses: [10.44.0.1] }
---
kind: EndpointSlice
metadata: { name: db-6 }
addressType: IPv6
ports: [{ port: 5432 }]
endpoints: [{ addresses: ["2001:db8:113::41"], hostname: db }]
---
kind: Endpoints
metadata: { name: other }
subsets: [{ addresses: [{ ip: 192.0.2.42 }], ports: [{ port: 53, protocol: UDP }, { port: 54, protocol: SCTP }] }]
"#;
        let mut endpoints = Vec::new();
        let pods = parse(text, &mut endpoints).unwrap();
        let db = OutsideSpec {
            name: "db".to_owned(),
            ips: vec![
                "203.0.113.41".parse().unwrap(),
                "2001:db8:113::41".parse().unwrap(),
            ],
            ports: vec![Port::tcp(5432)],
        };
        let other = OutsideSpec {
            name: "other-192-0-2-42".to_owned(),
            ips: vec!["192.0.2.42".parse().unwrap()],
            ports: vec![Port::udp(53)],
        };
        assert_eq!(outside(&pods, endpoints), [db, other]);
    }

    #[test]
    fn the_manifests_of_the_demo_can_be_made() {
        let manifests =
            Manifests::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/dev"))
                .unwrap();
        assert!(
            manifests.pods.len() >= 7 && manifests.outside.len() >= 2,
            "{manifests:?}"
        );
        assert!(
            manifests
                .pods
                .iter()
                .all(|pod| pod.ips.len() == 2 && !pod.ports.is_empty()),
            "{manifests:?}"
        );
    }
}
