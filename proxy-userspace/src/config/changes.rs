//! What a changed file of `--config` means to an agent that runs: which settings it takes over at
//! once, and which wait for its next start.

use super::Settings;

/// The settings in which two differ, by the names that `--config` has for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Taken over by a running agent.
    pub live: Vec<&'static str>,
    /// Of these a running agent goes on with the old.
    pub at_restart: Vec<&'static str>,
}

impl Settings {
    /// What `new` changes. Names every setting, so that nobody adds one without saying which kind
    /// it is.
    pub fn changes(&self, new: &Self) -> Changes {
        let Self {
            kubeconfig,
            manifests,
            service_proxy_name,
            node_name,
            node_ips,
            bind_address,
            devices,
            pod_devices,
            cgroup_root,
            bpf_root,
            xdp,
            socket_lb,
            socket_lb_labels,
            fast_path,
            count_traffic,
            datapath_log,
            service_cidrs,
            answer_ping,
            load_balancer_cidrs,
            service_node_port_range,
            cluster_cidrs,
            nodeport_addresses,
            localhost_node_ports,
            external_ips,
            masquerade_all,
            retry_silence,
            snat_ports,
            conntrack,
            capacities,
            healthz_bind_address,
            metrics_bind_address,
            metrics_services,
            dns,
            bind_address_hard_fail,
            netfilter,
            logging,
        } = self;
        let live = [
            ("bindAddress", *bind_address != new.bind_address),
            ("devices", *devices != new.devices),
            ("podDevices", *pod_devices != new.pod_devices),
            ("answerPing", *answer_ping != new.answer_ping),
            ("clusterCIDR", *cluster_cidrs != new.cluster_cidrs),
            (
                "nodePortAddresses",
                *nodeport_addresses != new.nodeport_addresses,
            ),
            (
                "iptables.localhostNodePorts",
                *localhost_node_ports != new.localhost_node_ports,
            ),
            ("retrySilenceSeconds", *retry_silence != new.retry_silence),
            (
                "conntrack",
                *conntrack != new.conntrack || *netfilter != new.netfilter,
            ),
            (
                "serviceCIDRs",
                self.takes_service_cidrs() && *service_cidrs != new.service_cidrs,
            ),
        ];
        let at_restart = [
            ("clientConnection.kubeconfig", *kubeconfig != new.kubeconfig),
            ("manifests", *manifests != new.manifests),
            (
                "serviceProxyName",
                *service_proxy_name != new.service_proxy_name,
            ),
            ("hostnameOverride", *node_name != new.node_name),
            ("nodeIPs", *node_ips != new.node_ips),
            ("cgroupRoot", *cgroup_root != new.cgroup_root),
            ("bpfRoot", *bpf_root != new.bpf_root),
            ("xdp", *xdp != new.xdp),
            ("socketLB", *socket_lb != new.socket_lb),
            ("socketLBLabels", *socket_lb_labels != new.socket_lb_labels),
            ("fastPath", *fast_path != new.fast_path),
            ("countTraffic", *count_traffic != new.count_traffic),
            ("datapathLog", *datapath_log != new.datapath_log),
            (
                "serviceCIDRs",
                !self.takes_service_cidrs() && *service_cidrs != new.service_cidrs,
            ),
            (
                "loadBalancerCIDRs",
                *load_balancer_cidrs != new.load_balancer_cidrs,
            ),
            (
                "serviceNodePortRange",
                *service_node_port_range != new.service_node_port_range,
            ),
            ("externalIPs", *external_ips != new.external_ips),
            (
                "iptables.masqueradeAll",
                *masquerade_all != new.masquerade_all,
            ),
            ("logging", *logging != new.logging),
            // Open flows hold ports of the old range by their place in it.
            ("snatPorts", *snat_ports != new.snat_ports),
            ("capacities", *capacities != new.capacities),
            (
                "healthzBindAddress",
                *healthz_bind_address != new.healthz_bind_address,
            ),
            (
                "metricsBindAddress",
                *metrics_bind_address != new.metrics_bind_address,
            ),
            ("metricsServices", *metrics_services != new.metrics_services),
            ("dns", *dns != new.dns),
            (
                "bindAddressHardFail",
                *bind_address_hard_fail != new.bind_address_hard_fail,
            ),
        ];
        let names = |all: &[(&'static str, bool)]| {
            all.iter()
                .filter(|(_, is)| *is)
                .map(|(name, _)| *name)
                .collect()
        };
        Changes {
            live: names(&live),
            at_restart: names(&at_restart),
        }
    }

    /// These settings with what a running agent takes over from `new`.
    #[must_use]
    pub fn with_live(&self, new: &Self) -> Self {
        let service_cidrs = match self.takes_service_cidrs() {
            true => &new.service_cidrs,
            false => &self.service_cidrs,
        };
        Self {
            bind_address: new.bind_address,
            netfilter: new.netfilter,
            devices: new.devices.clone(),
            pod_devices: new.pod_devices.clone(),
            answer_ping: new.answer_ping,
            cluster_cidrs: new.cluster_cidrs.clone(),
            nodeport_addresses: new.nodeport_addresses.clone(),
            localhost_node_ports: new.localhost_node_ports,
            retry_silence: new.retry_silence,
            conntrack: new.conntrack,
            service_cidrs: service_cidrs.clone(),
            ..self.clone()
        }
    }

    /// With manifests, cluster IPs have been given from the networks already.
    fn takes_service_cidrs(&self) -> bool {
        self.manifests.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{config::PortRange, datapath::xdp::XdpMode};

    /// Every setting is different, so a live one that [`Settings::with_live`] forgets shows.
    #[test]
    fn what_is_live_is_taken_over_and_nothing_else() {
        for manifests in [vec![], vec!["/m".into()]] {
            let old = Settings {
                manifests: manifests.clone(),
                ..Settings::default()
            };
            let mut new = Settings {
                bind_address: Some([192, 0, 2, 1].into()),
                devices: vec!["eth*".to_owned()],
                pod_devices: vec!["veth*".to_owned()],
                answer_ping: false,
                cluster_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
                nodeport_addresses: vec!["primary".to_owned()],
                localhost_node_ports: false,
                retry_silence: Duration::from_secs(7),
                service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
                node_name: Some("other".to_owned()),
                xdp: XdpMode::Off,
                snat_ports: PortRange(1..=2),
                healthz_bind_address: None,
                ..old.clone()
            };
            new.conntrack.udp += Duration::from_secs(1);
            new.capacities.flows += 1;
            let changes = old.changes(&new);
            let rest = old.with_live(&new).changes(&new);
            assert_eq!(rest.live, [""; 0]);
            assert_eq!(rest.at_restart, changes.at_restart);
            let cidrs_are_live = manifests.is_empty();
            assert_eq!(
                changes.live.len(),
                if cidrs_are_live { 10 } else { 9 },
                "{changes:?}"
            );
            assert_eq!(changes.live.contains(&"serviceCIDRs"), cidrs_are_live);
            assert_eq!(old.changes(&old.with_live(&new)).at_restart, [""; 0]);
        }
    }
}
