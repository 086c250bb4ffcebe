//! Pods and outside hosts.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    BRIDGE_HOST, Cni, Lab, MAX_DEVICE_NAME, Place, PodLink, PodSpec, Port, Sockets, State,
    WAN_GATEWAY_V4, WAN_GATEWAY_V6, pod_address_v4, pod_address_v6,
};
use crate::{client::Client, netns::NetNs, protocol::Proto, tunnel::Tunnel};

/// Every pod's gateway with [`Cni::Routed`], as Calico has it: no device has it, the node answers
/// ARP by proxy.
const POD_GATEWAY_V4: &str = "169.254.1.1";
const POD_GATEWAY_V6: &str = "fe80::ee:ee";
/// Last byte of the first pod address that the lab gives itself.
const FIRST_FREE_HOST: u16 = 100;
fn host_route(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

impl Lab {
    /// Makes a pod and starts its server; it answers when this returns.
    ///
    /// # Errors
    ///
    /// When the name is taken, the lab has no such node, or a namespace, device, route or socket
    /// cannot be made.
    pub fn add_pod(&self, pod: &PodSpec) -> Result<()> {
        self.add_pod_inner(pod)
            .with_context(|| format!("pod {}", pod.name))
    }

    fn add_pod_inner(&self, pod: &PodSpec) -> Result<()> {
        let mut state = self.state();
        ensure!(!state.places.contains_key(&pod.name), "the name is taken");
        let State { nodes, places, .. } = &mut *state;
        let node = nodes
            .get(&pod.node)
            .with_context(|| format!("the lab has no node {}", pod.node))?;
        let ips = if pod.ips.is_empty() {
            free_addresses(node.index, places)?
        } else {
            pod.ips.clone()
        };
        if let Some((name, _)) = places
            .iter()
            .find(|(_, place)| place.ips.iter().any(|ip| ips.contains(ip)))
        {
            bail!("{name} has the same address");
        }
        let device = device_name(&pod.name, &pod.node, places);
        let ns = self.make_ns(&pod.name, false)?;
        let mut on_node = Vec::new();
        let mut in_pod = vec!["link set eth0 up".to_owned()];
        let link = self.settings.network.pods;
        let tunnel = match link {
            PodLink::Tun => Some(Tunnel::new([(&node.ns, &device), (&ns, "eth0")])?),
            PodLink::Veth => {
                on_node.push(format!(
                    "link add name {device} type veth peer name eth0 netns {}",
                    ns.name()
                ));
                None
            }
        };
        match self.settings.cni {
            _ if link == PodLink::Tun => {
                on_node.extend(
                    ips.iter()
                        .map(|&ip| format!("route add {} dev {device}", host_route(ip))),
                );
                in_pod.extend(ips.iter().map(|&ip| add_address(ip, &host_route(ip))));
                in_pod.push("route add default dev eth0".to_owned());
                in_pod.push("route add ::/0 dev eth0".to_owned());
            }
            Cni::Routed => {
                on_node.push(format!("link set {device} up"));
                on_node.push(format!(
                    "address add {POD_GATEWAY_V6}/64 dev {device} nodad"
                ));
                on_node.extend(
                    ips.iter()
                        .map(|&ip| format!("route add {} dev {device}", host_route(ip))),
                );
                in_pod.extend(ips.iter().map(|&ip| add_address(ip, &host_route(ip))));
                if ips.iter().any(IpAddr::is_ipv4) {
                    in_pod.push(format!("route add {POD_GATEWAY_V4} dev eth0 scope link"));
                    in_pod.push(format!("route add default via {POD_GATEWAY_V4} dev eth0"));
                }
                if ips.iter().any(IpAddr::is_ipv6) {
                    in_pod.push(format!("route add default via {POD_GATEWAY_V6} dev eth0"));
                }
            }
            Cni::Bridge => {
                on_node.push(format!("link set {device} master cni0 up"));
                for &ip in &ips {
                    let (length, gateway) = if ip.is_ipv4() {
                        (24, pod_address_v4(node.index, BRIDGE_HOST))
                    } else {
                        (64, pod_address_v6(node.index, BRIDGE_HOST))
                    };
                    in_pod.push(add_address(ip, &format!("{ip}/{length}")));
                    in_pod.push(format!("route replace default via {gateway}"));
                }
            }
        }
        node.ns.ip(&on_node)?;
        if self.settings.cni == Cni::Routed && link == PodLink::Veth {
            let proxy_arp = format!("ipv4.conf.{device}.proxy_arp");
            // The kernel would wait up to 0.8 s before it answers for another.
            let proxy_delay = format!("ipv4.neigh.{device}.proxy_delay");
            node.ns.sysctl(&[(&proxy_arp, "1"), (&proxy_delay, "0")])?;
        }
        ns.ip(&in_pod)?;
        if link == PodLink::Veth {
            self.offloads(&node.ns, &[&device], false)?;
            self.offloads(&ns, &["eth0"], false)?;
        }
        let cgroup = match pod.sockets {
            Sockets::Hooked => self.node_cgroup(&pod.node).join("pods"),
            Sockets::Unhooked => self.cgroup.join("unhooked"),
        };
        let server = start_server(&pod.name, &ns, &cgroup, &ips, &pod.ports)?;
        let place = Place {
            ns,
            node: Some(pod.node.clone()),
            ips,
            device: Some(device),
            server,
            tunnel,
        };
        places.insert(pod.name.clone(), place);
        Ok(())
    }

    /// Makes a host outside of the cluster; its server, if it has ports, answers when this returns.
    /// The fabric routes addresses of any range to it.
    ///
    /// # Errors
    ///
    /// When the name or an address is taken, or a namespace, device, route or socket cannot be
    /// made.
    pub fn add_outside(&self, name: &str, ips: &[IpAddr], ports: &[Port]) -> Result<()> {
        self.add_outside_inner(name, ips, ports)
            .with_context(|| format!("outside host {name}"))
    }

    fn add_outside_inner(&self, name: &str, ips: &[IpAddr], ports: &[Port]) -> Result<()> {
        let mut state = self.state();
        ensure!(!state.places.contains_key(name), "the name is taken");
        let device = device_name(name, "", &state.places);
        let ns = self.make_ns(name, false)?;
        let mut in_fabric = vec![
            format!(
                "link add name {device} type veth peer name eth0 netns {}",
                ns.name()
            ),
            format!("link set {device} master wan0 up"),
        ];
        let mut inside = vec!["link set eth0 up".to_owned()];
        for &ip in ips {
            let (on_link, length, gateway): (bool, u8, IpAddr) = match ip {
                IpAddr::V4(ip) => (
                    ip.octets()[..3] == WAN_GATEWAY_V4.octets()[..3],
                    24,
                    WAN_GATEWAY_V4.into(),
                ),
                IpAddr::V6(ip) => (
                    ip.segments()[..4] == WAN_GATEWAY_V6.segments()[..4],
                    64,
                    WAN_GATEWAY_V6.into(),
                ),
            };
            if on_link {
                inside.push(add_address(ip, &format!("{ip}/{length}")));
            } else {
                inside.push(add_address(ip, &host_route(ip)));
                in_fabric.push(format!("route add {} dev wan0", host_route(ip)));
            }
            inside.push(format!(
                "route replace default via {gateway} dev eth0 onlink"
            ));
        }
        self.fabric.ip(&in_fabric)?;
        ns.ip(&inside)?;
        self.offloads(&self.fabric, &[&device], false)?;
        self.offloads(&ns, &["eth0"], false)?;
        let unhooked = self.cgroup.join("unhooked");
        let server = if ports.is_empty() {
            None
        } else {
            start_server(name, &ns, &unhooked, ips, ports)?
        };
        let place = Place {
            ns,
            node: None,
            ips: ips.to_vec(),
            device: Some(device),
            server,
            tunnel: None,
        };
        state.places.insert(name.to_owned(), place);
        Ok(())
    }

    /// An outside host behind a tunnel without link-layer header to a node (a VPN's client).
    pub(super) fn add_vpn_client(&self, name: &str, node: &str) -> Result<()> {
        let ns = self.make_ns(name, false)?;
        let mut state = self.state();
        let node_ns = &state.nodes.get(node).context("no such node")?.ns;
        let tunnel = Tunnel::new([(node_ns, "tun0"), (&ns, "eth0")])?;
        let ips: Vec<IpAddr> = vec!["10.8.0.2".parse()?, "fd08::2".parse()?];
        node_ns.ip(&[
            "address add 10.8.0.1/24 dev tun0".to_owned(),
            "address add fd08::1/64 dev tun0 nodad".to_owned(),
        ])?;
        ns.ip(&[
            "address add 10.8.0.2/24 dev eth0".to_owned(),
            "address add fd08::2/64 dev eth0 nodad".to_owned(),
            "route add default dev eth0".to_owned(),
            "route add ::/0 dev eth0".to_owned(),
        ])?;
        let place = Place {
            ns,
            node: None,
            ips,
            device: Some("tun0".to_owned()),
            server: None,
            tunnel: Some(tunnel),
        };
        state.places.insert(name.to_owned(), place);
        Ok(())
    }

    /// Removes a pod or an outside host with its devices and routes; clients in it lose their
    /// network.
    ///
    /// # Errors
    ///
    /// When the lab has none of that name.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut state = self.state();
        ensure!(
            !state.nodes.contains_key(name),
            "{name} is a node: nodes stay"
        );
        let place = state
            .places
            .remove(name)
            .with_context(|| format!("the lab has no pod {name}"))?;
        drop(place.server);
        let device = place
            .device
            .with_context(|| format!("{name} has no device"))?;
        let other = place
            .node
            .and_then(|node| state.nodes.get(&node))
            .map_or(&self.fabric, |node| &node.ns);
        // The namespace may outlive its name (a client in it), so the device does not go with it at
        // once. A tunnel's may be gone.
        if place.tunnel.is_some() {
            return Ok(());
        }
        other.ip(&[format!("link delete {device}")])
    }

    /// Ends a pod's server, or starts it again: the pod stays, its ports are closed meanwhile.
    ///
    /// # Errors
    ///
    /// When the lab has no such pod, or a port cannot be listened on.
    pub fn set_serving(&self, name: &str, ports: &[Port]) -> Result<()> {
        let mut state = self.state();
        let place = state
            .places
            .get_mut(name)
            .with_context(|| format!("the lab has no pod {name}"))?;
        place.server = None;
        let cgroup = match &place.node {
            Some(node) => self.node_cgroup(node).join("pods"),
            None => self.cgroup.join("unhooked"),
        };
        if !ports.is_empty() {
            place.server = start_server(name, &place.ns, &cgroup, &place.ips, ports)?;
        }
        Ok(())
    }

    /// Makes the pods of a manifest list, and leaves out those that exist.
    ///
    /// # Errors
    ///
    /// As [`Self::add_pod`].
    pub fn add_pods(&self, pods: &[PodSpec]) -> Result<()> {
        for pod in pods {
            if !self.has(&pod.name) {
                self.add_pod(pod)?;
            }
        }
        Ok(())
    }
}

