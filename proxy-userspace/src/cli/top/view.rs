//! How a report is drawn, in 80 columns and 24 rows or more.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Paragraph, Row, Sparkline, Table, TableState},
};

use super::sample::{BackendLine, HISTORY, Report, ServiceLine, rate};

/// Rows of the sparkline.
const SPARKLINE_ROWS: u16 = 3;
/// Reasons that are shown at once.
const MOST_REASONS: u16 = 4;

/// What Services are sorted by, falling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Connections,
    Retries,
    Refusals,
    Packets,
    Bytes,
}

impl Sort {
    /// The next one; packets and bytes only where they are counted.
    pub(super) fn next(self, counts_traffic: bool) -> Self {
        match self {
            Self::Connections => Self::Retries,
            Self::Retries => Self::Refusals,
            Self::Refusals if counts_traffic => Self::Packets,
            Self::Packets if counts_traffic => Self::Bytes,
            _ => Self::Connections,
        }
    }

    fn of(self, line: &ServiceLine) -> u64 {
        match self {
            Self::Connections => line.connections,
            Self::Retries => line.retries.unwrap_or(0),
            Self::Refusals => line.refusals.unwrap_or(0),
            Self::Packets => line.packets.unwrap_or(0),
            Self::Bytes => line.bytes.unwrap_or(0),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Connections => "new",
            Self::Retries => "retries",
            Self::Refusals => "refused",
            Self::Packets => "packets",
            Self::Bytes => "bytes",
        }
    }
}

/// What of it is shown.
pub(super) struct View {
    no_color: bool,
    pub(super) sort: Sort,
    /// The Service that the bar is on, by its number: it stays on it when others pass it.
    selected: Option<u32>,
    /// The Service whose backends are shown.
    opened: Option<u32>,
}

impl View {
    pub(super) fn new(no_color: bool) -> Self {
        Self {
            no_color,
            sort: Sort::default(),
            selected: None,
            opened: None,
        }
    }

    /// Shows a Service's backends.
    pub(super) fn open(&mut self, report: &Report) {
        self.opened = self.selected.or_else(|| number_at(report, 0));
    }

    /// The Service whose backends are shown.
    pub(super) fn opened(&self) -> Option<u32> {
        self.opened
    }

    /// Shows the Services again.
    pub(super) fn close(&mut self) {
        self.opened = None;
    }

    /// Moves the bar by so many rows.
    pub(super) fn select(&mut self, report: &Report, by: isize) {
        let last = (report.services.len() + report.idle.len()).saturating_sub(1);
        let at = match self.position(report) {
            Some(position) => position.saturating_add_signed(by).min(last),
            None => 0,
        };
        self.selected = number_at(report, at);
    }

    fn position(&self, report: &Report) -> Option<usize> {
        let selected = self.selected?;
        let active = report.services.iter().map(|line| line.name.number);
        let idle = report.idle.iter().map(|name| name.number);
        active.chain(idle).position(|number| number == selected)
    }

    /// Sorts the Services as they are shown; those that have been idle for a minute come last.
    pub(super) fn arrange(&self, report: &mut Report) {
        let key = |line: &ServiceLine| std::cmp::Reverse(self.sort.of(line));
        report.services.sort_by_key(key);
    }

    fn style(&self, color: Color) -> Style {
        match self.no_color {
            true => Style::new(),
            false => Style::new().fg(color),
        }
    }

