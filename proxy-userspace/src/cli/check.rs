//! `shunt check`: what this kernel, this process and this node have of what shunt needs, tried out,
//! not read from versions.
//!
//! Nothing is left behind and nothing of the node's own is touched: programs are attached to the
//! loopback device of a network namespace that lives as long as the probe.

use std::{
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    time::Duration,
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_helper_supported, is_map_supported},
};
use aya_obj::generated::bpf_func_id;
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

use super::Output;
use crate::datapath::{
    Paths,
    attach::{TcMode, pinned_links},
    bpf::{
        link::{self, Hook},
        probe,
    },
    capability, cgroup,
    devices::{self, Device, DevicePatterns, Role, is_link_local},
    load::is_bpffs,
    local_ports,
    maps::Maps,
    netfilter::{self, Netfilter, Value},
    netlink,
    object::kernel,
    xdp,
};
use crate::sync::node::SNAT_PORTS;

/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
/// `BPF_PROG_TYPE_XDP`.
const XDP: u32 = 6;
/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
const CGROUP_SOCK_ADDR: u32 = 18;
/// `XDP_FLAGS_SKB_MODE`.
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
/// Index of the loopback device in every network namespace.
const LOOPBACK: u32 = 1;

/// Fewer source ports of their own than one in so many are few.
const FEW: usize = 8;

/// How much depends on a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// shunt does not run without it.
    Required,
    /// Something is missing or slower without it.
    Optional,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The feature, capability or condition.
    pub what: String,
    /// How much depends on it.
    pub need: Need,
    /// Whether it is there.
    pub ok: bool,
    /// What was found.
    pub found: String,
    /// What to do when it is not there; empty when it is.
    pub advice: String,
}

/// All rows, and the kernel that they are about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The running kernel's release.
    pub kernel: String,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether everything required is there.
    pub fn ok(&self) -> bool {
        self.rows
            .iter()
            .all(|row| row.ok || row.need == Need::Optional)
    }
}

struct Rows(Vec<Row>);

impl Rows {
    fn add(&mut self, what: &str, need: Need, found: Result<String, String>, advice: &str) {
        let ok = found.is_ok();
        let advice = if ok { String::new() } else { advice.to_owned() };
        let found = found.unwrap_or_else(|e| e);
        self.0.push(Row {
            what: what.to_owned(),
            need,
            ok,
            found,
            advice,
        });
    }
}

/// Tries everything out.
pub fn check(bpf_root: &Path, cgroup_root: &Path) -> Report {
    let mut rows = Rows(Vec::new());
    capabilities(&mut rows);
    filesystems(&mut rows, bpf_root, cgroup_root);
    features(&mut rows);
    network(&mut rows, bpf_root);
    others(&mut rows);
    connection_table(&mut rows);
    Report {
        kernel: kernel(),
        rows: rows.0,
    }
}

fn capabilities(rows: &mut Rows) {
    let missing = capability::missing();
    for (name, _) in capability::NEEDED {
        let found = match missing.contains(&name) {
            false => Ok("held".to_owned()),
            true => Err("not held".to_owned()),
        };
        rows.add(
            &format!("capability {name}"),
            Need::Required,
            found,
            &format!("run as root, or add {name} to the container's securityContext.capabilities"),
        );
    }
}

fn filesystems(rows: &mut Rows, bpf_root: &Path, cgroup_root: &Path) {
    let existing = bpf_root
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let bpffs = if is_bpffs(existing) {
        Ok(format!("{} is on one", bpf_root.display()))
    } else if known
        .lines()
        .any(|l| l.split_whitespace().last() == Some("bpf"))
    {
        Ok("known to the kernel; `shunt run` mounts it".to_owned())
    } else {
        Err("not known to the kernel".to_owned())
    };
    rows.add(
        "bpffs",
        Need::Required,
        bpffs,
        "a kernel with CONFIG_BPF_SYSCALL",
    );
    let btf = fs::metadata("/sys/kernel/btf/vmlinux")
        .map(|m| format!("{} KiB", m.len() / 1024))
        .map_err(|e| format!("/sys/kernel/btf/vmlinux: {e}"));
    rows.add(
        "kernel type information (BTF)",
        Need::Required,
        btf,
        "a kernel with CONFIG_DEBUG_INFO_BTF",
    );
    let cgroup = match fs::metadata(cgroup_root) {
        Ok(_) if cgroup::is_cgroup2(cgroup_root) => Ok(cgroup_root.display().to_string()),
        Ok(_) => Err(format!("{} is no cgroup2 directory", cgroup_root.display())),
        Err(e) => Err(format!("{}: {e}", cgroup_root.display())),
    };
    rows.add(
        "cgroup2 root",
        Need::Optional,
        cgroup,
        "name it with --cgroup-root (often /sys/fs/cgroup or /sys/fs/cgroup/unified); without it run with --socket-lb off",
    );
}