fn add_address(ip: IpAddr, with_length: &str) -> String {
    format!(
        "address add {with_length} dev eth0{}",
        if ip.is_ipv6() { " nodad" } else { "" }
    )
}

/// A server on every address and port, without loopback: UDP answers then come from the address
/// that was asked.
fn start_server(
    name: &str,
    ns: &NetNs,
    cgroup: &Path,
    ips: &[IpAddr],
    ports: &[Port],
) -> Result<Option<Client>> {
    let server = Client::start(name, ns, cgroup)?;
    let listen: Vec<(Proto, SocketAddr)> = ips
        .iter()
        .flat_map(|&ip| {
            ports
                .iter()
                .map(move |port| (port.proto, SocketAddr::new(ip, port.number)))
        })
        .collect();
    server.serve(name, &listen)?;
    Ok(Some(server))
}

/// `veth-<pod>`, with the pod's end only where the whole is too long, and a number where that is
/// taken.
fn device_name(pod: &str, node: &str, places: &BTreeMap<String, Place>) -> String {
    let taken = |name: &str| {
        places.values().any(|place| {
            place.node.as_deref().unwrap_or_default() == node
                && place.device.as_deref() == Some(name)
        })
    };
    let mut tail: String = pod
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    tail = tail.split_off(tail.len().saturating_sub(MAX_DEVICE_NAME - "veth-".len()));
    let mut name = format!("veth-{tail}");
    let mut number = 0_usize;
    while taken(&name) {
        name = format!("veth-{number}");
        number += 1;
    }
    name
}

/// The first pair of addresses in the node's pod CIDRs that nothing has.
fn free_addresses(node: usize, places: &BTreeMap<String, Place>) -> Result<Vec<IpAddr>> {
    (FIRST_FREE_HOST..BRIDGE_HOST)
        .map(|host| vec![pod_address_v4(node, host), pod_address_v6(node, host)])
        .find(|pair| {
            !places
                .values()
                .any(|place| place.ips.iter().any(|ip| pair.contains(ip)))
        })
        .context("the node's pod CIDR is used up")
}
