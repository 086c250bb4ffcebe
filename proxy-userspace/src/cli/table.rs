//! Tables as `kubectl` prints them.

/// Columns without lines, as `kubectl` prints them: of a hundred thousand rows too, for which a
/// library of tables takes seconds.
pub(crate) fn table<'a, R: IntoIterator<Item = String>>(
    titles: impl IntoIterator<Item = &'a str>,
    rows: impl Iterator<Item = R>,
) -> String {
    let mut cells = Cells::default();
    titles.into_iter().for_each(|title| cells.push(title));
    let columns = cells.widths.len();
    for row in rows {
        row.into_iter()
            .take(columns)
            .for_each(|cell| cells.push(&cell));
    }
    cells.aligned(columns)
}

/// Cells one behind the other, of which none has memory of its own.
#[derive(Default)]
struct Cells {
    text: String,
    /// Bytes and characters of each.
    widths: Vec<(u32, u32)>,
}

impl Cells {
    fn push(&mut self, cell: &str) {
        self.text.push_str(cell);
        let characters = match cell.is_ascii() {
            true => cell.len(),
            false => cell.chars().count(),
        };
        self.widths.push((cell.len() as u32, characters as u32));
    }

    /// So many a line, each column as wide as its widest cell.
    fn aligned(&self, columns: usize) -> String {
        let mut most = vec![0; columns];
        for row in self.widths.chunks(columns) {
            for (most, &(_, width)) in most.iter_mut().zip(row) {
                *most = width.max(*most);
            }
        }
        let mut text = String::with_capacity(self.text.len() * 2);
        let mut rest = self.text.as_str();
        for row in self.widths.chunks(columns) {
            for (most, &(bytes, width)) in most.iter().zip(row) {
                let (cell, after) = rest.split_at(bytes as usize);
                rest = after;
                text.push_str(cell);
                let padding = (most - width + 2) as usize;
                text.extend(std::iter::repeat_n(' ', padding));
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text
    }
}
