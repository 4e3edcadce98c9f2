//! The buffers of one rank, each by its formula.

use super::{Buffer, DenseMask, ModelError, Place, Positions, Recompute, Training, ZeroStage, real};

/// Layers whose activations are on the device when the rest is on the host: one in use, one in flight.
const OFFLOADED_LAYERS_ON_DEVICE: u32 = 2;

/// A number of bytes by rank, under construction.
struct Share {
    bytes: f64,
    by: Vec<&'static str>,
}

impl Training {
    /// Every buffer of one rank for a sequence; those that would be empty are left out.
    ///
    /// ```
    /// use tilefold_comm::memory_model::{Model, Training};
    /// let model = Model { layers: 64, hidden: 6144, heads: 64, vocabulary: 50257 };
    /// let training = Training { tensor_ranks: 32, sequence_parallel: true, ..Training::new(model) };
    /// for buffer in training.buffers(131_072)? {
    ///     println!("{}: {:.1} GB", buffer.name, buffer.bytes / 1e9);
    /// }
    /// # Ok::<(), tilefold_comm::memory_model::ModelError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Training::check`].
    pub fn buffers(&self, seqlen: u64) -> Result<Vec<Buffer>, ModelError> {
        self.check()?;
        let mut buffers = self.state();
        buffers.extend(self.position_table(seqlen));
        buffers.extend(self.gathered_parameters());
        buffers.extend(self.kept_activations(seqlen));
        buffers.extend(self.layer_in_work(seqlen));
        buffers.extend(self.dense_mask(seqlen));
        buffers.extend(self.gathered_sequence(seqlen));
        buffers.push(self.logits(seqlen));
        Ok(buffers)
    }

    /// Bytes of one parameter: in the model, as a gradient, in the optimizer (f32 weights where e = 2, and Adam's two
    /// moments).
    fn bytes_per_parameter(&self) -> [f64; 3] {
        let e = f64::from(self.element_bytes);
        let master = if self.element_bytes == 2 { 4.0 } else { 0.0 };
        [e, if self.f32_gradients { 4.0 } else { e }, 8.0 + master]
    }

    /// Which of the three are divided by N and r.
    fn is_sharded(&self) -> [bool; 3] {
        [ZeroStage::Parameters, ZeroStage::Gradients, ZeroStage::OptimizerState].map(|stage| self.zero >= stage)
    }

    /// 16Ψ/t; ZeRO-1 (4Ψ + 12Ψ/N)/t; ZeRO-2 (2Ψ + 14Ψ/N)/t; ZeRO-3 16Ψ/(tN), with e = 2.
    ///
    /// *Source*: Rajbhandari et al. 2020, section 5.
    fn state(&self) -> Vec<Buffer> {
        let names = ["parameters", "gradients", "optimizer state"];
        let parts = names.into_iter().zip(self.bytes_per_parameter()).zip(self.is_sharded());
        let buffers = parts.map(|((name, bytes), sharded)| {
            let share = Share::of(bytes * self.model.parameters()).over_tensor(self);
            let share = if sharded { share.over_data(self) } else { share };
            share.buffer(name, format!("{bytes} Ψ"))
        });
        buffers.collect()
    }

    /// 16sh, with ZeRO as the rest of the state; over t and r when it is partitioned. Megatron keeps it whole on each of the t
    /// ranks.
    fn position_table(&self, seqlen: u64) -> Option<Buffer> {
        let partitioned = match self.positions {
            Positions::None => return None,
            Positions::Replicated => false,
            Positions::Partitioned => true,
        };
        // Ranks that hold the same rows share out what ZeRO does.
        let alike = f64::from(self.data_ranks) * if partitioned { 1.0 } else { f64::from(self.sequence_ranks) };
        let parts = self.bytes_per_parameter().into_iter().zip(self.is_sharded());
        let bytes: f64 = parts.map(|(bytes, sharded)| if sharded { bytes / alike } else { bytes }).sum();
        let share = Share::of(bytes * real(seqlen) * f64::from(self.model.hidden));
        let share = if partitioned { share.over_tensor(self).over_sequence(self) } else { share };
        Some(share.buffer("position table", format!("{bytes} s h")))
    }

    /// ZeRO-3 gathers the parameters of the layer in use: e(12h² + 13h)/t.
    fn gathered_parameters(&self) -> Option<Buffer> {
        let gathers = self.zero == ZeroStage::Parameters && (self.data_ranks > 1 || self.sequence_ranks > 1);
        let share = Share::of(f64::from(self.element_bytes) * self.model.layer_parameters()).over_tensor(self);
        gathers.then(|| share.buffer("gathered parameters", format!("{} Ψ/L", self.element_bytes)))
    }

