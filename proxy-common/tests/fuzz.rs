//! Packets byte by byte through the whole decision on the host: whatever comes, a packet is
//! translated wholly or not at all.
//!
//! Two tests, bounded in time. The first plays flows of many clients against a model that knows no
//! tables, only what each side must see, and compares whole packets. The second throws mangled
//! packets at the same node and checks what must hold of any packet: nothing out of bounds, no
//! other length, and checksums exactly as right or wrong as they were.

use std::{cell::UnsafeCell, collections::HashMap, hash::Hash};

use proptest::{collection::vec, prelude::*, sample::Index};
use shunt_common::{
    access::{Access, Number},
    balance::{arriving, leaving},
    checksum::{self, Difference},
    family::{Family, V4, V6},
    layout::*,
    packet::{self, ACK, ETHERNET, Headers, Packet, SYN, Tuple},
    slow_path::{self, Action},
    snat,
    verdict::{Arrival, Direction, Origin, Verdict},
};

use crate::support::Node;

mod support;

/// Flows that wait in `flows`: few, so that both ways are taken.
const MAX_HALF_OPEN: i64 = 3;

/// A frame that every access is checked against.
struct Frame(UnsafeCell<Vec<u8>>);

impl Frame {
    #[expect(
        clippy::mut_from_ref,
        reason = "packets are written through shared references, as in the kernel"
    )]
    fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: one thread, and no reference is kept.
        unsafe { &mut *self.0.get() }
    }
}

impl Packet for Frame {
    fn bytes(&self, offset: usize, len: usize) -> Option<*mut u8> {
        Some(
            self.bytes_mut()
                .get_mut(offset..offset.checked_add(len)?)?
                .as_mut_ptr(),
        )
    }
}

impl Access for Frame {
    fn length(&self) -> u32 {
        self.bytes_mut().len() as u32
    }
    fn load<T: Number>(&self, offset: u32) -> Option<T> {
        let ptr = self.bytes(offset as usize, size_of::<T>())?;
        // SAFETY: so many bytes were checked, and a number may be any bytes.
        Some(unsafe { ptr.cast::<T>().read_unaligned() })
    }
    fn store<T: Number>(&self, offset: u32, value: T) -> bool {
        let Some(ptr) = self.bytes(offset as usize, size_of::<T>()) else {
            return false;
        };
        // SAFETY: so many bytes were checked.
        unsafe { ptr.cast::<T>().write_unaligned(value) };
        true
    }
    fn replace_checksum(
        &self,
        offset: u32,
        addresses: Difference,
        ports: Difference,
        or_none: bool,
    ) -> bool {
        let Some(old) = self.load::<u16>(offset) else {
            return false;
        };
        if or_none && old == 0 {
            return true;
        }
        let new = addresses.and(ports).apply(old);
        self.store(offset, if or_none && new == 0 { 0xffff } else { new })
    }
    fn changed(&self, _difference: Difference) {}
}

/// Addresses of the test, by number: the same in both families.
trait Addresses: Family<Words: Hash> {
    fn addr(n: u16) -> Self::Words;
}

impl Addresses for V4 {
    fn addr(n: u16) -> u32 {
        let [high, low] = n.to_be_bytes();
        V4::words([10, 9, high, low])
    }
}

impl Addresses for V6 {
    fn addr(n: u16) -> shunt_common::family::Words6 {
        let [high, low] = n.to_be_bytes();
        V6::words([0xfd, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, high, low])
    }
}

/// Cluster IPs from here on, the first [`FRONTENDS`] of them taken, each with port 80; below are
/// all others.
const SERVICES: u16 = 0xff00;
const FRONTENDS: u16 = 3;
/// Backends 8080, odd ones on this node.
const BACKENDS: std::ops::Range<u16> = 0x100..0x104;
const NODE: u16 = 1;
const ROUTER: u16 = 2;
const CLIENTS: u16 = 0x200;

