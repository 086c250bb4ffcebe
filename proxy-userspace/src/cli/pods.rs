//! Pods by name: where those are asked that a map does not have.

use std::{net::IpAddr, path::PathBuf};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use shunt_common::layout::{SCTP, TCP, UDP};

use crate::{
    config::{SERVICE_CIDRS, Settings},
    object::{ObjectName, Protocol},
    source::{kinds::Pod, kubernetes, manifests},
};

/// How like the name must be that is proposed for one that is unknown (1 less the share of letters
/// that were added, left out, changed or swapped).
const ALIKE: f64 = 0.6;

/// A protocol on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ProtocolArg {
    Tcp,
    Udp,
    Sctp,
}

impl ProtocolArg {
    pub(super) fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
            Self::Sctp => Protocol::Sctp,
        }
    }

    /// IANA's number.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
            Self::Sctp => SCTP,
        }
    }
}

/// Where Pods are looked up.
#[derive(Clone, Debug, Args)]
pub(super) struct PodSource {
    /// Files and folders of Kubernetes YAML that have the Pod, as `shunt run` has them.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    manifests: Vec<PathBuf>,
    /// The Pod is asked of the API server that this file names [default: the one of the pod that
    /// this runs in].
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,
}

impl PodSource {
    /// The addresses of a Pod.
    pub(super) async fn addresses(&self, name: &ObjectName) -> anyhow::Result<Vec<IpAddr>> {
        let pod: Pod = if self.manifests.is_empty() {
            let namespace = [&*name.namespace];
            let read =
                kubernetes::snapshot(self.kubeconfig.as_deref(), &namespace, Some(&name.name));
            let (_services, pod) = match (read.await, &self.kubeconfig) {
                (Err(error), None) => {
                    return Err(error.context(
                        "addresses of Pods stand in no map: give the address, --manifests PATH or --kubeconfig FILE",
                    ));
                }
                (read, _) => read?,
            };
            pod.with_context(|| format!("there is no Pod {name}"))?
        } else {
            let mut snapshot = manifests::snapshot(manifests::Config {
                paths: self.manifests.clone(),
                service_cidrs: SERVICE_CIDRS.to_vec(),
                node_ports: Settings::default().service_node_port_range.0,
                load_balancer_cidrs: Vec::new(),
                node_name: String::new(),
                socket_lb_labels: false,
            })
            .await?;
            match snapshot.pods.remove(name) {
                Some(pod) => pod,
                None => {
                    let known = snapshot.pods.keys();
                    let known = known.map(|pod| (pod.namespace.to_string(), pod.name.to_string()));
                    let near = nearest(&name.name, known);
                    bail!("the manifests have no Pod {name}{near}");
                }
            }
        };
        let status = pod.status.unwrap_or_default();
        let first = status.pod_ip.as_deref();
        let addresses: Vec<IpAddr> = status
            .pod_ips
            .iter()
            .map(|ip| ip.ip.as_str())
            .chain(first)
            .filter_map(|ip| ip.parse().ok())
            .collect();
        if addresses.is_empty() {
            bail!("the Pod {name} has no address yet");
        }
        Ok(addresses)
    }
}

/// `; the nearest: …` with the names that are most like one, in whichever namespace; nothing if
/// none is.
pub(super) fn nearest(name: &str, known: impl Iterator<Item = (String, String)>) -> String {
    let mut alike: Vec<(f64, String)> = known
        .map(|(namespace, known)| {
            let likeness = strsim::normalized_damerau_levenshtein(name, &known);
            (likeness, format!("{namespace}/{known}"))
        })
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .collect();
    alike.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    alike.dedup_by(|a, b| a.1 == b.1);
    let names: Vec<String> = alike.into_iter().take(3).map(|(_, name)| name).collect();
    match names.as_slice() {
        [] => String::new(),
        names => format!("; the nearest: {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_answered_with_the_nearest() {
        let known = || {
            [("default", "kubia"), ("shop", "web"), ("a", "kube-dns")]
                .map(|(namespace, name)| (namespace.to_owned(), name.to_owned()))
                .into_iter()
        };
        assert_eq!(nearest("kubai", known()), "; the nearest: default/kubia");
        assert_eq!(nearest("wbe", known()), "; the nearest: shop/web");
        assert_eq!(nearest("zzz", known()), "");
    }
}
