//! Netfilter's own connection table, which others use beside shunt (masquerading, network policies,
//! published container ports): its time-outs, size and window checks, as kube-proxy sets them
//! (`pkg/proxy/conntrack/sysctls.go`).
//!
//! Time-outs are set over netlink, which asks for no more than `CAP_NET_ADMIN`
//! (`IPCTNL_MSG_TIMEOUT_DEFAULT_SET` of linux/netfilter/nfnetlink_cttimeout.h). All else is files
//! below `/proc/sys/net/netfilter`, which an unprivileged container has read-only, unless an
//! overlay gives it another sight of them ([`SYSCTLS`]). All of it is of the calling thread's
//! network namespace.

use std::{fs, io, os::fd::AsFd, path::PathBuf, time::Duration};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::NETFILTER,
    recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// Where the files are, and where `deploy/components/netfilter-conntrack` puts them so that they
/// can be written.
pub const SYSCTLS: [&str; 2] = ["/proc/sys/net/netfilter", "/run/shunt/sysctl-net/netfilter"];
/// kube-proxy gives the table no more entries than these, however many CPUs there are.
const MOST_ENTRIES: u64 = 1 << 20;

/// What is to be set; `None`, zero and `false` leave as it is what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Netfilter {
    /// An open TCP connection is forgotten when it has been silent for so long.
    pub tcp_established: Option<Duration>,
    /// The same when the other side has closed its half.
    pub tcp_close_wait: Option<Duration>,
    /// The same for UDP that nobody has answered.
    pub udp: Option<Duration>,
    /// The same for UDP that has gone on after an answer.
    pub udp_stream: Option<Duration>,
    /// Entries per CPU; zero leaves the table's size alone.
    pub max_per_core: u32,
    /// Entries at least.
    pub min: u32,
    /// Segments outside of the window are no reason to call a packet invalid.
    pub be_liberal: bool,
}

impl Default for Netfilter {
    /// What kube-proxy sets when its configuration says nothing.
    fn default() -> Self {
        Self {
            tcp_established: Some(Duration::from_secs(24 * 60 * 60)),
            tcp_close_wait: Some(Duration::from_secs(60 * 60)),
            udp: None,
            udp_stream: None,
            max_per_core: 32 * 1024,
            min: 128 * 1024,
            be_liberal: false,
        }
    }
}

impl Netfilter {
    /// How many entries the table is to have on a machine with so many CPUs; `None`: as many as it
    /// has.
    pub fn entries(&self, cpus: u64) -> Option<u64> {
        if self.max_per_core == 0 {
            return None;
        }
        let scaled = u64::from(self.max_per_core) * cpus;
        Some(if scaled > MOST_ENTRIES {
            MOST_ENTRIES
        } else {
            scaled.max(self.min.into())
        })
    }
}

/// A value of the table's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Entries at most.
    Max,
    /// Entries now.
    Count,
    /// 1: windows are not checked.
    Liberal,
    /// Seconds.
    TcpEstablished,
    /// Seconds.
    TcpCloseWait,
    /// Seconds.
    Udp,
    /// Seconds.
    UdpStream,
}

impl Value {
    fn file(self) -> &'static str {
        match self {
            Self::Max => "nf_conntrack_max",
            Self::Count => "nf_conntrack_count",
            Self::Liberal => "nf_conntrack_tcp_be_liberal",
            Self::TcpEstablished => "nf_conntrack_tcp_timeout_established",
            Self::TcpCloseWait => "nf_conntrack_tcp_timeout_close_wait",
            Self::Udp => "nf_conntrack_udp_timeout",
            Self::UdpStream => "nf_conntrack_udp_timeout_stream",
        }
    }

    /// What it is now; `None` where the kernel has no such table (yet).
    pub fn read(self) -> Option<u64> {
        let path = PathBuf::from(SYSCTLS[0]).join(self.file());
        fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// # Errors
    /// The files cannot be written: an unprivileged container's are read-only.
    fn write(self, value: u64) -> io::Result<()> {
        let mut result = Err(io::ErrorKind::NotFound.into());
        for folder in SYSCTLS {
            let path = PathBuf::from(folder).join(self.file());
            if !path.exists() {
                continue;
            }
            result = fs::write(path, value.to_string());
            if result.is_ok() {
                break;
            }
        }
        result
    }
}

/// Whether this kernel has the table in this namespace. It may come later: with the first rule that
/// asks for it.
pub fn is_there() -> bool {
    Value::Count.read().is_some()
}

/// CPUs of the machine, whichever of them this process may use.
pub fn cpus() -> u64 {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let count = |range: &str| -> Option<u64> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        (last.parse::<u64>().ok()? + 1).checked_sub(first.parse().ok()?)
    };
    let counted: Option<u64> = online.trim().split(',').map(count).sum();
    counted.filter(|count| *count > 0).unwrap_or(1)
}

