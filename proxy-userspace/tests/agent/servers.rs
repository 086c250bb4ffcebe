//! The agent's HTTP servers under thousands of connections that ask for nothing, or ask slowly
//! (SPEC H3).

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shunt_lab::{Agent, AgentOptions, Lab, PodSpec, Port};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

const HEALTHZ: u16 = 10_256;
const METRICS: u16 = 10_249;
const HEALTH_CHECK: u16 = 32_000;
/// Longest time until a probe is answered.
const AT_ONCE: Duration = Duration::from_millis(100);
/// Of a hundred probes those that may take longer, on a machine that has other things to do.
const LATE: usize = 3;

/// A Service with policy Local and one endpoint on `node-a`, whose agent runs.
fn start() -> (Lab, Agent, TempDir) {
    let lab = Lab::builder().nodes(&["node-a"]).build().unwrap();
    lab.add_pod(&PodSpec::new("web", "node-a", &[Port::tcp(8080)]))
        .unwrap();
    let [pod, ..] = lab.ips("web").unwrap()[..] else {
        panic!()
    };
    let manifests = TempDir::new().unwrap();
    let text = format!(
        "apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  externalTrafficPolicy: Local
  healthCheckNodePort: {HEALTH_CHECK}
  ports: [{{port: 80, targetPort: 8080}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: ['{pod}'], nodeName: node-a, conditions: {{ready: true}}}}]
"
    );
    fs::write(manifests.path().join("web.yaml"), text).unwrap();
    let options = AgentOptions::manifests(manifests.path())
        .xdp("off")
        .shunt(env!("CARGO_BIN_EXE_shunt"))
        .small_maps();
    let agent = lab.start_agent("node-a", &options).unwrap();
    (lab, agent, manifests)
}

/// A connection from one of the loopback addresses, in the calling thread's namespace.
fn connect(from: u32, port: u16) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let from = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 1)) + from);
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    Ok(socket.into())
}

/// The status that a request gets.
fn ask(mut stream: TcpStream, path: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split(' ').nth(1).unwrap_or_default().to_owned())
}

/// Probes that are not answered within [`AT_ONCE`], of a hundred to each server.
fn late_probes() -> Vec<String> {
    let mut late = Vec::new();
    for (port, path) in [
        (HEALTHZ, "/livez"),
        (HEALTHZ, "/healthz"),
        (HEALTH_CHECK, "/"),
    ] {
        for n in 0..100 {
            let begin = Instant::now();
            let status = connect(60_000, port).and_then(|stream| ask(stream, path));
            let took = begin.elapsed();
            assert_eq!(
                status.as_deref().ok(),
                Some("200"),
                "{path} of {port}, {n}: {status:?}"
            );
            if took > AT_ONCE {
                late.push(format!("{path} of {port}, {n}: {took:?}"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
    late
}

fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// H3: ten thousand connections of one source, and of ten thousand sources, hold no probe up;
/// neither do those who send a byte now and then, nor those who read nothing.
#[test]
fn idle_and_slow_connections_hold_no_probe_up() {
    raise_file_limit();
    let (lab, agent, _manifests) = start();
    lab.ns("node-a").unwrap().run(|| {
        let until = Instant::now() + Duration::from_secs(5);
        while connect(0, HEALTH_CHECK)
            .and_then(|stream| ask(stream, "/"))
            .is_err()
            && Instant::now() < until
        {
            thread::sleep(Duration::from_millis(50));
        }
        // What other tests do to this machine meanwhile is not the agent's fault.
        let alone = late_probes();
        assert!(alone.len() <= LATE, "with nobody else: {alone:#?}");

        for sources in [1, 10_000] {
            let mut held = Vec::new();
            for n in 0..10_000 {
                let port = [HEALTHZ, HEALTH_CHECK, METRICS][n % 3];
                let mut stream = connect(n as u32 % sources, port).unwrap();
                match n / 3 % 3 {
                    0 => {}
                    // A header that never ends.
                    1 => drop(stream.write_all(b"GET /livez HTTP/1.1\r\nX-Slow: ")),
                    // An answer that nobody takes.
                    _ => {
                        drop(stream.write_all(
                            b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n",
                        ))
                    }
                }
                held.push(stream);
            }
            let slow = thread::scope(|scope| {
                let dripping = scope.spawn(|| {
                    let end = Instant::now() + Duration::from_secs(3);
                    while Instant::now() < end {
                        held.iter()
                            .skip(3)
                            .step_by(9)
                            .for_each(|mut stream| drop(stream.write(b"x")));
                        thread::sleep(Duration::from_millis(200));
                    }
                });
                let late = late_probes();
                dripping.join().unwrap();
                late
            });
            assert!(
                slow.len() <= LATE + alone.len(),
                "{sources} sources: {slow:#?}"
            );
            println!(
                "{sources} sources: {} of 300 probes took longer than {AT_ONCE:?}",
                slow.len()
            );
            let scraped = connect(60_001, METRICS).and_then(|stream| ask(stream, "/metrics"));
            assert_eq!(scraped.ok().as_deref(), Some("200"), "{sources} sources");
        }
    });
    drop(agent);
}

/// H3: a load balancer that keeps a connection open for its next request loses it to nobody who
/// holds more.
#[test]
fn one_source_takes_the_place_of_no_other() {
    raise_file_limit();
    let (lab, agent, _manifests) = start();
    lab.ns("node-a").unwrap().run(|| {
        let patient = connect(1, HEALTHZ).unwrap();
        let greedy: Vec<_> = (0..3000).map(|_| connect(2, HEALTHZ).unwrap()).collect();
        assert_eq!(ask(patient, "/livez").unwrap(), "200");
        drop(greedy);
    });
    drop(agent);
}

/// H3: whoever asks for nothing is gone within seconds.
#[test]
fn who_says_nothing_is_hung_up_on() {
    let (lab, agent, _manifests) = start();
    lab.ns("node-a").unwrap().run(|| {
        for (port, half) in [(HEALTHZ, ""), (METRICS, "GET /metrics HTTP/1.1\r\nA: b")] {
            let mut stream = connect(1, port).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(9)))
                .unwrap();
            stream.write_all(half.as_bytes()).unwrap();
            let begin = Instant::now();
            let mut text = Vec::new();
            stream.read_to_end(&mut text).unwrap();
            assert!(
                begin.elapsed() < Duration::from_secs(8),
                "{port}: {:?}",
                begin.elapsed()
            );
        }
    });
    drop(agent);
}
