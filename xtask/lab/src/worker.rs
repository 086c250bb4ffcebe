//! The process behind every pod and client: real sockets in one namespace and one cgroup, told what
//! to do over a pipe.
//!
//! cgroup membership is a property of a process, so each pod and each client is a process of its
//! own. It is this very program, started again with [`ENV`] set: a constructor runs the worker
//! before `main` is reached. That works in test binaries as well, whose `main` belongs to the test
//! harness, and leaves no helper binary to build and find.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::protocol::{Answer, Dial, DialError, Outcome, Proto, Reply, Request, Stage};

/// Set for a process that is to be a worker.
pub const ENV: &str = "SHUNT_LAB_WORKER";

/// Connections that wait to be accepted: more than any test opens at once.
const BACKLOG: i32 = 4096;
/// Between `connect` and the first byte. Before Linux 6.19 a server that takes the handshake's last
/// segment on one CPU, and the first data on another at the same moment, may find no socket for the
/// data and reset the connection ("inet: Avoid ehash lookup race in inet_ehash_insert()"): two
/// connections in 100,000, seen in captures with nothing else wrong on the way.
const SETTLE: Duration = Duration::from_micros(200);
/// The largest UDP payload over IPv4: 65535 less the IP and UDP headers.
const MAX_DATAGRAM: usize = 65507;
/// The first word of a request after whose answer the server closes. The *server* closes first, so
/// that TIME_WAIT is on its side and a client can dial more often than it has ports.
const ONCE: &str = "once";

/// Run by the dynamic loader before `main`, with the environment already there.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    if std::env::var_os(ENV).is_some() {
        let code = match work() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("lab worker: {error:#}");
                ExitCode::FAILURE
            }
        };
        std::process::exit(i32::from(code != ExitCode::SUCCESS));
    }
}

/// Keeps the linker from leaving this module, and with it [`START`], out of a program that starts
/// workers.
pub(crate) fn linked() {
    std::hint::black_box(&START);
}

/// Answers requests until the lab closes the pipe, which also happens when the lab's process is
/// killed.
fn work() -> Result<()> {
    let mut sockets = HashMap::new();
    let mut stdout = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?).context("request")?;
        let mut text = serde_json::to_string(&answer(request, &mut sockets)).context("reply")?;
        text.push('\n');
        stdout.write_all(text.as_bytes())?;
        stdout.flush()?;
    }
    Ok(())
}

fn answer(request: Request, sockets: &mut HashMap<u32, Open>) -> Reply {
    match request {
        Request::Serve { name, listen } => match serve(&name, &listen) {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Failed(format!("{error:#}")),
        },
        Request::Once { proto, to, dial } => Reply::Answer(once(proto, to, &dial)),
        Request::Many {
            proto,
            to,
            dial,
            count,
        } => {
            let mut outcome = Outcome::default();
            for _ in 0..count {
                match once(proto, to, &dial) {
                    Ok(answer) => {
                        *outcome.servers.entry(answer.server).or_default() += 1;
                        outcome
                            .latencies
                            .push(u64::try_from(answer.latency.as_nanos()).unwrap_or(u64::MAX));
                    }
                    Err(error) => *outcome.errors.entry(without_time(&error)).or_default() += 1,
                }
            }
            Reply::Many(outcome)
        }
        Request::Open {
            id,
            proto,
            to,
            dial,
        } => Reply::Opened(Open::dial(proto, to, &dial).map(|open| {
            let addresses = (open.local(), open.peer());
            sockets.insert(id, open);
            addresses
        })),
        Request::Ask { id, text, timeout } => match sockets.get_mut(&id) {
            Some(open) => Reply::Answer(open.ask(&text, timeout, Instant::now())),
            None => Reply::Failed(format!("socket {id} is not open")),
        },
        Request::Turn { id, to } => match sockets.get_mut(&id) {
            Some(open) => Reply::Turned(open.turn(to)),
            None => Reply::Failed(format!("socket {id} is not open")),
        },
        Request::AskAll { id, to, timeout } => match sockets.get_mut(&id) {
            Some(open) => Reply::Answers(open.ask_all(&to, timeout)),
            None => Reply::Failed(format!("socket {id} is not open")),
        },
        Request::Close { id } => {
            sockets.remove(&id);
            Reply::Done
        }
    }
}

