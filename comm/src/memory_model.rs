//! What one rank holds while a transformer is trained, buffer by buffer: published formulas as plain functions.
//!
//! s sequence, b batch, h hidden, a heads, L layers, V vocabulary, e bytes of an element, t tensor- and
//! sequence-parallel ranks, r ranks that divide the sequence alone, N data-parallel ranks, Ψ parameters. *Sources*:
//! Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (activations); Rajbhandari et
//! al. 2020, "ZeRO" (model state); Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters"
//! (parameters); Song et al. 2023, "DeepSpeed4Science" (masks and position tables of long sequences). Allocators,
//! communication libraries, streams and
//! short-lived temporaries are not in it: a prediction is what must fit, not what will.

mod buffers;
pub mod paper;

use thiserror::Error;

/// Longest sequence that is tried.
const MAX_SEQLEN: u64 = 1 << 40;

/// A decoder of equal layers, with a feed-forward part of 4h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// L
    pub layers: u32,
    /// h
    pub hidden: u32,
    /// a; divides h.
    pub heads: u32,
    /// V
    pub vocabulary: u32,
}

/// What ranks share out that have the same weights, the N data-parallel ones and the r that divide the sequence alone, instead
/// of each holding all of it: every stage adds one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// Nothing.
    #[default]
    Off,
    /// ZeRO-1.
    OptimizerState,
    /// ZeRO-2.
    Gradients,
    /// ZeRO-3.
    Parameters,
}

/// Which activations backward computes again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// None: all are kept.
    None,
    /// The attention matrices; fused attention does that by itself.
    #[default]
    Selective,
    /// All but the input of each layer.
    Full,
}

/// A mask of s × s entries that is kept in the device's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DenseMask {
    /// None: a descriptor.
    #[default]
    None,
    /// One byte a pair.
    Bool,
    /// Four bytes a pair.
    F32,
}

/// A learned table of positions, s × h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Positions {
    /// None: rotary positions or ALiBi.
    #[default]
    None,
    /// Whole on every rank.
    Replicated,
    /// Each of the t tensor-parallel ranks has its own positions.
    Partitioned,
}

/// A model and how it is trained: mixed-precision Adam.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Training {
    /// The sizes.
    pub model: Model,
    /// b: sequences of one pass on one rank.
    pub batch: u32,
    /// t; divides the heads.
    pub tensor_ranks: u32,
    /// N
    pub data_ranks: u32,
    /// r: ranks that divide the sequence and nothing else, as ring attention and Ulysses do. Each holds all weights, and
    /// ZeRO shares them out over these ranks too.
    pub sequence_ranks: u32,
    /// Whether the t ranks also divide the sequence between layers (Megatron's sequence parallelism).
    pub sequence_parallel: bool,
    /// What data-parallel ranks share out.
    pub zero: ZeroStage,
    /// What backward computes again.
    pub recompute: Recompute,
    /// Whether the t ranks share out the layer inputs that [`Recompute::Full`] keeps; with sequence parallelism they do
    /// anyway.
    pub partition_activations: bool,
    /// Whether what layers keep goes to host memory, all but two layers of it.
    pub offload_activations: bool,
    /// Whether attention is fused: no matrix of s × s.
    pub fused_attention: bool,
    /// A mask on the device.
    pub mask: DenseMask,
    /// Whether the mask is built from a second one of its size, as `torch.tril` and a comparison do.
    pub mask_is_copied: bool,
    /// The table of positions.
    pub positions: Positions,
    /// e: 2 for f16 and bf16, with f32 master weights; 4 for f32.
    pub element_bytes: u32,
    /// Whether gradients are summed in f32 (2Ψ more with e = 2).
    pub f32_gradients: bool,
    /// Elements that a layer keeps for each of the sbh, divided where the sequence is; none for Megatron's layer: 16, and two
    /// dropout masks.
    pub kept_elements: Option<u32>,
    /// Logits of a token that are there at a time, where the loss takes the vocabulary in tiles; none for all of them.
    pub vocabulary_tile: Option<u32>,
    /// c: tensors of the whole sequence, e·sbh each, that sequence parallelism holds at a time. 2: in front of a layer's
    /// products the gathered input, and behind them the output before its reduce-scatter.
    pub gathered_copies: u32,
}

/// Where a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the device's memory.
    Device,
    /// In host memory.
    Host,
}

/// Memory for one purpose.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// What it holds.
    pub name: &'static str,
    /// Bytes on one rank, as a formula.
    pub formula: String,
    /// Ranks that share it out: `t`, `r`, `N`, several of them, or `-` for none.
    pub divided_by: String,
    /// Bytes on one rank.
    pub bytes: f64,
    /// Where.
    pub place: Place,
}

/// A training that cannot be, or does not fit.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A size or a number of ranks is 0.
    #[error("{parameter} is 0; it must be at least 1")]
    Zero {
        /// The parameter.
        parameter: &'static str,
    },
    /// One number must be a multiple of another.
    #[error("{parameter} = {got} must be a multiple of {divisor} = {expected}")]
    NotDivisible {
        /// The number.
        parameter: &'static str,
        /// What must divide it.
        divisor: &'static str,
        /// Its value.
        expected: u32,
        /// The number's value.
        got: u32,
    },
    /// An element has neither 2 nor 4 bytes.
    #[error("element_bytes: expected 2 or 4, got {got}")]
    ElementBytes {
        /// What came.
        got: u32,
    },
    /// A buffer does not fit, however short the sequence.
    #[error(
        "{buffer} does not fit: with the buffers before it {:.2} GB for a sequence of 1, and there are {:.2}; \
         use more ranks, a higher ZeRO stage or more memory",
        needed / 1e9, memory_bytes / 1e9
    )]
    DoesNotFit {
        /// The first buffer that does not fit beside those before it.
        buffer: &'static str,
        /// Bytes of the buffers up to and with it.
        needed: f64,
        /// Bytes there are.
        memory_bytes: f64,
    },
}

