//! The flags of `shunt run`. None has a default here, so that what is not given leaves a file's
//! word alone; `--help` tells those of [`Settings`].

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, ValueEnum};
use ipnet::IpNet;

use super::{
    DatapathLog, HEALTHZ_PORT, METRICS_PORT, PortRange, Settings, dns, file,
    kube_proxy_flags::KubeProxyArgs,
    values::{Listen, Network, NodePortAddress, Timeout, set, set_list, set_option},
};
use crate::{
    datapath::{load::SocketLb, netfilter::Netfilter, netns::NodePortAddresses, xdp::XdpMode},
    dns::PORT as DNS_PORT,
};

/// `shunt run`.
#[derive(Clone, Debug, Args)]
// As kube-proxy has it: of a flag that is given twice the last one holds.
#[command(args_override_self = true)]
pub struct RunArgs {
    /// A file of YAML with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) as clusters
    /// have it, a ShuntConfiguration (shunt.dev/v1alpha1), or both; flags stand over it. Changes
    /// are followed: what can change live does.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print what flags, file and defaults come to, as such a file, and exit.
    #[arg(long)]
    pub dump_config: bool,
    /// Connect to the API server as this file says [default: the pod's service account].
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,
    /// Files and folders of Kubernetes YAML to serve instead of a cluster; changes are followed.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    manifests: Vec<PathBuf>,
    /// From a cluster: serve only what has this value in the label
    /// service.kubernetes.io/service-proxy-name, so that kube-proxy may go on beside it [default:
    /// what is without the label].
    #[arg(long, value_name = "NAME", conflicts_with = "manifests")]
    service_proxy_name: Option<String>,
    /// Name of this node's Node object [default: the host name].
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// This node's addresses, at most one per family is used as source [default: those of the Node
    /// object, else those of the device with the default route].
    #[arg(long, value_name = "IP", num_args = 1.., value_delimiter = ',')]
    node_ip: Vec<IpAddr>,
    /// Devices that lead out of the node; `*` stands for anything [default: every one where packets
    /// may pass, but for pods'].
    #[arg(long, value_name = "PATTERN", num_args = 1.., value_delimiter = ',')]
    devices: Vec<String>,
    /// Devices that lead to pods [default: found by their kind and name].
    #[arg(long, value_name = "PATTERN", num_args = 1.., value_delimiter = ',')]
    pod_devices: Vec<String>,
    /// The cgroup2 directory whose processes the socket programs serve [default: where the system
    /// has it mounted].
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// The folder in a bpf file system to pin everything in; one agent per folder [default:
    /// /sys/fs/bpf/shunt].
    #[arg(long, value_name = "DIR")]
    bpf_root: Option<PathBuf>,
    /// XDP on node devices [default: auto].
    #[arg(long, value_enum)]
    xdp: Option<XdpMode>,
    /// Translate at connect and sendmsg, before there is a packet [default: on]. Where pods need to
    /// see their own packets to Services (meshes, VMs, gVisor, kind or Docker in pods) take host,
    /// which does it for sockets of the node itself only; off translates all by packets.
    #[arg(long, value_enum)]
    socket_lb: Option<SocketLb>,
    /// Leave pods out of --socket-lb by the label `shunt.dev/socket-lb: "off"`, theirs or their
    /// namespace's; needs the right to watch Pods and Namespaces. A connect that comes before the
    /// label is known is translated there, and stays so until the socket closes [default: off].
    #[arg(long, value_enum)]
    socket_lb_labels: Option<Switch>,
    /// At tc, hand packets of Services straight to the pod or to the next hop. Faster, but they
    /// then skip this node's netfilter (network policies in iptables or nftables, its conntrack and
    /// counters), its IPsec, and the tc programs of others on the way to a pod [default: off].
    #[arg(long, value_enum)]
    fast_path: Option<Switch>,
    /// Count packets and bytes of Services, for metrics, where packets are seen (not of sockets
    /// that connect to a backend right away). Costs some 20 ns a packet [default: off].
    #[arg(long, value_enum)]
    count_traffic: Option<Switch>,
    /// What the programs have to say in the agent's log, rate-limited: error (something is broken),
    /// warn (maps without room, no source port or address, no route), info (refusals, drops and
    /// retries too), debug (new flows too). New flows and drops cost some 0.2 µs more while it is
    /// not off; it takes one of the four places of `shunt trace` and `shunt top` [default: off].
    #[arg(long, value_enum, value_name = "LEVEL")]
    datapath_log: Option<DatapathLog>,
    /// Networks of cluster IPs: packets to addresses there that no Service has are dropped. With
    /// --manifests missing cluster IPs come from here, and the first decides the default family
    /// [default: none with a cluster; with --manifests 10.96.0.0/12,fd00:10:96::/112].
    #[arg(long, value_name = "CIDR", num_args = 1.., value_delimiter = ',')]
    service_cidr: Vec<IpNet>,
    /// Answer pings of Services' addresses that have a backend [default: on].
    #[arg(long, value_enum)]
    answer_ping: Option<Switch>,
    /// With --manifests: networks that missing load balancer IPs come from [default: none, such
    /// Services stay pending].
    #[arg(long, value_name = "CIDR", num_args = 1.., value_delimiter = ',')]
    load_balancer_cidr: Vec<IpNet>,
    /// With --manifests: ports that missing node ports come from [default: 30000-32767].
    #[arg(long, value_name = "FIRST-LAST")]
    service_node_port_range: Option<PortRange>,
    /// Networks of the cluster's pods: their packets are internal clients' wherever they come in.
    #[arg(long, value_name = "CIDR", num_args = 1.., value_delimiter = ',')]
    cluster_cidr: Vec<Network>,
    /// Node addresses that node ports and healthCheckNodePort answer on: networks, `primary` (the
    /// Node object's best of each family), `localhost`, `all`. Networks of one family do not limit
    /// the other [default: all].
    #[arg(long, value_name = "CIDR|WORD", num_args = 1.., value_delimiter = ',')]
    nodeport_addresses: Vec<String>,
    /// Serve spec.externalIPs of Services [default: on].
    #[arg(long, value_enum)]
    external_ips: Option<Switch>,
    /// Seconds for which a backend that has not answered a connection gets no new ones, twice as
    /// long each time it does not answer again, up to 60; 0: none. The annotation shunt.dev/retry
    /// of a Service says whether its connections try another backend [default: 1].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=60))]
    retry_silence: Option<u32>,
    /// Source ports of translated packets; each backend has a supply of its own, node ports and
    /// those that sockets of the node use are left out, and those of ip_local_port_range come last
    /// [default: 1024-65535].
    #[arg(long, value_name = "FIRST-LAST")]
    snat_ports: Option<PortRange>,
    /// Where /healthz, /livez and /readyz are served; 0.0.0.0 means all addresses of both families,
    /// empty nowhere [default: 0.0.0.0:10256].
    #[arg(long, value_name = "IP:PORT")]
    healthz_bind_address: Option<Listen<HEALTHZ_PORT>>,
    /// Where /metrics is served; empty: nowhere [default: 127.0.0.1:10249].
    #[arg(long, value_name = "IP:PORT")]
    metrics_bind_address: Option<Listen<METRICS_PORT>>,
    /// Most ports of Services that have metrics of their own; what others get is summed under the
    /// empty name. 0: only sums [default: 1000].
    #[arg(long, value_name = "N")]
    metrics_services: Option<u32>,
    /// How log lines are written, to stderr: text, or json with the fields of Kubernetes'
    /// components [default: text].
    #[arg(long, value_name = "FORMAT", value_parser = ["text", "json"])]
    logging_format: Option<String>,
    /// How much is logged: from 4 on what a developer wants to know, from 6 on everything; RUST_LOG
    /// stands over it [default: 0].
    #[arg(short, long = "v", value_name = "LEVEL")]
    verbosity: Option<u32>,
    #[command(flatten)]
    dns: DnsArgs,
    #[command(flatten)]
    conntrack: ConntrackArgs,
    #[command(flatten)]
    capacities: CapacityArgs,
    /// What kube-proxy's users have on its command line.
    #[command(flatten)]
    pub kube_proxy: KubeProxyArgs,
}

