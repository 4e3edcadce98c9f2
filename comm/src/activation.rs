//! What a training step keeps of its activations, and where: checkpoints that are recomputed, in parts over ranks or in host
//! memory.
//!
//! ```text
//! forward:  for each segment of layers:  keep its input;  x = layers(x), forgetting what each of them saves
//! backward: for each segment, last first: x = its input;  layers(x) once more, with all that they save
//!                                         dx = their backward passes, last first
//! ```
//!
//! Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; activations in parts and in host memory:
//! Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.

use std::sync::Arc;

use tilefold_core::Tensor;

use crate::communicator::Communicator;
use crate::error::{CommError, Result};
use crate::rank::Rank;
use crate::sequence_parallel::maps::{Gather, Map, Scatter, Split};

/// One layer of a network, as the caller computes it on a rank.
///
/// The same input has to give the same output each time: one that drops elements at random draws the same ones again.
pub trait Layer {
    /// What its backward pass needs of its forward pass.
    type Saved;
    /// Gradients of its parameters.
    type Gradients;

    /// The layer's output, and what its backward pass needs. Called by all ranks.
    ///
    /// # Errors
    /// The layer's.
    fn forward(&self, rank: &Rank<'_>, x: &Arc<Tensor>) -> Result<(Tensor, Self::Saved)>;

    /// Gradients of the layer's input and of its parameters, from that of its output. Called by all ranks.
    ///
    /// # Errors
    /// The layer's.
    fn backward(&self, rank: &Rank<'_>, saved: Self::Saved, d_out: Tensor) -> Result<(Tensor, Self::Gradients)>;
}

/// Where an activation is until the backward pass needs it. All of them give back the same bits.
#[derive(Clone, Copy, Debug)]
pub enum Keep<'g> {
    /// Where it is.
    Device,
    /// In parts on the devices of a group whose ranks all have it alike (not checked): each keeps a part of its largest axis,
    /// and they gather it again. One whose axes are all smaller than the group is kept whole.
    Partitioned(&'g Communicator),
    /// In host memory, as a row-major copy; on a device that is the host itself, where it is.
    Host,
}

/// An activation that is kept.
#[derive(Debug)]
pub struct Kept<'g>(Place<'g>);

#[derive(Debug)]
enum Place<'g> {
    Device(Arc<Tensor>),
    Part { group: &'g Communicator, split: Split, part: Tensor },
    Host(Arc<Tensor>),
}

impl<'g> Keep<'g> {
    /// Keeps an activation. With [`Keep::Partitioned`], no rank waits for another.
    ///
    /// # Errors
    /// What the device reports.
    pub fn keep(self, rank: &Rank<'_>, activation: Arc<Tensor>) -> Result<Kept<'g>> {
        Ok(Kept(match self {
            Self::Device => Place::Device(activation),
            Self::Host => Place::Host(rank.pack_shared(&activation)?),
            Self::Partitioned(group) => {
                let sizes = activation.shape().iter().copied().enumerate();
                let largest = sizes.rev().max_by_key(|&(_, size)| size);
                match largest.filter(|&(_, size)| size >= group.world_size()) {
                    None => Place::Device(activation),
                    Some((axis, size)) => {
                        let split = Split::contiguous(axis, size, group.world_size())?;
                        let part = Scatter(split.clone()).apply(&Rank { comm: group, ..*rank }, &activation.view())?;
                        Place::Part { group, split, part }
                    }
                }
            }
        }))
    }
}

impl Kept<'_> {
    /// The activation, on the rank's device. With [`Keep::Partitioned`] called by all ranks of the group.
    ///
    /// # Errors
    /// A [`CommError`]; [`CommError::Mismatch`] when ranks of the group have kept tensors of other shapes or dtypes; what the
    /// device reports.
    pub fn restore(self, rank: &Rank<'_>) -> Result<Arc<Tensor>> {
        match self.0 {
            Place::Device(activation) => Ok(activation),
            Place::Host(packed) => rank.unpack(packed),
            Place::Part { group, split, part } => {
                Gather(split).apply(&Rank { comm: group, ..*rank }, &part.view()).map(Arc::new)
            }
        }
    }

    /// Bytes that this rank keeps, on its device or the host.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Place::Device(tensor) | Place::Host(tensor) => tensor.storage().bytes(),
            Place::Part { part, .. } => part.storage().bytes(),
        }
    }
}

