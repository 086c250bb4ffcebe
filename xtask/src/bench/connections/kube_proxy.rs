//! The rules that kube-proxy writes for the same Services, in iptables and nftables mode.
//!
//! As kube-proxy 1.33 writes them for a node with `clusterCIDR` (`pkg/proxy/iptables/proxier.go`,
//! `pkg/proxy/nftables/proxier.go`), less what needs kernel modules beyond netfilter's own
//! (nfacct). Chains of all Services come in the order of their names.

use std::{
    fmt::Write as _,
    io::Write,
    net::Ipv4Addr,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use shunt_lab::{Lab, Sockets};

/// Pods' addresses, `clusterCIDR`.
const CLUSTER_CIDR: &str = "10.44.0.0/16";
/// Of ClusterIPs.
const SERVICE_CIDR: &str = "10.96.0.0/12";
/// Up to so many Services, each has its own map of endpoints, as kube-proxy writes it. The kernel
/// finds a name for a map without one by going through all others of the table
/// (`nf_tables_set_alloc_name`): 15 s for 10,000, 74 s for 20,000. Among more, a Service that
/// nobody dials has a plain `goto` instead, in a chain that no packet comes to.
const ENDPOINT_MAPS_MOST: usize = 10_000;

/// One Service with one TCP port and one endpoint.
#[derive(Clone, Debug)]
pub(super) struct Service {
    /// Its name, in the namespace `default`; ASCII letters, digits and dashes.
    pub(super) name: String,
    /// Its ClusterIP.
    pub(super) ip: Ipv4Addr,
    /// Its port.
    pub(super) port: u16,
    /// Its node port.
    pub(super) node_port: Option<u16>,
    /// Its endpoint's address.
    pub(super) backend: Ipv4Addr,
    /// Its endpoint's port.
    pub(super) backend_port: u16,
}

/// kube-proxy's `--proxy-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Mode {
    /// With the legacy tables, which are the faster ones.
    Iptables,
    Nftables,
}

impl Mode {
    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }

    /// The program that loads the rules.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Iptables => "iptables-legacy-restore",
            Self::Nftables => "nft",
        }
    }

    /// Loads the rules on a node of the lab.
    ///
    /// # Errors
    ///
    /// When the program is missing or refuses them.
    pub(super) fn load(self, lab: &Lab, node: &str, services: &[Service]) -> Result<()> {
        let rules = match self {
            Self::Iptables => iptables(services),
            Self::Nftables => nftables(services, &lab.node_ips(node)?[0].to_string()),
        };
        let mut command: Command = lab.command(node, Sockets::Unhooked, self.program())?;
        if self == Self::Nftables {
            command.args(["-f", "-"]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}: install it", self.program()))?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        // A broken pipe means that it stopped at a line: its message says which.
        let _ = stdin.write_all(rules.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context(self.program())?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{}: {}",
                self.program(),
                message.lines().next().unwrap_or("no message")
            );
        }
        Ok(())
    }
}

/// The 16 characters that name a Service's chains: here its number in kube-proxy's alphabet, there
/// a hash.
fn code(number: usize) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    // An odd factor keeps numbers apart, and spreads them as a hash would.
    let mut rest = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..16)
        .map(|_| {
            let letter = ALPHABET[(rest & 31) as usize];
            rest = rest.rotate_right(5);
            char::from(letter)
        })
        .collect()
}