fn without_time(error: &DialError) -> String {
    match error {
        DialError::Os { stage, text, .. } => format!("{stage:?}: {text}"),
        DialError::TimedOut { stage, .. } => format!("{stage:?}: timed out"),
        DialError::Closed { .. } => "closed by the peer".to_owned(),
        DialError::Worker(text) => text.clone(),
    }
}

fn once(proto: Proto, to: SocketAddr, dial: &Dial) -> Result<Answer, DialError> {
    let began = Instant::now();
    let padding = "x".repeat(dial.padding);
    let mut open = Open::dial(proto, to, dial)?;
    let answer = open.ask(&format!("{ONCE} {padding}"), dial.timeout, began)?;
    if let Open::Stream { stream, .. } = &mut open {
        // Until the server has closed; what the answer was is known already.
        let _ = stream.read(&mut [0; 1]);
    }
    Ok(answer)
}

/// An open socket of a client.
enum Open {
    /// TCP, or SCTP, whose one-to-one sockets take the same calls.
    Stream {
        stream: BufReader<TcpStream>,
        local: SocketAddr,
        peer: SocketAddr,
    },
    Udp {
        socket: UdpSocket,
        to: SocketAddr,
        connected: bool,
    },
}

impl Open {
    fn dial(proto: Proto, to: SocketAddr, dial: &Dial) -> Result<Self, DialError> {
        let began = Instant::now();
        let at = |stage| move |error| failure(stage, &error, began);
        let socket = socket(proto, to).map_err(at(Stage::Bind))?;
        if let Some(bind) = dial.bind {
            socket.set_reuse_address(true).map_err(at(Stage::Bind))?;
            socket.bind(&bind.into()).map_err(at(Stage::Bind))?;
        }
        match proto {
            Proto::Tcp | Proto::Sctp => {
                if proto == Proto::Sctp {
                    report_icmp(&socket, to).map_err(at(Stage::Bind))?;
                }
                socket
                    .connect_timeout(&to.into(), dial.timeout)
                    .map_err(at(Stage::Connect))?;
                let stream = TcpStream::from(socket);
                if proto == Proto::Tcp {
                    stream.set_nodelay(true).map_err(at(Stage::Connect))?;
                }
                let local = stream.local_addr().map_err(at(Stage::Connect))?;
                let peer = stream.peer_addr().map_err(at(Stage::Connect))?;
                thread::sleep(SETTLE);
                Ok(Self::Stream {
                    stream: BufReader::new(stream),
                    local,
                    peer,
                })
            }
            Proto::Udp => {
                if dial.connected {
                    socket
                        .connect(&SockAddr::from(to))
                        .map_err(at(Stage::Connect))?;
                } else {
                    report_icmp(&socket, to).map_err(at(Stage::Bind))?;
                }
                Ok(Self::Udp {
                    socket: socket.into(),
                    to,
                    connected: dial.connected,
                })
            }
        }
    }

    fn local(&self) -> SocketAddr {
        match self {
            Self::Stream { local, .. } => *local,
            Self::Udp { socket, to, .. } => socket.local_addr().unwrap_or(unspecified(*to)),
        }
    }

    fn peer(&self) -> SocketAddr {
        match self {
            Self::Stream { stream, peer, .. } => stream.get_ref().peer_addr().unwrap_or(*peer),
            Self::Udp { socket, to, .. } => socket.peer_addr().unwrap_or(*to),
        }
    }