fn features(rows: &mut Rows) {
    for (kind, name, need, advice) in [
        (
            MapType::LruHash,
            "LRU hash map",
            Need::Required,
            "kernel 4.10 or later",
        ),
        (
            MapType::SkStorage,
            "socket storage map",
            Need::Optional,
            "kernel 5.2 or later; without it run with --socket-lb off",
        ),
    ] {
        let found = match is_map_supported(kind) {
            Ok(true) => Ok("works".to_owned()),
            Ok(false) => Err("not supported".to_owned()),
            Err(e) => Err(chain(&e)),
        };
        rows.add(name, need, found, advice);
    }
    let batch = probe::probe_batch()
        .map(|()| "works".to_owned())
        .map_err(|e| e.to_string());
    rows.add(
        "batch operations on maps",
        Need::Optional,
        batch,
        "kernel 5.6 or later; without them walks over flows are slower",
    );
    let tail_call = probe::probe_tail_call()
        .map(|()| "works".to_owned())
        .map_err(|e| e.to_string());
    rows.add(
        "tail calls beside functions",
        Need::Required,
        tail_call,
        "kernel 5.10 or later on x86-64, 6.0 or later on arm64, with net.core.bpf_jit_enable=1",
    );

    use ProgramType::{CgroupSockAddr, SchedClassifier, Xdp};
    use bpf_func_id::{
        BPF_FUNC_fib_lookup, BPF_FUNC_get_netns_cookie, BPF_FUNC_redirect_peer,
        BPF_FUNC_set_retval, BPF_FUNC_sk_lookup_udp, BPF_FUNC_sk_storage_get,
        BPF_FUNC_skc_lookup_tcp,
    };
    let tc = "kernel 5.15 or later";
    for (program, helper, name, need, advice) in [
        (
            SchedClassifier,
            BPF_FUNC_fib_lookup,
            "route lookup in tc (fib_lookup)",
            Need::Required,
            tc,
        ),
        (
            SchedClassifier,
            BPF_FUNC_skc_lookup_tcp,
            "TCP socket lookup in tc",
            Need::Required,
            tc,
        ),
        (
            SchedClassifier,
            BPF_FUNC_sk_lookup_udp,
            "UDP socket lookup in tc",
            Need::Required,
            tc,
        ),
        (
            SchedClassifier,
            BPF_FUNC_redirect_peer,
            "redirect into a pod (redirect_peer)",
            Need::Optional,
            "kernel 5.10 or later",
        ),
        (
            Xdp,
            BPF_FUNC_fib_lookup,
            "route lookup in XDP (fib_lookup)",
            Need::Optional,
            "run with --xdp off",
        ),
        (
            Xdp,
            BPF_FUNC_skc_lookup_tcp,
            "TCP socket lookup in XDP",
            Need::Optional,
            "run with --xdp off",
        ),
        (
            CgroupSockAddr,
            BPF_FUNC_sk_storage_get,
            "socket storage in the socket hook",
            Need::Optional,
            "run with --socket-lb off",
        ),
        (
            CgroupSockAddr,
            BPF_FUNC_get_netns_cookie,
            "namespace cookie in the socket hook",
            Need::Optional,
            "run with --socket-lb off",
        ),
        (
            CgroupSockAddr,
            BPF_FUNC_set_retval,
            "refusal with ECONNREFUSED in the socket hook (set_retval)",
            Need::Optional,
            "kernel 5.18 or later; before it a refused connect(2) fails with EPERM",
        ),
    ] {
        let found = match is_helper_supported(program, helper) {
            Ok(true) => Ok("works".to_owned()),
            Ok(false) => Err("not supported".to_owned()),
            Err(e) => Err(chain(&e)),
        };
        rows.add(name, need, found, advice);
    }

    let links = cgroup_links().map_err(|e| e.to_string());
    rows.add(
        "links to cgroups",
        Need::Optional,
        links,
        "kernel 5.7 or later; without them run with --socket-lb off",
    );
    // A namespace of the probe's own, gone with its thread.
    let attached = std::thread::spawn(|| -> io::Result<[io::Result<()>; 2]> {
        // SAFETY: nothing else runs in this thread that a new network namespace could surprise.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
        let xdp = probe::load_trivial(XDP, Some(Hook::Xdp), 2).and_then(|program| {
            link::create(program.as_fd(), LOOPBACK, Hook::Xdp, XDP_FLAGS_SKB_MODE)
        });
        let tcx = probe::load_trivial(SCHED_CLS, None, -1)
            .and_then(|program| link::create(program.as_fd(), LOOPBACK, Hook::TcxIngress, 0));
        Ok([xdp.map(drop), tcx.map(drop)])
    });
    let [xdp, tcx] = match attached
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the probe panicked")))
    {
        Ok(results) => results.map(|r| r.map(|()| "works".to_owned()).map_err(|e| e.to_string())),
        Err(e) => [0, 1].map(|_| {
            Err(format!(
                "not tried, for lack of a network namespace to do it in: {e}"
            ))
        }),
    };
    // The agent's container lacks SYS_ADMIN, which such a namespace needs; the agent itself does
    // not.
    let advise = |found: &Result<String, String>, advice: &'static str| match found {
        Err(text) if text.starts_with("not tried") => {
            "run `shunt check` as root on the node itself to know"
        }
        _ => advice,
    };
    let advice = [
        advise(&xdp, "kernel 5.9 or later; without them run with --xdp off"),
        advise(
            &tcx,
            "kernel 6.6 or later; before it shunt uses clsact filters",
        ),
    ];
    rows.add("links to XDP", Need::Optional, xdp, advice[0]);
    rows.add("links to tc (TCX)", Need::Optional, tcx, advice[1]);
}

