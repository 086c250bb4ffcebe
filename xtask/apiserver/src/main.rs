//! Serves an empty API server until it is ended: for trying an agent out by hand.

use std::io::{Read, Write};

fn main() -> anyhow::Result<()> {
    let server = shunt_apiserver::ApiServer::start()?;
    let mut out = std::io::stdout();
    writeln!(out, "KUBECONFIG={}", server.kubeconfig().display())?;
    out.flush()?;
    // Until whoever started it closes its end, or presses Ctrl-D.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
