//! What Services do not name: cluster IPs, load balancer IPs and node ports, as the API server and
//! a cloud's controller give them.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    super::allocate::{Pool, Range, to_ip, to_number},
    config::Config,
    service::{DualStack, ServiceManifest},
};
use crate::object::{Exposure, ObjectName, Problem, Service};

/// The pool's port number of a Service's health check node port: no Service port has it.
const HEALTH_CHECK: u16 = 0;

/// What was given: it stays given.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// By family, as everywhere here: IPv4, IPv6.
    cluster_ips: [Pool<ObjectName>; 2],
    load_balancer_ips: [Pool<ObjectName>; 2],
    node_ports: Pool<(ObjectName, u16)>,
}

impl Numbers {
    /// Gives Services what they do not name.
    pub(super) fn give(
        &mut self,
        config: &Config,
        manifests: &BTreeMap<ObjectName, Arc<ServiceManifest>>,
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<ObjectName, Service> {
        let ranges = Ranges::of(config);
        let mut wanted = Wanted::default();
        for (name, manifest) in manifests {
            wanted.add(name, manifest, &ranges);
        }
        let given = self.take(&mut wanted, &ranges);
        manifests
            .iter()
            .map(|(name, manifest)| {
                let service = fill_in(name, manifest, config, &ranges, &wanted, &given, problems);
                (name.clone(), service)
            })
            .collect()
    }

    fn take(&mut self, wanted: &mut Wanted<'_>, ranges: &Ranges) -> Given {
        let give = |pools: &mut [Pool<ObjectName>; 2],
                    owners: &[BTreeMap<ObjectName, String>; 2],
                    ranges: &[Vec<Range>; 2],
                    taken: &[HashSet<u128>; 2]| {
            [0, 1]
                .map(|family| pools[family].give(&owners[family], &ranges[family], &taken[family]))
        };
        let cluster_ips = give(
            &mut self.cluster_ips,
            &wanted.cluster_ips,
            &ranges.cluster_ips,
            &wanted.taken_ips,
        );
        // The two ranges may overlap.
        for family in [0, 1] {
            wanted.taken_ips[family].extend(cluster_ips[family].values());
        }
        let load_balancer_ips = give(
            &mut self.load_balancer_ips,
            &wanted.load_balancer_ips,
            &ranges.load_balancer_ips,
            &wanted.taken_ips,
        );
        let node_ports =
            self.node_ports
                .give(&wanted.node_ports, &ranges.node_ports, &wanted.taken_ports);
        Given {
            cluster_ips,
            load_balancer_ips,
            node_ports,
        }
    }
}

/// Where numbers come from.
struct Ranges {
    default_is_v6: bool,
    cluster_ips: [Vec<Range>; 2],
    load_balancer_ips: [Vec<Range>; 2],
    node_ports: [Range; 1],
}

impl Ranges {
    fn of(config: &Config) -> Self {
        let of_family = |nets: &[IpNet], is_v6: bool| -> Vec<Range> {
            let nets = nets.iter().filter(|net| net.addr().is_ipv6() == is_v6);
            nets.map(Range::of_net).collect()
        };
        Self {
            default_is_v6: config
                .service_cidrs
                .first()
                .is_some_and(|net| net.addr().is_ipv6()),
            cluster_ips: [false, true].map(|is_v6| of_family(&config.service_cidrs, is_v6)),
            load_balancer_ips: [false, true]
                .map(|is_v6| of_family(&config.load_balancer_cidrs, is_v6)),
            node_ports: [Range::of_ports(&config.node_ports)],
        }
    }
}

/// What Services want, each with the text that its search begins at; and what is not to be had,
/// because a manifest names it.
#[derive(Default)]
struct Wanted<'a> {
    taken_ips: [HashSet<u128>; 2],
    taken_ports: HashSet<u128>,
    cluster_ips: [BTreeMap<ObjectName, String>; 2],
    load_balancer_ips: [BTreeMap<ObjectName, String>; 2],
    node_ports: BTreeMap<(ObjectName, u16), String>,
    /// Families of a Service's cluster IPs, true: IPv6.
    families: BTreeMap<&'a ObjectName, Vec<bool>>,
}