    fn count(&self, count: Option<u64>, seconds: f64, color: Color) -> Cell<'static> {
        let Some(count) = count else {
            return Cell::from(Line::from("-").right_aligned());
        };
        let style = match count {
            0 => Style::new(),
            _ => self.style(color),
        };
        Cell::from(Line::styled(rate(count, seconds), style).right_aligned())
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>, report: &Report) {
        let opened = self.opened.and_then(|number| {
            let is_it = |line: &&ServiceLine| line.name.number == number;
            report.services.iter().find(is_it)
        });
        let [head, chart, services, reasons, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(SPARKLINE_ROWS + 1),
            Constraint::Min(3),
            Constraint::Length(MOST_REASONS + 1),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.headline(report), head);
        let (what, history) = match opened {
            Some(line) => (
                format!("{}/{}", line.name.namespace, line.name.service),
                &line.history,
            ),
            None => ("all Services".to_owned(), &report.history),
        };
        self.draw_history(frame, chart, &what, history, report.seconds);
        match opened {
            Some(line) => self.draw_backends(frame, services, line, report.seconds),
            None => self.draw_services(frame, services, report),
        }
        self.draw_reasons(frame, reasons, report);
        let keys = match opened {
            Some(_) => "Esc back  q quit".to_owned(),
            None => format!(
                "Up/Down choose  Enter backends  s sorted by {}  q quit",
                self.sort.name()
            ),
        };
        let note = report.note().unwrap_or(keys);
        frame.render_widget(Paragraph::new(note), foot);
    }

    fn headline(&self, report: &Report) -> Line<'static> {
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let retries = report.events.get("retry").copied().unwrap_or(0);
        let (refused, seconds) = (report.refused(), report.seconds);
        let new: u64 = report.services.iter().map(|line| line.connections).sum();
        let at_trouble = |count: u64, color| match count {
            0 => Style::new(),
            _ => self.style(color),
        };
        Line::from(vec![
            Span::styled("shunt top", bold),
            Span::from(format!(
                "  {} Services, {} active",
                report.services.len() + report.idle.len(),
                report.active
            )),
            Span::from(format!("  new {}/s", rate(new, seconds))),
            Span::styled(
                format!("  retries {}/s", rate(retries, seconds)),
                at_trouble(retries, Color::Yellow),
            ),
            Span::styled(
                format!("  refused {}/s", rate(refused, seconds)),
                at_trouble(refused, Color::Red),
            ),
        ])
    }

    fn draw_history(
        &self,
        frame: &mut Frame<'_>,
        area: Rect,
        what: &str,
        history: &[u64],
        seconds: f64,
    ) {
        let most = history.iter().copied().max().unwrap_or(0);
        let title = format!(
            "new connections of {what}, last minute, at most {}/s",
            rate(most, seconds)
        );
        let [title_area, chart] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
        frame.render_widget(Paragraph::new(title), title_area);
        // The newest at the right.
        let width = usize::from(chart.width).min(HISTORY);
        let shown = &history[history.len().saturating_sub(width)..];
        let mut data = vec![0; width - shown.len()];
        data.extend_from_slice(shown);
        let sparkline = Sparkline::default()
            .data(data)
            .style(self.style(Color::Green));
        frame.render_widget(sparkline, chart);
    }

    fn draw_services(&self, frame: &mut Frame<'_>, area: Rect, report: &Report) {
        // Of ten thousand Services only those that are on the screen are drawn.
        let height = usize::from(area.height.saturating_sub(1));
        let position = self.position(report);
        let above = position.map_or(0, |position| (position + 1).saturating_sub(height));
        let rows = (above..above + height).map_while(|at| match report.services.get(at) {
            Some(line) => Some(self.row(report, line)),
            None => {
                let name = report.idle.get(at - report.services.len())?;
                Some(self.row(report, &ServiceLine::idle(name.clone(), report)))
            }
        });
        let mut titles = vec!["SERVICE", "NEW/S", "RETRY/S", "REFUSED/S"];
        let mut widths = vec![
            Constraint::Min(20),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(9),
        ];
        if report.counts_traffic {
            titles.extend(["PACKETS/S", "BYTES/S"]);
            widths.extend([Constraint::Length(9), Constraint::Length(8)]);
        }
        let mut state = TableState::default();
        state.select(position.map(|position| position - above));
        let table = Table::new(rows, widths)
            .header(header(&titles))
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        frame.render_stateful_widget(table, area, &mut state);
    }

    fn row(&self, report: &Report, line: &ServiceLine) -> Row<'static> {
        let seconds = report.seconds;
        let mut cells = vec![
            Cell::from(format!("{}/{}", line.name.namespace, line.name.service)),
            self.count(Some(line.connections), seconds, Color::Green),
            self.count(line.retries, seconds, Color::Yellow),
            self.count(line.refusals, seconds, Color::Red),
        ];
        if report.counts_traffic {
            cells.push(self.count(line.packets, seconds, Color::Green));
            cells.push(self.count(line.bytes, seconds, Color::Green));
        }
        Row::new(cells)
    }

    fn draw_backends(&self, frame: &mut Frame<'_>, area: Rect, line: &ServiceLine, seconds: f64) {
        let rows = line.backends.iter().map(|backend| {
            Row::new([
                Cell::from(backend.address.to_string()),
                Cell::from(backend.protocol.to_string()),
                Cell::from(if backend.local { "local" } else { "remote" }),
                Cell::from(Line::from(format!("{:.0} %", backend.share)).right_aligned()),
                self.count(Some(backend.connections), seconds, Color::Green),
                self.state(backend),
            ])
        });
        let widths = [
            Constraint::Min(24),
            Constraint::Length(5),
            Constraint::Length(6),
            Constraint::Length(6),
            Constraint::Length(8),
            Constraint::Length(21),
        ];
        let titles = ["BACKEND", "PROTO", "WHERE", "SHARE", "NEW/S", "STATE"];
        frame.render_widget(Table::new(rows, widths).header(header(&titles)), area);
    }

    fn state(&self, backend: &BackendLine) -> Cell<'static> {
        let Some(quarantine) = &backend.quarantine else {
            return Cell::from("serving");
        };
        let text = match quarantine.remaining_ms {
            0 => "to be tried again".to_owned(),
            ms => format!("quarantined for {:.0} s", ms as f64 / 1000.0),
        };
        Cell::from(Span::styled(text, self.style(Color::Red)))
    }

    fn draw_reasons(&self, frame: &mut Frame<'_>, area: Rect, report: &Report) {
        let flows = ["socket_flow", "tc_flow", "xdp_flow"];
        let mut reasons: Vec<(&str, u64)> = report
            .events
            .iter()
            .map(|(&name, &count)| (name, count))
            .filter(|&(name, count)| count > 0 && !flows.contains(&name))
            .collect();
        reasons.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        let lines: Vec<Line<'_>> = match reasons.is_empty() {
            true => vec![Line::from("nothing")],
            false => reasons
                .iter()
                .map(|(name, count)| {
                    Line::from(format!("{:>8}  {name}", rate(*count, report.seconds)))
                })
                .collect(),
        };
        let block = Block::new()
            .borders(Borders::TOP)
            .title("dropped, refused and else, per second");
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }
}

