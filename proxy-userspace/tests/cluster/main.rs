//! shunt in clusters of network namespaces: agents on nodes, pods and clients with real sockets and
//! packets. Needs root.

mod capabilities;
mod dns;
mod kubernetes;
mod labels;
mod life;
mod long;
mod networks;
mod operations;
mod own;
mod packets;
mod pod;
mod policies;
mod processes;
mod retry;
mod sctp;
mod services;
mod snat;
mod socket_lb;
mod sockets;
mod source_ports;
mod upgrade;

#[path = "../support/forged.rs"]
mod forged;
#[path = "../support/web.rs"]
mod web;