fn node<F: Addresses>() -> Node<F> {
    let mut config = Config {
        snat_first: 10_240,
        snat_ports: 4000,
        snat_entries: 32_768,
        ..Config::default()
    };
    fn prefix<A: Copy>(addr: A, mask: A) -> Prefix<A> {
        Prefix { addr, mask }
    }
    config.v4.node = V4::bytes(V4::addr(NODE));
    config.v6.node = V6::bytes(V6::addr(NODE));
    config.v4.service_cidrs[0] = prefix(V4::bytes(V4::addr(SERVICES)), [255, 255, 255, 0]);
    let mut mask = [255; 16];
    mask[15] = 0;
    config.v6.service_cidrs[0] = prefix(V6::bytes(V6::addr(SERVICES)), mask);
    config.v4.service_hull = config.v4.service_cidrs[0];
    config.v6.service_hull = config.v6.service_cidrs[0];
    config.v4.service_cidr_count = 1;
    config.v6.service_cidr_count = 1;
    config.flags = CONFIG_ANSWER_PING;
    let node = Node::<F>::new(config);
    node.max_half_open.set(MAX_HALF_OPEN);
    let backends: Vec<_> = BACKENDS.map(|n| (F::addr(n), 8080, n % 2 == 1)).collect();
    for n in 0..FRONTENDS {
        let addr = F::addr(SERVICES + n);
        // The last has nobody behind it.
        let behind = if n + 1 == FRONTENDS {
            &[]
        } else {
            &backends[..]
        };
        let flags = ADDRESS_CLUSTER_IP | if behind.is_empty() { 0 } else { ADDRESS_READY };
        node.addresses.borrow_mut().insert(addr, flags);
        for proto in [TCP, UDP, SCTP] {
            node.serve(addr, 80, proto, behind);
        }
    }
    node
}

/// What the tc programs do, over a host's frame.
fn run<F: Addresses>(node: &Node<F>, frame: &[u8], direction: Direction) -> (Action, Vec<u8>) {
    let frame = Frame(UnsafeCell::new(frame.to_vec()));
    let action = match packet::parse::<F>(&frame, ETHERNET) {
        None => slow_path::handle::<F, _>(node, &frame, direction),
        Some(headers) => {
            let Headers {
                tuple, tcp_flags, ..
            } = headers;
            let verdict = match direction {
                Direction::Ingress(origin) => arriving(
                    node,
                    &Arrival {
                        tuple,
                        tcp_flags,
                        origin,
                        sends_on: false,
                    },
                ),
                Direction::Egress => leaving(node, &tuple, tcp_flags),
            };
            match verdict {
                Verdict::Pass => Action::Pass,
                Verdict::Drop | Verdict::Reset => Action::Drop,
                Verdict::Refuse => Action::Refuse,
                Verdict::Translate(to) => {
                    assert!(packet::update_checksum::<F>(&frame, &headers, &to.tuple));
                    assert!(packet::write_tuple::<F>(&frame, &headers, &to.tuple));
                    Action::Pass
                }
            }
        }
    };
    (action, frame.0.into_inner())
}

/// What the XDP program does first with what the network brings: an answer, a frame that is sent on
/// at once, or one for tc.
fn express<F: Addresses>(node: &Node<F>, frame: &[u8]) -> (Action, Vec<u8>, bool) {
    let frame = Frame(UnsafeCell::new(frame.to_vec()));
    let Some(headers) = packet::parse::<F>(&frame, ETHERNET) else {
        return (Action::Pass, frame.0.into_inner(), false);
    };
    let arrival = Arrival {
        tuple: headers.tuple,
        tcp_flags: headers.tcp_flags,
        origin: Origin::Network,
        sends_on: true,
    };
    let (action, sent) = match arriving(node, &arrival) {
        Verdict::Pass => (Action::Pass, false),
        Verdict::Drop | Verdict::Reset => (Action::Drop, false),
        Verdict::Refuse => (Action::Refuse, false),
        Verdict::Translate(to) => {
            let sent = !to.local && packet::decrement_hops::<F>(&frame, headers.l3);
            // Without hops left the kernel shall tell the sender.
            if to.local || sent {
                assert!(packet::update_checksum::<F>(&frame, &headers, &to.tuple));
                assert!(packet::write_tuple::<F>(&frame, &headers, &to.tuple));
            }
            (Action::Pass, sent)
        }
    };
    (action, frame.0.into_inner(), sent)
}

/// Through the node: in and, if it passes, out; on a network device with XDP first, which may take
/// both steps and one hop.
fn across<F: Addresses>(
    node: &Node<F>,
    frame: &[u8],
    origin: Origin,
    xdp: bool,
) -> (Action, Vec<u8>) {
    let mut frame = frame.to_vec();
    if xdp && origin == Origin::Network {
        let (action, after, sent) = express(node, &frame);
        if sent || action != Action::Pass {
            return (action, after);
        }
        frame = after;
    }
    match run(node, &frame, Direction::Ingress(origin)) {
        (Action::Pass, frame) => run(node, &frame, Direction::Egress),
        other => other,
    }
}

