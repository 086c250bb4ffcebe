//! Where the owner of a translated source port stands: an array index computed from what a reply
//! carries.

use crate::{family::Family, hash, layout::Config};

/// Most ports looked at in one of four rounds before a new flow is dropped as
/// [`SnatExhausted`](crate::event::Event::SnatExhausted).
pub const MAX_TRIES: u32 = 12;

/// Number of `snat` entries that a configuration uses: its range times its ways.
pub fn entries(config: &Config) -> u32 {
    u32::from(config.snat_ports) * config.snat_ways
}

/// Whether a port (host order) belongs to the SNAT range.
#[inline(always)]
pub fn in_range(config: &Config, port: u16) -> bool {
    port.wrapping_sub(config.snat_first) < config.snat_ports
}

/// The slot of a port in the SNAT range towards a backend. Out of every map's range for ports
/// outside it.
#[inline(always)]
pub fn index<F: Family>(
    config: &Config,
    port: u16,
    backend: F::Words,
    backend_port: u16,
    proto: u8,
) -> u32 {
    let way = hash::pick(
        hash::side::<F>(backend, backend_port, proto) as u32,
        config.snat_ways,
    );
    u32::from(port.wrapping_sub(config.snat_first)) * config.snat_ways + way
}