/// What `iptables-restore` reads.
fn iptables(services: &[Service]) -> String {
    let mut chains = String::new();
    let mut portals = String::new();
    let mut ports = String::new();
    let mut rules = String::new();
    for (number, service) in services.iter().enumerate() {
        let Service {
            name,
            ip,
            port,
            backend,
            backend_port,
            ..
        } = service;
        let code = code(number);
        let _ = writeln!(chains, ":KUBE-SVC-{code} - [0:0]\n:KUBE-SEP-{code} - [0:0]");
        let _ = writeln!(
            portals,
            "-A KUBE-SERVICES -m comment --comment \"default/{name} cluster IP\" -m tcp -p tcp -d {ip} --dport {port} -j KUBE-SVC-{code}"
        );
        if let Some(node_port) = service.node_port {
            let _ = writeln!(chains, ":KUBE-EXT-{code} - [0:0]");
            let _ = writeln!(
                ports,
                "-A KUBE-NODEPORTS -m comment --comment default/{name} -m tcp -p tcp --dport {node_port} -j KUBE-EXT-{code}"
            );
            let _ = writeln!(
                rules,
                "-A KUBE-EXT-{code} -m comment --comment \"masquerade traffic for default/{name} external destinations\" -j KUBE-MARK-MASQ\n\
                 -A KUBE-EXT-{code} -j KUBE-SVC-{code}"
            );
        }
        let _ = writeln!(
            rules,
            "-A KUBE-SVC-{code} -m comment --comment \"default/{name} cluster IP\" -m tcp -p tcp -d {ip} --dport {port} ! -s {CLUSTER_CIDR} -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{code} -m comment --comment \"default/{name} -> {backend}:{backend_port}\" -j KUBE-SEP-{code}\n\
             -A KUBE-SEP-{code} -m comment --comment default/{name} -s {backend} -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{code} -m comment --comment default/{name} -m tcp -p tcp -j DNAT --to-destination {backend}:{backend_port}"
        );
    }
    format!(
        "*filter
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
{chains}-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
{ports}{portals}-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
{rules}COMMIT
"
    )
}