/// The frame with one hop less, and its header's checksum made anew.
fn one_hop_less<F: Family>(mut frame: Vec<u8>) -> Vec<u8> {
    if F::HEADER == 40 {
        frame[ETHERNET + 7] -= 1;
        return frame;
    }
    let header = ETHERNET..ETHERNET + usize::from(frame[ETHERNET] & 15) * 4;
    frame[ETHERNET + 8] -= 1;
    frame[ETHERNET + 10..ETHERNET + 12].fill(0);
    let value = !checksum::fold(sum(&frame[header]));
    frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&value.to_ne_bytes());
    frame
}

/// A packet as a sender means it.
#[derive(Clone, Debug)]
struct Sent<A> {
    tuple: Tuple<A>,
    flags: u8,
    /// Hop limit.
    hops: u8,
    /// IPv4 options in words, or IPv6 extension headers by kind.
    more: Vec<u8>,
    payload: Vec<u8>,
}

/// Sum of words, an odd byte padded.
fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    bytes.chunks(2).map(word).sum()
}

fn addr_bytes<F: Family>(addr: F::Words) -> Vec<u8> {
    let bytes = F::bytes(addr);
    // SAFETY: an address is so many bytes.
    unsafe {
        std::slice::from_raw_parts((&raw const bytes).cast::<u8>(), size_of::<F::Addr>()).to_vec()
    }
}

/// An IP packet in a frame, every checksum filled in.
fn ip<F: Family>(
    src: F::Words,
    dst: F::Words,
    (proto, hops): (u8, u8),
    more: &[u8],
    mut l4: Vec<u8>,
    checksum: Option<usize>,
) -> Vec<u8> {
    let (src, dst) = (addr_bytes::<F>(src), addr_bytes::<F>(dst));
    if let Some(offset) = checksum {
        let pseudo = sum(&src)
            + sum(&dst)
            + u64::from((l4.len() as u16).to_be())
            + u64::from(u16::from(proto).to_be());
        let pseudo = if proto == 1 { 0 } else { pseudo };
        let value = match !checksum::fold(pseudo + sum(&l4)) {
            0 if proto == UDP => 0xffff,
            value => value,
        };
        l4[offset..offset + 2].copy_from_slice(&value.to_ne_bytes());
    }
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    frame.extend(F::ETHERTYPE.to_be_bytes());
    if F::HEADER == 20 {
        // No operations.
        let options = vec![1; more.len().min(10) * 4];
        let mut header = vec![0x45 + (options.len() / 4) as u8, 0];
        header.extend(((20 + options.len() + l4.len()) as u16).to_be_bytes());
        header.extend([0, 7, 0x40, 0, hops, proto, 0, 0]);
        header.extend(src.iter().chain(&dst).chain(&options));
        let value = !checksum::fold(sum(&header));
        header[10..12].copy_from_slice(&value.to_ne_bytes());
        frame.extend(header);
    } else {
        let kinds = more
            .iter()
            .map(|kind| [0, 60, 43, 44][usize::from(kind % 4)]);
        let next: Vec<u8> = kinds.chain([proto]).collect();
        let extensions: Vec<u8> = next[1..]
            .iter()
            .flat_map(|&next| [next, 0, 0, 0, 0, 0, 0, 0])
            .collect();
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(((extensions.len() + l4.len()) as u16).to_be_bytes());
        frame.extend([next[0], hops]);
        frame.extend(src.iter().chain(&dst).chain(&extensions));
    }
    frame.extend(l4);
    frame
}

impl<A: Copy> Sent<A> {
    fn frame<F: Family<Words = A>>(&self) -> Vec<u8> {
        let Tuple {
            src,
            dst,
            src_port,
            dst_port,
            proto,
        } = self.tuple;
        let mut l4: Vec<u8> = [src_port.to_be_bytes(), dst_port.to_be_bytes()].concat();
        let checksum = if proto == TCP {
            l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, self.flags, 9, 9, 0, 0, 0, 0]);
            16
        } else {
            l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        };
        l4.extend(&self.payload);
        ip::<F>(src, dst, (proto, self.hops), &self.more, l4, Some(checksum))
    }

    fn with(&self, tuple: Tuple<A>) -> Self
    where
        A: Clone,
    {
        Self {
            tuple,
            ..self.clone()
        }
    }
}

