//! Sockets: datagrams and connections in, answers out.
//!
//! Everything runs on one thread with a runtime of its own, so that neither a batch of changes nor
//! a scrape of the agent delays an answer. What the zone knows is answered where it came in; what
//! others know is asked for in a task of its own.
//!
//! An answer leaves from the address that was asked, also where the server listens on all
//! addresses: a client that has connected its socket, and the datapath, take no other
//! ([`quinn_udp`], which reads and sets it, takes many datagrams at once too).

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use futures::future::Abortable;
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::timeout,
};
use tracing::debug;

use super::{
    metrics::{Metrics, Transport},
    resolve::{Resolver, Response},
    wire::{self, Incoming},
};
use crate::{
    connections::Connections,
    http::{ACCEPT_RETRY, lacks_room},
};

/// Bytes that are read of a datagram. The kernel may have joined many of one client (GRO), up to
/// the longest datagram that there is.
const STRIDE: usize = 1 << 16;
/// Bytes of datagrams that may wait.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Connections at once; the one that has been silent longest makes room ([`Connections`]).
const MAX_CONNECTIONS: usize = 512;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 256;
/// A connection on which nothing is asked is closed after so long
/// ([RFC 7766, 6.2.3](https://www.rfc-editor.org/rfc/rfc7766#section-6.2.3)).
const IDLE: Duration = Duration::from_secs(10);
/// A client that does not take its answer is left after so long.
const SLOW_READER: Duration = Duration::from_secs(10);

/// Sockets that listen on one address.
#[derive(Debug)]
pub struct Listeners {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
}

