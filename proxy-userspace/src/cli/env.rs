//! `shunt env`: the environment variables of Services that a kubelet gives to a pod's containers.
//!
//! The maps hold neither the names of ports nor their order, so objects are read again: from the
//! manifests or from the API server. Of the maps comes only what nobody has written down: cluster
//! IPs that a running agent gave.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use anyhow::Context;
use clap::{Args, ValueEnum};
use ipnet::IpNet;

use super::{block_on, print, services};
use crate::{
    config::{DEFAULT_BPF_ROOT, SERVICE_CIDRS, Settings},
    datapath::maps::Maps,
    environment::{self, MASTER_NAMESPACE, Variable},
    object::ObjectName,
    source::{
        kinds::{Pod, Service},
        kubernetes, manifests,
    },
};

/// `shunt env`.
#[derive(Clone, Debug, Args)]
pub struct EnvArgs {
    /// The pod's namespace.
    #[arg(short, long, value_name = "NAMESPACE", default_value = "default")]
    namespace: String,
    /// A pod of it: its spec.enableServiceLinks counts, and what its container sets itself in `env`
    /// is left out.
    #[arg(long, value_name = "NAME")]
    pod: Option<String>,
    /// Which of the pod's containers [default: the first].
    #[arg(short, long, value_name = "NAME", requires = "pod")]
    container: Option<String>,
    /// Without a pod: its spec.enableServiceLinks. When false, only the Service `kubernetes` of the
    /// namespace default is named.
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        action = clap::ArgAction::Set,
        conflicts_with = "pod"
    )]
    enable_service_links: bool,
    /// Files and folders of Kubernetes YAML, as `shunt run` has them.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    manifests: Vec<PathBuf>,
    /// Ask the API server that this file names [default: the one of the pod that this runs in].
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,
    /// With --manifests: networks that missing cluster IPs come from, as `shunt run` has them
    /// [default: 10.96.0.0/12,fd00:10:96::/112].
    #[arg(long, value_name = "CIDR", num_args = 1.., value_delimiter = ',', requires = "manifests")]
    service_cidr: Vec<IpNet>,
    /// The folder that the agent pins everything in: with --manifests, cluster IPs that it gave are
    /// read from there.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPF_ROOT)]
    bpf_root: PathBuf,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t = EnvOutput::Table)]
    output: EnvOutput,
}

/// `-o`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EnvOutput {
    /// `NAME=value`, a line each.
    #[value(alias = "env")]
    Table,
    /// An array of `name` and `value`, as a container's `env` has them.
    Json,
    /// `export NAME='value'`, for a shell to read.
    Export,
}

/// Objects that matter, as an API server has them.
struct Objects {
    services: Vec<Service>,
    pod: Option<Pod>,
}

/// Runs the verb.
///
/// # Errors
/// Objects that cannot be read, or no such pod or container.
pub fn run(args: &EnvArgs) -> anyhow::Result<()> {
    let (text, warnings) = text(args)?;
    for warning in warnings {
        eprintln!("shunt: {warning}");
    }
    match text.is_empty() {
        true => Ok(()),
        false => print(&text),
    }
}

/// What is printed to stdout, and what to stderr.
fn text(args: &EnvArgs) -> anyhow::Result<(String, Vec<String>)> {
    let mut warnings = Vec::new();
    let objects = block_on(read(args, &mut warnings))?;
    let links = objects
        .pod
        .as_ref()
        .map_or(args.enable_service_links, environment::enable_service_links);
    let (mut variables, clashes) =
        environment::variables(&objects.services, &args.namespace, links);
    for clash in clashes {
        warnings.push(format!(
            "{}: Services {} and {} both have it; that of {} is printed, a kubelet may take the other",
            clash.name, clash.loser, clash.winner, clash.winner
        ));
    }
    if let Some(pod) = &objects.pod {
        let own = own_variables(pod, args.container.as_deref())?;
        // A container's own words stand over what is injected.
        variables.retain(|variable| !own.contains(variable.name.as_str()));
    }
    Ok((format(&variables, args.output)?, warnings))
}