/// An ICMP error about a frame.
fn error<F: Family>(src: F::Words, dst: F::Words, about: &[u8]) -> Vec<u8> {
    let (proto, kind) = if F::HEADER == 20 { (1, 3) } else { (58, 2) };
    let mut l4 = vec![kind, 4, 0, 0, 0, 0, 5, 0];
    l4.extend(&about[ETHERNET..]);
    ip::<F>(src, dst, (proto, 64), &[], l4, Some(2))
}

fn back<A: Copy>(tuple: Tuple<A>) -> Tuple<A> {
    Tuple {
        src: tuple.dst,
        dst: tuple.src,
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        proto: tuple.proto,
    }
}

/// One thing that happens.
#[derive(Clone, Debug)]
struct Step {
    client: u16,
    port: u16,
    frontend: u16,
    frontend_port: u16,
    udp: bool,
    pod: bool,
    /// Whether there is XDP: each packet of a flow may find it on or off.
    xdp: bool,
    hops: u8,
    more: Vec<u8>,
    payload: Vec<u8>,
}

fn step() -> impl Strategy<Value = Step> {
    let frontend_port = prop_oneof![8 => Just(80u16), 1 => Just(81)];
    (
        0..4u16,
        0..6u16,
        0..=FRONTENDS + 1,
        frontend_port,
        any::<bool>(),
        any::<bool>(),
        prop_oneof![4 => Just(64u8), 1 => 0..3u8],
        vec(any::<u8>(), 0..5),
        vec(any::<u8>(), 0..40),
    )
        .prop_map(
            |(client, port, frontend, frontend_port, udp, xdp, hops, more, payload)| Step {
                client,
                // Some in the SNAT range, some not.
                port: if port < 3 {
                    10_300 + port
                } else {
                    40_000 + port
                },
                frontend,
                frontend_port,
                udp,
                pod: client % 2 == 0,
                xdp,
                hops,
                more,
                payload,
            },
        )
}

/// What each side must see, flow by flow.
fn play<F: Addresses>(steps: &[Step]) {
    let node = node::<F>();
    let mut flows: HashMap<Tuple<F::Words>, Tuple<F::Words>> = HashMap::new();
    for step in steps {
        let proto = if step.udp { UDP } else { TCP };
        let dialled = Tuple {
            src: F::addr(CLIENTS + step.client),
            dst: F::addr(if step.frontend > FRONTENDS {
                ROUTER
            } else {
                SERVICES + step.frontend
            }),
            src_port: step.port,
            dst_port: step.frontend_port,
            proto,
        };
        let sent = Sent {
            tuple: dialled,
            flags: if flows.contains_key(&dialled) {
                ACK
            } else {
                SYN
            },
            hops: step.hops,
            more: step.more.clone(),
            payload: step.payload.clone(),
        };
        let from = if step.pod {
            Origin::Pod
        } else {
            Origin::Network
        };
        let frame = sent.frame::<F>();
        let (action, out) = across(&node, &frame, from, step.xdp);
        let known = step.frontend + 1 < FRONTENDS && step.frontend_port == 80;
        if !known {
            let wanted = match step.frontend {
                n if n < FRONTENDS => Action::Refuse,
                FRONTENDS => Action::Drop,
                _ => Action::Pass,
            };
            assert_eq!((action, &out), (wanted, &frame), "{step:?}");
            continue;
        }
        assert_eq!(action, Action::Pass, "{step:?}");

        // The backend's view: one that is eligible, the same as before, from a source that nobody
        // shares.
        let parsed = seen::<F>(&out);
        let seen = *flows.entry(dialled).or_insert(parsed);
        assert_eq!(
            parsed, seen,
            "{step:?}: a flow keeps its backend and its source"
        );
        let backend = BACKENDS
            .clone()
            .find(|&n| F::addr(n) == seen.dst)
            .expect("a backend");
        assert_eq!(seen.dst_port, 8080);
        let translated = !step.pod && backend % 2 == 0;
        assert_eq!(
            seen.src,
            if translated {
                F::addr(NODE)
            } else {
                dialled.src
            },
            "{step:?}"
        );
        assert!(seen.src_port == dialled.src_port || snat::in_range(&node.config, seen.src_port));
        assert_eq!(
            flows.values().filter(|other| **other == seen).count(),
            1,
            "{step:?}: {flows:?}"
        );
        // XDP leaves extension headers to tc, and the last hop to the kernel.
        let express = step.xdp && step.hops > 1 && (F::HEADER == 20 || step.more.is_empty());
        let hop = |sends_on: bool, frame| {
            if express && sends_on {
                one_hop_less::<F>(frame)
            } else {
                frame
            }
        };
        assert_eq!(
            out,
            hop(translated, sent.with(seen).frame::<F>()),
            "{step:?}"
        );

        // An error about it finds the client, and shows what it dialled.
        let backend_side = if backend % 2 == 1 {
            Origin::Pod
        } else {
            Origin::Network
        };
        let about = error::<F>(F::addr(ROUTER), seen.src, &out);
        let (action, out) = across(&node, &about, Origin::Network, step.xdp);
        assert_eq!(
            (action, out),
            (
                Action::Pass,
                error::<F>(dialled.dst, dialled.src, &hop(translated, frame))
            ),
            "{step:?}"
        );

        // The answer comes from what was dialled.
        let answer = Sent {
            flags: SYN | ACK,
            ..sent.with(back(seen))
        };
        let (action, shown) = across(&node, &answer.frame::<F>(), backend_side, step.xdp);
        assert_eq!(
            (action, &shown),
            (
                Action::Pass,
                &hop(translated, answer.with(back(dialled)).frame::<F>())
            ),
            "{step:?}"
        );
        let about = error::<F>(F::addr(ROUTER), dialled.dst, &shown);
        let (action, out) = across(&node, &about, from, step.xdp);
        let src = if seen.src == dialled.src {
            F::addr(ROUTER)
        } else {
            seen.src
        };
        assert_eq!(
            (action, out),
            (
                Action::Pass,
                error::<F>(src, seen.dst, &hop(translated, answer.frame::<F>()))
            ),
            "{step:?}"
        );
    }
}

