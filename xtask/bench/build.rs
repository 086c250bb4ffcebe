//! Builds the floor programs and leaves the object as `OUT_DIR/shunt-floors`.

use std::process::ExitCode;

fn main() -> ExitCode {
    shunt_bpf_build::main("../..", "shunt-floors", "xtask/floors", "shunt-floors")
}