/// What `nft -f` reads.
fn nftables(services: &[Service], node_ip: &str) -> String {
    let mut chains = String::new();
    let (mut ips, mut portals, mut ports) = (Vec::new(), Vec::new(), Vec::new());
    for (number, service) in services.iter().enumerate() {
        let Service {
            name,
            ip,
            port,
            backend,
            backend_port,
            ..
        } = service;
        let code = &code(number)[..8];
        let chain = format!("{code}-default/{name}/tcp/");
        let endpoint = format!("{chain}__{backend}/{backend_port}");
        let choice = if services.len() <= ENDPOINT_MAPS_MOST + 1 || service.node_port.is_some() {
            format!("numgen random mod 1 vmap {{ 0 : goto endpoint-{endpoint} }}")
        } else {
            format!("goto endpoint-{endpoint}")
        };
        ips.push(ip.to_string());
        portals.push(format!("{ip} . tcp . {port} : goto service-{chain}"));
        if let Some(node_port) = service.node_port {
            ports.push(format!("tcp . {node_port} : goto external-{chain}"));
            let _ = writeln!(
                chains,
                "add chain ip kube-proxy external-{chain}\n\
                 add rule ip kube-proxy external-{chain} jump mark-for-masquerade\n\
                 add rule ip kube-proxy external-{chain} goto service-{chain}"
            );
        }
        let _ = writeln!(
            chains,
            "add chain ip kube-proxy service-{chain}\n\
             add chain ip kube-proxy endpoint-{endpoint}\n\
             add rule ip kube-proxy service-{chain} ip daddr {ip} tcp dport {port} ip saddr != {CLUSTER_CIDR} jump mark-for-masquerade\n\
             add rule ip kube-proxy service-{chain} {choice}\n\
             add rule ip kube-proxy endpoint-{endpoint} ip saddr {backend} jump mark-for-masquerade\n\
             add rule ip kube-proxy endpoint-{endpoint} meta l4proto tcp dnat to {backend}:{backend_port}"
        );
    }
    // Elements name chains that must be there; services' chains name others in turn.
    let declared: String = services
        .iter()
        .enumerate()
        .filter(|(_, service)| service.node_port.is_some())
        .map(|(number, service)| {
            format!(
                "add chain ip kube-proxy service-{}-default/{}/tcp/\n",
                &code(number)[..8],
                service.name
            )
        })
        .collect();
    let elements = |map: &str, elements: &[String]| match elements {
        [] => String::new(),
        _ => format!(
            "add element ip kube-proxy {map} {{ {} }}\n",
            elements.join(", ")
        ),
    };
    format!(
        "table ip kube-proxy {{
  comment \"rules for kube-proxy\"
  set cluster-ips {{ type ipv4_addr; comment \"Active ClusterIPs\"; }}
  set nodeport-ips {{ type ipv4_addr; comment \"IPs that accept NodePort traffic\"; elements = {{ {node_ip} }}; }}
  map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
  map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
  map service-nodeports {{ type inet_proto . inet_service : verdict; }}
  chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
  chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
  chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
  chain cluster-ips-check {{
    ip daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\";
    ip daddr {SERVICE_CIDR} drop comment \"Drop traffic to unallocated ClusterIPs\";
  }}
  chain reject-chain {{ reject; }}
  chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
  chain masquerading {{
    meta mark and 0x4000 == 0 return;
    meta mark set meta mark xor 0x4000;
    masquerade fully-random;
  }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips;
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports;
  }}
  chain filter-prerouting {{ type filter hook prerouting priority -110; ct state new jump firewall-check; }}
  chain filter-input {{
    type filter hook input priority -110;
    ct state new jump nodeport-endpoints-check;
    ct state new jump service-endpoints-check;
  }}
  chain filter-forward {{
    type filter hook forward priority -110;
    ct state new jump service-endpoints-check;
    ct state new jump cluster-ips-check;
  }}
  chain filter-output {{
    type filter hook output priority -110;
    ct state new jump service-endpoints-check;
    ct state new jump firewall-check;
  }}
  chain filter-output-post-dnat {{ type filter hook output priority -90; ct state new jump cluster-ips-check; }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
{declared}{chains}{}{}{}",
        elements("cluster-ips", &ips),
        elements("service-ips", &portals),
        elements("service-nodeports", &ports),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services() -> Vec<Service> {
        (0..3)
            .map(|number: u8| Service {
                name: format!("s{number}"),
                ip: Ipv4Addr::new(10, 96, 0, number),
                port: 80,
                node_port: (number == 1).then_some(30080),
                backend: Ipv4Addr::new(10, 44, 0, number),
                backend_port: 8080,
            })
            .collect()
    }

    #[test]
    fn chains_of_many_services_have_names_of_their_own() {
        let mut codes: Vec<String> = (0..100_000)
            .map(|number| code(number)[..8].to_owned())
            .collect();
        codes.sort();
        codes.dedup();
        assert_eq!(codes.len(), 100_000);
    }

    #[test]
    fn iptables_rules_have_a_jump_per_service_and_the_node_ports_last() {
        let rules = iptables(&services());
        assert_eq!(rules.matches("-A KUBE-SERVICES").count(), 4, "{rules}");
        assert_eq!(rules.matches("-j DNAT").count(), 3);
        let last = rules
            .lines()
            .rfind(|line| line.starts_with("-A KUBE-SERVICES"))
            .unwrap();
        assert!(last.ends_with("-j KUBE-NODEPORTS"), "{last}");
        assert_eq!(rules.matches("-j KUBE-EXT-").count(), 1);
    }

    #[test]
    fn dialled_services_have_their_map_of_endpoints_among_however_many() {
        let many = |count| -> Vec<_> { services().into_iter().cycle().take(count).collect() };
        let maps = |count| {
            nftables(&many(count), "192.168.50.11")
                .matches("numgen random")
                .count()
        };
        assert_eq!(maps(9_999), 9_999);
        assert_eq!(maps(30_000), 10_000, "those with a node port");
    }

    #[test]
    fn nftables_rules_have_an_element_per_service() {
        let rules = nftables(&services(), "192.168.50.11");
        assert_eq!(
            rules.matches(". tcp . 80 : goto service-").count(),
            3,
            "{rules}"
        );
        assert_eq!(rules.matches("tcp . 30080 : goto external-").count(), 1);
        assert_eq!(rules.matches("dnat to 10.44.0.").count(), 3);
    }
}