fn cgroup_links() -> io::Result<String> {
    let program = probe::load_trivial(CGROUP_SOCK_ADDR, Some(Hook::Connect4), 1)?;
    // No cgroup at all, so that nothing is attached: a kernel that knows such links looks at the
    // descriptor first.
    let not_a_cgroup = fs::File::open("/dev/null")?;
    match link::create(
        program.as_fd(),
        not_a_cgroup.as_raw_fd() as u32,
        Hook::Connect4,
        0,
    ) {
        Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok("works".to_owned()),
        Err(e) => Err(e),
        Ok(_) => Err(io::Error::other("the kernel took /dev/null for a cgroup")),
    }
}

/// What of this node's network would get in the way of Service traffic.
fn network(rows: &mut Rows, bpf_root: &Path) {
    let devices = match devices::list() {
        Ok(devices) => devices,
        Err(error) => {
            rows.add(
                "network devices",
                Need::Required,
                Err(error.to_string()),
                "rtnetlink",
            );
            return;
        }
    };
    let (taken, _) = DevicePatterns::default().select(devices);
    let names = |devices: &[&Device]| {
        let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        names.join(", ")
    };
    let links = pinned_links(&Paths::new(bpf_root)).unwrap_or_default();
    let bare: Vec<&Device> = taken
        .iter()
        .map(|(device, _)| device)
        .filter(|device| !links.iter().any(|link| link.index == Some(device.index)))
        .collect();
    let found = if links.is_empty() || TcMode::probe() == TcMode::Clsact || bare.is_empty() {
        Ok(format!("{} that shunt has programs for", taken.len()))
    } else {
        Err(format!("no program on {}", names(&bare)))
    };
    rows.add(
        "devices by which packets come and go",
        Need::Optional,
        found,
        "answers and requests by these devices are not translated: let --devices name them, or leave it out",
    );
    let outward: Vec<&Device> = taken
        .iter()
        .filter(|(_, role)| *role == Role::Node)
        .map(|(device, _)| device)
        .collect();
    for (family, is_family) in [
        ("IPv4", IpAddr::is_ipv4 as fn(&IpAddr) -> bool),
        ("IPv6", IpAddr::is_ipv6),
    ] {
        let usable = |address: &&IpAddr| is_family(address) && !is_link_local(address);
        let found = match outward
            .iter()
            .flat_map(|device| &device.addresses)
            .find(usable)
        {
            Some(address) => Ok(address.to_string()),
            None => Err("none".to_owned()),
        };
        rows.add(
            &format!("{family} source address for packets to other nodes"),
            Need::Optional,
            found,
            "without one, clients from outside reach the backends of this node only, in this family",
        );
    }
    source_ports(rows, bpf_root);
    let setting = |device: &str| -> u32 {
        let path = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
        fs::read_to_string(path).map_or(0, |text| text.trim().parse().unwrap_or(0))
    };
    // The kernel takes the greater of the two.
    let strict: Vec<&Device> = outward
        .iter()
        .filter(|device| setting(&device.name).max(setting("all")) == 1)
        .copied()
        .collect();
    let found = if strict.len() > 1 {
        Err(format!("strict on {}", names(&strict)))
    } else {
        Ok("not in the way".to_owned())
    };
    rows.add(
        "reverse path filter (rp_filter)",
        Need::Optional,
        found,
        "packets whose answers leave by another device are dropped: set it to 2 (loose) where ways are asymmetric",
    );
    let found = xdp::forward_rules().map_or_else(|| Ok("none".to_owned()), Err);
    rows.add(
        "netfilter rules in FORWARD that XDP would pass by",
        Need::Optional,
        found,
        "--xdp auto leaves the work to tc, where the rules hold; --xdp native passes them by",
    );
}

