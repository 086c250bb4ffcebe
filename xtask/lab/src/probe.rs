//! Readiness probes: what a kubelet asks a container before it calls its pod ready.
//!
//! <https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/>

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// How often a child is looked at that has not ended yet.
const LOOK: Duration = Duration::from_millis(5);

/// `readinessProbe` of a container, checked, with the API's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) action: Action,
    pub(crate) initial_delay: Duration,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// A program in the container ends with 0.
    Exec(Vec<String>),
    /// `GET` is answered by a status from 200 to 399. Without a host: the pod's address.
    Http {
        host: Option<IpAddr>,
        port: u16,
        path: String,
        headers: Vec<(String, String)>,
    },
    /// A connection opens.
    Tcp { host: Option<IpAddr>, port: u16 },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    exec: Option<Exec>,
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Value>,
    initial_delay_seconds: Option<u32>,
    period_seconds: Option<u32>,
    timeout_seconds: Option<u32>,
    success_threshold: Option<u32>,
    failure_threshold: Option<u32>,
}

#[derive(Deserialize)]
struct Exec {
    #[serde(default)]
    command: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpGet {
    host: Option<IpAddr>,
    port: Value,
    path: Option<String>,
    scheme: Option<String>,
    #[serde(default)]
    http_headers: Vec<Header>,
}

#[derive(Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Deserialize)]
struct TcpSocket {
    host: Option<IpAddr>,
    port: Value,
}

impl Probe {
    /// Reads a `readinessProbe`; `ports`: the container's named ports.
    pub(crate) fn parse(probe: &Value, ports: &[(String, u16)]) -> Result<Self> {
        let manifest = Manifest::deserialize(probe)?;
        let seconds =
            |given: Option<u32>, default: u32| Duration::from_secs(given.unwrap_or(default).into());
        let action = match (
            manifest.exec,
            manifest.http_get,
            manifest.tcp_socket,
            manifest.grpc,
        ) {
            (Some(exec), None, None, None) => {
                ensure!(!exec.command.is_empty(), "exec.command: is empty");
                Action::Exec(exec.command)
            }
            (None, Some(get), None, None) => {
                let scheme = get.scheme.as_deref().unwrap_or("HTTP");
                ensure!(
                    scheme == "HTTP",
                    "httpGet.scheme: the lab speaks HTTP only, not {scheme}"
                );
                Action::Http {
                    host: get.host,
                    port: port(&get.port, ports).context("httpGet.port")?,
                    path: get.path.unwrap_or_else(|| "/".to_owned()),
                    headers: get
                        .http_headers
                        .into_iter()
                        .map(|header| (header.name, header.value))
                        .collect(),
                }
            }
            (None, None, Some(socket), None) => Action::Tcp {
                host: socket.host,
                port: port(&socket.port, ports).context("tcpSocket.port")?,
            },
            (None, None, None, Some(_)) => bail!("grpc: the lab knows exec, httpGet and tcpSocket"),
            _ => bail!("give one of exec, httpGet and tcpSocket"),
        };
        Ok(Self {
            action,
            initial_delay: seconds(manifest.initial_delay_seconds, 0),
            period: seconds(manifest.period_seconds.filter(|period| *period > 0), 10),
            timeout: seconds(manifest.timeout_seconds.filter(|timeout| *timeout > 0), 1),
            success_threshold: manifest.success_threshold.unwrap_or(1).max(1),
            failure_threshold: manifest.failure_threshold.unwrap_or(3).max(1),
        })
    }
}

/// A number, or a container port's name.
fn port(value: &Value, ports: &[(String, u16)]) -> Result<u16> {
    let of_name = |name: &str| {
        ports
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, port)| *port)
    };
    match value {
        Value::Number(number) => number
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .filter(|port| *port > 0)
            .with_context(|| format!("{number} is no port")),
        Value::String(name) => {
            of_name(name).with_context(|| format!("no port of the container has the name {name:?}"))
        }
        other => bail!("{other} is no port"),
    }
}

/// Whether a container is ready, from what its probe has found so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    pub(crate) ready: bool,
    successes: u32,
    failures: u32,
}

impl Readiness {
    /// A container without a probe is ready as soon as it runs.
    pub(crate) fn of(probe: Option<&Probe>) -> Self {
        Self {
            ready: probe.is_none(),
            ..Self::default()
        }
    }

    /// Takes in what the probe has found; thresholds count results in a row.
    pub(crate) fn observe(&mut self, success: bool, probe: &Probe) {
        if success {
            (self.successes, self.failures) = (self.successes + 1, 0);
            self.ready |= self.successes >= probe.success_threshold;
        } else {
            (self.successes, self.failures) = (0, self.failures + 1);
            self.ready &= self.failures < probe.failure_threshold;
        }
    }
}

