//! Masks described by positions, from options.

use anyhow::{Context, Result};
use tilefold::{StructuralMask, Window};

/// Which keys a query may see.
#[derive(Debug, clap::Args)]
pub(super) struct MaskArgs {
    /// A query sees no key after its own position
    #[arg(long)]
    causal: bool,
    /// A query sees L keys before and R keys after its position; `-` for no limit
    #[arg(long, value_parser = window, value_name = "L,R", allow_hyphen_values = true)]
    window: Option<Window>,
    /// Global position of the first query
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    q_offset: i64,
    /// Global position of the first key
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    k_offset: i64,
    /// ALiBi: one slope a head, or `auto` for those of the paper
    #[arg(long, value_name = "SLOPES", allow_hyphen_values = true)]
    alibi: Option<String>,
}

impl MaskArgs {
    /// The descriptors for a number of heads.
    pub(super) fn structural(&self, heads: usize) -> Result<StructuralMask> {
        Ok(StructuralMask {
            causal: self.causal,
            window: self.window,
            alibi_slopes: self.alibi.as_deref().map(|text| slopes(text, heads)).transpose()?,
            q_offset: self.q_offset,
            k_offset: self.k_offset,
        })
    }
}

fn window(text: &str) -> Result<Window, String> {
    let error = || format!("expected two numbers of keys such as 128,0 or 128,- (no limit), got `{text}`");
    let limit = |part: &str| match part.trim() {
        "-" => Ok(None),
        number => number.parse().map(Some).map_err(|_| error()),
    };
    let (left, right) = text.split_once(',').ok_or_else(error)?;
    Ok(Window { left: limit(left)?, right: limit(right)? })
}

fn slopes(text: &str, heads: usize) -> Result<Vec<f32>> {
    if text == "auto" {
        return Ok(paper_slopes(heads));
    }
    let parse = |part: &str| {
        part.trim()
            .parse()
            .with_context(|| format!("--alibi: expected `auto` or numbers such as 0.5,0.25, got `{part}`"))
    };
    text.split(',').map(parse).collect()
}

/// Press et al. 2022: 2^(-8 i / n) for a power of two; otherwise those of the power below, then every other one of the
/// power above.
fn paper_slopes(heads: usize) -> Vec<f32> {
    let geometric = |count: usize, index: usize| {
        let exponent = -8.0 * crate::output::as_f64(index) / crate::output::as_f64(count);
        #[allow(clippy::cast_possible_truncation, reason = "slopes are f32")]
        let slope = exponent.exp2() as f32;
        slope
    };
    let below = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let first = (1..=below).map(|index| geometric(below, index));
    first.chain((1..).step_by(2).map(|index| geometric(2 * below, index))).take(heads).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_have_two_sides() {
        assert_eq!(window("128,0"), Ok(Window { left: Some(128), right: Some(0) }));
        assert_eq!(window("-,4"), Ok(Window { left: None, right: Some(4) }));
        assert!(["", "3", "3,x", "-1,2"].into_iter().all(|text| window(text).is_err()));
    }

    #[test]
    fn slopes_are_the_papers() {
        assert_eq!(paper_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015_625, 0.007_812_5, 0.003_906_25]);
        let six = paper_slopes(6);
        assert_eq!(six[..4], [0.25, 0.0625, 0.015_625, 0.003_906_25]);
        assert_eq!(six[4..], [0.5, 0.125]);
        assert_eq!(slopes("0.5, 1", 2).unwrap(), [0.5, 1.0]);
        assert!(slopes("a", 1).is_err());
    }
}