impl<'a> Wanted<'a> {
    fn add(&mut self, name: &'a ObjectName, manifest: &ServiceManifest, ranges: &Ranges) {
        let service = &manifest.service;
        let explicit = [
            &service.cluster_ips,
            &service.external_ips,
            &service.load_balancer_ips,
        ];
        for ip in explicit
            .into_iter()
            .flatten()
            .chain(&manifest.load_balancer_ip)
        {
            self.taken_ips[usize::from(ip.is_ipv6())].insert(to_number(*ip));
        }
        let ports = service.ports.iter().filter_map(|port| port.node_port);
        self.taken_ports
            .extend(ports.chain(service.health_check_node_port).map(u128::from));

        if matches!(
            service.exposure,
            Exposure::Headless | Exposure::ExternalName(_)
        ) {
            self.families.insert(name, Vec::new());
            return;
        }
        let families = families(manifest, ranges);
        for is_v6 in families.iter().copied() {
            let family = usize::from(is_v6);
            if !service.cluster_ips.iter().any(|ip| ip.is_ipv6() == is_v6) {
                self.cluster_ips[family].insert(name.clone(), name.to_string());
            }
            let pending = manifest.wants_load_balancer_ip && manifest.load_balancer_ip.is_none();
            if pending && !ranges.load_balancer_ips[family].is_empty() {
                self.load_balancer_ips[family].insert(name.clone(), name.to_string());
            }
        }
        self.families.insert(name, families);
        if manifest.wants_node_ports {
            for port in service.ports.iter().filter(|port| port.node_port.is_none()) {
                // One number for TCP and UDP on one port, as the API server gives it.
                self.node_ports
                    .insert((name.clone(), port.port), format!("{name}:{}", port.port));
            }
        }
        if manifest.wants_health_check_node_port {
            self.node_ports
                .insert((name.clone(), HEALTH_CHECK), format!("{name} health check"));
        }
    }
}

/// Families of a Service's cluster IPs, those that it names first.
fn families(manifest: &ServiceManifest, ranges: &Ranges) -> Vec<bool> {
    let mut families: Vec<bool> = manifest
        .service
        .cluster_ips
        .iter()
        .map(IpAddr::is_ipv6)
        .collect();
    for is_v6 in
        manifest.families.iter().flatten().copied().chain(
            (families.is_empty() && manifest.families.is_none()).then_some(ranges.default_is_v6),
        )
    {
        if !families.contains(&is_v6) {
            families.push(is_v6);
        }
    }
    let other = !families[0];
    let other_possible = !ranges.cluster_ips[usize::from(other)].is_empty();
    if manifest.dual_stack == DualStack::Required
        || manifest.dual_stack == DualStack::Preferred && other_possible
    {
        families.extend((!families.contains(&other)).then_some(other));
    }
    families
}

/// What there was.
struct Given {
    cluster_ips: [BTreeMap<ObjectName, u128>; 2],
    load_balancer_ips: [BTreeMap<ObjectName, u128>; 2],
    node_ports: BTreeMap<(ObjectName, u16), u128>,
}

/// The Service with what it was given, and what it lacks.
fn fill_in(
    name: &ObjectName,
    manifest: &ServiceManifest,
    config: &Config,
    ranges: &Ranges,
    wanted: &Wanted<'_>,
    given: &Given,
    problems: &mut Vec<Problem>,
) -> Service {
    let mut service = manifest.service.clone();
    let mut problem =
        |field: &str, message: String| problems.push(Problem::new("Service", name, field, message));
    for is_v6 in wanted.families[name].iter().copied() {
        let family = usize::from(is_v6);
        let family_name = ["IPv4", "IPv6"][family];
        if wanted.cluster_ips[family].contains_key(name) {
            match given.cluster_ips[family].get(name) {
                Some(number) => service.cluster_ips.push(to_ip(*number, is_v6)),
                None if ranges.cluster_ips[family].is_empty() => problem(
                    "spec.clusterIP",
                    format!(
                        "is missing and there is no {family_name} range to take it from; write it down or give --service-cidr"
                    ),
                ),
                None => problem(
                    "spec.clusterIP",
                    format!(
                        "is missing and the {family_name} range is full; give a larger --service-cidr"
                    ),
                ),
            }
        }
        if wanted.load_balancer_ips[family].contains_key(name) {
            match given.load_balancer_ips[family].get(name) {
                Some(number) => service.load_balancer_ips.push(to_ip(*number, is_v6)),
                None => problem(
                    "status.loadBalancer",
                    format!("is missing and the {family_name} range is full; give a larger one"),
                ),
            }
        }
    }
    if manifest.wants_load_balancer_ip
        && let Some(ip) = manifest.load_balancer_ip
    {
        match config
            .load_balancer_cidrs
            .iter()
            .any(|net| net.contains(&ip))
        {
            true => service.load_balancer_ips.push(ip),
            false => problem(
                "spec.loadBalancerIP",
                format!("{ip} is in none of the load balancer ranges; the Service stays pending"),
            ),
        }
    }
    let node_port = |port: u16| {
        given
            .node_ports
            .get(&(name.clone(), port))
            .map(|number| *number as u16)
    };
    if manifest.wants_node_ports {
        for (i, port) in service
            .ports
            .iter_mut()
            .enumerate()
            .filter(|(_, port)| port.node_port.is_none())
        {
            port.node_port = node_port(port.port);
            if port.node_port.is_none() {
                problem(
                    &format!("spec.ports[{i}].nodePort"),
                    format!(
                        "is missing and all of {}-{} are taken; give a larger range",
                        config.node_ports.start(),
                        config.node_ports.end()
                    ),
                );
            }
        }
    }
    if manifest.wants_health_check_node_port {
        service.health_check_node_port = node_port(HEALTH_CHECK);
    }
    service
}