    /// s·b·h
    fn tokens(&self, seqlen: u64) -> f64 {
        real(seqlen) * f64::from(self.batch) * f64::from(self.model.hidden)
    }

    /// What a layer keeps beside attention matrices: sbh(4e + 2 + 12e/t), and over t altogether with sequence
    /// parallelism; 34sbh on one rank with e = 2.
    ///
    /// *Source*: Korthikanti et al. 2022, equations (1), (2) and (4), with e for the 2 bytes of their elements: 16 elements
    /// and two one-byte dropout masks for each of the sbh.
    fn layer(&self, seqlen: u64) -> f64 {
        let (e, t) = (f64::from(self.element_bytes), f64::from(self.tensor_ranks));
        let whole = if self.sequence_parallel { t } else { 1.0 };
        if let Some(elements) = self.kept_elements {
            return self.tokens(seqlen) * f64::from(elements) * e / whole;
        }
        self.tokens(seqlen) * ((4.0 * e + 2.0) / whole + 12.0 * e / t)
    }

    /// Attention matrices of a layer: (2e + 1)as²b/t. Logits' softmax, its dropout and the mask of that.
    ///
    /// *Source*: Korthikanti et al. 2022, equation (1): 5as²b.
    fn matrices(&self, seqlen: u64) -> f64 {
        if self.fused_attention {
            return 0.0;
        }
        let (s, heads) = (real(seqlen), f64::from(self.model.heads) / f64::from(self.tensor_ranks));
        (2.0 * f64::from(self.element_bytes) + 1.0) * heads * s * s * f64::from(self.batch)
    }

    /// What all layers keep for backward; on the host, with two layers on the device, when it is offloaded.
    ///
    /// *Source*: Korthikanti et al. 2022, table 2; full recomputation keeps the input of each layer, e·sbh.
    fn kept_activations(&self, seqlen: u64) -> Vec<Buffer> {
        let (one, formula) = match self.recompute {
            Recompute::None if self.fused_attention => (self.layer(seqlen), self.layer_formula()),
            Recompute::None => {
                let formula = format!("{} + {} a s² b/t", self.layer_formula(), 2 * self.element_bytes + 1);
                (self.layer(seqlen) + self.matrices(seqlen), formula)
            }
            Recompute::Selective => (self.layer(seqlen), self.layer_formula()),
            Recompute::Full => {
                let whole = self.tokens(seqlen) * f64::from(self.element_bytes);
                let parts = if self.divides_checkpoints() { f64::from(self.tensor_ranks) } else { 1.0 };
                (whole / parts, format!("{} s b h", self.element_bytes))
            }
        };
        let by = match self.recompute {
            Recompute::Full if !self.divides_checkpoints() => Vec::new(),
            Recompute::None | Recompute::Selective if !self.sequence_parallel => self.layer_by(),
            _ => vec!["t"],
        };
        let buffer = |layers: u32, name, place| {
            let share = Share { bytes: f64::from(layers) * one, by: by.clone() }.over_sequence(self);
            Buffer { place, ..share.buffer(name, format!("{layers} ({formula})")) }
        };
        if !self.offload_activations {
            return vec![buffer(self.model.layers, "activations", Place::Device)];
        }
        vec![
            buffer(self.model.layers.min(OFFLOADED_LAYERS_ON_DEVICE), "activations", Place::Device),
            buffer(self.model.layers, "activations", Place::Host),
        ]
    }

