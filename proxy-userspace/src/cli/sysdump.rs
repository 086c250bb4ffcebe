//! `shunt sysdump`: one archive with what a maintainer asks for, secrets left out.
//!
//! What cannot be read is named in `errors.txt`; the rest is there all the same.

use std::{
    collections::BTreeSet,
    fmt::{Debug, Display, Write as _},
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use clap::Args;
use flate2::{Compression, write::GzEncoder};
use netlink_packet_route::{
    RouteNetlinkMessage, address::AddressMessage, link::LinkMessage, neighbour::NeighbourMessage,
    route::RouteMessage, rule::RuleMessage,
};
use serde::Serialize;
use shunt_common::layout::LAYOUT_VERSION;

use super::{backends, check, conntrack, print, services, status::Status, trace};
use crate::{
    config::DEFAULT_BPF_ROOT,
    datapath::{
        Paths,
        bpf::{self, program},
        cgroup,
        lock::agent_pid,
        maps::Maps,
        nftables, rtnl,
    },
};

/// Most flows in the archive.
const FLOWS: usize = 10_000;
/// Decisions in the archive at most, and for how long they are listened to.
const EVENTS: usize = 1_000;
const EVENTS_FOR: Duration = Duration::from_secs(1);
/// Longest the agent may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Where the agent serves its metrics by default.
const METRICS_PORT: u16 = 10_249;
/// Files under /proc/sys that change a packet's way; `*`: every device.
const SYSCTLS: [&str; 19] = [
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_enable",
    "net/core/bpf_jit_harden",
    "net/core/netdev_max_backlog",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/tcp_syn_retries",
    "net/ipv4/tcp_syncookies",
    "net/ipv4/conf/*/accept_local",
    "net/ipv4/conf/*/arp_ignore",
    "net/ipv4/conf/*/forwarding",
    "net/ipv4/conf/*/route_localnet",
    "net/ipv4/conf/*/rp_filter",
    "net/ipv4/conf/*/src_valid_mark",
    "net/ipv6/conf/*/forwarding",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
];
/// Words in an option's name whose value is nobody's business.
const SECRET: [&str; 4] = ["token", "password", "secret", "key"];

/// `shunt sysdump`.
#[derive(Debug, Args)]
pub struct SysdumpArgs {
    /// The folder in a bpf file system where the agent pins everything.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPF_ROOT)]
    bpf_root: PathBuf,
    /// Where to write it; `-`: to stdout [default: shunt-sysdump-TIME.tar.gz].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Put numbers in the place of the names of Services, namespaces and the node. Addresses stay.
    #[arg(long)]
    anonymise: bool,
}

/// A pinned program.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Program {
    name: String,
    id: u32,
    tag: String,
    verified_instructions: u32,
    maps: Vec<u32>,
}

/// Files of the archive, and what could not be read.
#[derive(Default)]
struct Archive {
    files: Vec<(&'static str, String)>,
    errors: String,
}

impl Archive {
    fn add(&mut self, name: &'static str, text: Result<String, impl Display>) {
        match text {
            Ok(text) => self.files.push((name, text)),
            Err(error) => {
                // A `String` takes everything.
                let _ = writeln!(self.errors, "{name}: {error:#}");
            }
        }
    }

