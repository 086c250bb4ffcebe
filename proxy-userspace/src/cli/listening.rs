//! What sockets another process listens on, as /proc has it
//! ([proc_pid_net(5)](https://man7.org/linux/man-pages/man5/proc_pid_net.5.html)).

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Where a process takes datagrams of everybody; of what cannot be seen, nothing.
pub(super) fn udp(pid: u32) -> Vec<SocketAddr> {
    let inodes = inodes(pid);
    let of =
        |table: &str| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
    [of("udp"), of("udp6")]
        .iter()
        .flat_map(|text| bound(text, &inodes))
        .collect()
}

/// The sockets that a process has open.
fn inodes(pid: u32) -> BTreeSet<u64> {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return BTreeSet::new();
    };
    let inode = |file: fs::DirEntry| {
        let target = fs::read_link(file.path()).ok()?;
        target
            .to_str()?
            .strip_prefix("socket:[")?
            .strip_suffix(']')?
            .parse()
            .ok()
    };
    files.flatten().filter_map(inode).collect()
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …`: those without a
/// remote side.
fn bound(table: &str, inodes: &BTreeSet<u64>) -> Vec<SocketAddr> {
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let inode = fields.get(9)?.parse().ok()?;
        let (local, remote) = (address(fields.get(1)?)?, address(fields.get(2)?)?);
        (remote.port() == 0 && local.port() != 0 && inodes.contains(&inode)).then_some(local)
    };
    table.lines().skip(1).filter_map(socket).collect()
}

/// `0100007F:0035`: words of four bytes as this machine keeps them, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words = address.as_bytes().chunks(8).map(|word| {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        Some(word.to_ne_bytes())
    });
    let bytes = words.collect::<Option<Vec<[u8; 4]>>>()?.concat();
    let ip: IpAddr = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(v4) => Ipv4Addr::from(v4).into(),
        Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?).into(),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_this_process_are_found() {
        for ip in ["127.0.0.1", "::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            let bound = std::net::UdpSocket::bind((ip, 0)).unwrap();
            let connected = std::net::UdpSocket::bind((ip, 0)).unwrap();
            connected.connect(bound.local_addr().unwrap()).unwrap();
            let found = udp(std::process::id());
            assert!(found.contains(&bound.local_addr().unwrap()), "{found:?}");
            assert!(
                !found.contains(&connected.local_addr().unwrap()),
                "{found:?}"
            );
        }
    }
}
