//! What the followed kernels cost when it was last recorded: `benches/record/static/ARCH.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How much more than the record a kernel may cost.
const TOLERANCE: f64 = 1.03;

/// The file of one architecture.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// What compiled the kernels.
    pub(super) compiler: String,
    /// By name.
    pub(super) kernels: BTreeMap<String, Costs>,
}

/// One kernel; cycles and instructions are those of a sub-partition for 1024 scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Costs {
    /// Cycles of the busiest pipe.
    pub(super) bound: f64,
    /// That pipe.
    pub(super) pipe: String,
    pub(super) instructions: f64,
    pub(super) registers: u32,
    pub(super) spills: u32,
    /// Resident warps of a sub-partition.
    pub(super) warps: f64,
    /// Cycles with latencies, where the loop was replayed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replay: Option<f64>,
}

impl Costs {
    /// What is worse than it was.
    pub(super) fn complaints(&self, before: Option<&Self>) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.spills > 0 {
            wrong.push(format!("{} instructions spill", self.spills));
        }
        let Some(before) = before else {
            wrong.push("not in the record: `cargo xtask kernels model --record` adds it".to_owned());
            return wrong;
        };
        let replays = self.replay.zip(before.replay);
        for (what, now, then) in
            [("bound", self.bound, before.bound)].into_iter().chain(replays.map(|(now, then)| ("replay", now, then)))
        {
            if now > then * TOLERANCE {
                wrong.push(format!("{what} {now:.0} cycles, {then:.0} were recorded"));
            }
        }
        wrong
    }
}

impl Record {
    fn path(arch: &str) -> PathBuf {
        PathBuf::from("benches/record/static").join(format!("{arch}.json"))
    }

    /// The record of an architecture; empty where there is none yet.
    pub(super) fn read(arch: &str) -> Result<Self> {
        let path = Self::path(arch);
        match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is not as expected", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Replaces the record.
    pub(super) fn write(&self, arch: &str) -> Result<()> {
        let path = Self::path(arch);
        let folder = path.parent().context("a record without a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spills_and_three_percent_are_refused() {
        let before = Costs {
            bound: 300.0,
            pipe: "alu".into(),
            instructions: 290.0,
            registers: 168,
            spills: 0,
            warps: 3.0,
            replay: Some(600.0),
        };
        assert!(before.complaints(Some(&before)).is_empty());
        assert_eq!(before.complaints(None).len(), 1);
        assert!(Costs { bound: 308.9, ..before.clone() }.complaints(Some(&before)).is_empty());
        assert_eq!(Costs { bound: 309.1, ..before.clone() }.complaints(Some(&before)).len(), 1);
        assert_eq!(Costs { replay: Some(619.0), ..before.clone() }.complaints(Some(&before)).len(), 1);
        assert!(Costs { replay: None, ..before.clone() }.complaints(Some(&before)).is_empty());
        assert_eq!(Costs { spills: 1, ..before.clone() }.complaints(Some(&before)).len(), 1);
    }
}
