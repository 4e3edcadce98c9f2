//! DeepSpeed4Science's own signature: a mask bias and a pair bias beside q, k and v.

use crate::attention::{Backward, Forward, Inputs, Options, attention, attention_backward};
use crate::{Device, Error, Gradients, ProblemError, TensorView};

/// `DS4Sci_EvoformerAttention`: attention with up to two biases in their own fixed shapes.
///
/// *Shapes*: q, k, v `[B, N, L, H, D]`; `biases[0]` (the mask as a bias, such as `1e9 · (mask - 1)`) `[B, N, 1, 1, L]`;
/// `biases[1]` (the pair bias) `[B, 1, H, L, L]`; either may be absent. Any L and D, where DeepSpeed asks for L > 16 and
/// D ≤ 64. *Numerics*: products are [exact](crate::Products::Exact). *Source*: Song et al. 2023, DeepSpeed4Science, section 3.
///
/// ```
/// use tilefold::evoformer::{evoformer_attention, evoformer_attention_backward};
/// use tilefold::{Device, Gradients, TensorView};
/// let device = Device::cpu()?;
/// let data: Vec<f32> = (0_u8..48).map(|i| f32::from(i % 7) - 3.0).collect();
/// let x = TensorView::from_slice(&data, &[1, 2, 3, 2, 4])?; // [B, N, L, H, D]
/// let bias1 = [0.0_f32, 0.0, -1e9, 0.0, 0.0, 0.0]; // sequence 0 ends with a gap
/// let bias2 = [0.5_f32; 18];
/// let biases = [
///     Some(TensorView::from_slice(&bias1, &[1, 2, 1, 1, 3])?),
///     Some(TensorView::from_slice(&bias2, &[1, 1, 2, 3, 3])?),
/// ];
/// let forward = evoformer_attention(&device, &x, &x, &x, &biases)?;
/// let wanted = Gradients { q: true, k: true, v: true, biases: [false, true, false, false], ..Gradients::default() };
/// let backward = evoformer_attention_backward(&device, &x, &x, &x, &biases, &forward, &x, wanted)?;
/// assert!(backward.dbiases[0].is_none() && backward.dbiases[1].is_some());
/// # Ok::<(), tilefold::Error>(())
/// ```
///
/// # Errors
/// [`Error::Problem`] that names the tensor and dimension; [`Error::Device`].
pub fn evoformer_attention(
    device: &Device,
    q: &TensorView<'_>,
    k: &TensorView<'_>,
    v: &TensorView<'_>,
    biases: &[Option<TensorView<'_>>; 2],
) -> Result<Forward, Error> {
    attention(device, &inputs(q, k, v, biases)?, &Options::default())
}

/// Gradients of [`evoformer_attention`]: `dbiases[0]` and `dbiases[1]` are those of its two biases, absent ones `None`.
///
/// # Errors
/// As [`evoformer_attention`]; [`ProblemError::Unexpected`] for a gradient of an absent bias.
#[allow(clippy::too_many_arguments, reason = "the signature is DeepSpeed's, with what its autograd context holds")]
pub fn evoformer_attention_backward(
    device: &Device,
    q: &TensorView<'_>,
    k: &TensorView<'_>,
    v: &TensorView<'_>,
    biases: &[Option<TensorView<'_>>; 2],
    forward: &Forward,
    d_out: &TensorView<'_>,
    gradients: Gradients,
) -> Result<Backward, Error> {
    let inputs = inputs(q, k, v, biases)?;
    let mut packed = Gradients { biases: Default::default(), ..gradients };
    let mut next = 0;
    for (i, bias) in biases.iter().enumerate() {
        match (bias, gradients.biases[i]) {
            (None, true) => {
                let reason = "this bias is absent";
                return Err(ProblemError::Unexpected { tensor: ["dbias1", "dbias2"][i], reason }.into());
            }
            (None, false) => {}
            (Some(_), wanted) => {
                packed.biases[next] = wanted;
                next += 1;
            }
        }
    }
    packed.biases[2..].copy_from_slice(&gradients.biases[2..]);
    let mut backward = attention_backward(device, &inputs, &Options::default(), forward, d_out, packed)?;
    let mut present = std::mem::take(&mut backward.dbiases).into_iter();
    backward.dbiases = biases.iter().map(|bias| bias.as_ref().and_then(|_| present.next().flatten())).collect();
    Ok(backward)
}

/// Checked views: attention takes DeepSpeed's order of axes as it is.
fn inputs<'a>(
    q: &TensorView<'a>,
    k: &TensorView<'a>,
    v: &TensorView<'a>,
    biases: &[Option<TensorView<'a>>; 2],
) -> Result<Inputs<'a>, ProblemError> {
    let &[batch, rows, seqlen, heads, _] = q.shape() else {
        return Err(ProblemError::Rank { tensor: "q", expected: 5, got: q.shape().len() });
    };
    let shapes = [("bias1", [batch, rows, 1, 1, seqlen]), ("bias2", [batch, 1, heads, seqlen, seqlen])];
    let mut inputs = Inputs::new(q.clone(), k.clone(), v.clone());
    for (bias, (tensor, shape)) in biases.iter().zip(shapes) {
        if let Some(bias) = bias {
            super::variant::check(tensor, bias, &shape, ["B", "N", "H", "L (query)", "L (key)"], false)?;
            inputs.biases.push(bias.clone());
        }
    }
    Ok(inputs)
}