    /// One request and its answer.
    fn ask(&mut self, text: &str, timeout: Duration, began: Instant) -> Result<Answer, DialError> {
        let at = |stage| move |error| failure(stage, &error, began);
        let (answer, peer) = match self {
            Self::Stream { stream, .. } => {
                stream
                    .get_ref()
                    .set_read_timeout(Some(timeout))
                    .map_err(at(Stage::Receive))?;
                // A request larger than the peer's window waits for it.
                stream
                    .get_ref()
                    .set_write_timeout(Some(timeout))
                    .map_err(at(Stage::Send))?;
                stream
                    .get_mut()
                    .write_all(format!("{text}\n").as_bytes())
                    .map_err(at(Stage::Send))?;
                let mut line = String::new();
                if stream.read_line(&mut line).map_err(at(Stage::Receive))? == 0 {
                    return Err(DialError::Closed {
                        after: began.elapsed(),
                    });
                }
                (line, None)
            }
            Self::Udp {
                socket,
                to,
                connected,
            } => {
                socket
                    .set_read_timeout(Some(timeout))
                    .map_err(at(Stage::Receive))?;
                if *connected {
                    socket.send(text.as_bytes()).map_err(at(Stage::Send))?;
                } else {
                    socket
                        .send_to(text.as_bytes(), *to)
                        .map_err(at(Stage::Send))?;
                }
                let mut buffer = vec![0; MAX_DATAGRAM + 1];
                loop {
                    let (length, from) =
                        socket.recv_from(&mut buffer).map_err(at(Stage::Receive))?;
                    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    // An answer to an earlier request, which had been given up, is not taken for
                    // this one's.
                    let echo = answer.splitn(3, ' ').nth(2).unwrap_or_default();
                    if echo == text || length == MAX_DATAGRAM {
                        break (answer, (!*connected).then_some(from));
                    }
                }
            }
        };
        self.read(&answer, peer, began)
    }

    /// An answer's text, and who sent it if the socket is not connected.
    fn read(
        &self,
        answer: &str,
        peer: Option<SocketAddr>,
        began: Instant,
    ) -> Result<Answer, DialError> {
        let latency = began.elapsed();
        let mut words = answer.trim_end_matches('\n').splitn(3, ' ');
        let unreadable = || DialError::Worker(format!("unreadable answer {answer:?}"));
        let server = words.next().ok_or_else(unreadable)?.to_owned();
        let seen_peer = words
            .next()
            .and_then(|word| word.parse().ok())
            .ok_or_else(unreadable)?;
        let echo = words.next().unwrap_or_default().to_owned();
        Ok(Answer {
            server,
            seen_peer,
            peer: peer.unwrap_or(self.peer()),
            local: self.local(),
            latency,
            echo,
        })
    }

    /// Asks somebody else from now on; a connected socket is connected anew.
    fn turn(&mut self, address: SocketAddr) -> Result<SocketAddr, DialError> {
        let Self::Udp {
            socket,
            to,
            connected,
        } = self
        else {
            return Err(DialError::Worker("not a UDP socket".to_owned()));
        };
        if *connected {
            let began = Instant::now();
            socket
                .connect(address)
                .map_err(|error| failure(Stage::Connect, &error, began))?;
        }
        *to = address;
        Ok(self.peer())
    }

    /// A datagram to each address, numbered, and then the answers. The socket is not connected.
    fn ask_all(
        &mut self,
        addresses: &[SocketAddr],
        timeout: Duration,
    ) -> Vec<Result<Answer, DialError>> {
        let began = Instant::now();
        let timed_out = || DialError::TimedOut {
            stage: Stage::Receive,
            after: began.elapsed(),
        };
        let mut answers: Vec<_> = addresses.iter().map(|_| Err(timed_out())).collect();
        let Self::Udp { socket, .. } = self else {
            return answers;
        };
        let mut waits = 0;
        for (number, address) in addresses.iter().enumerate() {
            match socket.send_to(number.to_string().as_bytes(), address) {
                Ok(_) => waits += 1,
                Err(error) => answers[number] = Err(failure(Stage::Send, &error, began)),
            }
        }
        let mut received = Vec::new();
        let mut buffer = [0; 1024];
        while received.len() < waits {
            let left = timeout.saturating_sub(began.elapsed());
            if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
                break;
            }
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                received.push((
                    String::from_utf8_lossy(&buffer[..length]).into_owned(),
                    from,
                ));
            }
        }
        for (text, from) in received {
            let answer = self.read(&text, Some(from), began);
            let number = answer.as_ref().ok().and_then(|it| it.echo.parse().ok());
            if let Some(place) = number.and_then(|number: usize| answers.get_mut(number)) {
                *place = answer;
            }
        }
        answers
    }
}

