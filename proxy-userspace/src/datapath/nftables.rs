//! What stands in netfilter, for people to read: chains and rules over netlink, as no `nft` need be
//! there.

use std::{fs, io};

use super::netlink::{Attributes, Message, dump_netfilter};

/// `NFNL_SUBSYS_NFTABLES` << 8 | `NFT_MSG_GETCHAIN`.
const GET_CHAIN: u16 = (10 << 8) | 4;
/// `NFNL_SUBSYS_NFTABLES` << 8 | `NFT_MSG_GETRULE`.
const GET_RULE: u16 = (10 << 8) | 7;
/// Attributes of linux/netfilter/nf_tables.h.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_USE: u16 = 6;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
/// Names of `enum nf_inet_hooks`, by number.
const HOOKS: [&str; 6] = [
    "prerouting",
    "input",
    "forward",
    "output",
    "postrouting",
    "ingress",
];

/// Every chain of nf_tables with its hook, policy and number of users, every rule with the names
/// of its expressions, and which tables the older iptables has; a line each.
///
/// # Errors
/// The kernel's: `EINVAL` without nf_tables.
pub fn list() -> io::Result<Vec<String>> {
    let mut lines: Vec<String> = dump_netfilter(GET_CHAIN)?.iter().map(chain).collect();
    lines.extend(dump_netfilter(GET_RULE)?.iter().map(rule));
    for file in ["ip_tables_names", "ip6_tables_names"] {
        let path = format!("/proc/thread-self/net/{file}");
        let tables = fs::read_to_string(path).unwrap_or_default();
        lines.extend(tables.lines().map(|table| format!("{file} {table}")));
    }
    Ok(lines)
}

fn family(message: &Message) -> String {
    match message.first() {
        1 => "inet".to_owned(),
        2 => "ip".to_owned(),
        3 => "arp".to_owned(),
        5 => "netdev".to_owned(),
        7 => "bridge".to_owned(),
        10 => "ip6".to_owned(),
        other => format!("family {other}"),
    }
}

fn chain(message: &Message) -> String {
    let attributes = message.attributes();
    let text = |kind| attributes.text(kind).unwrap_or_default();
    let mut line = format!(
        "chain {} {} {}",
        family(message),
        text(CHAIN_TABLE),
        text(CHAIN_NAME)
    );
    if let Some(hook) = attributes.get(CHAIN_HOOK).map(Attributes::nested) {
        let number = hook.be32(HOOK_NUMBER).unwrap_or(u32::MAX) as usize;
        let priority = hook.be32(HOOK_PRIORITY).unwrap_or_default().cast_signed();
        let hook = HOOKS.get(number).copied().unwrap_or("unknown");
        let policy = match attributes.be32(CHAIN_POLICY) {
            Some(0) => "drop",
            _ => "accept",
        };
        line += &format!(": hook {hook} priority {priority} policy {policy}");
    }
    let users = attributes.be32(CHAIN_USE).unwrap_or_default();
    format!("{line}, {users} rules and jumps")
}

fn rule(message: &Message) -> String {
    let attributes = message.attributes();
    let text = |kind| attributes.text(kind).unwrap_or_default();
    let expressions = attributes.get(RULE_EXPRESSIONS).map(Attributes::nested);
    let names: Vec<String> = expressions
        .into_iter()
        .flatten()
        .filter_map(|(_, expression)| Attributes::nested(expression).text(EXPRESSION_NAME))
        .collect();
    format!(
        "rule {} {} {}: {}",
        family(message),
        text(RULE_TABLE),
        text(RULE_CHAIN),
        names.join(" ")
    )
}