/// The number of the Service in a row.
fn number_at(report: &Report, row: usize) -> Option<u32> {
    let active = report.services.iter().map(|line| line.name.number);
    let idle = report.idle.iter().map(|name| name.number);
    active.chain(idle).nth(row)
}

/// Titles: of numbers at the right.
fn header(titles: &[&'static str]) -> Row<'static> {
    let cells = titles.iter().map(|&title| {
        let line = Line::from(title);
        match title.ends_with("/S") || title == "SHARE" {
            true => line.right_aligned(),
            false => line,
        }
    });
    Row::new(cells.map(Cell::from)).style(Style::new().add_modifier(Modifier::BOLD))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, rc::Rc};

    use ratatui::{Terminal, backend::TestBackend, buffer::Buffer};

    use super::{
        super::{super::backends::Quarantine, sample::Named},
        *,
    };
    use crate::object::Protocol;

    fn named(number: u32, service: &str) -> Rc<Named> {
        Rc::new(Named {
            namespace: "shop".to_owned(),
            service: service.to_owned(),
            number,
            rank: number,
        })
    }

    fn report() -> Report {
        let backend = |n: u8, connections, share, quarantine| BackendLine {
            address: ([10, 44, 0, n], 8080).into(),
            protocol: Protocol::Tcp,
            local: n == 1,
            quarantine,
            connections,
            share,
        };
        let silent = Quarantine {
            failures: 2,
            remaining_ms: 1800,
        };
        let line = |number, service: &str, connections, retries, refusals| ServiceLine {
            name: named(number, service),
            connections,
            retries: Some(retries),
            refusals: Some(refusals),
            history: vec![0, connections],
            ..ServiceLine::default()
        };
        let mut web = line(1, "web", 1500, 3, 0);
        web.backends = vec![
            backend(1, 1500, 100.0, None),
            backend(2, 0, 0.0, Some(silent)),
        ];
        Report {
            seconds: 1.0,
            services: vec![web, line(2, "empty", 0, 0, 40)],
            active: 2,
            events: BTreeMap::from([("no_backend", 40), ("retry", 3), ("tc_flow", 1500)]),
            history: vec![0, 0, 750, 1500],
            ..Report::default()
        }
    }

    fn drawn(view: &View, report: &Report, size: (u16, u16)) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).unwrap();
        terminal.draw(|frame| view.draw(frame, report)).unwrap();
        terminal.backend().buffer().clone()
    }

    fn lines(buffer: &Buffer) -> Vec<String> {
        let width = usize::from(buffer.area.width);
        let symbols = buffer.content.iter().map(|cell| cell.symbol());
        let symbols: Vec<&str> = symbols.collect();
        symbols
            .chunks(width)
            .map(|row| row.concat().trim_end().to_owned())
            .collect()
    }

    #[test]
    fn services_and_reasons_stand_in_80_columns() {
        let text = lines(&drawn(&View::new(true), &report(), (80, 24)));
        let wanted = [
            (
                0,
                "shunt top  2 Services, 2 active  new 1.5k/s  retries 3.0/s  refused 40/s",
            ),
            (
                1,
                "new connections of all Services, last minute, at most 1.5k/s",
            ),
            (
                5,
                "SERVICE                                                 NEW/S  RETRY/S REFUSED/S",
            ),
            (
                6,
                "shop/web                                                 1.5k      3.0         0",
            ),
            (
                7,
                "shop/empty                                                  0        0        40",
            ),
            (19, "      40  no_backend"),
            (20, "     3.0  retry"),
            (
                23,
                "Up/Down choose  Enter backends  s sorted by new  q quit",
            ),
        ];
        for (row, wanted) in wanted {
            assert_eq!(text[row], wanted, "{text:#?}");
        }
        assert!(
            text[18].starts_with("dropped, refused and else, per second─"),
            "{text:#?}"
        );
        // The last look is the highest, the one before half as high.
        assert_eq!(text[2].trim_start(), "█");
        assert_eq!(text[4].trim_start(), "██");
    }

    #[test]
    fn enter_opens_the_backends_with_share_and_state() {
        let (mut view, report) = (View::new(true), report());
        view.open(&report);
        let text = lines(&drawn(&view, &report, (80, 24)));
        let wanted = [
            (
                1,
                "new connections of shop/web, last minute, at most 1.5k/s",
            ),
            (
                5,
                "BACKEND                       PROTO WHERE   SHARE    NEW/S STATE",
            ),
            (
                6,
                "10.44.0.1:8080                TCP   local   100 %     1.5k serving",
            ),
            (
                7,
                "10.44.0.2:8080                TCP   remote    0 %        0 quarantined for 2 s",
            ),
            (23, "Esc back  q quit"),
        ];
        for (row, wanted) in wanted {
            assert_eq!(text[row], wanted, "{text:#?}");
        }
        view.close();
        let text = lines(&drawn(&view, &report, (80, 24)));
        assert!(text[5].starts_with("SERVICE"), "{text:#?}");
    }

    #[test]
    fn the_bar_stays_on_its_service() {
        let (mut view, mut report) = (View::new(true), report());
        view.select(&report, 1);
        view.select(&report, 1);
        assert_eq!(view.selected, Some(2));
        view.sort = view.sort.next(false).next(false);
        view.arrange(&mut report);
        let buffer = drawn(&view, &report, (80, 24));
        assert!(lines(&buffer)[6].starts_with("shop/empty"));
        assert!(buffer[(0, 6)].modifier.contains(Modifier::REVERSED));
        view.select(&report, 5);
        assert_eq!(view.selected, Some(1));
        view.select(&report, -5);
        assert_eq!(view.selected, Some(2));
        assert_eq!(view.sort.next(false), Sort::Connections);
        assert_eq!(view.sort.next(true), Sort::Packets);
    }

    #[test]
    fn idle_services_stand_below_and_are_drawn_as_far_as_one_looks() {
        let (mut view, mut report) = (View::new(true), report());
        report.idle = (3..100).map(|n| named(n, &format!("idle-{n}"))).collect();
        let text = lines(&drawn(&view, &report, (80, 24)));
        assert!(text[0].starts_with("shunt top  99 Services, 2 active"));
        assert!(text[8].starts_with("shop/idle-3 "), "{text:#?}");
        assert!(text[17].starts_with("shop/idle-12 "), "{text:#?}");
        view.select(&report, 0);
        view.select(&report, 50);
        let buffer = drawn(&view, &report, (80, 24));
        assert!(lines(&buffer)[17].starts_with("shop/idle-51 "));
        assert!(buffer[(0, 17)].modifier.contains(Modifier::REVERSED));
        view.open(&report);
        assert_eq!(view.opened(), Some(51));
        view.close();
        view.select(&report, 500);
        assert_eq!(view.selected, Some(99));
    }

    #[test]
    fn colour_is_left_out_when_asked() {
        let colours = |no_color| {
            let buffer = drawn(&View::new(no_color), &report(), (80, 24));
            let cells = buffer.content.iter();
            cells
                .filter(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
                .count()
        };
        assert_eq!(colours(true), 0);
        assert!(colours(false) > 0);
    }

    #[test]
    fn any_size_is_drawn() {
        for size in [(1, 1), (10, 3), (40, 10), (300, 100)] {
            drawn(&View::new(false), &report(), size);
            drawn(&View::new(false), &Report::default(), size);
        }
    }

    #[test]
    fn packets_and_bytes_stand_there_when_they_are_counted() {
        let mut report = report();
        report.counts_traffic = true;
        report.services[0].packets = Some(20_000);
        report.services[0].bytes = Some(3_000_000);
        let text = lines(&drawn(&View::new(true), &report, (80, 24)));
        assert!(text[5].ends_with("PACKETS/S  BYTES/S"), "{text:#?}");
        assert!(text[6].ends_with("20.0k     3.0M"), "{text:#?}");
        report.lost = 12;
        let text = lines(&drawn(&View::new(true), &report, (80, 24)));
        assert_eq!(
            text[23],
            "12 retries and refusals were too many to be told by Service"
        );
    }
}