/// A socket for `address`'s family alone, unless that is IPv4 in IPv6's clothes (`::ffff:…`): an
/// SCTP association over both would tell the peer addresses that no Service translates.
fn socket(proto: Proto, address: SocketAddr) -> io::Result<Socket> {
    let (kind, protocol) = match proto {
        Proto::Tcp => (Type::STREAM, Protocol::TCP),
        Proto::Udp => (Type::DGRAM, Protocol::UDP),
        Proto::Sctp => (Type::STREAM, Protocol::from(libc::IPPROTO_SCTP)),
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.ip().to_canonical().is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Whether this kernel has SCTP sockets: it is a module that small machines leave out.
#[must_use]
pub fn has_sctp() -> bool {
    Socket::new(
        Domain::IPV4,
        Type::STREAM,
        Some(Protocol::from(libc::IPPROTO_SCTP)),
    )
    .is_ok()
}

fn failure(stage: Stage, error: &io::Error, began: Instant) -> DialError {
    let after = began.elapsed();
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::TimedOut, None) | (io::ErrorKind::WouldBlock, _) => {
            DialError::TimedOut { stage, after }
        }
        (_, Some(errno)) => DialError::Os {
            stage,
            errno,
            text: error.to_string(),
            after,
        },
        (_, None) => DialError::Worker(format!("{stage:?}: {error}")),
    }
}

/// Makes ICMP errors reach an unconnected UDP socket, or an SCTP socket, as errors of its calls
/// (ip(7), `IP_RECVERR`).
fn report_icmp(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let (level, option) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_RECVERR),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    };
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which outlives the call, and its size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into(),
        SocketAddr::V6(_) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0).into(),
    }
}

/// Listens on all of `listen`; the sockets are bound when it returns.
fn serve(name: &str, listen: &[(Proto, SocketAddr)]) -> Result<()> {
    for &(proto, address) in listen {
        let cannot = || format!("{name}: cannot listen on {proto} {address}");
        match proto {
            Proto::Tcp | Proto::Sctp => {
                let socket = socket(proto, address).with_context(cannot)?;
                socket.set_reuse_address(true).with_context(cannot)?;
                socket.bind(&address.into()).with_context(cannot)?;
                socket.listen(BACKLOG).with_context(cannot)?;
                let (listener, name) = (TcpListener::from(socket), name.to_owned());
                thread::spawn(move || accept(&listener, proto, &name));
            }
            Proto::Udp => {
                let (socket, name) = (
                    UdpSocket::bind(address).with_context(cannot)?,
                    name.to_owned(),
                );
                thread::spawn(move || echo_datagrams(&socket, &name));
            }
        }
    }
    Ok(())
}

fn accept(listener: &TcpListener, proto: Proto, name: &str) {
    loop {
        // A client that reset its connection before it was accepted is no reason to stop.
        let Ok((stream, peer)) = listener.accept() else {
            continue;
        };
        let name = name.to_owned();
        // Without a thread the connection is closed, which the client sees.
        let _ = thread::Builder::new()
            .stack_size(128 * 1024)
            .spawn(move || echo_lines(stream, proto, peer, &name));
    }
}

/// Answers every line with the server's name, the peer and the line; speaks enough HTTP for curl.
fn echo_lines(mut stream: TcpStream, proto: Proto, peer: SocketAddr, name: &str) -> io::Result<()> {
    if proto == Proto::Tcp {
        stream.set_nodelay(true)?;
    }
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(line) = lines.next() {
        let line = line?;
        if line.starts_with("GET ") || line.starts_with("HEAD ") {
            for header in lines.by_ref() {
                if header?.is_empty() {
                    break;
                }
            }
            let body = format!("{name} {peer}\n");
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            return stream.write_all(format!("{head}{body}").as_bytes());
        }
        stream.write_all(format!("{name} {peer} {line}\n").as_bytes())?;
        if line.split(' ').next() == Some(ONCE) {
            break;
        }
    }
    Ok(())
}

fn echo_datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = vec![0; MAX_DATAGRAM + 1];
    loop {
        // ICMP errors about earlier answers come out of here too.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let mut answer = format!("{name} {peer} ").into_bytes();
        answer.extend_from_slice(&buffer[..length]);
        answer.truncate(MAX_DATAGRAM);
        // A client that is gone does not wait for it.
        let _ = socket.send_to(&answer, peer);
    }
}
