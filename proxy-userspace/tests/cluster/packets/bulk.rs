//! Large datagrams and transfers.

use shunt_lab::{Lab, Proto};

use super::{Cluster, cluster_ip, transfer};

/// L7 with sockets, and bulk TCP: datagrams that need six fragments there and back, by ClusterIP
/// and node port, to backends here and there; with `offloads`, segments of 64 KiB whose payload
/// stands in pages, and checksums still to be filled in.
fn large(lab: Lab, xdp: &str, extra: &[&str]) {
    let cluster = Cluster::start(lab, xdp, extra);
    for v6 in [false, true] {
        for name in ["packets", "client"] {
            let client = cluster.client(name);
            for number in [1, 2] {
                for to in [cluster_ip(number, v6), cluster.node_port(number, v6)] {
                    let wanted = ["near", "far"][usize::from(number == 2)];
                    for (proto, bytes) in [
                        (Proto::Udp, 8_000),
                        (Proto::Udp, 1_473),
                        (Proto::Tcp, 4_000_000),
                    ] {
                        let answer = transfer(&client, proto, to, bytes);
                        assert_eq!(
                            (answer.server.as_str(), answer.peer),
                            (wanted, to),
                            "{proto} from {name}"
                        );
                        assert!(answer.echo.len() >= bytes, "{proto} {to} from {name}");
                    }
                }
            }
        }
    }
}

#[test]
fn fragments_and_bulk_with_xdp() {
    large(Lab::new().unwrap(), "native", &[]);
}

#[test]
fn fragments_and_bulk_without_xdp() {
    large(Lab::new().unwrap(), "off", &[]);
}

#[test]
fn fragments_and_bulk_with_offloads() {
    let lab = || {
        Lab::builder()
            .strict_rp_filter()
            .checksum_offload()
            .build()
            .unwrap()
    };
    large(lab(), "off", &[]);
    large(lab(), "off", &["--fast-path", "on"]);
}
