//! `tilefold plan train --compare paper`: published lengths beside two predictions.

use anyhow::Result;
use serde::Serialize;
use tilefold_comm::memory_model::paper::{self, Compared, System};

use crate::output::{digits, say, say_json, table};

/// What the columns are worth; printed below the table.
const NOTES: &str = "\
lengths in K = 1024 tokens, on GPUs of 40 GiB; t = up to 64 tensor ranks (one a head), the rest data parallel with ZeRO-1\n\
predicted: the formulas of `plan train`, with no constant fitted; the assumptions beside each row are ours, the paper\n           \
does not state them. Where the error is large the simple model is wrong: it counts no allocator, no communication\n           \
buffers and no temporaries, and is far too high where these are most of what is left, on many ranks\n\
fit:       constants chosen to match these six lengths (4 + 18/N bytes a parameter, 6sh gathered, 8sV logits, 6 GB\n           \
for what no formula names): it describes them, and predicts nothing beyond";

#[derive(Serialize)]
struct Row {
    model: &'static str,
    system: &'static str,
    assumed: &'static str,
    gpus: u32,
    paper_k: f64,
    predicted_k: Option<f64>,
    predicted_error_percent: Option<f64>,
    /// Why there is no prediction.
    predicted_reason: Option<String>,
    fit_k: Option<f64>,
    fit_error_percent: Option<f64>,
}

impl Row {
    fn of(row: &Compared) -> Self {
        let percent = |k: f64| (k / row.published_k - 1.0) * 100.0;
        let predicted_k = row.predicted_k.as_ref().ok().copied();
        Self {
            model: row.published.name,
            system: match row.published.system {
                System::New => "new Megatron-DeepSpeed",
                System::Old => "old Megatron-DeepSpeed",
                System::MegatronLm => "Megatron-LM",
            },
            assumed: row.assumed,
            gpus: row.gpus,
            paper_k: row.published_k,
            predicted_k,
            predicted_error_percent: predicted_k.map(percent),
            predicted_reason: row.predicted_k.as_ref().err().map(ToString::to_string),
            fit_k: row.fitted_k,
            fit_error_percent: row.fitted_k.map(percent),
        }
    }
}

/// Prints the comparison.
pub(super) fn run(json: bool) -> Result<()> {
    let rows: Vec<Row> = paper::compare().iter().map(Row::of).collect();
    if json {
        return say_json(&rows);
    }
    let head = ["model", "system", "assumed", "GPUs", "paper K", "predicted K", "error", "fit K", "error"];
    let mut lengths = table(&head, 3);
    let k = |length: Option<f64>| length.map_or_else(String::new, |length| format!("{length:.0}"));
    let percent = |error: Option<f64>| error.map_or_else(String::new, |error| format!("{error:+.0} %"));
    for row in &rows {
        lengths.add_row([
            row.model.to_owned(),
            row.system.to_owned(),
            row.assumed.to_owned(),
            row.gpus.to_string(),
            digits(row.paper_k),
            row.predicted_reason.clone().unwrap_or_else(|| k(row.predicted_k)),
            percent(row.predicted_error_percent),
            k(row.fit_k),
            percent(row.fit_error_percent),
        ]);
    }
    say(&lengths.to_string())?;
    say(NOTES)
}
