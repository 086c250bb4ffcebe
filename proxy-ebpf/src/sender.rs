//! The socket that a packet comes from, as tc sees it on the way out.

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use shunt_common::{
    family::{Family, Words6},
    packet::Tuple,
};

/// Whether the packet bears its socket's own port, the address that it is bound to, if any, and the
/// address and port that it is connected to, if it is.
///
/// What was translated does not: either its destination is not the socket's any more, or its source,
/// for no port is taken that an unconnected socket has at the address that is put in place of its own.
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
    if size_of::<F::Words>() == 4 {
        // SAFETY: the caller's promise; addresses are of one word.
        unsafe {
            let bound = bound4(skb);
            (bound == 0 || bound == core::mem::transmute_copy(&packet.src))
                && (peer == 0 || peer4(skb) == core::mem::transmute_copy(&packet.dst))
        }
    } else {
        // SAFETY: the caller's promise; addresses are of two words.
        unsafe {
            let bound = Words6 {
                high: bound6::<0>(skb),
                low: bound6::<2>(skb),
            };
            let (src, dst): (Words6, Words6) = (
                core::mem::transmute_copy(&packet.src),
                core::mem::transmute_copy(&packet.dst),
            );
            (bound == Words6 { high: 0, low: 0 } || bound == src)
                && (peer == 0 || peer6::<0>(skb) == dst.high && peer6::<2>(skb) == dst.low)
        }
    }
}

/// Source and destination port, host order; 0: none.
#[inline(never)]
unsafe fn ports(skb: *mut __sk_buff) -> u32 {
    let read = |socket: *const bpf_sock| {
        // SAFETY: `of_socket` gives the packet's.
        let (source, peer) = unsafe {
            (
                (&raw const (*socket).src_port).read_volatile(),
                (&raw const (*socket).dst_port).read_volatile(),
            )
        };
        source << 16 | u32::from(u16::from_be(peer))
    };
    // SAFETY: the caller's promise.
    unsafe { of_socket(skb, read) }
}

/// The address of IPv4 that the socket is bound to, as it stands in packets; 0: none.
#[inline(never)]
unsafe fn bound4(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the caller's promise, and as above.
    unsafe { of_socket(skb, |socket| (&raw const (*socket).src_ip4).read_volatile()) }
}

/// Two words of the address of IPv6 that the socket is bound to, from the `I`th on.
#[inline(never)]
unsafe fn bound6<const I: usize>(skb: *mut __sk_buff) -> u64 {
    // SAFETY: the caller's promise, and as above.
    unsafe { of_socket(skb, |socket| half::<I>(&raw const (*socket).src_ip6)) }
}

/// The address of IPv4 that the socket is connected to, as it stands in packets.
#[inline(never)]
unsafe fn peer4(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the caller's promise, and as above.
    unsafe { of_socket(skb, |socket| (&raw const (*socket).dst_ip4).read_volatile()) }
}

/// Two words of the address of IPv6 that it is connected to, from the `I`th on.
#[inline(never)]
unsafe fn peer6<const I: usize>(skb: *mut __sk_buff) -> u64 {
    // SAFETY: the caller's promise, and as above.
    unsafe { of_socket(skb, |socket| half::<I>(&raw const (*socket).dst_ip6)) }
}

/// What `read` finds in the packet's socket, which the kernel keeps while the packet is under way; zero
/// where it has none.
///
/// # Safety
/// `skb` must be the running program's context.
#[inline(always)]
unsafe fn of_socket<T: Default>(skb: *mut __sk_buff, read: impl FnOnce(*const bpf_sock) -> T) -> T {
    // SAFETY: the caller's promise.
    let socket = unsafe { (&raw const (*skb).__bindgen_anon_2.sk).read_volatile() };
    if socket.is_null() {
        T::default()
    } else {
        read(socket)
    }
}

/// Two words of an address of IPv6, from the `I`th on.
///
/// # Safety
/// `I` must be 0 to 2.
#[inline(always)]
unsafe fn half<const I: usize>(address: *const [u32; 4]) -> u64 {
    // SAFETY: within the array, by the caller's promise.
    let [low, high] = unsafe {
        let words = address.cast::<u32>();
        [
            words.add(I).read_volatile(),
            words.add(I + 1).read_volatile(),
        ]
    };
    u64::from(low) | u64::from(high) << 32
}
