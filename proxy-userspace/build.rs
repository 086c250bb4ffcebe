//! Builds `proxy-ebpf` and leaves the object as `OUT_DIR/shunt-bpf`, which `datapath::load` embeds.

use std::process::ExitCode;

fn main() -> ExitCode {
    shunt_bpf_build::main("..", "shunt-ebpf", "proxy-ebpf", "shunt-bpf")
}
