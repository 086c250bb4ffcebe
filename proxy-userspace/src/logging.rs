//! The agent's log, to stderr: lines for people, or objects with the fields that Kubernetes'
//! components write.

use std::{
    fmt,
    io::{self, IsTerminal},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::config::Logging;

/// Begins to log; to be called once.
pub fn init(logging: Logging) {
    // What the programs say has passed a filter of its own (`--datapath-log`).
    let level = match logging.verbosity {
        0..=3 => "info,shunt::programs=debug",
        4..=5 => "info,shunt=debug",
        _ => "debug,shunt=trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match logging.json {
        true => log.event_format(Json).init(),
        false => log.with_ansi(io::stderr().is_terminal()).init(),
    }
}

/// One object a line
/// (<https://kubernetes.io/docs/concepts/cluster-administration/system-logs/#json-log-format>):
/// `ts` in milliseconds since 1970, `msg`, and either `v` or `err`; of these `v` says how chatty a
/// line is, and `err` makes it an error.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        writeln!(
            writer,
            "{}",
            line(
                fields,
                *event.metadata().level(),
                event.metadata().target(),
                now.as_secs_f64()
            )
        )
    }
}

fn line(fields: Fields, level: Level, target: &str, seconds: f64) -> Value {
    let mut object = Map::new();
    object.insert("ts".to_owned(), (seconds * 1000.0).into());
    object.insert("logger".to_owned(), target.into());
    object.insert("msg".to_owned(), fields.message.clone().into());
    match level {
        Level::ERROR => drop(object.insert("err".to_owned(), fields.message.into())),
        Level::WARN | Level::INFO => drop(object.insert("v".to_owned(), 0.into())),
        Level::DEBUG => drop(object.insert("v".to_owned(), 4.into())),
        _ => drop(object.insert("v".to_owned(), 6.into())),
    }
    if level == Level::WARN {
        object.insert("severity".to_owned(), "warning".into());
    }
    object.extend(fields.others);
    object.into()
}

/// What an event says.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            name => drop(self.others.insert(name.to_owned(), text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_an_object_with_the_fields_of_kubernetes() {
        let fields = || Fields {
            message: "a \"quoted\"\nline".to_owned(),
            others: Map::new(),
        };
        let warning = line(fields(), Level::WARN, "shunt::agent", 1.5).to_string();
        assert!(!warning.contains('\n'), "{warning}");
        let warning: Value = serde_json::from_str(&warning).unwrap();
        let expected = serde_json::json!({
            "ts": 1500.0, "logger": "shunt::agent", "msg": "a \"quoted\"\nline", "v": 0, "severity": "warning",
        });
        assert_eq!(warning, expected);
        let error = line(fields(), Level::ERROR, "shunt", 1.5);
        assert_eq!((error["err"].is_string(), error.get("v")), (true, None));
        assert_eq!(line(fields(), Level::DEBUG, "shunt", 1.5)["v"], 4);
    }
}
