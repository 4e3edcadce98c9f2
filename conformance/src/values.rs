//! The inputs of a case, drawn from its seed and rounded to their dtypes.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use tilefold_core::attention::reference::ReferenceInputs;
use tilefold_core::{AttentionSpec, DType, Element};

use crate::case::{Case, MaskPattern, Place, Poison, SegmentPattern, Values};

/// One operand on the host: row-major values that its dtype holds exactly.
#[derive(Clone, Debug)]
pub struct Host {
    /// Element type on the device.
    pub dtype: DType,
    /// Sizes.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f64>,
}

/// Every input of a case.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Queries.
    pub q: Host,
    /// Keys.
    pub k: Host,
    /// Values.
    pub v: Host,
    /// Biases in their own shapes.
    pub biases: Vec<Host>,
    /// Key mask in its own shape.
    pub key_mask: Option<Host>,
    /// Segment ids of queries and keys in their own shapes.
    pub segments: Option<[Host; 2]>,
    /// Gate.
    pub gate: Option<Host>,
    /// Gradient of the output.
    pub d_out: Host,
}

/// Nearest value that `dtype` holds.
#[must_use]
pub fn round_to(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f32::from_f64(value).to_f64(),
        DType::F16 => Element::to_f64(<f16 as Element>::from_f64(value)),
        DType::BF16 => Element::to_f64(<bf16 as Element>::from_f64(value)),
        _ => value,
    }
}

/// Nearest number of 11 significant bits, ties away from 0: what a factor of a product becomes in tf32. Infinities and NaN
/// stay.
#[must_use]
pub fn round_to_tf32(value: f32) -> f32 {
    const CUT: u32 = 13;
    let bits = value.to_bits();
    if value.is_finite() { f32::from_bits((bits + (1 << (CUT - 1))) & !((1 << CUT) - 1)) } else { value }
}

impl Inputs {
    /// Draws the inputs of a case. Each operand has a stream of its own, so that one does not depend on another's size.
    #[must_use]
    pub fn draw(case: &Case) -> Self {
        let (s, fill, places) = (&case.spec, &case.fill, &case.places);
        let outer = [s.batch, s.rows];
        let float = |stream, dtype, shape: &[usize], values, place: &Place| {
            let mut rng = ChaCha8Rng::seed_from_u64(case.seed);
            rng.set_stream(stream);
            let values = draw(&mut rng, values, shape);
            let values = values.into_iter().map(|value| round_to(dtype, value)).collect();
            Host { dtype, shape: shape.to_vec(), values }.repeat(&place.repeated)
        };
        let q_shape = [outer[0], outer[1], s.seqlen_q, s.heads, s.head_dim];
        let k_shape = [outer[0], outer[1], s.seqlen_k, s.kv_heads, s.head_dim];
        let v_shape = [outer[0], outer[1], s.seqlen_k, s.kv_heads, s.head_dim_v];
        let out_shape = [outer[0], outer[1], s.seqlen_q, s.heads, s.head_dim_v];
        let biases = s.biases.iter().zip(&fill.biases).zip(&places.biases).zip(16..);
        let mut inputs = Self {
            q: float(0, s.dtype, &q_shape, fill.q, &places.q),
            k: float(1, s.dtype, &k_shape, fill.k, &places.k),
            v: float(2, s.dtype, &v_shape, fill.v, &places.v),
            gate: s.gate.then(|| float(3, s.dtype, &out_shape, fill.gate, &places.gate)),
            d_out: float(4, s.dtype, &out_shape, fill.d_out, &places.d_out),
            biases: biases
                .map(|(((bias, &values), place), stream)| float(stream, bias.dtype, &bias.shape, values, place))
                .collect(),
            key_mask: s.key_mask.then(|| key_mask(case)),
            segments: s.segments.then(|| segments(case)),
        };
        inputs.poison(case);
        inputs
    }

