//! The two ends of what is measured: a server and a client in tight loops, as processes of their
//! own inside the lab.
//!
//! Both are pinned to one CPU, with a real-time priority, so that a machine with other work to do
//! is still measured and not its scheduler. The client is told by lines on its standard input what
//! to do, and answers each with a line.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    mem::MaybeUninit,
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use shunt_lab::{Lab, Sockets};

use crate::shell::target;

/// Bytes that the client hands to the kernel at once when it sends as much as it can.
const CHUNK: usize = 64 * 1024;
/// Patience with a peer that is silent: a packet that was lost ends a round instead of hanging it.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What a client does for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// Connect, one byte each way, close.
    Connect,
    /// One byte each way on a connection that is kept.
    Request,
    /// As many bytes as go through one connection.
    Bulk,
}

impl Load {
    fn word(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Request => "request",
            Self::Bulk => "bulk",
        }
    }
}

/// What a round came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// Transactions, or bytes, per second.
    pub(super) rate: f64,
    /// Half of the transactions were at most as long, in µs; zero for [`Load::Bulk`].
    pub(super) p50: f64,
    /// The same for 99 of 100.
    pub(super) p99: f64,
}

/// The hidden verb that this program starts itself with.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Serve here; without it, be a client.
    #[arg(long)]
    serve: Option<SocketAddr>,
    #[arg(long)]
    cpu: usize,
}

/// Runs a peer until its standard input ends (client) or for ever (server).
///
/// # Errors
///
/// When the sockets fail.
pub(crate) fn run(args: &Args) -> Result<()> {
    pin(args.cpu)?;
    match args.serve {
        Some(address) => serve(address).with_context(|| format!("{address}")),
        None => obey(),
    }
}

/// One CPU, and before everything that is not as urgent.
fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).with_context(|| format!("cannot run on CPU {cpu}"))?;
    let mut urgent = MaybeUninit::<libc::sched_param>::zeroed();
    // SAFETY: the struct is valid when zeroed, and the call reads it only.
    let result = unsafe {
        (*urgent.as_mut_ptr()).sched_priority = 1;
        libc::sched_setscheduler(0, libc::SCHED_FIFO, urgent.as_ptr())
    };
    if result != 0 {
        // A machine may keep real-time priorities to itself; then its other work shows in the
        // spread.
        eprintln!("no real-time priority: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// The CPU to measure on: the last that this process may use, since the first often takes the
/// interrupts.
pub(super) fn cpu() -> Result<usize> {
    let cpus = sched_getaffinity(None).context("CPUs")?;
    (0..CpuSet::MAX_CPU)
        .rev()
        .find(|&cpu| cpus.is_set(cpu))
        .context("no CPU")
}

fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("ready");
    let mut buffer = vec![0; CHUNK];
    loop {
        let (mut stream, _) = listener.accept()?;
        // What a client that gave up leaves behind is no reason to end.
        let _ = answer(&mut stream, &mut buffer);
    }
}

/// The first byte says what the client is about.
fn answer(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut first = [0];
    stream.read_exact(&mut first)?;
    if first == [b'c'] {
        return stream.write_all(&first);
    }
    stream.set_nodelay(true)?;
    if first == [b'r'] {
        stream.write_all(&first)?;
        while stream.read(&mut first)? == 1 {
            stream.write_all(&first)?;
        }
        return Ok(());
    }
    while stream.read(buffer)? > 0 {}
    stream.write_all(&first)
}

fn obey() -> Result<()> {
    let mut samples = Vec::with_capacity(1 << 20);
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let [load, to, millis] = words[..] else {
            bail!("not LOAD ADDRESS MILLISECONDS: {line}");
        };
        let load = Load::from_str(load, false).map_err(anyhow::Error::msg)?;
        let to: SocketAddr = to.parse()?;
        let time = Duration::from_millis(millis.parse()?);
        samples.clear();
        match play(load, to, time, &mut samples) {
            Ok(rate) => {
                samples.sort_unstable();
                let quantile = |hundredths: usize| {
                    let nanos = samples
                        .get(samples.len().saturating_sub(1) * hundredths / 100)
                        .copied();
                    f64::from(nanos.unwrap_or(0)) / 1000.0
                };
                println!("{rate} {} {}", quantile(50), quantile(99));
            }
            Err(error) => println!("error: {to}: {error}"),
        }
    }
    Ok(())
}

/// Does it for `time` and returns how much per second; how long each took goes to `samples`, in ns.
fn play(load: Load, to: SocketAddr, time: Duration, samples: &mut Vec<u32>) -> io::Result<f64> {
    let mut byte = [b'c'];
    let began = Instant::now();
    let mut last = began;
    let mut done = |samples: &mut Vec<u32>| {
        let now = Instant::now();
        samples.push(u32::try_from((now - last).as_nanos()).unwrap_or(u32::MAX));
        last = now;
        now - began >= time
    };
    let count = match load {
        Load::Connect => loop {
            let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            drop(stream);
            if done(samples) {
                break samples.len();
            }
        },
        Load::Request => {
            let mut stream = connect(to)?;
            byte = [b'r'];
            loop {
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)?;
                if done(samples) {
                    break samples.len();
                }
            }
        }
        Load::Bulk => {
            let mut stream = connect(to)?;
            let chunk = vec![b'b'; CHUNK];
            let mut sent = 0;
            while began.elapsed() < time {
                stream.write_all(&chunk)?;
                sent += CHUNK;
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_exact(&mut byte)?;
            sent
        }
    };
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A peer process; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    /// A server in a pod of the lab.
    pub(super) fn server(lab: &Lab, pod: &str, port: u16) -> Result<Self> {
        let ip = lab
            .ips(pod)?
            .into_iter()
            .find(|ip| ip.is_ipv4())
            .context("no IPv4 address")?;
        let mut peer = Self::start(
            lab,
            pod,
            Sockets::Hooked,
            &["--serve", &SocketAddr::new(ip, port).to_string()],
        )?;
        let line = peer.line()?;
        if line != "ready" {
            bail!("the server in {pod} does not start: {line}");
        }
        Ok(peer)
    }

    /// A client somewhere in the lab.
    pub(super) fn client(lab: &Lab, place: &str, sockets: Sockets) -> Result<Self> {
        Self::start(lab, place, sockets, &[])
    }

    fn start(lab: &Lab, place: &str, sockets: Sockets, args: &[&str]) -> Result<Self> {
        let mut command: Command = lab.command(place, sockets, target().join("release/xtask"))?;
        command
            .args(["bench-peer", "--cpu", &cpu()?.to_string()])
            .args(args);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a peer")?;
        let stdin = child.stdin.take().context("a peer has no stdin")?;
        let stdout = child.stdout.take().context("a peer has no stdout")?;
        Ok(Self {
            child,
            stdin,
            stdout: BufReader::new(stdout),
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).context("a peer")?;
        Ok(line.trim_end().to_owned())
    }

    /// Has the client do something for a while.
    ///
    /// # Errors
    ///
    /// With the client's error.
    pub(super) fn play(&mut self, load: Load, to: SocketAddr, time: Duration) -> Result<Round> {
        writeln!(self.stdin, "{} {to} {}", load.word(), time.as_millis()).context("a peer")?;
        let line = self.line()?;
        let numbers: Vec<f64> = line
            .split(' ')
            .map_while(|word| word.parse().ok())
            .collect();
        match numbers[..] {
            [rate, p50, p99] => Ok(Round { rate, p50, p99 }),
            _ => bail!("{}: {line}", load.word()),
        }
    }
}
