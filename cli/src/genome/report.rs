//! What a run found: for people text, for programs JSON.

use anyhow::Result;
use serde::Serialize;
use tilefold::DeviceInfo;

use super::job::Job;
use crate::output::{bytes, digits, say, table};

/// Everything a run found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    file: String,
    nucleotides: usize,
    codons: usize,
    model: String,
    device: String,
    arch: String,
    threads_per_rank: usize,
    ranks: usize,
    /// Of each step.
    pub(super) losses: Vec<f32>,
    /// Fewer ranks first; the last is the one that trained.
    pub(super) rows: Vec<Row>,
    /// Largest relative difference that another order of sums makes on one rank.
    pub(super) order_difference: Option<f64>,
    pub(super) passed: bool,
}

/// One number of ranks. Bytes and seconds are those of one step, on the rank that has most.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) ranks: usize,
    pub(super) activation_bytes: f64,
    /// Weights, gradients and Adam's state.
    pub(super) state_bytes: f64,
    pub(super) bytes_sent: f64,
    pub(super) seconds: f64,
    /// Of the genome's first sequences, before and after training.
    pub(super) losses: Vec<f32>,
    /// Largest relative difference of loss and gradients from one rank's.
    pub(super) difference: Option<f64>,
    /// The largest share of its tolerance that any of them takes.
    pub(super) of_tolerance: Option<f64>,
    /// Which that is.
    pub(super) worst: Option<String>,
}

impl Report {
    pub(super) fn new(job: &Job<'_>, ranks: usize, weights: usize, device: &DeviceInfo) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            file: job.file.clone(),
            nucleotides: job.tokens.nucleotides(),
            codons: job.tokens.codons().len(),
            model: job.model(weights),
            device: device.id.to_string(),
            arch: device.arch.clone(),
            threads_per_rank: device.parallelism,
            ranks,
            losses: Vec::new(),
            rows: Vec::new(),
            order_difference: None,
            passed: true,
        }
    }

    /// What is about to be done.
    pub(super) fn head(&self) -> String {
        let Self { file, nucleotides, codons, model, device, arch, threads_per_rank, ranks, .. } = self;
        format!(
            "{file}: {nucleotides} nucleotides, {codons} codons\n{model}\n{ranks} ranks, each with {threads_per_rank} threads of {device} \
             ({arch})\n"
        )
    }

    /// Numbers of ranks side by side, then the verdict.
    pub(super) fn print(&self) -> Result<()> {
        let head = [
            "ranks",
            "activations",
            "weights, gradients, Adam",
            "sent a step",
            "s a step",
            "loss before",
            "after",
            "off by",
            "of tolerance",
        ];
        let mut lines = table(&head, 0);
        for row in &self.rows {
            lines.add_row(row.cells());
        }
        say(&format!("\n{lines}"))?;
        say("\
activations: the most that a rank held at a time in a step, beyond weights and gradients; counted by the allocator.\n\
sent: by one rank to others. Each column is that of the rank with most.\n\
loss: of the genome's first codons, before and after training over all ranks.")?;
        let Some(order) = self.order_difference else { return Ok(()) };
        say(&format!(
            "off by: the loss and every gradient against one rank's, largest difference over largest element. Another order of sums\n\
             on one rank makes {order:.1e}; up to 8 times that of each weight is its tolerance."
        ))?;
        let failed = self.rows.iter().filter(|row| row.of_tolerance.is_some() && !row.passes());
        for row in failed {
            let (worst, over) = (row.worst.as_deref().unwrap_or(""), row.of_tolerance.unwrap_or(f64::NAN));
            say(&format!("FAIL {} ranks: {worst} is off by {over:.1} times its tolerance", row.ranks))?;
        }
        match (self.ranks, self.passed) {
            (1, _) => say("one rank: nothing to hold it against"),
            (_, true) => say("PASS: loss and all gradients are those of one rank"),
            (_, false) => say("FAIL: loss or gradients are not those of one rank"),
        }
    }
}

impl Row {
    /// Whether loss and gradients were compared, and are those of one rank; what is not a number is not.
    pub(super) fn passes(&self) -> bool {
        self.of_tolerance.is_some_and(|over| over <= 1.0)
    }

    fn cells(&self) -> [String; 9] {
        let loss = |at: usize| self.losses.get(at).map_or_else(String::new, |loss| format!("{loss:.5}"));
        let known = |value: Option<f64>, text: fn(f64) -> String| value.map_or_else(|| "-".to_owned(), text);
        [
            self.ranks.to_string(),
            bytes(self.activation_bytes),
            bytes(self.state_bytes),
            bytes(self.bytes_sent),
            digits(self.seconds),
            loss(0),
            loss(1),
            known(self.difference, |value| format!("{value:.1e}")),
            known(self.of_tolerance, |value| format!("{value:.2}")),
        ]
    }
}