/// Asks by HTTP, from the namespace of the calling thread.
pub(crate) fn http(
    to: SocketAddr,
    path: &str,
    headers: &[(String, String)],
    timeout: Duration,
) -> bool {
    let ask = || -> Result<bool> {
        let deadline = Instant::now() + timeout;
        let mut stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(
            deadline.saturating_duration_since(Instant::now()).max(LOOK),
        ))?;
        let given = |name: &str| {
            headers
                .iter()
                .any(|(other, _)| other.eq_ignore_ascii_case(name))
        };
        let mut request = format!("GET {path} HTTP/1.1\r\nConnection: close\r\n");
        if !given("Host") {
            request.push_str(&format!("Host: {to}\r\n"));
        }
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{request}\r\n").as_bytes())?;
        // `HTTP/1.1 200`
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        let status: u16 = std::str::from_utf8(&head[9..])?.parse()?;
        Ok((200..400).contains(&status))
    };
    ask().unwrap_or(false)
}

/// Connects, from the namespace of the calling thread.
pub(crate) fn tcp(to: SocketAddr, timeout: Duration) -> bool {
    TcpStream::connect_timeout(&to, timeout).is_ok()
}

/// Runs a program; one that takes longer is ended and has failed.
pub(crate) fn exec(mut command: Command, timeout: Duration) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().is_ok_and(|child| ends_well(child, timeout))
}

fn ends_well(mut child: Child, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < deadline => thread::sleep(LOOK),
            _ => {
                // It may have ended in between.
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(probe: Value) -> Result<Probe> {
        Probe::parse(&probe, &[("http".to_owned(), 8080)])
    }

    #[test]
    fn what_is_left_out_is_the_apis_default() {
        let probe = parse(json!({ "exec": { "command": ["ls", "/var/ready"] } })).unwrap();
        let seconds = [probe.initial_delay, probe.period, probe.timeout].map(|time| time.as_secs());
        assert_eq!(
            (seconds, probe.success_threshold, probe.failure_threshold),
            ([0, 10, 1], 1, 3)
        );
    }

    #[test]
    fn ports_have_numbers_or_names() {
        let of = |port: Value| parse(json!({ "httpGet": { "path": "/healthz", "port": port } }));
        for given in [json!("http"), json!(8080)] {
            let Action::Http { port, path, .. } = of(given).unwrap().action else {
                panic!()
            };
            assert_eq!((port, path.as_str()), (8080, "/healthz"));
        }
        for (bad, words) in [
            (
                json!("web"),
                "httpGet.port: no port of the container has the name \"web\"",
            ),
            (json!(0), "httpGet.port: 0 is no port"),
            (json!(70000), "httpGet.port: 70000 is no port"),
        ] {
            assert_eq!(format!("{:#}", of(bad).unwrap_err()), words);
        }
    }

    #[test]
    fn what_the_lab_cannot_ask_is_refused() {
        for (bad, words) in [
            (json!({}), "give one of"),
            (
                json!({ "exec": { "command": ["true"] }, "tcpSocket": { "port": 1 } }),
                "give one of",
            ),
            (json!({ "exec": {} }), "exec.command: is empty"),
            (json!({ "grpc": { "port": 1 } }), "grpc:"),
            (
                json!({ "httpGet": { "port": 1, "scheme": "HTTPS" } }),
                "httpGet.scheme",
            ),
        ] {
            let error = format!("{:#}", parse(bad.clone()).unwrap_err());
            assert!(error.contains(words), "{bad}: {error}");
        }
    }

    #[test]
    fn thresholds_count_results_in_a_row() {
        let probe = parse(
            json!({ "tcpSocket": { "port": 1 }, "successThreshold": 2, "failureThreshold": 3 }),
        )
        .unwrap();
        let mut readiness = Readiness::of(Some(&probe));
        let mut seen = String::new();
        for found in "+-++--+---+++-".chars() {
            readiness.observe(found == '+', &probe);
            seen.push(if readiness.ready { 'R' } else { '.' });
        }
        assert_eq!(seen, "...RRRRRR..RRR");
        assert!(Readiness::of(None).ready);
    }

    #[test]
    fn a_program_that_takes_too_long_has_failed() {
        let run = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments);
            exec(command, Duration::from_millis(200))
        };
        assert!(run("true", &[]));
        assert!(!run("false", &[]) && !run("/nonexistent", &[]));
        let began = Instant::now();
        assert!(!run("sleep", &["5"]));
        assert!(began.elapsed() < Duration::from_secs(4));
    }
}
