//! Line charts with logarithmic axes, as SVG.

use anyhow::{Context, Result, ensure};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of one panel.
const PANEL_WIDTH: u32 = 460;
/// Height of a panel without its legend.
const PANEL_HEIGHT: u32 = 380;
/// Height of one line of the legend.
const LEGEND_LINE: u32 = 20;

/// Colours that people with any colour vision can tell apart (Okabe and Ito).
pub(crate) const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(80, 80, 80),
];

/// Colour of text and axes.
pub(crate) const INK: RGBColor = RGBColor(51, 51, 51);
/// Colour of grids.
pub(crate) const PALE: RGBColor = RGBColor(226, 226, 226);

/// One panel.
#[derive(Debug)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    pub(crate) lines: Vec<Line>,
}

/// Points of one series, by x.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) label: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Text of a size and colour; the SVG's reader brings the font.
pub(crate) fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    let mut style = TextStyle::from(("sans-serif", size));
    style.color = colour.to_backend_color();
    style
}

/// Draws the panels side by side: the text of an SVG file.
pub(crate) fn draw(charts: &[Chart]) -> Result<String> {
    ensure!(!charts.is_empty(), "nothing to draw: no pass was timed");
    let panels = u32::try_from(charts.len()).context("too many panels")?;
    let longest = charts.iter().map(|chart| chart.lines.len()).max().unwrap_or(0);
    let legend = LEGEND_LINE * u32::try_from(longest).context("too many lines")?;
    let mut svg = String::new();
    {
        // Borrows the text until it is dropped.
        let size = (PANEL_WIDTH * panels, PANEL_HEIGHT + legend);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        let areas = root.split_evenly((1, charts.len()));
        areas.iter().zip(charts).try_for_each(|(area, chart)| panel(area, chart, legend))?;
        root.present()?;
    }
    Ok(svg)
}

/// One panel, its legend below.
fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, chart: &Chart, legend: u32) -> Result<()> {
    let (plot, names) = area.split_vertically(PANEL_HEIGHT.min(area.dim_in_pixel().1 - legend));
    let points = || chart.lines.iter().flat_map(|line| &line.points);
    let (x_low, x_high) = bounds(points().map(|point| point.0));
    let (y_low, y_high) = bounds(points().map(|point| point.1));
    let mut axes = ChartBuilder::on(&plot)
        .margin(14)
        .caption(&chart.title, text(19, INK))
        .x_label_area_size(38)
        .y_label_area_size(58)
        .build_cartesian_2d((x_low..x_high).log_scale(), (y_low..y_high).log_scale())?;
    axes.configure_mesh()
        .x_desc(chart.x)
        .y_desc(chart.y)
        .axis_style(INK)
        .bold_line_style(PALE)
        .light_line_style(TRANSPARENT)
        .label_style(text(13, INK))
        .x_label_formatter(&|value| crate::output::digits(*value))
        .y_label_formatter(&|value| crate::output::digits(*value))
        .draw()?;
    for (line, colour) in chart.lines.iter().zip(COLOURS.iter().cycle()) {
        axes.draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)))?;
        axes.draw_series(line.points.iter().map(|&point| Circle::new(point, 4, colour.filled())))?;
    }
    let left = Pos::new(HPos::Left, VPos::Center);
    for (row, (line, colour)) in (0_i32..).zip(chart.lines.iter().zip(COLOURS.iter().cycle())) {
        let y = 8 + row * 20;
        names.draw(&PathElement::new([(74, y), (98, y)], colour.stroke_width(3)))?;
        names.draw(&Text::new(line.label.clone(), (106, y), text(13, INK).pos(left)))?;
    }
    Ok(())
}

/// A range with some air around the values; a single value gets a factor of 2 each way.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
    let air = if high > low { 1.25 } else { 2.0 };
    ((low / air).max(f64::MIN_POSITIVE), high * air)
}