/// Ports for translated sources, beside what the kernel gives to sockets of this node.
fn source_ports(rows: &mut Rows, bpf_root: &Path) {
    let config = Maps::open(bpf_root).and_then(|maps| maps.config());
    let range = match config {
        Ok(config) if config.snat_ports != 0 => {
            config.snat_first..=config.snat_first.saturating_add(config.snat_ports - 1)
        }
        _ => SNAT_PORTS,
    };
    let given = local_ports::within(&range);
    let (first, last) = (range.start(), range.end());
    let own = range.len() - given.len();
    let text = format!(
        "{own} of {first}-{last}; sockets are given {} of them",
        given.len()
    );
    rows.add(
        "source ports (--snat-ports) that no socket is given",
        Need::Optional,
        if own * FEW < range.len() {
            Err(text)
        } else {
            Ok(text)
        },
        "what a process sends to a backend by the port of a translated flow gets another one, which costs: leave some of \
         --snat-ports out of net.ipv4.ip_local_port_range, or name them in net.ipv4.ip_local_reserved_ports",
    );
}

/// Others who translate Service traffic: two proxies on a node fight over its packets.
fn others(rows: &mut Rows) {
    let found = match nft::kube_proxy() {
        Ok(Some(what)) => Err(what),
        Ok(None) => Ok("none found".to_owned()),
        // Without nf_tables in the kernel there are no rules in it.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)
            ) =>
        {
            Ok("no nf_tables in this kernel".to_owned())
        }
        Err(e) => Ok(format!("cannot tell: nf_tables: {e}")),
    };
    let advice = "stop kube-proxy on this node, then remove its rules with `kube-proxy --cleanup`";
    rows.add(
        "no kube-proxy rules in nf_tables",
        Need::Optional,
        found,
        advice,
    );
    for (port, what) in [(10256, "healthz"), (10249, "metrics")] {
        let found = if listening(port) {
            Err(format!("port {port} is taken"))
        } else {
            Ok(format!("port {port} is free"))
        };
        rows.add(
            &format!("nobody at kube-proxy's {what} port"),
            Need::Optional,
            found,
            "kube-proxy, or a shunt, runs in this network namespace: stop it first",
        );
    }
}

/// What kube-proxy takes care of in netfilter's own table, which others on the node go on using.
fn connection_table(rows: &mut Rows) {
    let what = "netfilter's connection table as kube-proxy keeps it";
    let Some(count) = Value::Count.read() else {
        rows.add(
            what,
            Need::Optional,
            Ok("nothing on this node asks for it".to_owned()),
            "",
        );
        return;
    };
    let wanted = Netfilter::default();
    let value = |value: Value| value.read().unwrap_or_default();
    let (max, established, close_wait) = (
        value(Value::Max),
        value(Value::TcpEstablished),
        value(Value::TcpCloseWait),
    );
    let seconds = |timeout: Option<Duration>| timeout.unwrap_or_default().as_secs();
    let mut lacks = Vec::new();
    if let Some(entries) = wanted
        .entries(netfilter::cpus())
        .filter(|entries| max < *entries)
    {
        lacks.push(format!("nf_conntrack_max is {max}, not {entries}"));
    }
    if established > seconds(wanted.tcp_established) {
        lacks.push(format!("open TCP connections stay {established} s"));
    }
    if close_wait < seconds(wanted.tcp_close_wait) {
        lacks.push(format!("half-closed ones {close_wait} s"));
    }
    let found = match lacks.is_empty() {
        true => Ok(format!(
            "{count} of {max} entries; TCP: {established} s, CLOSE_WAIT {close_wait} s"
        )),
        false => Err(lacks.join(", ")),
    };
    let advice = "time-outs: run the agent with a KubeProxyConfiguration; the size: net.netfilter.nf_conntrack_max by sysctl on the \
                  node, or deploy/components/netfilter-conntrack";
    rows.add(what, Need::Optional, found, advice);
}