/// `--dns` and `--dns-*`.
#[derive(Clone, Debug, Args)]
struct DnsArgs {
    /// Answer DNS queries for the names of Services and endpoints here, over UDP and TCP, and pass
    /// others on; 0.0.0.0 means all addresses of both families, port 53 may be left out [default:
    /// no such server].
    #[arg(long, value_name = "IP[:PORT]", num_args = 1.., value_delimiter = ',')]
    dns: Vec<Listen<DNS_PORT>>,
    /// The cluster's domain [default: cluster.local].
    #[arg(long, value_name = "NAME")]
    dns_zone: Option<dns::Zone>,
    /// Servers that other names are asked of, in this order [default: those of /etc/resolv.conf].
    #[arg(long, value_name = "IP[:PORT]", num_args = 1.., value_delimiter = ',')]
    dns_upstream: Vec<Listen<DNS_PORT>>,
    /// Look up SERVICE in this namespace, SERVICE.NAMESPACE and SERVICE.NAMESPACE.svc too, for
    /// resolvers without a search list. A Service then stands before everybody else's name of that
    /// form; empty: only names of the zone are looked up [default: `default` with --manifests, else
    /// empty].
    #[arg(long, value_name = "NAMESPACE")]
    dns_namespace: Option<String>,
}

/// `--conntrack-*`: names and defaults of kube-proxy's flags
/// (<https://kubernetes.io/docs/reference/command-line-tools-reference/kube-proxy/>); where those
/// leave the kernel's time-outs alone, the kernel's defaults. Zero leaves one as it is.
#[derive(Clone, Debug, Args)]
struct ConntrackArgs {
    /// How long an open TCP connection may be silent before it is forgotten; it finds its backend
    /// again while the Service's backends stay the same [default: 24h].
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_established: Option<Timeout>,
    /// The same when one side has sent FIN [default: 1h].
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_close_wait: Option<Timeout>,
    /// The same for UDP, until the client has sent again after an answer [default: 30s].
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout: Option<Timeout>,
    /// The same for UDP from then on [default: 2m].
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout_stream: Option<Timeout>,
}

