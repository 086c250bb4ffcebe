//! kube-proxy's command line (1.37: `cmd/kube-proxy/app/options.go`), so that people's manifests
//! start shunt as they start it.
//!
//! What means something here is an argument of `shunt run` that `--help` leaves out
//! ([`KubeProxyArgs`]), or has the same name there. What means nothing is taken off the command
//! line before it is parsed, and named in one warning ([`translate`]).

use std::{collections::BTreeMap, ffi::OsString, net::IpAddr, path::PathBuf};

use clap::Args;

use super::{
    Settings,
    kube_proxy::{self, DetectLocalMode},
    values::{Address, set, set_option},
};

/// Arguments of kube-proxy's that shunt has under another name, or does not tell of.
#[derive(Clone, Debug, Default, Args)]
pub struct KubeProxyArgs {
    /// `--node-name`; it stands over that, as over the file.
    #[arg(long, hide = true)]
    hostname_override: Option<String>,
    #[arg(long, hide = true)]
    bind_address: Option<Address>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    bind_address_hard_fail: Option<bool>,
    #[arg(long, hide = true)]
    conntrack_max_per_core: Option<u32>,
    #[arg(long, hide = true)]
    conntrack_min: Option<u32>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    conntrack_tcp_be_liberal: Option<bool>,
    #[arg(long, hide = true)]
    detect_local_mode: Option<DetectLocalMode>,
    #[arg(long, hide = true)]
    pod_interface_name_prefix: Option<String>,
    #[arg(long, hide = true, value_parser = gates)]
    feature_gates: Option<Gates>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    iptables_localhost_nodeports: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    masquerade_all: Option<bool>,
    #[arg(long, hide = true)]
    proxy_mode: Option<String>,
    /// 0: no such server; another port has to be said with the address.
    #[arg(long, hide = true)]
    healthz_port: Option<u16>,
    /// As `healthz_port`.
    #[arg(long, hide = true)]
    metrics_port: Option<u16>,
    /// Write what `--dump-config` prints into this file and end.
    #[arg(long, hide = true)]
    pub write_config_to: Option<PathBuf>,
    /// `shunt cleanup`.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub cleanup: Option<bool>,
    /// There is nothing to be prepared: end.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub init_only: Option<bool>,
    /// Those that were given and have no use, as [`translate`] found them.
    #[arg(skip)]
    pub unused: Vec<String>,
    /// Whether the line had no verb, as kube-proxy's has none.
    #[arg(skip)]
    pub is_its_line: bool,
}

/// `--feature-gates`.
type Gates = BTreeMap<String, bool>;

/// kube-proxy's flags without a meaning here, and whether a value follows them; those of the
/// releases before that people still have, too.
const UNUSED: &[(&str, bool)] = &[
    ("add-dir-header", false),
    ("alsologtostderr", false),
    ("boot-id-file", true),
    ("cleanup-iptables", false),
    ("cleanup-ipvs", false),
    ("config-sync-period", true),
    ("conntrack-max", true),
    ("ipvs-exclude-cidrs", true),
    ("ipvs-min-sync-period", true),
    ("ipvs-scheduler", true),
    ("ipvs-strict-arp", false),
    ("ipvs-sync-period", true),
    ("ipvs-tcp-timeout", true),
    ("ipvs-tcpfin-timeout", true),
    ("ipvs-udp-timeout", true),
    ("iptables-masquerade-bit", true),
    ("iptables-min-sync-period", true),
    ("iptables-sync-period", true),
    ("kube-api-burst", true),
    ("kube-api-content-type", true),
    ("kube-api-qps", true),
    ("log-backtrace-at", true),
    ("log-dir", true),
    ("log-file", true),
    ("log-file-max-size", true),
    ("log-flush-frequency", true),
    ("log-json-info-buffer-size", true),
    ("log-json-split-stream", false),
    ("log-text-info-buffer-size", true),
    ("log-text-split-stream", false),
    ("logtostderr", false),
    ("machine-id-file", true),
    ("master", true),
    ("one-output", false),
    ("oom-score-adj", true),
    ("pod-bridge-interface", true),
    ("profiling", false),
    ("proxy-port-range", true),
    ("resource-container", true),
    ("show-hidden-metrics-for-version", true),
    ("skip-headers", false),
    ("skip-log-headers", false),
    ("stderrthreshold", true),
    ("udp-timeout", true),
    ("vmodule", true),
];

/// Flags that say nothing when their value is empty.
const EMPTY_SAYS_NOTHING: &[&str] = &[
    "bind-address",
    "cluster-cidr",
    "config",
    "detect-local-mode",
    "feature-gates",
    "hostname-override",
    "kubeconfig",
    "logging-format",
    "nodeport-addresses",
    "pod-interface-name-prefix",
    "proxy-mode",
    "write-config-to",
];

/// A command line as [`clap`] takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// What is to be parsed.
    pub args: Vec<OsString>,
    /// Flags that were taken off it.
    pub unused: Vec<String>,
    /// Whether it is one of kube-proxy's, which have no verb.
    pub is_kube_proxys: bool,
}

