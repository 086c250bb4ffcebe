//! The agent's small HTTP servers: one request per connection, few connections at once.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tracing::{debug, info};

/// From one attempt to listen to the next; the first failure may be a listener that is just being closed.
const RETRY: Duration = Duration::from_millis(500);
/// A request's headers must be there by then.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections of one listener at once: others wait.
const MAX_CONNECTIONS: usize = 64;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// What a server listens on, and what a message says about it.
pub struct Listening {
    /// The setting or field that asks for it.
    pub subject: String,
    /// Where.
    pub address: SocketAddr,
    /// Whether 0.0.0.0 means IPv6 too, as it does where Go programs listen, kube-proxy among them.
    pub both_families: bool,
    /// Whether an address that cannot be listened on ends the server, instead of being tried again (`bindAddressHardFail`).
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
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    // Connections of an earlier listener may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Listens as soon as it can and answers those who dial an address that `admits` says yes to, until it is dropped.
///
/// # Errors
/// When it cannot listen and that is to be its end.
pub async fn serve<F, A>(listening: Listening, admits: impl Fn(IpAddr) -> bool, answer: F) -> anyhow::Result<()>
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<String>> + Send + 'static,
{
    let listener = listening.listener().await?;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Ends the connections too when the listener goes.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = room.clone().acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!("{}: {}: {error}", listening.subject, listening.address);
                // No more files: some may be closed by then.
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        if !stream.local_addr().is_ok_and(|address| admits(address.ip())) {
            continue;
        }
        let answer = answer.clone();
        connections.spawn(async move {
            let answer = service_fn(move |request| {
                let response = answer(request);
                async move { Ok::<_, Infallible>(response.await) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                // One answer is all that is asked for, and a connection that stays would keep its place.
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = served.await {
                debug!("HTTP server: {error}");
            }
            drop(permit);
        });
    }
}

/// An answer whose body is of a media type that no browser should second-guess.
pub fn response(status: hyper::StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        header::HeaderValue::from_static("nosniff"),
    );
    response
}