impl Listeners {
    /// Listens; on both families where the address is 0.0.0.0, as the agent's other servers do.
    ///
    /// # Errors
    /// The kernel's: another has the port, no device has the address, or the right to listen below
    /// 1024 is missing.
    pub fn bind(address: SocketAddr) -> io::Result<Vec<Self>> {
        let mut all = vec![Self::bind_one(address)?];
        if address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED) {
            match Self::bind_one((Ipv6Addr::UNSPECIFIED, address.port()).into()) {
                Ok(v6) => all.push(v6),
                // A kernel without IPv6.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    fn bind_one(address: SocketAddr) -> io::Result<Self> {
        let open = |kind: Type| {
            let socket = Socket::new(
                Domain::for_address(address),
                kind.nonblocking().cloexec(),
                None,
            )?;
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            io::Result::Ok(socket)
        };
        let tcp = open(Type::STREAM)?;
        // Connections of an earlier listener may still be in TIME_WAIT.
        tcp.set_reuse_address(true)?;
        tcp.bind(&address.into())?;
        tcp.listen(BACKLOG)?;
        let udp = open(Type::DGRAM)?;
        // The kernel gives what it may.
        let _ = udp.set_recv_buffer_size(RECEIVE_BUFFER);
        udp.bind(&tcp.local_addr()?)?;
        Ok(Self {
            udp: udp.into(),
            tcp: tcp.into(),
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The kernel's, of a socket that is not bound: a mistake of the caller's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Answers on all of them, until it is dropped.
///
/// # Errors
/// When a socket fails for good.
pub(super) async fn serve(listeners: Vec<Listeners>, resolver: Rc<Resolver>) -> io::Result<()> {
    let connections = Connections::new(MAX_CONNECTIONS);
    let mut servers = JoinSet::new();
    for listener in listeners {
        let udp = UdpSocket::from_std(listener.udp)?;
        let tcp = TcpListener::from_std(listener.tcp)?;
        servers.spawn_local(serve_udp(udp, resolver.clone()));
        servers.spawn_local(serve_tcp(tcp, resolver.clone(), connections.clone()));
    }
    match servers.join_next().await {
        Some(ended) => ended.map_err(io::Error::other)?,
        None => Ok(()),
    }
}

/// A socket for datagrams whose answers leave from where the questions went.
struct Datagrams {
    socket: UdpSocket,
    state: UdpSocketState,
    metrics: Metrics,
}

impl Datagrams {
    fn send(&self, meta: &RecvMeta, contents: &[u8]) {
        let transmit = Transmit {
            destination: meta.addr,
            ecn: None,
            contents,
            segment_size: None,
            src_ip: meta.dst_ip,
        };
        // A buffer that is full drops the datagram, as a network would; the client asks again.
        if let Err(error) = self.state.try_send((&self.socket).into(), &transmit) {
            self.metrics.unsent.inc();
            debug!("DNS: {}: {error}", meta.addr);
        }
    }
}

async fn serve_udp(socket: UdpSocket, resolver: Rc<Resolver>) -> io::Result<()> {
    let state = UdpSocketState::new((&socket).into())?;
    let mut buffer = vec![0; STRIDE * BATCH_SIZE];
    let mut metas = [RecvMeta::default(); BATCH_SIZE];
    let datagrams = Rc::new(Datagrams {
        socket,
        state,
        metrics: resolver.metrics().clone(),
    });
    loop {
        datagrams.socket.readable().await?;
        let received = datagrams.socket.try_io(Interest::READABLE, || {
            let mut slices = buffer.chunks_mut(STRIDE).map(IoSliceMut::new);
            let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                std::array::from_fn(|_| slices.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
            datagrams
                .state
                .recv((&datagrams.socket).into(), &mut slices, &mut metas)
        });
        let count = match received {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            // Of an answer that went nowhere (ICMP), or no memory: the next datagram may be better.
            Err(error) => {
                debug!("DNS: {error}");
                continue;
            }
        };
        for (meta, bytes) in metas.iter().zip(buffer.chunks(STRIDE)).take(count) {
            let bytes = &bytes[..meta.len];
            for datagram in bytes.chunks(meta.stride.max(1)) {
                answer_datagram(&datagrams, &resolver, meta, datagram);
            }
        }
        // Connections and tasks have their turn too.
        tokio::task::yield_now().await;
    }
}

fn answer_datagram(
    datagrams: &Rc<Datagrams>,
    resolver: &Rc<Resolver>,
    meta: &RecvMeta,
    bytes: &[u8],
) {
    // Nobody can be answered there.
    if meta.addr.port() == 0 {
        return;
    }
    let question = match wire::read(bytes) {
        Incoming::Question(question) => question,
        Incoming::Refused(reply, code) => {
            resolver.metrics().asked(Transport::udp);
            resolver.metrics().answered(None, code);
            return datagrams.send(meta, &reply);
        }
        Incoming::Nothing => return,
    };
    resolver.metrics().asked(Transport::udp);
    match resolver.resolve(&question) {
        Response::Now(reply) => {
            resolver.metrics().answered(Some(question.kind), reply.code);
            datagrams.send(meta, &question.reply(&reply, question.udp_limit()));
        }
        Response::Later(asked) => {
            let (datagrams, resolver, meta) = (datagrams.clone(), resolver.clone(), *meta);
            tokio::task::spawn_local(async move {
                let reply = asked.wait(&resolver, &question).await;
                resolver.metrics().answered(Some(question.kind), reply.code);
                datagrams.send(&meta, &question.reply(&reply, question.udp_limit()));
            });
        }
    }
}

async fn serve_tcp(
    listener: TcpListener,
    resolver: Rc<Resolver>,
    room: Connections,
) -> io::Result<()> {
    // Ends the connections too when the listener goes.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, peer)) => {
                let resolver = resolver.clone();
                let (place, registration) = room.admit(peer.ip());
                let served = async move {
                    if let Err(error) = serve_connection(stream, &resolver).await {
                        debug!("DNS: {peer}: {error}");
                    }
                    drop(place);
                };
                connections.spawn_local(Abortable::new(served, registration));
            }
            Err(error) => {
                debug!("DNS: {error}");
                if lacks_room(&error) {
                    room.evict();
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

/// Questions of a connection in the order in which they come, each behind two bytes of length.
async fn serve_connection(mut stream: TcpStream, resolver: &Rc<Resolver>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        let length = match timeout(IDLE, stream.read_u16()).await {
            Ok(Ok(length)) => usize::from(length),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(()),
        };
        buffer.resize(length, 0);
        timeout(IDLE, stream.read_exact(&mut buffer)).await??;
        let reply = match wire::read(&buffer) {
            Incoming::Nothing => return Ok(()),
            Incoming::Refused(reply, code) => {
                resolver.metrics().asked(Transport::tcp);
                resolver.metrics().answered(None, code);
                reply
            }
            Incoming::Question(question) => {
                resolver.metrics().asked(Transport::tcp);
                let reply = match resolver.resolve(&question) {
                    Response::Now(reply) => reply,
                    Response::Later(asked) => asked.wait(resolver, &question).await,
                };
                resolver.metrics().answered(Some(question.kind), reply.code);
                question.reply(&reply, u16::MAX)
            }
        };
        let mut framed = Vec::with_capacity(2 + reply.len());
        framed.extend(u16::try_from(reply.len()).unwrap_or(u16::MAX).to_be_bytes());
        framed.extend(reply);
        timeout(SLOW_READER, stream.write_all(&framed)).await??;
    }
}