    fn json(&mut self, name: &'static str, value: anyhow::Result<impl Serialize>) {
        let text = value.and_then(|value| Ok(serde_json::to_string_pretty(&value)?));
        self.add(name, text);
    }
}

fn programs(paths: &Paths) -> anyhow::Result<Vec<Program>> {
    let mut programs = Vec::new();
    for entry in fs::read_dir(paths.programs())? {
        let path = entry?.path();
        // Maps stand there too: see `Paths::build` and `Paths::start`.
        let Ok(info) = bpf::open(&path).and_then(program::info) else {
            continue;
        };
        if info.program_type != 0 && path != paths.build() && path != paths.start() {
            programs.push(Program {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                id: info.id,
                tag: info
                    .tag
                    .iter()
                    .fold(String::new(), |tag, byte| tag + &format!("{byte:02x}")),
                verified_instructions: info.verified_instructions,
                maps: info.maps,
            });
        }
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

/// What rtnetlink lists, a message a line.
fn listed(message: RouteNetlinkMessage) -> io::Result<String> {
    let messages = rtnl::dump(message)?;
    Ok(lines(messages))
}

fn lines(items: impl IntoIterator<Item: Debug>) -> String {
    items
        .into_iter()
        .fold(String::new(), |text, item| text + &format!("{item:?}\n"))
}

fn sysctls() -> String {
    let mut text = String::new();
    let mut add = |name: &str| {
        if let Ok(value) = fs::read_to_string(Path::new("/proc/sys").join(name)) {
            text += &format!("{name} = {}\n", value.trim());
        }
    };
    for name in SYSCTLS {
        let Some((folder, file)) = name.split_once("/*/") else {
            add(name);
            continue;
        };
        let devices = fs::read_dir(Path::new("/proc/sys").join(folder));
        let mut devices: Vec<String> = devices
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        devices.sort();
        for device in devices {
            add(&format!("{folder}/{device}/{file}"));
        }
    }
    text
}

/// The lines of the kernel's own configuration that concern BPF and packets.
fn kernel_config(release: &str) -> anyhow::Result<String> {
    let text = match fs::read("/proc/config.gz") {
        Ok(packed) => {
            let mut text = String::new();
            flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut text)?;
            text
        }
        Err(_) => {
            let path = format!("/boot/config-{release}");
            fs::read_to_string(&path)
                .with_context(|| format!("neither /proc/config.gz nor {path} can be read"))?
        }
    };
    let matters = |line: &&str| {
        [
            "BPF",
            "NET",
            "NF_",
            "XDP",
            "CGROUP",
            "XFRM",
            "VETH",
            "CONFIG_HZ",
        ]
        .iter()
        .any(|word| line.contains(word))
    };
    Ok(text.lines().filter(matters).collect::<Vec<_>>().join("\n"))
}

/// The agent's command line, without what may be secret.
fn command_line(pid: u32) -> io::Result<String> {
    let text = fs::read(format!("/proc/{pid}/cmdline"))?;
    let mut words = Vec::new();
    let mut hide = false;
    for word in text.split(|&byte| byte == 0).map(String::from_utf8_lossy) {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (&*word, None),
        };
        let is_secret = name.starts_with("--") && SECRET.iter().any(|secret| name.contains(secret));
        words.push(match value {
            Some(_) if is_secret => format!("{name}=(left out)"),
            None if hide && !word.starts_with("--") => "(left out)".to_owned(),
            _ => word.to_string(),
        });
        hide = is_secret && value.is_none();
    }
    Ok(words.join("\n"))
}

/// The value of `--config` on a command line.
fn config_path<'a>(words: &[&'a str]) -> Option<&'a str> {
    let mut given = words
        .iter()
        .zip(words.iter().skip(1).map(Some).chain([None]));
    given.find_map(|(word, next)| match word.strip_prefix("--config") {
        Some("") => next.copied(),
        Some(value) => value.strip_prefix('='),
        None => None,
    })
}

/// The agent's file of `--config`, as it sees it, without what may be secret.
fn config_file(pid: u32, path: &str) -> io::Result<String> {
    let place = match path.strip_prefix('/') {
        Some(path) => format!("/proc/{pid}/root/{path}"),
        None => format!("/proc/{pid}/cwd/{path}"),
    };
    Ok(without_secrets(&fs::read_to_string(place)?))
}

/// YAML without the values of fields that may be secret.
fn without_secrets(yaml: &str) -> String {
    let lines = yaml.lines().map(|line| match line.split_once(':') {
        Some((name, _))
            if SECRET
                .iter()
                .any(|secret| name.to_lowercase().contains(secret)) =>
        {
            format!("{name}: (left out)\n")
        }
        _ => format!("{line}\n"),
    });
    lines.collect()
}

