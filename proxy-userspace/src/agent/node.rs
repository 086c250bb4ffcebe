//! What the settings and the Node object say of this node: its name, its addresses, its entry in
//! the configuration map.

use std::{net::IpAddr, path::PathBuf};

use anyhow::Context;

use crate::{
    config::Settings,
    datapath::{
        cgroup, devices,
        load::SocketLb,
        local_ports,
        netns::{self, NodePortAddresses},
    },
    object::NodeFacts,
    sync::node::NodeSettings,
};

/// The Node's name: as given, or the host name; in lower case, as kubelet and kube-proxy have it.
pub(super) fn name(settings: &Settings) -> anyhow::Result<String> {
    if let Some(name) = &settings.node_name {
        return Ok(name.trim().to_lowercase());
    }
    let host = rustix::system::uname();
    let name = host
        .nodename()
        .to_str()
        .context("the host name is not UTF-8: give --node-name")?;
    Ok(name.trim().to_lowercase())
}

/// The cgroup2 directory that pods' cgroups are in, and whose processes the socket hook serves.
pub(super) fn cgroup_root(settings: &Settings) -> PathBuf {
    let given = settings.cgroup_root.clone();
    given.unwrap_or_else(cgroup::default_root)
}

pub(super) fn settings(settings: &Settings, addresses: &[IpAddr]) -> NodeSettings {
    // What cannot be has ended the agent before.
    let node_ports =
        NodePortAddresses::parse(&settings.nodeport_addresses, addresses).unwrap_or_default();
    NodeSettings {
        addresses: addresses.to_vec(),
        cluster_cidrs: settings.cluster_cidrs.clone(),
        service_cidrs: settings.service_cidrs(),
        answer_ping: settings.answer_ping,
        retry_silence: settings.retry_silence,
        snat_ports: settings.snat_ports.0.clone(),
        local_ports: local_ports::within(&settings.snat_ports.0),
        timeouts: settings.conntrack.ticks(),
        loopback: [false, true]
            .map(|v6| settings.localhost_node_ports && node_ports.admits_loopback(v6)),
        host_netns: netns::cookie(),
        sockets_of_node: settings.socket_lb == SocketLb::Host,
        pods_left_out: settings.socket_lb_labels,
    }
}

/// This node's addresses, best first: as given; else `bindAddress` and the Node object's, those
/// that a device here has before others (an external IP often lies on a gateway); else those of the
/// device with the default route; else any.
pub(super) fn addresses(settings: &Settings, node: &NodeFacts) -> anyhow::Result<Vec<IpAddr>> {
    if !settings.node_ips.is_empty() {
        return Ok(settings.node_ips.clone());
    }
    let mut addresses = found_addresses(node)?;
    if let Some(address) = settings.bind_address {
        addresses.retain(|other| *other != address);
        addresses.insert(0, address);
    }
    Ok(addresses)
}

fn found_addresses(node: &NodeFacts) -> anyhow::Result<Vec<IpAddr>> {
    let mut devices = devices::list().context("cannot list the devices")?;
    devices.retain(|device| !device.loopback);
    devices.sort_by_key(|device| !device.default_route);
    let usable = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_link_local(),
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    let here: Vec<IpAddr> = devices
        .into_iter()
        .flat_map(|device| device.addresses)
        .filter(usable)
        .collect();
    if node.addresses.is_empty() {
        // One of each family: the others are of bridges and pods.
        let first = |is_v4: bool| {
            here.iter()
                .copied()
                .find(|address| address.is_ipv4() == is_v4)
        };
        return Ok([true, false].into_iter().filter_map(first).collect());
    }
    let mut addresses: Vec<IpAddr> = here
        .into_iter()
        .filter(|address| node.addresses.contains(address))
        .collect();
    addresses.extend(
        node.addresses
            .iter()
            .filter(|address| !addresses.contains(address))
            .copied()
            .collect::<Vec<_>>(),
    );
    Ok(addresses)
}