    fn poison(&mut self, case: &Case) {
        let s = &case.spec;
        let (q_width, k_width) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        match case.poison {
            Poison::Nothing => {}
            Poison::OneQuery => self.q.values[q_width * (s.seqlen_q / 2)] = f64::NAN,
            Poison::OneKey => self.k.values[k_width * (s.seqlen_k / 2)] = f64::NAN,
            Poison::BiasOfExcludedKeys => {
                let mask = self.key_mask.as_ref().map(|mask| mask.expand(&[s.batch, s.rows, s.seqlen_k]));
                let excluded = |key: usize| mask.as_ref().is_some_and(|mask| mask[key] == 0.0);
                for (at, value) in self.biases[0].values.iter_mut().enumerate() {
                    if excluded(at % s.seqlen_k) {
                        *value = if at % 2 == 0 { f64::NAN } else { f64::INFINITY };
                    }
                }
            }
            Poison::ExcludedKeys => {
                let mask = self.key_mask.as_ref().map(|mask| mask.expand(&[s.batch, s.rows, s.seqlen_k]));
                let excluded: Vec<bool> = (0..s.batch * s.rows * s.seqlen_k)
                    .map(|at| {
                        let (row, key) = (at / s.seqlen_k, at % s.seqlen_k);
                        key >= key_count(s, row) || mask.as_ref().is_some_and(|mask| mask[at] == 0.0)
                    })
                    .collect();
                let rows = self.k.values.chunks_mut(k_width).zip(self.v.values.chunks_mut(s.kv_heads * s.head_dim_v));
                for ((k, v), _) in rows.zip(excluded).filter(|(_, excluded)| *excluded) {
                    k.fill(f64::NAN);
                    v.fill(f64::NAN);
                }
            }
        }
    }

    /// The same inputs for the oracle: masks expanded, everything in f64.
    #[must_use]
    pub fn reference(&self, s: &AttentionSpec) -> ReferenceInputs {
        let ids =
            |host: &Host, seqlen| host.expand(&[s.batch, s.rows, seqlen]).into_iter().map(i32::from_f64).collect();
        let keeps = |host: &Host| host.expand(&[s.batch, s.rows, s.seqlen_k]).into_iter().map(|v| v != 0.0).collect();
        ReferenceInputs {
            q: self.q.values.clone(),
            k: self.k.values.clone(),
            v: self.v.values.clone(),
            biases: self.biases.iter().map(|bias| bias.values.clone()).collect(),
            key_mask: self.key_mask.as_ref().map(keeps),
            q_segments: self.segments.as_ref().map(|[q, _]| ids(q, s.seqlen_q)),
            k_segments: self.segments.as_ref().map(|[_, k]| ids(k, s.seqlen_k)),
            gate: self.gate.as_ref().map(|gate| gate.values.clone()),
        }
    }
}

/// Keys that count in row `row` of batch · rows.
fn key_count(s: &AttentionSpec, row: usize) -> usize {
    let Some(lengths) = &s.kv_lengths else { return s.seqlen_k };
    let index = match lengths.len() {
        1 => 0,
        count if count == s.batch => row / s.rows,
        _ => row,
    };
    usize::try_from(lengths[index]).unwrap_or(0)
}

impl Host {
    /// Values of the full shape; axes of size 1 are repeated.
    fn expand(&self, full: &[usize]) -> Vec<f64> {
        let total = full.iter().product();
        (0..total).map(|index| self.values[self.source(index, full, &[])]).collect()
    }

    /// The entries of an axis at `positions`, in that order; all of it where the axis is broadcast.
    pub(crate) fn select(&self, axis: usize, positions: &[usize]) -> Self {
        if self.shape[axis] == 1 {
            return self.clone();
        }
        let inner: usize = self.shape[axis + 1..].iter().product();
        let mut values = Vec::new();
        for outer in self.values.chunks(self.shape[axis] * inner) {
            for position in positions {
                values.extend_from_slice(&outer[position * inner..(position + 1) * inner]);
            }
        }
        let mut shape = self.shape.clone();
        shape[axis] = positions.len();
        Self { dtype: self.dtype, shape, values }
    }

    /// Makes the values along `axes` copies of entry 0, as a stride of 0 will.
    pub(crate) fn repeat(self, axes: &[usize]) -> Self {
        if axes.is_empty() {
            return self;
        }
        let values = (0..self.values.len()).map(|index| self.values[self.source(index, &self.shape, axes)]).collect();
        Self { values, ..self }
    }