/// What the agent serves at a path.
fn ask(port: u16, path: &str) -> io::Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn gather(args: &SysdumpArgs) -> (Archive, BTreeSet<String>) {
    let mut archive = Archive::default();
    let paths = Paths::new(&args.bpf_root);
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy().into_owned();
    archive.add(
        "version.txt",
        Ok::<_, io::Error>(format!(
            "shunt {} (maps of layout {LAYOUT_VERSION})\n{} {release} {} {}\n",
            env!("CARGO_PKG_VERSION"),
            system.sysname().to_string_lossy(),
            system.version().to_string_lossy(),
            system.machine().to_string_lossy(),
        )),
    );
    let mut names = BTreeSet::from([system.nodename().to_string_lossy().into_owned()]);
    match Maps::open(&args.bpf_root) {
        Ok(maps) => {
            archive.json("status.json", Status::read(&maps));
            let rows = services::list(&maps);
            for row in rows.iter().flatten() {
                names.extend([row.namespace.clone(), row.service.clone()]);
            }
            archive.json("services.json", rows.map_err(Into::into));
            archive.json("backends.json", backends::list(&maps).map_err(Into::into));
            let flows = conntrack::list(&maps, &conntrack::Filter::default()).map(|mut flows| {
                flows.truncate(FLOWS);
                flows
            });
            archive.json("flows.json", flows.map_err(Into::into));
            archive.add("events.jsonl", trace::record(&maps, EVENTS_FOR, EVENTS));
        }
        Err(error) => archive.add("status.json", Err(error)),
    }
    archive.json("programs.json", programs(&paths));
    archive.json(
        "check.json",
        Ok(check::check(&args.bpf_root, &cgroup::default_root())),
    );
    for (name, message) in [
        (
            "links.txt",
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        ),
        (
            "addresses.txt",
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        ),
        (
            "routes.txt",
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
        ),
        (
            "rules.txt",
            RouteNetlinkMessage::GetRule(RuleMessage::default()),
        ),
        (
            "neighbours.txt",
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        ),
    ] {
        archive.add(name, listed(message));
    }
    archive.add(
        "netfilter.txt",
        nftables::list().map(|lines| lines.join("\n")),
    );
    archive.add("sysctls.txt", Ok::<_, io::Error>(sysctls()));
    archive.add("kernel-config.txt", kernel_config(&release));
    if let Some(pid) = agent_pid(&args.bpf_root) {
        let line = command_line(pid);
        let words: Vec<&str> = line.iter().flat_map(|line| line.lines()).collect();
        for pair in words.windows(2) {
            if ["--node-name", "--hostname-override"].contains(&pair[0]) {
                names.insert(pair[1].to_owned());
            }
        }
        if let Some(path) = config_path(&words) {
            archive.add("config.yaml", config_file(pid, path));
        }
        archive.add("command-line.txt", line);
        archive.add("metrics.txt", ask(METRICS_PORT, "/metrics"));
        // What flags, file and defaults come to.
        archive.add("configz.txt", ask(METRICS_PORT, "/configz"));
    }
    (archive, names)
}

/// Puts numbers in the place of names, where they stand by themselves.
fn anonymised(text: &str, names: &BTreeSet<String>) -> String {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(is_of_name) {
        out += &rest[..start];
        rest = &rest[start..];
        let end = rest.find(|c| !is_of_name(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        match names.iter().position(|name| name == word) {
            Some(number) => out += &format!("name-{number}"),
            None => out += word,
        }
        rest = &rest[end..];
    }
    out + rest
}

fn pack(archive: &Archive, folder: &str, time: u64, to: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(GzEncoder::new(to, Compression::default()));
    for (name, text) in &archive.files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(time);
        header.set_cksum();
        tar.append_data(&mut header, format!("{folder}/{name}"), text.as_bytes())?;
    }
    tar.into_inner()?.finish()?.flush()
}

/// Runs the verb.
///
/// # Errors
/// When the archive cannot be written.
pub fn run(args: &SysdumpArgs) -> anyhow::Result<()> {
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (mut archive, names) = gather(args);
    let errors = std::mem::take(&mut archive.errors);
    archive.files.push(("errors.txt", errors));
    if args.anonymise {
        for (_, text) in &mut archive.files {
            *text = anonymised(text, &names);
        }
    }
    let folder = format!("shunt-sysdump-{time}");
    let path = match &args.output {
        Some(path) if path.as_os_str() == "-" => {
            return Ok(pack(&archive, &folder, time, io::stdout().lock())?);
        }
        Some(path) => path.clone(),
        None => PathBuf::from(format!("{folder}.tar.gz")),
    };
    let written = fs::File::create(&path).and_then(|file| pack(&archive, &folder, time, file));
    written.with_context(|| format!("cannot write {}", path.display()))?;
    print(&path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_found_and_has_no_secrets() {
        let line = [
            "shunt",
            "run",
            "--config",
            "/etc/shunt.yaml",
            "--xdp",
            "off",
        ];
        assert_eq!(config_path(&line), Some("/etc/shunt.yaml"));
        assert_eq!(config_path(&["run", "--config=a.yaml"]), Some("a.yaml"));
        assert_eq!(config_path(&["run", "--config"]), None);
        assert_eq!(config_path(&["run", "--config-sync-period=1m"]), None);
        let yaml = "kind: ShuntConfiguration\n  bearerToken: abc\nxdp: off\n";
        let told = "kind: ShuntConfiguration\n  bearerToken: (left out)\nxdp: off\n";
        assert_eq!(without_secrets(yaml), told);
    }

    #[test]
    fn names_are_numbers_where_they_stand_alone() {
        let names = ["default", "web"].map(str::to_owned).into();
        assert_eq!(
            anonymised(
                r#"{"namespace": "default", "service": "web"} default/web"#,
                &names
            ),
            r#"{"namespace": "name-0", "service": "name-1"} name-0/name-1"#
        );
        let others = "net.ipv4.conf.default.rp_filter = 1, webs, web-a, ünïcode web.";
        assert_eq!(anonymised(others, &names), others);
    }
}
