//! The socket that a packet comes from, as tc sees it on the way out.

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use shunt_common::{
    family::{Family, Words6},
    packet::Tuple,
};

/// Whether the packet bears its socket's own port and, if that is connected, the address and port that
/// it is connected to.
///
/// What was translated does not: either its destination is not the socket's any more, or its source
/// port, for none is taken that an unconnected socket has.
///
/// # Safety
/// `skb` must be the running program's context.
// Functions of their own: LLVM would make one load of several, by a pointer that the verifier does not
// take.
#[inline(always)]
pub(crate) unsafe fn sends<F: Family>(skb: *mut __sk_buff, packet: &Tuple<F::Words>) -> bool {
    // SAFETY: the caller's promise.
    let ports = unsafe { ports(skb) };
    let (source, peer) = ((ports >> 16) as u16, ports as u16);
    if source != packet.src_port || peer != 0 && peer != packet.dst_port {
        return false;
    }
    if peer == 0 {
        return true;
    }
    if size_of::<F::Words>() == 4 {
        // SAFETY: the caller's promise; the address is of one word.
        unsafe { peer4(skb) == core::mem::transmute_copy(&packet.dst) }
    } else {
        // SAFETY: the caller's promise; the address is of two words.
        unsafe {
            let Words6 { high, low } = core::mem::transmute_copy(&packet.dst);
            peer6::<0>(skb) == high && peer6::<2>(skb) == low
        }
    }
}

/// Source and destination port, host order; 0: none.
#[inline(never)]
unsafe fn ports(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the caller's promise; the kernel keeps the socket while the packet is under way.
    unsafe {
        let socket = socket(skb);
        if socket.is_null() {
            return 0;
        }
        let source = (&raw const (*socket).src_port).read_volatile();
        let peer = (&raw const (*socket).dst_port).read_volatile();
        source << 16 | u32::from(u16::from_be(peer))
    }
}

/// The address of IPv4 that the socket is connected to, as it stands in packets.
#[inline(never)]
unsafe fn peer4(skb: *mut __sk_buff) -> u32 {
    // SAFETY: as above.
    unsafe {
        let socket = socket(skb);
        if socket.is_null() {
            return 0;
        }
        (&raw const (*socket).dst_ip4).read_volatile()
    }
}

/// Two words of the address of IPv6, from the `I`th on.
#[inline(never)]
unsafe fn peer6<const I: usize>(skb: *mut __sk_buff) -> u64 {
    // SAFETY: as above.
    unsafe {
        let socket = socket(skb);
        if socket.is_null() {
            return 0;
        }
        let low = (&raw const (*socket).dst_ip6[I]).read_volatile();
        let high = (&raw const (*socket).dst_ip6[I + 1]).read_volatile();
        u64::from(low) | u64::from(high) << 32
    }
}

#[inline(always)]
unsafe fn socket(skb: *mut __sk_buff) -> *mut bpf_sock {
    // SAFETY: the caller's promise.
    unsafe { (&raw const (*skb).__bindgen_anon_2.sk).read_volatile() }
}