impl Model {
    /// Ψ = 12Lh² + 13Lh + (V + 2)h: matrices and their biases, norms, the embedding that the output shares. Without the
    /// table of positions.
    ///
    /// *Source*: Narayanan et al. 2021, equation (2).
    #[must_use]
    pub fn parameters(&self) -> f64 {
        let (layers, h) = (f64::from(self.layers), f64::from(self.hidden));
        layers * self.layer_parameters() + (f64::from(self.vocabulary) + 2.0) * h
    }

    /// 12h² + 13h
    fn layer_parameters(&self) -> f64 {
        let h = f64::from(self.hidden);
        12.0 * h * h + 13.0 * h
    }
}

impl Training {
    /// One rank, batch 1, bf16, fused attention, nothing else.
    #[must_use]
    pub fn new(model: Model) -> Self {
        Self {
            model,
            batch: 1,
            tensor_ranks: 1,
            data_ranks: 1,
            sequence_ranks: 1,
            sequence_parallel: false,
            zero: ZeroStage::default(),
            recompute: Recompute::default(),
            partition_activations: false,
            offload_activations: false,
            fused_attention: true,
            mask: DenseMask::default(),
            mask_is_copied: false,
            positions: Positions::default(),
            element_bytes: 2,
            f32_gradients: false,
            kept_elements: None,
            vocabulary_tile: None,
            gathered_copies: 2,
        }
    }

    /// That sizes are there and divide as they must.
    ///
    /// # Errors
    /// [`ModelError::Zero`], [`ModelError::NotDivisible`], [`ModelError::ElementBytes`].
    pub fn check(&self) -> Result<(), ModelError> {
        let Model { layers, hidden, heads, vocabulary } = self.model;
        let sizes = [
            ("layers", layers),
            ("hidden", hidden),
            ("heads", heads),
            ("vocabulary", vocabulary),
            ("batch", self.batch),
            ("tensor_ranks", self.tensor_ranks),
            ("data_ranks", self.data_ranks),
            ("sequence_ranks", self.sequence_ranks),
            ("kept_elements", self.kept_elements.unwrap_or(1)),
            ("vocabulary_tile", self.vocabulary_tile.unwrap_or(1)),
        ];
        if let Some(&(parameter, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(ModelError::Zero { parameter });
        }
        for (parameter, got, divisor, expected) in
            [("hidden", hidden, "heads", heads), ("heads", heads, "tensor_ranks", self.tensor_ranks)]
        {
            if !got.is_multiple_of(expected) {
                return Err(ModelError::NotDivisible { parameter, divisor, expected, got });
            }
        }
        if ![2, 4].contains(&self.element_bytes) {
            return Err(ModelError::ElementBytes { got: self.element_bytes });
        }
        Ok(())
    }

    /// Bytes of one rank in the device's memory.
    ///
    /// # Errors
    /// As [`Training::check`].
    pub fn device_bytes(&self, seqlen: u64) -> Result<f64, ModelError> {
        Ok(on_device(&self.buffers(seqlen)?).map(|buffer| buffer.bytes).sum())
    }

    /// The longest sequence whose buffers fit the device's memory: no buffer shrinks when the sequence grows.
    ///
    /// ```
    /// use tilefold_comm::memory_model::{Model, Training};
    /// let model = Model { layers: 12, hidden: 768, heads: 12, vocabulary: 50257 };
    /// let training = Training::new(model);
    /// let longest = training.longest(16 << 30)?;
    /// assert!(training.device_bytes(longest)? <= 17_179_869_184.0);
    /// assert!(training.device_bytes(longest + 1)? > 17_179_869_184.0);
    /// # Ok::<(), tilefold_comm::memory_model::ModelError>(())
    /// ```
    ///
    /// # Errors
    /// [`ModelError::DoesNotFit`] naming the buffer, and as [`Training::check`].
    pub fn longest(&self, memory_bytes: u64) -> Result<u64, ModelError> {
        let memory_bytes = real(memory_bytes);
        let mut needed = 0.0;
        for buffer in on_device(&self.buffers(1)?) {
            needed += buffer.bytes;
            if needed > memory_bytes {
                return Err(ModelError::DoesNotFit { buffer: buffer.name, needed, memory_bytes });
            }
        }
        let (mut low, mut high) = (1, MAX_SEQLEN);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.device_bytes(middle)? <= memory_bytes { low = middle } else { high = middle }
        }
        Ok(low)
    }
}

/// Those in the device's memory.
fn on_device(buffers: &[Buffer]) -> impl Iterator<Item = &Buffer> {
    buffers.iter().filter(|buffer| buffer.place == Place::Device)
}

/// A size as a real number; beyond 2^53 it is rounded.
#[allow(clippy::cast_precision_loss, reason = "an estimate; 53 bits are plenty")]
fn real(size: u64) -> f64 {
    size as f64
}

#[cfg(test)]
mod tests;
