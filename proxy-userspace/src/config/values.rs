//! Values as files and flags have them: text, with words of what is wanted instead.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// An address as kube-proxy reads it: parts of an IPv4 address may have leading zeros, and are
/// decimal all the same; an IPv4 address in IPv6 clothes (`::ffff:192.0.2.1`) is one of IPv4.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    let parts: Vec<u8> = text.split('.').map(decimal).collect::<Option<_>>()?;
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(parts).ok()?).into())
}

/// The same with a prefix length.
pub(super) fn network(text: &str) -> Option<IpNet> {
    if let Ok(network) = text.parse() {
        return Some(network);
    }
    let (address, length) = text.split_once('/')?;
    IpNet::new(self::address(address)?, decimal(length)?).ok()
}

/// A number of digits alone, leading zeros among them.
fn decimal(text: &str) -> Option<u8> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// `FIRST-LAST`, not empty and without port 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |(first, last): (&str, &str)| Some((first.parse().ok()?, last.parse().ok()?));
        match text.split_once('-').and_then(parse) {
            Some((first, last)) if 0 < first && first <= last => Ok(Self(first..=last)),
            _ => Err("give FIRST-LAST, both from 1 to 65535, FIRST not above LAST".into()),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

/// Where a server listens, or that there is to be none (empty). As with kube-proxy, the port may be
/// left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listen<const PORT: u16>(pub Option<SocketAddr>);

impl<const PORT: u16> FromStr for Listen<PORT> {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let bare = |text: &str| {
            address(
                text.strip_prefix('[')
                    .and_then(|text| text.strip_suffix(']'))
                    .unwrap_or(text),
            )
        };
        let with_port = || -> Option<SocketAddr> {
            let (ip, port) = text.rsplit_once(':')?;
            // Colons without brackets are part of an address.
            let ip = bare(ip).filter(|_| ip.starts_with('[') || !ip.contains(':'))?;
            Some(SocketAddr::new(ip, port.parse().ok()?))
        };
        let without = || Some(SocketAddr::new(bare(text)?, PORT));
        match with_port().or_else(without) {
            Some(address) => Ok(Self(Some(address))),
            None => Err("give IP:PORT ([IP]:PORT for IPv6) or an IP"),
        }
    }
}

impl<const PORT: u16> fmt::Display for Listen<PORT> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |address| write!(f, "{address}"))
    }
}

/// An address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address(pub IpAddr);

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wanted = "give an IP address, such as 192.0.2.1 or 2001:db8::1";
        address(text).map(Self).ok_or(wanted)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Network(pub IpNet);

impl FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wanted = "give a network, such as 10.244.0.0/16 or fd00:10:244::/56";
        network(text).map(Self).ok_or(wanted)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Networks with commas between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Networks(pub Vec<IpNet>);

impl FromStr for Networks {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let networks = text
            .split(',')
            .map(|network| network.trim().parse().map(|Network(network)| network));
        networks.collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let networks: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&networks.join(","))
    }
}

/// A network, or a word for some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodePortAddress(pub String);

impl FromStr for NodePortAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "primary" | "localhost" | "all" => Ok(Self(text.to_owned())),
            _ => network(text)
                .map(|network| Self(network.to_string()))
                .ok_or("give networks, such as 10.0.0.0/8 or fd00::/8, or `primary`, `localhost` or `all`"),
        }
    }
}

impl fmt::Display for NodePortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Such networks and words with commas between them, as in the flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JoinedNodePortAddresses(pub Vec<String>);

impl FromStr for JoinedNodePortAddresses {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let one = |text: &str| text.trim().parse().map(|NodePortAddress(text)| text);
        text.split(',').map(one).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for JoinedNodePortAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

/// A duration as Go writes it (`24h0m0s`): `metav1.Duration`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    match text {
        "0" => Some(Duration::ZERO),
        _ => text.parse::<SignedDuration>().ok()?.try_into().ok(),
    }
}

/// A time-out, or zero, which leaves it alone. What is too short or too long is told later
/// ([`clamp`](super::conntrack::Conntrack::clamp)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timeout(pub Option<Duration>);

impl FromStr for Timeout {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let duration = duration(text)
            .ok_or("give a duration, as in 24h, 1h30m or 90s, or 0s to leave it alone")?;
        Ok(Self(Some(duration).filter(|duration| !duration.is_zero())))
    }
}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The units of `Debug` are Go's.
        fmt::Debug::fmt(&self.0.unwrap_or_default(), f)
    }
}

/// A text that is read as another type, and may stand in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text<T>(pub T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let error = |error| D::Error::custom(format_args!("`{text}`: {error}"));
        text.parse().map(Self).map_err(error)
    }
}

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// A field that says nothing when it is empty, as kube-proxy's do: `null`, or a text without
/// characters.
pub(super) mod or_empty {
    use super::*;

    pub(in crate::config) fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: fmt::Display>,
        D: Deserializer<'de>,
    {
        match Option::<String>::deserialize(deserializer)? {
            Some(text) if !text.is_empty() => {
                let error = |error| D::Error::custom(format_args!("`{text}`: {error}"));
                text.parse().map(Some).map_err(error)
            }
            _ => Ok(None),
        }
    }

    pub(in crate::config) fn serialize<T, S>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error>
    where
        T: fmt::Display,
        S: Serializer,
    {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_str(""),
        }
    }
}

/// A field that is as good as absent when it is `null`, as Go's decoder has it.
pub(super) fn or_null<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A number; one below zero is told elsewhere ([`review`](super::review)), and is as good as zero.
pub(super) fn or_zero<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let number: Option<i64> = Option::deserialize(deserializer)?;
    Ok(number.map(|number| u32::try_from(number.max(0)).unwrap_or(u32::MAX)))
}

/// Seconds, at most a minute.
pub(super) fn up_to_a_minute<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u32>, D::Error> {
    match Option::deserialize(deserializer)? {
        Some(61..) => Err(D::Error::custom("wants seconds from 0 to 60")),
        number => Ok(number),
    }
}

/// A number of which there must be something.
pub(super) fn from_one_on<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u32>, D::Error> {
    match Option::deserialize(deserializer)? {
        Some(0) => Err(D::Error::custom("wants a whole number from 1 on")),
        number => Ok(number),
    }
}

/// Takes a value over that was given.
pub(super) fn set<T>(to: &mut T, given: Option<T>) {
    if let Some(value) = given {
        *to = value;
    }
}

/// The same for a setting that may be none.
pub(super) fn set_option<T>(to: &mut Option<T>, given: Option<T>) {
    if given.is_some() {
        *to = given;
    }
}

/// The same for a list, where none given is none at all.
pub(super) fn set_list<T>(to: &mut Vec<T>, given: Vec<T>) {
    if !given.is_empty() {
        *to = given;
    }
}
