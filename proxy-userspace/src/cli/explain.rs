//! `shunt explain`: what this node does with a packet, hook by hook, and why.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum};

use super::{
    Common, block_on,
    pods::{PodSource, ProtocolArg, nearest},
    print, services, table,
};
use crate::{
    datapath::maps::Maps,
    explain::{self, Explanation, Pinned, Question, Sender},
    object::{ObjectName, Protocol},
};

/// The port of a client that names none: of the range that Linux takes such ports from.
const CLIENT_PORT: u16 = 40_000;
/// `shunt explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// The packet's protocol.
    #[arg(value_enum, ignore_case = true)]
    protocol: ProtocolArg,
    /// Who sends it: ADDRESS, ADDRESS:PORT ([ADDRESS]:PORT for IPv6) or pod/NAMESPACE/NAME.
    #[arg(value_name = "SRC")]
    source: String,
    /// Whom it is for: ADDRESS:PORT, or a Service: [NAMESPACE/]NAME:PORT.
    #[arg(value_name = "DST")]
    destination: String,
    /// Where it comes from [default: told by SRC].
    #[arg(long, value_enum)]
    from: Option<From>,
    /// The device by which it comes in [default: the one that leads back to SRC].
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    #[command(flatten)]
    pods: PodSource,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum From {
    /// A pod of this node.
    Pod,
    /// A process of the node itself.
    Node,
    /// The network.
    Outside,
}

/// What stands for SRC.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Address(IpAddr, u16),
    Pod(ObjectName),
}

/// What stands for DST.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Destination {
    Address(SocketAddr),
    Service {
        namespace: Option<String>,
        name: String,
        port: u16,
    },
}

fn source(text: &str) -> anyhow::Result<Source> {
    if let Some(pod) = text.strip_prefix("pod/") {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            bail!("SRC {text}: a Pod is pod/NAMESPACE/NAME");
        }
        return Ok(Source::Pod(ObjectName::new(namespace, name)));
    }
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Ok(Source::Address(socket.ip(), socket.port()));
    }
    match text.parse() {
        Ok(address) => Ok(Source::Address(address, CLIENT_PORT)),
        Err(_) => bail!(
            "SRC {text}: neither ADDRESS, ADDRESS:PORT ([ADDRESS]:PORT for IPv6) nor pod/NAMESPACE/NAME"
        ),
    }
}

