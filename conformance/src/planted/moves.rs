//! Bugs in what a backend does besides attention: fills, copies, sums, merges, rotations.

use tilefold_core::{
    AccumulateArgs, Backend, DType, DeviceResult, MergeArgs, MergeOperands, RelayoutArgs, RopeArgs, Stream, Tensor,
    TensorViewMut,
};

use super::{Bug, failed};

/// What an empty part's lse becomes where -inf is not told from other numbers.
const VERY_LOW: f64 = -1e30;

pub(super) fn fill(
    inner: &dyn Backend,
    bug: Option<Bug>,
    stream: &Stream,
    mut destination: TensorViewMut<'_>,
    value: f64,
) -> DeviceResult<()> {
    let layout = destination.as_view().layout().clone();
    if let (Some(Bug::FillMissesTail), false, Some(&size @ 2..)) = (bug, layout.is_contiguous(), layout.shape().last())
    {
        destination = destination.slice(layout.shape().len() - 1, 0..size - 1, 1).map_err(failed)?;
    }
    inner.fill(stream, destination, value)
}

pub(super) fn relayout(
    inner: &dyn Backend,
    bug: Option<Bug>,
    stream: &Stream,
    args: RelayoutArgs<'_>,
) -> DeviceResult<()> {
    let (mut source, destination) = args.into_parts();
    let layout = source.layout().clone();
    if bug == Some(Bug::RelayoutForwards) {
        for (axis, (&size, _)) in layout.shape().iter().zip(layout.strides()).enumerate().filter(|(_, (_, s))| **s < 0)
        {
            source = source.slice(axis, 0..size, -1).map_err(failed)?;
        }
    }
    if bug == Some(Bug::RelayoutTruncates) && destination.as_view().dtype() == DType::BF16 {
        let cut: Vec<f64> = source.to_f64().map_err(failed)?.into_iter().map(truncated).collect();
        let dense = Tensor::from_f64(&cut, DType::BF16, layout.shape()).map_err(failed)?;
        return inner.relayout(stream, RelayoutArgs::new(dense.view(), destination).map_err(failed)?);
    }
    inner.relayout(stream, RelayoutArgs::new(source, destination).map_err(failed)?)
}

/// The upper half of an f32's bits.
#[allow(clippy::cast_possible_truncation, reason = "every source dtype fits in f32")]
fn truncated(value: f64) -> f64 {
    f64::from(f32::from_bits((value as f32).to_bits() & 0xffff_0000))
}

pub(super) fn accumulate(
    inner: &dyn Backend,
    bug: Option<Bug>,
    stream: &Stream,
    args: AccumulateArgs<'_>,
) -> DeviceResult<()> {
    if bug != Some(Bug::AccumulateOverwrites) {
        return inner.accumulate(stream, args);
    }
    let (source, destination) = args.into_parts();
    inner.relayout(stream, RelayoutArgs::new(source, destination).map_err(failed)?)
}

pub(super) fn rope(inner: &dyn Backend, bug: Option<Bug>, stream: &Stream, args: RopeArgs<'_>) -> DeviceResult<()> {
    let mut spec = args.spec().clone();
    match bug {
        Some(Bug::RopePositionsInSingle) => spec.offset = in_single(spec.offset),
        Some(Bug::RopeInverseForgotten) => spec.inverse = false,
        _ => {}
    }
    let (source, destination) = args.into_parts();
    inner.rope(stream, RopeArgs::new(&spec, source, destination).map_err(failed)?)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "the bug")]
fn in_single(position: i64) -> i64 {
    position as f32 as i64
}

pub(super) fn merge(inner: &dyn Backend, bug: Option<Bug>, stream: &Stream, args: MergeArgs<'_>) -> DeviceResult<()> {
    let operands = args.into_operands();
    let dense = |values: &[f64]| Tensor::from_f64(values, DType::F32, operands.lse.shape()).map_err(failed);
    let low = operands.lse_low.to_f64().map_err(failed)?;
    let lse = operands.lse.to_f64().map_err(failed)?;
    let (lse, low) = match bug {
        Some(Bug::MergeLowIgnored) => (lse, vec![0.0; low.len()]),
        Some(Bug::MergeEmptyPartCounts) => (lse.into_iter().map(|lse| lse.max(VERY_LOW)).collect(), low),
        _ => (lse, low),
    };
    let (lse, low) = (dense(&lse)?, dense(&low)?);
    let operands = MergeOperands { lse: lse.view(), lse_low: low.view(), ..operands };
    inner.merge(stream, MergeArgs::new(operands).map_err(failed)?)
}