/// Whether a TCP socket listens on `port` in this network namespace.
fn listening(port: u16) -> bool {
    ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
        .iter()
        .any(|file| {
            fs::read_to_string(file).is_ok_and(|table| {
                // sl local_address rem_address st …; 0A: TCP_LISTEN.
                table.lines().skip(1).any(|line| {
                let fields: Vec<&str> = line.split_whitespace().take(4).collect();
                matches!(fields[..], [_, local, _, "0A"] if local.rsplit(':').next() == Some(&format!("{port:04X}")))
            })
            })
        })
}

/// kube-proxy's traces in nf_tables, which iptables-nft writes into as well; read over netlink, as
/// no `nft` need be there.
mod nft {
    use std::io;

    use super::netlink::dump_netfilter;

    /// `NFNL_SUBSYS_NFTABLES` << 8 | `NFT_MSG_GETTABLE`.
    const GET_TABLE: u16 = (10 << 8) | 1;
    /// `NFNL_SUBSYS_NFTABLES` << 8 | `NFT_MSG_GETCHAIN`.
    const GET_CHAIN: u16 = (10 << 8) | 4;
    /// `NFTA_TABLE_NAME`.
    const TABLE_NAME: u16 = 1;
    /// `NFTA_CHAIN_NAME`.
    const CHAIN_NAME: u16 = 3;

    /// What of kube-proxy is there, in its iptables (`KUBE-SERVICES`) or nftables mode (table
    /// `kube-proxy`).
    pub(super) fn kube_proxy() -> io::Result<Option<String>> {
        if names(GET_TABLE, TABLE_NAME)?
            .iter()
            .any(|name| name == "kube-proxy")
        {
            return Ok(Some("table kube-proxy".to_owned()));
        }
        Ok(names(GET_CHAIN, CHAIN_NAME)?
            .into_iter()
            .find(|name| name == "KUBE-SERVICES" || name == "KUBE-NODEPORTS")
            .map(|name| format!("chain {name}")))
    }

    /// The names (attribute `attribute`) of all objects of a kind and of every family.
    fn names(kind: u16, attribute: u16) -> io::Result<Vec<String>> {
        let objects = dump_netfilter(kind)?;
        Ok(objects
            .iter()
            .filter_map(|object| object.attributes().text(attribute))
            .collect())
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Runs the verb and prints its report; whether everything required is there.
///
/// # Errors
/// When the report cannot be printed.
pub fn run(bpf_root: &Path, cgroup_root: &Path, output: Output) -> anyhow::Result<bool> {
    let report = check(bpf_root, cgroup_root);
    if let Some(text) = output.structured(&report)? {
        println!("{text}");
        return Ok(report.ok());
    }
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_header(["", "", "WHAT", "FOUND", "WHAT TO DO"]);
    for row in &report.rows {
        let verdict = match (row.ok, row.need) {
            (true, _) => "ok",
            (false, Need::Required) => "MISSING",
            (false, Need::Optional) => "without",
        };
        let need = match row.need {
            Need::Required => "required",
            Need::Optional => "optional",
        };
        table.add_row([verdict, need, &row.what, &row.found, &row.advice]);
    }
    println!("kernel {}\n{table}", report.kernel);
    Ok(report.ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_required_decides() {
        let row = |need, ok| Row {
            what: String::new(),
            need,
            ok,
            found: String::new(),
            advice: String::new(),
        };
        let report = |rows| Report {
            kernel: String::new(),
            rows,
        };
        assert!(report(vec![row(Need::Required, true), row(Need::Optional, false)]).ok());
        assert!(!report(vec![row(Need::Required, false), row(Need::Optional, true)]).ok());
    }

    #[test]
    fn a_listener_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listening(port));
        drop(listener);
        assert!(!listening(port));
    }
}