/// Makes a command line one of shunt's. A line of kube-proxy's has no verb: what begins with a
/// flag, and everything that a program of that name is told, is meant for `run`.
pub fn translate(args: impl IntoIterator<Item = OsString>) -> Line {
    let mut args = args.into_iter().peekable();
    let program = args.next().unwrap_or_default();
    let is_kube_proxy = PathBuf::from(&program)
        .file_name()
        .is_some_and(|name| name == "kube-proxy");
    let mut line = vec![program];
    let mut is_kube_proxys = true;
    match args.peek().and_then(|arg| arg.to_str()) {
        Some("run") => {
            line.extend(args.next());
            is_kube_proxys = false;
        }
        Some("-h" | "--help" | "-V" | "--version") => {}
        Some(flag) if flag.starts_with("--version=") => {
            args.next();
            line.push("--version".into());
        }
        Some(flag) if is_kube_proxy || flag.starts_with('-') => line.push("run".into()),
        None if is_kube_proxy => line.push("run".into()),
        _ => {
            line.extend(args);
            return Line {
                args: line,
                ..Line::default()
            };
        }
    }
    let mut unused = Vec::new();
    while let Some(arg) = args.next() {
        let Some(flag) = arg
            .to_str()
            .and_then(|arg| arg.strip_prefix("--"))
            .filter(|flag| !flag.is_empty())
        else {
            line.push(arg);
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        // As Kubernetes' components have it.
        let name = name.replace('_', "-");
        if let Some((_, takes_value)) = UNUSED.iter().find(|(unused, _)| *unused == name) {
            if *takes_value && value.is_none() {
                args.next();
            }
            unused.push(format!("--{name}"));
        } else if EMPTY_SAYS_NOTHING.contains(&name.as_str()) && value == Some("") {
        } else if EMPTY_SAYS_NOTHING.contains(&name.as_str())
            && value.is_none()
            && args.peek().is_some_and(|next| next.is_empty())
        {
            args.next();
        } else {
            line.push(
                value
                    .map_or_else(|| format!("--{name}"), |value| format!("--{name}={value}"))
                    .into(),
            );
        }
    }
    Line {
        args: line,
        unused,
        is_kube_proxys,
    }
}

/// A truth as Go writes it.
fn boolean(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("give true or false"),
    }
}

fn gates(text: &str) -> Result<Gates, String> {
    let gate = |pair: &str| -> Result<(String, bool), String> {
        let (name, value) = pair
            .trim()
            .split_once('=')
            .ok_or("give NAME=true or NAME=false, with commas between")?;
        Ok((name.trim().to_owned(), boolean(value.trim())?))
    };
    text.split(',')
        .filter(|pair| !pair.trim().is_empty())
        .map(gate)
        .collect()
}

impl KubeProxyArgs {
    /// Writes what was given, and says what is not taken.
    pub(super) fn write(self, to: &mut Settings, has_file: bool, warnings: &mut Vec<String>) {
        let mut unused = self.unused;
        set_option(&mut to.node_name, self.hostname_override);
        let bind: Option<IpAddr> = self.bind_address.map(|address| address.0);
        set_option(
            &mut to.bind_address,
            bind.filter(|address| !address.is_unspecified()),
        );
        set(&mut to.bind_address_hard_fail, self.bind_address_hard_fail);
        set(
            &mut to.localhost_node_ports,
            self.iptables_localhost_nodeports,
        );
        if let Some(netfilter) = &mut to.netfilter {
            set(&mut netfilter.max_per_core, self.conntrack_max_per_core);
            set(&mut netfilter.min, self.conntrack_min);
            set(&mut netfilter.be_liberal, self.conntrack_tcp_be_liberal);
        }
        if let Some(mode) = self.proxy_mode {
            if !["iptables", "ipvs", kube_proxy::NFTABLES].contains(&mode.as_str()) {
                warnings.push(format!(
                    "--proxy-mode {mode}: kube-proxy has no such mode on Linux: ignored"
                ));
            }
            kube_proxy::open_node_ports_as(&mode, to);
        }
        match (self.detect_local_mode, self.pod_interface_name_prefix) {
            (None | Some(DetectLocalMode::ClusterCIDR), prefix) => {
                unused.extend(prefix.map(|_| "--pod-interface-name-prefix".to_owned()));
            }
            (Some(mode), prefix) => {
                to.cluster_cidrs.clear();
                if let (DetectLocalMode::InterfaceNamePrefix, Some(prefix)) = (mode, prefix) {
                    to.pod_devices = vec![format!("{prefix}*")];
                }
            }
        }
        let mut gates = Vec::new();
        kube_proxy::write_gates(&self.feature_gates.unwrap_or_default(), to, &mut gates);
        unused.extend(
            gates
                .into_iter()
                .map(|gate| gate.replace("featureGates.", "--feature-gates ")),
        );
        for (flag, port, address) in [
            (
                "--healthz-port",
                self.healthz_port,
                &mut to.healthz_bind_address,
            ),
            (
                "--metrics-port",
                self.metrics_port,
                &mut to.metrics_bind_address,
            ),
        ] {
            match port {
                Some(0) if !has_file => *address = None,
                Some(_) => unused.push(flag.to_owned()),
                None => {}
            }
        }
        set(&mut to.masquerade_all, self.masquerade_all);
        if !unused.is_empty() {
            warnings.push(format!(
                "shunt has no use for {}: ignored",
                unused.join(", ")
            ));
        }
    }
}