fn destination(text: &str) -> anyhow::Result<Destination> {
    if let Ok(socket) = text.parse() {
        return Ok(Destination::Address(socket));
    }
    let wrong = || {
        anyhow!(
            "DST {text}: neither ADDRESS:PORT ([ADDRESS]:PORT for IPv6) nor [NAMESPACE/]NAME:PORT"
        )
    };
    if text.parse::<IpAddr>().is_ok() {
        bail!("DST {text}: a port is missing: {text}:PORT ([ADDRESS]:PORT for IPv6)");
    }
    let (name, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse().map_err(|_| wrong())?;
    let name = name.strip_prefix("svc/").unwrap_or(name);
    let (namespace, name) = match name.split_once('/') {
        Some((namespace, name)) => (Some(namespace.to_owned()), name),
        None => (None, name),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    if !is_label(name)
        || namespace
            .as_deref()
            .is_some_and(|namespace| !is_label(namespace))
    {
        return Err(wrong());
    }
    Ok(Destination::Service {
        namespace,
        name: name.to_owned(),
        port,
    })
}

/// The address of a Service's port, of the client's family.
fn service_address(
    maps: &Maps,
    namespace: Option<&str>,
    name: &str,
    port: u16,
    protocol: Protocol,
    v4: bool,
) -> anyhow::Result<SocketAddr> {
    let rows = services::list(maps)?;
    let namespace = namespace.unwrap_or("default");
    let is_it = |row: &&services::FrontendRow| row.namespace == namespace && row.service == name;
    if !rows.iter().any(|row| is_it(&row)) {
        let known = rows
            .iter()
            .map(|row| (row.namespace.clone(), row.service.clone()));
        let (full, near) = (format!("{namespace}/{name}"), nearest(name, known));
        bail!(
            "no Service {full} in the maps{near}; `shunt services` lists all (one without cluster IP is not there)"
        );
    }
    let of_port = |row: &&services::FrontendRow| {
        is_it(row) && row.port == port && row.protocol == protocol.to_string()
    };
    let found = rows
        .iter()
        .filter(of_port)
        .filter(|row| row.kind != "NodePort")
        .find(|row| row.address.is_ipv4() == v4);
    if let Some(row) = found {
        return Ok(row.socket());
    }
    let family = if v4 { "IPv4" } else { "IPv6" };
    if rows.iter().any(|row| of_port(&row)) {
        bail!("Service {namespace}/{name} has no {family} address, and SRC is one");
    }
    let mut ports: Vec<String> = rows
        .iter()
        .filter(is_it)
        .filter(|row| row.kind != "NodePort")
        .map(|row| format!("{}/{}", row.port, row.protocol))
        .collect();
    ports.sort();
    ports.dedup();
    bail!(
        "Service {namespace}/{name} has no port {port}/{protocol}; it has {}",
        ports.join(", ")
    );
}

fn question(args: &ExplainArgs, maps: &Maps) -> anyhow::Result<Question> {
    let protocol = args.protocol.protocol();
    let destination = destination(&args.destination)?;
    let mut sender = args.from.map(|from| match from {
        From::Pod => Sender::Pod,
        From::Node => Sender::Node,
        From::Outside => Sender::Outside,
    });
    let mut namespace = None;
    let (addresses, port) = match source(&args.source)? {
        Source::Address(address, port) => (vec![address], port),
        Source::Pod(name) => {
            let addresses = block_on(args.pods.addresses(&name))?;
            sender.get_or_insert(Sender::Pod);
            namespace = Some(name.namespace.to_string());
            (addresses, CLIENT_PORT)
        }
    };
    let of_family = |v4: bool| addresses.iter().copied().find(|ip| ip.is_ipv4() == v4);
    let (destination, source) = match destination {
        Destination::Address(destination) => (destination, of_family(destination.is_ipv4())),
        Destination::Service {
            namespace: of,
            name,
            port,
        } => {
            let v4 = addresses.first().is_none_or(IpAddr::is_ipv4);
            // As a resolver in the pod would find it.
            let of = of.or(namespace);
            let of = of.as_deref();
            (
                service_address(maps, of, &name, port, protocol, v4)?,
                of_family(v4),
            )
        }
    };
    let source = source.with_context(|| {
        format!(
            "{} and {} are of different address families",
            args.source, destination
        )
    })?;
    Ok(Question {
        protocol,
        source: SocketAddr::new(source, port),
        destination,
        sender,
        device: args.device.clone(),
    })
}

fn text(told: &Explanation) -> String {
    let mut lines = Vec::new();
    let sender = match told.sender {
        Sender::Pod => "from a pod",
        Sender::Node => "from the node itself",
        Sender::Outside => "from outside",
    };
    let by = told
        .device
        .as_ref()
        .map_or(String::new(), |device| format!(" by {device}"));
    lines.push(format!(
        "{} {} to {}, {sender}{by}",
        told.protocol, told.packet.source, told.packet.destination
    ));
    match &told.frontend {
        None => lines.push("service:  none".to_owned()),
        Some(frontend) => {
            lines.push(format!(
                "service:  {}/{}, {}, for {} clients",
                frontend.namespace, frontend.service, frontend.kind, frontend.scope
            ));
            for policy in &frontend.policies {
                lines.push(format!("policy:   {policy}"));
            }
            if !frontend.source_ranges.is_empty() {
                lines.push(format!("ranges:   {}", frontend.source_ranges.join(" ")));
            }
        }
    }
    if !told.backends.is_empty() {
        let rows = told.backends.iter().map(|backend| {
            [
                if backend.chosen { "*" } else { "" }.to_owned(),
                backend.address.to_string(),
                if backend.local { "local" } else { "remote" }.to_owned(),
                backend.state.clone(),
            ]
        });
        lines.push(String::new());
        lines.push(table(["", "BACKEND", "WHERE", "STATE"], rows));
    }
    lines.push(String::new());
    for (n, hook) in told.hooks.iter().enumerate() {
        let on = hook
            .device
            .as_ref()
            .map_or(String::new(), |device| format!(" on {device}"));
        lines.push(format!(
            "{}. {}{on}: {}: {}",
            n + 1,
            hook.program,
            hook.verdict,
            hook.why
        ));
        if let Some(to) = &hook.to {
            lines.push(format!("   now {} to {}", to.source, to.destination));
        }
    }
    let verdict = match told.verdict {
        "translate" | "connect" => "it reaches its backend",
        "refuse" => "it is refused at once",
        "drop" => "it is dropped",
        "reset" => "it is reset",
        _ => "it goes on as it is",
    };
    lines.push(format!("verdict:  {verdict}: {}", told.why));
    if let Some(sent) = &told.sent {
        lines.push(format!("backend:  gets it from {}", sent.source));
    }
    if let Some(answer) = &told.answer {
        lines.push(format!(
            "answer:   {} gets it from {}",
            answer.destination, answer.source
        ));
    }
    if let Some(advice) = &told.advice {
        lines.push(format!("to do:    {advice}"));
    }
    for warning in &told.warnings {
        lines.push(format!("warning:  {warning}"));
    }
    lines.join("\n")
}

/// Runs the verb.
///
/// # Errors
/// No maps, a name or address that nothing has, or the kernel's.
pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let pinned = Pinned::open(&args.common.bpf_root)?;
    let told = explain::explain(&pinned, &question(args, &pinned.maps)?)?;
    match args.common.output.structured(&told)? {
        Some(text) => print(&text),
        None => print(&text(&told)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_addresses_or_names() {
        let address = |text: &str| Destination::Address(text.parse().unwrap());
        let named = |namespace: Option<&str>, name: &str, port| Destination::Service {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
            port,
        };
        for (text, meant) in [
            ("10.96.0.1:80", address("10.96.0.1:80")),
            ("[fd96::1]:80", address("[fd96::1]:80")),
            ("kubia:80", named(None, "kubia", 80)),
            ("shop/kubia:80", named(Some("shop"), "kubia", 80)),
            ("svc/shop/kubia:80", named(Some("shop"), "kubia", 80)),
        ] {
            assert_eq!(destination(text).unwrap(), meant, "{text}");
        }
        for wrong in [
            "10.96.0.1",
            "fd96::1",
            "kubia",
            "kubia:http",
            "a/b/c:80",
            ":80",
            "10.96:80",
        ] {
            let error = destination(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("DST {wrong}: ")), "{error}");
        }
        assert_eq!(
            source("10.0.0.1").unwrap(),
            Source::Address("10.0.0.1".parse().unwrap(), CLIENT_PORT)
        );
        assert_eq!(
            source("[fd00::1]:7").unwrap(),
            Source::Address("fd00::1".parse().unwrap(), 7)
        );
        assert_eq!(
            source("pod/shop/client").unwrap(),
            Source::Pod(ObjectName::new("shop", "client"))
        );
        for wrong in ["client", "pod/", "pod/a/b/c", "10.0.0"] {
            assert!(source(wrong).is_err(), "{wrong}");
        }
    }
}
