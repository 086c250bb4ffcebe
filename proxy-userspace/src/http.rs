//! The agent's small HTTP servers: one request per connection, which is over within seconds, and
//! few connections at once ([`Connections`]).

use std::{
    convert::Infallible,
    error::Error,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use futures::future::Abortable;
use hyper::{
    Request, Response,
    body::{Body, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tracing::{debug, info};

use crate::connections::{Connections, Place};

/// From one attempt to listen to the next; the first failure may be a listener that is just being
/// closed.
pub(crate) const RETRY: Duration = Duration::from_millis(500);
/// From one attempt to accept to the next when there is no room for a socket.
pub(crate) const ACCEPT_RETRY: Duration = Duration::from_millis(10);
/// A request's headers must be there by then.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer must have been taken by then, counted from the connection's begin.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's headers; more is refused (431).
const MAX_HEADERS: usize = 16 * 1024;
/// Connections that wait to be accepted (`net.core.somaxconn`, 4096 by default, stands over it). Of
/// those who wait in vain none is a prober: the queue is emptied at once.
const BACKLOG: i32 = 4096;
/// Bytes of a socket's receive buffer: what a peer may make the kernel hold that nobody reads.
const RECEIVE_BUFFER: usize = 32 * 1024;

/// What a server listens on, and what a message says about it.
pub struct Listening {
    /// The setting or field that asks for it.
    pub subject: String,
    /// Where.
    pub address: SocketAddr,
    /// Whether 0.0.0.0 means IPv6 too, as it does where Go programs listen, kube-proxy among them.
    pub both_families: bool,
    /// Whether an address that cannot be listened on ends the server, instead of being tried again
    /// (`bindAddressHardFail`).
    pub hard_fail: bool,
    /// What goes wrong as long as it cannot listen.
    pub consequence: &'static str,
    /// Gets the one message about that.
    pub trouble: Box<dyn Fn(String) + Send + Sync>,
}

impl Listening {
    /// Tries until the port is free: one warning names it, and one line says when it works.
    ///
    /// # Errors
    /// The first failure, if it is to end the server.
    async fn listener(&self) -> anyhow::Result<TcpListener> {
        let mut failures = 0;
        loop {
            match self.listen() {
                Ok(listener) => {
                    if failures >= 2 {
                        info!("{}: listening on {} now", self.subject, self.address);
                    }
                    return Ok(listener);
                }
                Err(error) if self.hard_fail => anyhow::bail!(
                    "{}: cannot listen on {}: {error}; free the port, choose another, or set bindAddressHardFail to false to have it tried \
                     again",
                    self.subject,
                    self.address
                ),
                Err(error) => {
                    failures += 1;
                    if failures == 2 {
                        (self.trouble)(format!(
                            "cannot listen on {}: {error}; {}; free the port or choose another, it is tried again",
                            self.address, self.consequence
                        ));
                    }
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn listen(&self) -> io::Result<TcpListener> {
        if self.both_families && self.address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED) {
            let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.address.port()));
            match listen(both, false) {
                // A kernel without IPv6.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                result => return result,
            }
        }
        listen(self.address, !self.both_families)
    }
}

fn listen(address: SocketAddr, only_v6: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        None,
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    // Connections of an earlier listener may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit it.
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Listens as soon as it can and answers those who dial an address that `admits` says yes to, until
/// it is dropped. Connections take their places in `connections`, which other servers may share.
///
/// # Errors
/// When it cannot listen and that is to be its end.
pub async fn serve<F, A, B>(
    listening: Listening,
    connections: Connections,
    admits: impl Fn(IpAddr) -> bool,
    answer: F,
) -> anyhow::Result<()>
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let listener = listening.listener().await?;
    // Ends the connections too when the listener goes.
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                debug!("{}: {}: {error}", listening.subject, listening.address);
                if lacks_room(&error) {
                    connections.evict();
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
                continue;
            }
        };
        if !stream
            .local_addr()
            .is_ok_and(|address| admits(address.ip().to_canonical()))
        {
            continue;
        }
        let (place, registration) = connections.admit(peer.ip());
        tasks.spawn(Abortable::new(
            answer_one(stream, place, answer.clone()),
            registration,
        ));
    }
}

/// Whether a socket could not be had, rather than that its peer had gone already.
pub(crate) fn lacks_room(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// Reads a request and writes the answer, each within its time.
async fn answer_one<F, A, B>(stream: TcpStream, place: Place, answer: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let answer = service_fn(move |request| {
        place.asked();
        let response = answer(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADERS)
        // One answer is all that is asked for, and a connection that stays would keep its place.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match tokio::time::timeout(ANSWER_TIMEOUT, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("HTTP server: {error}"),
        Err(_) => debug!("HTTP server: an answer was not taken within {ANSWER_TIMEOUT:?}"),
    }
}

/// An answer whose body is of a media type that no browser should second-guess.
pub fn response<B>(status: hyper::StatusCode, content_type: &'static str, body: B) -> Response<B> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        header::HeaderValue::from_static("nosniff"),
    );
    response
}