    /// What divides [`Self::layer`] without sequence parallelism.
    fn layer_by(&self) -> Vec<&'static str> {
        if self.kept_elements.is_some() { Vec::new() } else { vec!["t in part"] }
    }

    fn layer_formula(&self) -> String {
        let e = self.element_bytes;
        if let Some(elements) = self.kept_elements {
            format!("{} s b h", u64::from(elements) * u64::from(e))
        } else if self.sequence_parallel || self.tensor_ranks == 1 {
            format!("{} s b h", 16 * e + 2)
        } else {
            format!("{} s b h + {} s b h/t", 4 * e + 2, 12 * e)
        }
    }

    fn divides_checkpoints(&self) -> bool {
        self.sequence_parallel || self.partition_activations
    }

    /// The layer that backward computes again: all of it, or its attention matrices.
    fn layer_in_work(&self, seqlen: u64) -> Option<Buffer> {
        let matrices = (!self.fused_attention).then(|| format!("{} a s² b", 2 * self.element_bytes + 1));
        let (bytes, formula) = match self.recompute {
            Recompute::None => return None,
            Recompute::Selective => (self.matrices(seqlen), matrices?),
            Recompute::Full => {
                let formula = std::iter::once(self.layer_formula()).chain(matrices).collect::<Vec<_>>().join(" + ");
                (self.layer(seqlen) + self.matrices(seqlen), formula)
            }
        };
        let in_part = self.recompute == Recompute::Full && !self.sequence_parallel;
        let by = if in_part { self.layer_by() } else { vec!["t"] };
        Some(Share { bytes, by }.over_sequence(self).buffer("layer computed again", formula))
    }

    /// s² or 4s², twice where it is built from another; divided by r alone, whose ranks need the rows of their queries (under
    /// ring attention; with Ulysses every rank needs all).
    fn dense_mask(&self, seqlen: u64) -> Vec<Buffer> {
        let bytes = match self.mask {
            DenseMask::None => return Vec::new(),
            DenseMask::Bool => 1.0,
            DenseMask::F32 => 4.0,
        };
        let names = ["mask", "mask, the copy it is built from"];
        let buffers = names.into_iter().take(1 + usize::from(self.mask_is_copied));
        let s = real(seqlen);
        buffers.map(|name| Share::of(bytes * s * s).over_sequence(self).buffer(name, format!("{bytes} s²"))).collect()
    }

    /// c·e·sbh of the whole sequence, which sequence parallelism gathers: not divided by t.
    fn gathered_sequence(&self, seqlen: u64) -> Option<Buffer> {
        let gathers = self.sequence_parallel && self.tensor_ranks > 1 && self.gathered_copies > 0;
        let per_token = f64::from(self.gathered_copies) * f64::from(self.element_bytes);
        let share = Share::of(per_token * self.tokens(seqlen));
        gathers.then(|| share.over_sequence(self).buffer("gathered sequence", format!("{per_token} s b h")))
    }

    /// Final norm, input of the output layer, logits in f32: 4sbh(1 + V/h)/t with e = 2; without sequence parallelism only
    /// the logits are divided.
    ///
    /// *Source*: Korthikanti et al. 2022, section 4.3.
    fn logits(&self, seqlen: u64) -> Buffer {
        let inputs = 2.0 * f64::from(self.element_bytes);
        let whole = if self.sequence_parallel { f64::from(self.tensor_ranks) } else { 1.0 };
        // Of this rank's part of the vocabulary; a tile is as wide on every rank.
        let own = f64::from(self.model.vocabulary) / f64::from(self.tensor_ranks);
        let tile = self.vocabulary_tile.filter(|&tile| f64::from(tile) < own);
        let logits = tile.map_or(own, f64::from);
        let bytes = self.tokens(seqlen) * (inputs / whole + 4.0 * logits / f64::from(self.model.hidden));
        let by = if self.sequence_parallel { "t" } else { "t in part" };
        let formula = match tile {
            Some(tile) => format!("{inputs} s b h + {} s b", 4 * u64::from(tile)),
            None => format!("{inputs} s b h + 4 s b V"),
        };
        Share { bytes, by: vec![by] }.over_sequence(self).buffer("norm, logits and loss", formula)
    }
}

impl Share {
    fn of(bytes: f64) -> Self {
        Self { bytes, by: Vec::new() }
    }

    fn over_tensor(mut self, training: &Training) -> Self {
        self.bytes /= f64::from(training.tensor_ranks);
        self.by.push("t");
        self
    }

    /// Ranks that hold the same weights: N and r.
    fn over_data(mut self, training: &Training) -> Self {
        self.bytes /= f64::from(training.data_ranks);
        self.by.push("N");
        self.over_sequence(training)
    }

    /// r, which is not spoken of where it is 1.
    fn over_sequence(mut self, training: &Training) -> Self {
        if training.sequence_ranks > 1 {
            self.bytes /= f64::from(training.sequence_ranks);
            self.by.push("r");
        }
        self
    }

    fn buffer(self, name: &'static str, formula: String) -> Buffer {
        let divided_by = if self.by.is_empty() { "-".to_owned() } else { self.by.join(" ") };
        Buffer { name, formula, divided_by, bytes: self.bytes, place: Place::Device }
    }
}