async fn read(args: &EnvArgs, warnings: &mut Vec<String>) -> anyhow::Result<Objects> {
    if args.manifests.is_empty() {
        let mut namespaces = vec![args.namespace.as_str()];
        namespaces.extend((args.namespace != MASTER_NAMESPACE).then_some(MASTER_NAMESPACE));
        let read =
            kubernetes::snapshot(args.kubeconfig.as_deref(), &namespaces, args.pod.as_deref())
                .await;
        let (services, pod) = match (read, &args.kubeconfig) {
            (Err(error), None) => {
                return Err(error.context(
                    "the names of ports stand in no map: give --manifests PATH as `shunt run` has it, or --kubeconfig FILE",
                ));
            }
            (read, _) => read?,
        };
        return Ok(Objects { services, pod });
    }
    let settings = Settings::default();
    let service_cidrs = match args.service_cidr.is_empty() {
        true => SERVICE_CIDRS.to_vec(),
        false => args.service_cidr.clone(),
    };
    let mut snapshot = manifests::snapshot(manifests::Config {
        paths: args.manifests.clone(),
        service_cidrs,
        node_ports: settings.service_node_port_range.0,
        load_balancer_cidrs: Vec::new(),
        node_name: String::new(),
        socket_lb_labels: false,
    })
    .await?;
    warnings.extend(snapshot.problems.iter().map(ToString::to_string));
    let pinned = pinned_cluster_ips(args);
    for name in &snapshot.given {
        let Some(ips) = pinned.get(name) else {
            continue;
        };
        let spec = snapshot
            .services
            .get_mut(name)
            .and_then(|service| service.spec.as_mut());
        if let Some(spec) = spec {
            correct(&mut spec.cluster_ip, ips);
        }
    }
    let pod = match &args.pod {
        Some(name) => Some(
            snapshot
                .pods
                .remove(&ObjectName::new(&args.namespace, name))
                .with_context(|| {
                    format!(
                        "--pod {name}: the manifests have no such Pod in namespace {}",
                        args.namespace
                    )
                })?,
        ),
        None => None,
    };
    Ok(Objects {
        services: snapshot.services.into_values().collect(),
        pod,
    })
}

/// Takes the address of the same family that the agent gave, where it gave another than an agent
/// that starts now would.
fn correct(cluster_ip: &mut Option<String>, pinned: &BTreeSet<IpAddr>) {
    let Some(computed) = cluster_ip
        .as_deref()
        .and_then(|text| text.parse::<IpAddr>().ok())
    else {
        return;
    };
    let of_family = pinned.iter().find(|ip| ip.is_ipv4() == computed.is_ipv4());
    if let (false, Some(ip)) = (pinned.contains(&computed), of_family) {
        *cluster_ip = Some(ip.to_string());
    }
}

/// Cluster IPs in the maps, by Service. Without maps, or the right to read them, there are none:
/// what is computed holds.
fn pinned_cluster_ips(args: &EnvArgs) -> BTreeMap<ObjectName, BTreeSet<IpAddr>> {
    let mut ips: BTreeMap<ObjectName, BTreeSet<IpAddr>> = BTreeMap::new();
    let rows = Maps::open(&args.bpf_root).and_then(|maps| services::list(&maps));
    for row in rows.unwrap_or_default() {
        if row.kind == "ClusterIP" {
            let name = ObjectName::new(&row.namespace, &row.service);
            ips.entry(name).or_default().insert(row.address);
        }
    }
    ips
}

/// Names that a container sets itself.
fn own_variables<'p>(pod: &'p Pod, container: Option<&str>) -> anyhow::Result<BTreeSet<&'p str>> {
    let mut containers = pod.spec.containers.iter().chain(&pod.spec.init_containers);
    let found = match container {
        None => containers.next(),
        Some(name) => {
            let found = containers.find(|container| container.name == name);
            anyhow::ensure!(
                found.is_some(),
                "--container {name}: the Pod has no such container"
            );
            found
        }
    };
    let own = found.iter().flat_map(|container| &container.env);
    Ok(own.map(|variable| variable.name.as_str()).collect())
}

fn format(variables: &[Variable], output: EnvOutput) -> anyhow::Result<String> {
    let line = |Variable { name, value }: &Variable| match output {
        EnvOutput::Export if !is_shell_name(name) => {
            format!("# a shell has no such names: {name}={value}")
        }
        EnvOutput::Export => format!("export {name}='{}'", value.replace('\'', r"'\''")),
        _ => format!("{name}={value}"),
    };
    Ok(match output {
        EnvOutput::Json => serde_json::to_string_pretty(variables)?,
        _ => variables.iter().map(line).collect::<Vec<_>>().join("\n"),
    })
}

/// Whether a shell takes it as a variable's name (POSIX, Base Definitions, 3.216): a Service's name
/// may begin with a digit.
fn is_shell_name(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests;
