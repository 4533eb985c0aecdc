//! Figures that a scenario of the lab measures in its guest.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};

use super::load::Metric;
use super::report::{Report, Row};
use crate::lab;

/// The figures by name.
pub(crate) struct Figures(HashMap<String, f64>);

impl Figures {
    /// Boots a guest and runs the scenario in it, which prints a line `BENCH NAME VALUE` for each figure.
    pub(crate) fn measure(scenario: &str, report: &Report) -> Result<Figures> {
        report.note(&format!("{scenario}: booting a guest and measuring in it takes some minutes ..."));
        let reports = lab::run_all(&lab::Args::release(scenario))?;
        let result = reports.first().context("the lab ran nothing")?;
        if let Some(failure) = &result.failure {
            bail!("scenario {scenario} failed: {failure}");
        }
        Figures::parse(&result.tagged)
    }

    /// The figure of a name.
    pub(crate) fn get(&self, name: &str) -> Result<f64> {
        self.0.get(name).copied().with_context(|| format!("the guest did not measure {name}"))
    }

    /// Lines `NAME VALUE`.
    fn parse(lines: &[String]) -> Result<Figures> {
        let pair = |line: &String| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        let pairs =
            lines.iter().map(|line| pair(line).with_context(|| format!("`{line}` is no measurement")));
        Ok(Figures(pairs.collect::<Result<_>>()?))
    }
}

/// A figure of one of xpm's devices against that of another device, of the same boot.
pub(crate) struct Comparison {
    pub(crate) bench: &'static str,
    pub(crate) device: &'static str,
    pub(crate) peer: &'static str,
    /// As the row has it.
    pub(crate) load: &'static str,
    /// The part of the figure's name that follows the device's name.
    pub(crate) figure: String,
    pub(crate) metric: Metric,
    /// The least ratio.
    pub(crate) goal: Option<f64>,
}

impl Comparison {
    /// Adds a row of it.
    ///
    /// # Errors
    /// When the guest did not measure one of the two.
    pub(crate) fn report(&self, figures: &Figures, report: &mut Report) -> Result<()> {
        let value = |name: &str| figures.get(&format!("{name}.{}", self.figure));
        let (ours, theirs) = (value(self.device)?, value(self.peer)?);
        let ratio = self.metric.ratio(ours, theirs);
        report.row(&Row {
            bench: self.bench,
            case: format!("{} {}", self.device, self.load).trim_end().to_owned(),
            metric: self.metric.name(),
            unit: self.metric.unit(),
            xpm: ours,
            peer: Some(self.peer.to_owned()),
            peer_value: Some(theirs),
            ratio: Some(ratio),
            goal: self.goal,
            ok: self.goal.map(|goal| ratio >= goal),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_read_or_refused() {
        let figures = Figures::parse(&["a.read-qd1.p50_us 12.5".to_owned()]).unwrap();
        assert_eq!(figures.get("a.read-qd1.p50_us").unwrap(), 12.5);
        assert!(figures.get("a.read-qd1.p99_us").is_err());
        assert!(Figures::parse(&["a.read-qd1.p50_us fast".to_owned()]).is_err());
        assert!(Figures::parse(&["rubbish".to_owned()]).is_err());
    }
}