    /// Own index of the element at row-major `index` of shape `full`, with `axes` and broadcast axes held at 0.
    fn source(&self, index: usize, full: &[usize], axes: &[usize]) -> usize {
        let (mut rest, mut step, mut source) = (index, 1, 0);
        for (axis, (&own, &size)) in self.shape.iter().zip(full).enumerate().rev() {
            let at = rest % size;
            rest /= size;
            if own != 1 && !axes.contains(&axis) {
                source += at * step;
            }
            step *= own;
        }
        source
    }
}

fn draw(rng: &mut ChaCha8Rng, values: Values, shape: &[usize]) -> Vec<f64> {
    let last = shape.last().copied().unwrap_or(1);
    let before_last = shape.iter().rev().nth(1).copied().unwrap_or(1);
    let element = |index: usize| {
        let normal: f64 = rng.sample(StandardNormal);
        match values {
            Values::Normal(deviation) => normal * deviation,
            Values::Constant(value) => value,
            Values::Signs(value) => value.copysign(normal),
            Values::Masking { value, share } => {
                if rng.random_bool(share) {
                    value
                } else {
                    0.0
                }
            }
            Values::Leading { value, count } if index % last < count => value,
            Values::EverySecondRow { value } if (index / last % before_last).is_multiple_of(2) => value,
            Values::Leading { .. } | Values::EverySecondRow { .. } => normal,
        }
    };
    (0..shape.iter().product()).map(element).collect()
}

fn own_shape(full: [usize; 3], axes: [bool; 3]) -> [usize; 3] {
    std::array::from_fn(|axis| if axes[axis] { full[axis] } else { 1 })
}

fn key_mask(case: &Case) -> Host {
    let s = &case.spec;
    let mut rng = ChaCha8Rng::seed_from_u64(case.seed);
    rng.set_stream(8);
    let shape = own_shape([s.batch, s.rows, s.seqlen_k], case.fill.key_mask_axes);
    let mut keeps = |index: usize| {
        let (key, row) = (index % shape[2], index / shape[2]);
        match case.fill.key_mask {
            MaskPattern::Random(share) => rng.random_bool(share),
            MaskPattern::Nothing => false,
            MaskPattern::EverySecondRow => !row.is_multiple_of(2),
            MaskPattern::From(first) => key >= first,
            MaskPattern::Until(end) => key < end,
            MaskPattern::Without(first, end) => key < first || key >= end,
        }
    };
    let values = (0..shape.iter().product()).map(|index| f64::from(u8::from(keeps(index)))).collect();
    Host { dtype: DType::Bool, shape: shape.to_vec(), values }.repeat(&case.places.masks.repeated)
}

fn segments(case: &Case) -> [Host; 2] {
    let s = &case.spec;
    [(s.seqlen_q, false), (s.seqlen_k, true)].map(|(seqlen, keys)| {
        let mut rng = ChaCha8Rng::seed_from_u64(case.seed);
        rng.set_stream(9);
        let shape = own_shape([s.batch, s.rows, seqlen], case.fill.segment_axes);
        let mut id = |index: usize| {
            let (position, row) = (index % shape[2], index / shape[2]);
            match case.fill.segments {
                // Blocks begin at another place in each row.
                SegmentPattern::Blocks(block) => i32::try_from((position + row % 3) / block).unwrap_or(-1),
                SegmentPattern::Random(count) => rng.random_range(0..count) - 1,
                SegmentPattern::Disjoint => 1 + i32::from(keys),
            }
        };
        let values = (0..shape.iter().product()).map(|index| f64::from(id(index))).collect();
        Host { dtype: DType::I32, shape: shape.to_vec(), values }.repeat(&case.places.masks.repeated)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tf32_has_eleven_bits() {
        let unit = 2_f32.powi(-10);
        for (value, rounded) in [
            (1.0 + unit, 1.0 + unit),
            (1.0 + 0.49 * unit, 1.0),
            (1.0 + 0.5 * unit, 1.0 + unit),
            (-1.0 - 0.5 * unit, -1.0 - unit),
            (2.0 - 0.25 * unit, 2.0),
            (0.0, 0.0),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(round_to_tf32(value), rounded, "{value}");
        }
        assert!(round_to_tf32(f32::NAN).is_nan());
    }
}