/// `--max-*`.
#[derive(Clone, Debug, Args)]
struct CapacityArgs {
    /// Frontend entries per family: two per address, port and protocol [default: 65536].
    #[arg(long, value_name = "N")]
    max_frontends: Option<u32>,
    /// Slots per family: backends of all frontends, and Maglev tables [default: 524288].
    #[arg(long, value_name = "N")]
    max_slots: Option<u32>,
    /// Backends, counted per Service port [default: 131072].
    #[arg(long, value_name = "N")]
    max_backends: Option<u32>,
    /// Answered flows per family; the longest silent one makes room [default: 524288].
    #[arg(long, value_name = "N")]
    max_flows: Option<u32>,
    /// Flows without an answer yet, per family [default: 65536].
    #[arg(long, value_name = "N")]
    max_new_flows: Option<u32>,
    /// Translated source ports per family, of all backends together; the next power of two below is
    /// used [default: 262144].
    #[arg(long, value_name = "N")]
    max_snat: Option<u32>,
    /// Clients that backends are kept for (sessionAffinity), per family, and as many more that may
    /// be made up; the longest unheard makes room [default: 65536].
    #[arg(long, value_name = "N")]
    max_affinity: Option<u32>,
    /// Connected sockets whose frontend is remembered [default: 131072].
    #[arg(long, value_name = "N")]
    max_sockets: Option<u32>,
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl RunArgs {
    /// The file of `--config`.
    pub fn config_file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// What the agent is to do, and warnings about the file, one line each.
    ///
    /// # Errors
    /// One line that names what cannot be.
    pub fn settings(self) -> anyhow::Result<(Settings, Vec<String>)> {
        let mut settings = Settings::default();
        let mut warnings = match &self.config {
            Some(path) => file::read(path, &mut settings)?,
            None => Vec::new(),
        };
        let (kube_proxy, has_file) = (self.kube_proxy.clone(), self.config.is_some());
        // Of a machine without a cluster nothing is changed that was not asked for.
        if kube_proxy.is_its_line && !has_file && self.manifests.is_empty() {
            settings.netfilter = Some(Netfilter::default());
        }
        self.write(&mut settings);
        kube_proxy.write(&mut settings, has_file, &mut warnings);
        warnings.extend(settings.conntrack.clamp());
        NodePortAddresses::parse(&settings.nodeport_addresses, &[]).map_err(anyhow::Error::msg)?;
        Ok((settings, warnings))
    }

    /// Writes what was given.
    fn write(self, to: &mut Settings) {
        if self.kubeconfig.is_some() || self.service_proxy_name.is_some() {
            to.manifests.clear();
        }
        to.read_manifests(self.manifests);
        let is_on = |switch: Option<Switch>| switch.map(|switch| switch == Switch::On);
        set_option(&mut to.kubeconfig, self.kubeconfig);
        set_option(&mut to.service_proxy_name, self.service_proxy_name);
        set_option(&mut to.node_name, self.node_name);
        set_list(&mut to.node_ips, self.node_ip);
        set_list(&mut to.devices, self.devices);
        set_list(&mut to.pod_devices, self.pod_devices);
        set_option(&mut to.cgroup_root, self.cgroup_root);
        set(&mut to.bpf_root, self.bpf_root);
        set(&mut to.xdp, self.xdp);
        set(&mut to.socket_lb, self.socket_lb);
        set(&mut to.socket_lb_labels, is_on(self.socket_lb_labels));
        set(&mut to.fast_path, is_on(self.fast_path));
        set(&mut to.count_traffic, is_on(self.count_traffic));
        set(&mut to.datapath_log, self.datapath_log);
        set_list(&mut to.service_cidrs, self.service_cidr);
        set(&mut to.answer_ping, is_on(self.answer_ping));
        set_list(&mut to.load_balancer_cidrs, self.load_balancer_cidr);
        set(
            &mut to.service_node_port_range,
            self.service_node_port_range,
        );
        set_list(
            &mut to.cluster_cidrs,
            self.cluster_cidr
                .into_iter()
                .map(|network| network.0)
                .collect(),
        );
        set_list(
            &mut to.nodeport_addresses,
            // What is no address is told once everything is together.
            self.nodeport_addresses
                .into_iter()
                .map(|text| {
                    text.parse()
                        .map_or(text, |NodePortAddress(address)| address)
                })
                .collect(),
        );
        set(&mut to.external_ips, is_on(self.external_ips));
        set(
            &mut to.logging.json,
            self.logging_format.map(|format| format == "json"),
        );
        set(&mut to.logging.verbosity, self.verbosity);
        set(
            &mut to.retry_silence,
            self.retry_silence
                .map(|seconds| Duration::from_secs(seconds.into())),
        );
        set(&mut to.snat_ports, self.snat_ports);
        set(
            &mut to.healthz_bind_address,
            self.healthz_bind_address.map(|listen| listen.0),
        );
        set(
            &mut to.metrics_bind_address,
            self.metrics_bind_address.map(|listen| listen.0),
        );
        set(&mut to.metrics_services, self.metrics_services);
        let given = dns::Given {
            addresses: self.dns.dns,
            zone: self.dns.dns_zone,
            upstreams: self.dns.dns_upstream,
            namespace: self.dns.dns_namespace,
        };
        given.write(&mut to.dns);
        let given = |timeout: Option<Timeout>| timeout.and_then(|timeout| timeout.0);
        for (to, timeout) in [
            (
                &mut to.conntrack.tcp_established,
                self.conntrack.conntrack_tcp_timeout_established,
            ),
            (
                &mut to.conntrack.tcp_close_wait,
                self.conntrack.conntrack_tcp_timeout_close_wait,
            ),
            (&mut to.conntrack.udp, self.conntrack.conntrack_udp_timeout),
            (
                &mut to.conntrack.udp_stream,
                self.conntrack.conntrack_udp_timeout_stream,
            ),
        ] {
            set(to, given(timeout));
        }
        if let Some(netfilter) = &mut to.netfilter {
            for (to, timeout) in [
                (
                    &mut netfilter.tcp_established,
                    self.conntrack.conntrack_tcp_timeout_established,
                ),
                (
                    &mut netfilter.tcp_close_wait,
                    self.conntrack.conntrack_tcp_timeout_close_wait,
                ),
                (&mut netfilter.udp, self.conntrack.conntrack_udp_timeout),
                (
                    &mut netfilter.udp_stream,
                    self.conntrack.conntrack_udp_timeout_stream,
                ),
            ] {
                set(to, timeout.map(|timeout| timeout.0));
            }
        }
        set(&mut to.capacities.frontends, self.capacities.max_frontends);
        set(&mut to.capacities.slots, self.capacities.max_slots);
        set(&mut to.capacities.backends, self.capacities.max_backends);
        set(&mut to.capacities.flows, self.capacities.max_flows);
        set(&mut to.capacities.new_flows, self.capacities.max_new_flows);
        set(&mut to.capacities.snat, self.capacities.max_snat);
        set(&mut to.capacities.affinity, self.capacities.max_affinity);
        set(&mut to.capacities.sockets, self.capacities.max_sockets);
    }
}