/// Sets what is not so yet. Returns what was set and what could not be, one line each.
pub fn apply(wanted: &Netfilter) -> (Vec<String>, Vec<String>) {
    let (mut set, mut failed) = (Vec::new(), Vec::new());
    let mut note = |value: Value, number: u64, result: io::Result<()>| match result {
        Ok(()) => set.push(format!("{} = {number}", value.file())),
        Err(error) => failed.push(format!("{} = {number}: {error}", value.file())),
    };
    for (protocol, timeouts) in [
        (
            libc::IPPROTO_TCP,
            [
                (
                    Value::TcpEstablished,
                    TCP_ESTABLISHED,
                    wanted.tcp_established,
                ),
                (Value::TcpCloseWait, TCP_CLOSE_WAIT, wanted.tcp_close_wait),
            ],
        ),
        (
            libc::IPPROTO_UDP,
            [
                (Value::Udp, UDP_UNREPLIED, wanted.udp),
                (Value::UdpStream, UDP_REPLIED, wanted.udp_stream),
            ],
        ),
    ] {
        for (value, attribute, timeout) in timeouts {
            let Some(seconds) = timeout.map(|timeout| timeout.as_secs()) else {
                continue;
            };
            let Some(now) = value.read() else { continue };
            if now != seconds {
                let seconds32 = u32::try_from(seconds).unwrap_or(u32::MAX);
                // A kernel without CONFIG_NF_CT_NETLINK_TIMEOUT has the file.
                let result = set_timeout(protocol as u8, attribute, seconds32)
                    .or_else(|error| value.write(seconds).map_err(|_| error));
                note(value, seconds, result);
            }
        }
    }
    if let (Some(entries), Some(now)) = (wanted.entries(cpus()), Value::Max.read())
        && now < entries
    {
        note(Value::Max, entries, Value::Max.write(entries));
    }
    if wanted.be_liberal && Value::Liberal.read() == Some(0) {
        note(Value::Liberal, 1, Value::Liberal.write(1));
    }
    (set, failed)
}

/// `NFNL_SUBSYS_CTNETLINK_TIMEOUT` << 8 | `IPCTNL_MSG_TIMEOUT_DEFAULT_SET`.
const TIMEOUT_DEFAULT_SET: u16 = (8 << 8) | 3;
const NLM_F_REQUEST_ACK: u16 = 0x5;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 1 << 15;
/// `CTA_TIMEOUT_L3PROTO`.
const L3PROTO: u16 = 2;
/// `CTA_TIMEOUT_L4PROTO`.
const L4PROTO: u16 = 3;
/// `CTA_TIMEOUT_DATA`.
const DATA: u16 = 4;
/// `CTA_TIMEOUT_TCP_ESTABLISHED`.
const TCP_ESTABLISHED: u16 = 3;
/// `CTA_TIMEOUT_TCP_CLOSE_WAIT`.
const TCP_CLOSE_WAIT: u16 = 5;
/// `CTA_TIMEOUT_UDP_UNREPLIED`.
const UDP_UNREPLIED: u16 = 1;
/// `CTA_TIMEOUT_UDP_REPLIED`.
const UDP_REPLIED: u16 = 2;

/// An attribute with its padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Sets one of a protocol's default time-outs, which are both families'.
fn set_timeout(protocol: u8, kind: u16, seconds: u32) -> io::Result<()> {
    let timeouts = attribute(kind, &seconds.to_be_bytes());
    let attributes = [
        attribute(L3PROTO, &(libc::AF_INET as u16).to_be_bytes()),
        attribute(L4PROTO, &[protocol]),
        attribute(DATA | NLA_F_NESTED, &timeouts),
    ]
    .concat();
    let mut request = Vec::new();
    // nlmsghdr with nfgenmsg (family, version 0, resource 0) behind it.
    request.extend((20 + attributes.len() as u32).to_ne_bytes());
    request.extend(TIMEOUT_DEFAULT_SET.to_ne_bytes());
    request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_INET as u8, 0, 0, 0]);
    request.extend(attributes);

    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(NETFILTER),
    )?;
    set_socket_timeout(socket.as_fd(), Timeout::Recv, Some(Duration::from_secs(5)))?;
    send(&socket, &request, SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    let answer = &answer[..length];
    let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    match (
        word(4).map(|word| word as u16),
        word(16).map(u32::cast_signed),
    ) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => Err(io::Error::from_raw_os_error(-error)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_large_as_kube_proxy_makes_it() {
        let with = |max_per_core, min| Netfilter {
            max_per_core,
            min,
            ..Netfilter::default()
        };
        for (netfilter, cpus, entries) in [
            (Netfilter::default(), 2, Some(131_072)),
            (Netfilter::default(), 8, Some(262_144)),
            (Netfilter::default(), 128, Some(1_048_576)),
            (with(0, 131_072), 8, None),
            (with(10, 0), 2, Some(20)),
            (with(10, 2_000_000), 2, Some(2_000_000)),
        ] {
            assert_eq!(netfilter.entries(cpus), entries, "{netfilter:?} {cpus}");
        }
        assert!(cpus() >= 1);
    }

    /// N10: in a namespace of the test's own. Needs root.
    #[test]
    fn time_outs_are_set_over_netlink_and_nothing_else_is_touched() {
        let values = [
            Value::TcpEstablished,
            Value::TcpCloseWait,
            Value::Udp,
            Value::UdpStream,
        ];
        let read = move || values.map(|value| value.read().expect("nf_conntrack"));
        let outside = is_there().then(read);
        let found = std::thread::spawn(move || {
            // SAFETY: nothing else runs in this thread that a new network namespace could surprise.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .expect("root");
            if !is_there() {
                return None;
            }
            let before = read();
            let wanted = Netfilter {
                tcp_established: Some(Duration::from_secs(7777)),
                udp_stream: Some(Duration::from_secs(333)),
                max_per_core: 0,
                be_liberal: true,
                ..Netfilter::default()
            };
            let (set, failed) = apply(&wanted);
            let again = apply(&wanted);
            Some((before, set, failed, read(), Value::Liberal.read(), again))
        })
        .join()
        .unwrap();
        let Some((before, set, failed, after, liberal, again)) = found else {
            eprintln!("skipped: this kernel has no nf_conntrack");
            return;
        };
        assert_eq!(failed, Vec::<String>::new());
        assert_eq!((set.len(), liberal), (4, Some(1)), "{set:?}");
        assert_eq!(after, [7777, 3600, before[2], 333]);
        assert_eq!(again, (Vec::new(), Vec::new()), "what is so is left alone");
        assert_eq!(is_there().then(read), outside, "the machine's own");
    }
}