/// Tuple of a frame that the test made itself, read in the plainest way.
fn seen<F: Addresses>(frame: &[u8]) -> Tuple<F::Words> {
    let (l4, proto) = payload::<F>(frame).expect("a packet");
    let at = |offset: usize| {
        let size = size_of::<F::Words>();
        let bytes = &frame[ETHERNET + F::ADDRESSES + offset * size..][..size];
        // SAFETY: so many bytes, and any are an address.
        unsafe { bytes.as_ptr().cast::<F::Words>().read_unaligned() }
    };
    let port = |offset: usize| u16::from_be_bytes([frame[l4 + offset], frame[l4 + offset + 1]]);
    Tuple {
        src: at(0),
        dst: at(1),
        src_port: port(0),
        dst_port: port(2),
        proto,
    }
}

/// Where the transport header of a whole packet stands.
fn payload<F: Family>(frame: &[u8]) -> Option<(usize, u8)> {
    let ip = frame.get(ETHERNET..)?;
    if F::HEADER == 20 {
        return Some((ETHERNET + usize::from(ip.first()? & 15) * 4, *ip.get(9)?));
    }
    let (mut next, mut at) = (*ip.get(6)?, 40);
    while [0, 43, 44, 60].contains(&next) {
        let length = if next == 44 {
            8
        } else {
            8 + usize::from(*ip.get(at + 1)?) * 8
        };
        next = *ip.get(at)?;
        at += length;
    }
    Some((ETHERNET + at, next))
}

/// What is wrong with a frame's checksums: the header's, and the transport's with its
/// pseudo-header. 0 and 0xffff are the same.
fn residue<F: Family>(frame: &[u8]) -> [u16; 2] {
    let normal = |value: u16| if value == 0xffff { 0 } else { value };
    let header = usize::from(frame[ETHERNET] & 15) * 4;
    let outer = match F::HEADER {
        20 if header >= 20 => frame.get(ETHERNET..ETHERNET + header).map_or(0, sum),
        _ => 0,
    };
    let addresses = &frame[ETHERNET + F::ADDRESSES..][..2 * size_of::<F::Words>()];
    let transport = match payload::<F>(frame) {
        // No checksum is no checksum, and ICMP's has no pseudo-header.
        Some((l4, UDP)) if frame.get(l4 + 6..l4 + 8) == Some(&[0, 0]) => 0,
        // A CRC is no such sum: see `tests/packet/odd.rs`.
        Some((_, SCTP)) => 0,
        Some((l4, 1)) => sum(frame.get(l4..).unwrap_or_default()),
        Some((l4, _)) => sum(addresses) + sum(frame.get(l4..).unwrap_or_default()),
        None => sum(addresses),
    };
    [
        normal(checksum::fold(outer)),
        normal(checksum::fold(transport)),
    ]
}