/// Layers in segments of which only the inputs are kept.
///
/// *Memory*: of n layers in segments of s, n/s inputs and what s layers save; s near √n makes the sum smallest. *Time*: each
/// layer goes forward twice. *Numerics*: the same bits as without, for layers that give the same output each time.
///
/// ```
/// use std::sync::Arc;
/// use tilefold_comm::activation::{Checkpoints, Keep, Layer};
/// use tilefold_comm::{Communicator, Rank, Result};
/// use tilefold_core::{Backend, Tensor};
///
/// /// x²
/// struct Square;
/// impl Layer for Square {
///     type Saved = Arc<Tensor>;
///     type Gradients = ();
///     fn forward(&self, _: &Rank<'_>, x: &Arc<Tensor>) -> Result<(Tensor, Arc<Tensor>)> {
///         let squares = x.as_slice::<f32>()?.iter().map(|x| x * x).collect();
///         Ok((Tensor::from_vec(squares, x.shape())?, Arc::clone(x)))
///     }
///     fn backward(&self, _: &Rank<'_>, x: Arc<Tensor>, d_out: Tensor) -> Result<(Tensor, ())> {
///         let pairs = x.as_slice::<f32>()?.iter().zip(d_out.as_slice::<f32>()?);
///         Ok((Tensor::from_vec(pairs.map(|(x, d)| 2.0 * x * d).collect(), x.shape())?, ()))
///     }
/// }
///
/// let (comm, device) = (Communicator::alone(), tilefold_backend_cpu::CpuBackend::new()?);
/// let stream = device.stream()?;
/// let rank = Rank { comm: &comm, device: &device, stream: &stream };
/// let (layers, checkpoints) = ([Square, Square, Square], Checkpoints::new(2, Keep::Host)?);
/// let x = Arc::new(Tensor::from_vec(vec![1.0_f32, 2.0], &[2])?);
/// let (out, kept) = checkpoints.forward(&rank, &layers, x)?;
/// assert_eq!(out.as_slice::<f32>()?, [1.0, 256.0]);
/// let (d_x, _) = checkpoints.backward(&rank, &layers, kept, Tensor::from_vec(vec![1.0_f32; 2], &[2])?)?;
/// assert_eq!(d_x.as_slice::<f32>()?, [8.0, 1024.0]); // of x⁸
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints<'g> {
    segment: usize,
    keep: Keep<'g>,
}

/// The inputs of segments.
#[derive(Debug)]
pub struct Checkpointed<'g> {
    inputs: Vec<Kept<'g>>,
}

impl<'g> Checkpoints<'g> {
    /// Segments of so many layers, of which the last may have fewer, and where their inputs are kept.
    ///
    /// # Errors
    /// [`CommError::Counts`] for segments of none.
    pub fn new(segment: usize, keep: Keep<'g>) -> Result<Self> {
        if segment == 0 {
            let (expected, got) = ("at least one layer".into(), "none".into());
            return Err(CommError::Counts { list: "segment", expected, got }.into());
        }
        Ok(Self { segment, keep })
    }

    /// The output of all layers, and what the backward pass needs. Called by all ranks.
    ///
    /// # Errors
    /// Those of the layers and of [`Keep::keep`].
    pub fn forward<L: Layer>(
        &self,
        rank: &Rank<'_>,
        layers: &[L],
        x: Arc<Tensor>,
    ) -> Result<(Arc<Tensor>, Checkpointed<'g>)> {
        let (mut x, mut inputs) = (x, Vec::new());
        for segment in layers.chunks(self.segment) {
            let input = Arc::clone(&x);
            for layer in segment {
                let (out, _) = layer.forward(rank, &x)?;
                x = Arc::new(out);
            }
            inputs.push(self.keep.keep(rank, input)?);
        }
        Ok((x, Checkpointed { inputs }))
    }

    /// Gradients of the input, and of the parameters of each layer in the order of layers, from that of the output. Called by
    /// all ranks.
    ///
    /// # Errors
    /// Those of the layers and of [`Kept::restore`]; [`CommError::Counts`] for other layers than those that went forward.
    pub fn backward<L: Layer>(
        &self,
        rank: &Rank<'_>,
        layers: &[L],
        kept: Checkpointed<'_>,
        d_out: Tensor,
    ) -> Result<(Tensor, Vec<L::Gradients>)> {
        let segments = layers.chunks(self.segment);
        if segments.len() != kept.inputs.len() {
            let (expected, got) = (format!("{} segments", kept.inputs.len()), segments.len().to_string());
            return Err(CommError::Counts { list: "layers", expected, got }.into());
        }
        let (mut d_out, mut gradients) = (d_out, Vec::new());
        for (segment, input) in segments.zip(kept.inputs).rev() {
            let mut x = input.restore(rank)?;
            let mut saved = Vec::new();
            for layer in segment {
                let (out, of_layer) = layer.forward(rank, &x)?;
                saved.push(of_layer);
                x = Arc::new(out);
            }
            for (layer, saved) in segment.iter().zip(saved).rev() {
                let (d_in, of_layer) = layer.backward(rank, saved, d_out)?;
                d_out = d_in;
                gradients.push(of_layer);
            }
        }
        gradients.reverse();
        Ok((d_out, gradients))
    }
}

impl Checkpointed<'_> {
    /// Bytes that this rank keeps, on its device or the host.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.inputs.iter().map(Kept::bytes).sum()
    }
}
