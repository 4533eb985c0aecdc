//! The output of a benchmark: rows for people, or one JSON object a line.

use serde::Serialize;

/// One comparison. `ratio` is made so that larger is better for xpm.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) bench: &'static str,
    pub(crate) case: String,
    pub(crate) metric: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) xpm: f64,
    /// The peer; none where a figure stands alone.
    pub(crate) peer: Option<String>,
    pub(crate) peer_value: Option<f64>,
    pub(crate) ratio: Option<f64>,
    /// The least ratio, or for a figure that stands alone the most it may be.
    pub(crate) goal: Option<f64>,
    pub(crate) ok: Option<bool>,
}

/// Rows as they come.
pub(crate) struct Report {
    json: bool,
    any: bool,
    missed: usize,
}

impl Report {
    pub(crate) fn new(json: bool) -> Report {
        Report { json, any: false, missed: 0 }
    }

    /// Progress for people; programs are not told.
    pub(crate) fn note(&self, text: &str) {
        if !self.json {
            eprintln!("{text}");
        }
    }

    pub(crate) fn row(&mut self, row: &Row) {
        self.missed += usize::from(row.ok == Some(false));
        if self.json {
            // A row has only plain fields, so this cannot fail.
            println!("{}", serde_json::to_string(row).unwrap_or_default());
            return;
        }
        if !std::mem::replace(&mut self.any, true) {
            println!(
                "{:<40} {:<10} {:>12} {:>12}  {:<26} {:>7} {:>6}",
                "case", "metric", "xpm", "peer", "", "ratio", "goal"
            );
        }
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        println!(
            "{:<40} {:<10} {:>12} {:>12}  {:<26} {:>7} {:>6} {}",
            row.case,
            row.metric,
            amount(row.xpm, row.unit),
            row.peer_value.map_or("-".to_owned(), |value| amount(value, row.unit)),
            row.peer.as_deref().unwrap_or("-"),
            number(row.ratio),
            number(row.goal),
            row.ok.map_or("", |ok| if ok { "ok" } else { "missed" }),
        );
    }

    /// The last line for people.
    pub(crate) fn end(&self) {
        match self.missed {
            0 => self.note("every goal is met"),
            missed => self.note(&format!("{missed} goals are missed")),
        }
    }
}

fn amount(value: f64, unit: &str) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.1}k {unit}", value / 1000.0),
        value if value >= 100.0 => format!("{value:.0} {unit}"),
        value => format!("{value:.1} {unit}"),
    }
}

/// The median; the lower one of two in the middle. Zero of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}
