//! The demonstration's picture: time of each attention, and memory with and without the logits.

use std::ops::Range;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{Case, Report};
use crate::chart::{COLOURS, INK, PALE, text};
use crate::output::{as_f64, bytes, digits, shape};

const WIDTH: u32 = 1080;
const HEAD: i32 = 118;
const FOOT: u32 = 70;
/// Height of one attention.
const ROW: i32 = 46;
/// Where the time panel lies.
const TIME: Range<i32> = 230..590;
/// Where the memory panel lies.
const MEMORY: Range<i32> = 660..1030;
const MUTED: RGBColor = RGBColor(110, 110, 110);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A logarithmic axis between two pixels.
struct Axis {
    pixels: Range<i32>,
    low: f64,
    high: f64,
}

/// The SVG's text.
pub(super) fn draw(report: &Report) -> Result<String> {
    let cases: Vec<_> = report.all().collect();
    let rows = i32::try_from(cases.len()).context("too many attentions to draw")?;
    let height = u32::try_from(HEAD + rows * ROW)? + FOOT;
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    drawn(&area, report, &cases, HEAD + rows * ROW)?;
    drop(area); // it borrows the text
    Ok(svg)
}

fn drawn(area: &Area<'_>, report: &Report, cases: &[&Case], bottom: i32) -> Result<()> {
    area.fill(&WHITE)?;
    let time = Axis::around(TIME, cases.iter().flat_map(|case| [case.forward_ms, case.backward_ms]));
    let memory = Axis::around(MEMORY, cases.iter().flat_map(|case| [fused(case), unfused(case)]));
    let source = &report.alignment;
    let device = format!(
        "{} ({}); inputs from {}, {} sequences x {} residues",
        report.model,
        report.kernels(),
        source.file,
        source.n_seq,
        source.n_res
    );
    label(area, "Evoformer attention, forward and backward", (24, 30), text(20, INK))?;
    label(area, &device, (24, 54), text(13, MUTED))?;
    time.draw(area, "time", bottom, milliseconds)?;
    memory.draw(area, "memory beside operands and gradients", bottom, bytes)?;
    for (case, y) in cases.iter().zip((HEAD + ROW / 2..).step_by(46)) {
        names(area, case, y)?;
        time_row(area, &time, case, y)?;
        memory_row(area, &memory, case, y)?;
    }
    legend(area, bottom + 46)?;
    Ok(area.present()?)
}

/// Bytes the kernels need beside operands and results; at least a byte, for the logarithm.
fn fused(case: &Case) -> f64 {
    as_f64(case.workspace_bytes).max(1.0)
}

/// What an unfused backward pass holds: logits, probabilities and the gradients of both.
fn unfused(case: &Case) -> f64 {
    4.0 * case.logits_bytes
}

fn names(area: &Area<'_>, case: &Case, y: i32) -> Result<()> {
    label(area, &case.variant.replace('_', " "), (24, y - 8), text(14, INK))?;
    label(area, &format!("{} {}", shape(&case.shape), case.dtype), (24, y + 9), text(11, MUTED))
}

fn time_row(area: &Area<'_>, axis: &Axis, case: &Case, y: i32) -> Result<()> {
    for (ms, colour, offset) in [(case.forward_ms, COLOURS[0], -8), (case.backward_ms, COLOURS[1], 8)] {
        let x = axis.at(ms);
        area.draw(&PathElement::new([(axis.pixels.start, y + offset), (x, y + offset)], colour.stroke_width(2)))?;
        dot(area, (x, y + offset), colour)?;
        label(area, &milliseconds(ms), (x + 9, y + offset), text(12, INK))?;
    }
    Ok(())
}

fn memory_row(area: &Area<'_>, axis: &Axis, case: &Case, y: i32) -> Result<()> {
    let (left, right) = (axis.at(fused(case)), axis.at(unfused(case)));
    area.draw(&PathElement::new([(left, y), (right, y)], PALE.stroke_width(6)))?;
    dot(area, (left, y), COLOURS[2])?;
    dot(area, (right, y), COLOURS[3])?;
    let centred = |size, colour| text(size, colour).pos(Pos::new(HPos::Center, VPos::Center));
    let ratio = format!("{}x less", digits(unfused(case) / fused(case)));
    area.draw(&Text::new(ratio, (i32::midpoint(left, right), y - 11), centred(12, INK)))?;
    area.draw(&Text::new(bytes(fused(case)), (left, y + 14), centred(11, COLOURS[2])))?;
    area.draw(&Text::new(bytes(unfused(case)), (right, y + 14), centred(11, COLOURS[3])))?;
    Ok(())
}

fn legend(area: &Area<'_>, y: i32) -> Result<()> {
    let entries = [
        (TIME.start, COLOURS[0], "forward"),
        (TIME.start + 110, COLOURS[1], "backward, every gradient"),
        (MEMORY.start, COLOURS[2], "tilefold"),
        (MEMORY.start + 110, COLOURS[3], "unfused: logits, probabilities, their gradients"),
    ];
    for (x, colour, name) in entries {
        dot(area, (x, y), colour)?;
        label(area, name, (x + 11, y), text(12, INK))?;
    }
    Ok(())
}

fn dot(area: &Area<'_>, at: (i32, i32), colour: RGBColor) -> Result<()> {
    Ok(area.draw(&Circle::new(at, 5, colour.filled()))?)
}

/// Text that starts at a point and is centred on its height.
fn label(area: &Area<'_>, words: &str, at: (i32, i32), style: TextStyle<'_>) -> Result<()> {
    Ok(area.draw(&Text::new(words.to_owned(), at, style.pos(Pos::new(HPos::Left, VPos::Center))))?)
}

fn milliseconds(value: f64) -> String {
    if value >= 999.5 { format!("{} s", digits(value / 1e3)) } else { format!("{} ms", digits(value)) }
}

impl Axis {
    /// Whole powers of ten around the values.
    fn around(pixels: Range<i32>, values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        let low = low.max(1e-6).log10().floor();
        Self { pixels, low, high: high.max(1e-6).log10().ceil().max(low + 1.0) }
    }

    fn at(&self, value: f64) -> i32 {
        let share = (value.max(1e-9).log10() - self.low) / (self.high - self.low);
        let width = f64::from(self.pixels.end - self.pixels.start);
        #[allow(clippy::cast_possible_truncation, reason = "a pixel of this picture")]
        let x = (share.clamp(0.0, 1.0) * width).round() as i32;
        self.pixels.start + x
    }

    fn draw(&self, area: &Area<'_>, title: &str, bottom: i32, name: fn(f64) -> String) -> Result<()> {
        label(area, title, (self.pixels.start, HEAD - 24), text(14, INK))?;
        let mut power = self.low;
        while power <= self.high + 0.5 {
            let value = 10_f64.powf(power);
            let x = self.at(value);
            area.draw(&PathElement::new([(x, HEAD - 8), (x, bottom)], PALE.stroke_width(1)))?;
            let below = text(11, MUTED).pos(Pos::new(HPos::Center, VPos::Center));
            // A power of ten needs no decimals.
            area.draw(&Text::new(name(value).replace(".00", "").replace(".0", ""), (x, bottom + 14), below))?;
            power += 1.0;
        }
        Ok(())
    }
}