/// Mangles packets of flows that exist, and throws them at the node.
fn mangle<F: Addresses>(steps: &[Step], changes: &[(Index, u8)], cut: Option<Index>) {
    let node = node::<F>();
    let known = |step: &&Step| step.frontend + 1 < FRONTENDS;
    for step in steps.iter().filter(known) {
        let tuple = Tuple {
            src: F::addr(CLIENTS + step.client),
            dst: F::addr(SERVICES + step.frontend),
            src_port: step.port,
            dst_port: 80,
            proto: if step.udp { UDP } else { TCP },
        };
        let sent = Sent {
            tuple,
            flags: SYN,
            hops: step.hops,
            more: step.more.clone(),
            payload: step.payload.clone(),
        };
        let frame = sent.frame::<F>();
        let (_, out) = across(&node, &frame, Origin::Network, false);
        let reply = sent.with(back(seen::<F>(&out))).frame::<F>();
        let about = error::<F>(F::addr(ROUTER), seen::<F>(&out).src, &out);
        for mut frame in [frame, reply, about] {
            for (index, value) in changes {
                // Mostly headers.
                let place = ETHERNET + index.index(frame.len().min(120) - ETHERNET);
                frame[place] = *value;
            }
            if let Some(cut) = cut {
                frame.truncate(
                    ETHERNET + F::HEADER + cut.index(frame.len() - ETHERNET - F::HEADER + 1),
                );
            }
            let tc = [
                Direction::Ingress(Origin::Pod),
                Direction::Ingress(Origin::Network),
                Direction::Egress,
            ];
            let results = tc.map(|direction| (Some(direction), run(&node, &frame, direction)));
            let (action, out, _) = express(&node, &frame);
            // No direction: XDP.
            for (direction, (action, out)) in results.into_iter().chain([(None, (action, out))]) {
                assert_eq!(out.len(), frame.len());
                match action {
                    // A checksum that is cut off cannot be right; one of a first fragment covers
                    // what is not here, and is as wrong as before.
                    Action::Pass if out != frame => {
                        let whole = payload::<F>(&frame).is_some_and(|(l4, proto)| {
                            l4 + if proto == TCP { 20 } else { 8 } <= frame.len()
                        });
                        if whole && later(&frame, F::HEADER == 20).is_none() {
                            assert_eq!(
                                residue::<F>(&out),
                                residue::<F>(&frame),
                                "{direction:?}: {frame:02x?} became {out:02x?}"
                            );
                        }
                    }
                    Action::Pass | Action::Drop | Action::Refuse => {
                        assert_eq!(out, frame, "{action:?} changed it")
                    }
                    Action::SendBack | Action::Deliver | Action::Send => {}
                }
            }
        }
    }
}

/// Whether a frame is a fragment other than the first, which has no checksum of its own.
fn later(frame: &[u8], v4: bool) -> Option<()> {
    if v4 {
        return (u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff != 0).then_some(());
    }
    let (mut next, mut at) = (frame[20], 54);
    while [0, 43, 44, 60].contains(&next) {
        if next == 44 && u16::from_be_bytes([*frame.get(at + 2)?, *frame.get(at + 3)?]) & !7 != 0 {
            return Some(());
        }
        let length = if next == 44 {
            8
        } else {
            8 + usize::from(*frame.get(at + 1)?) * 8
        };
        next = *frame.get(at)?;
        at += length;
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// L6, L7's parser, F12, P7 and P8's neighbours: each side sees what the model says, byte for
    /// byte.
    #[test]
    fn each_side_sees_what_the_model_says(steps in vec(step(), 1..40)) {
        play::<V4>(&steps);
        play::<V6>(&steps);
    }

    #[test]
    fn mangled_packets_are_translated_wholly_or_not_at_all(
        steps in vec(step(), 1..4), changes in vec((any::<Index>(), any::<u8>()), 0..4), cut in any::<Option<Index>>(),
    ) {
        mangle::<V4>(&steps, &changes, cut);
        mangle::<V6>(&steps, &changes, cut);
    }
}
