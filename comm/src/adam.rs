//! Adam whose state is shared out over the ranks that hold the same parameters: the first stage of ZeRO.
//!
//! ```text
//! all parameters, one after the other, are cut into p runs of elements; rank r keeps the state of run r
//! step, on every rank:
//!   send each rank its run of the gradients                        (in their dtype)
//!   g = sum of what the ranks sent, in their order, · scale        (f32)
//!   m, v, master = adam(m, v, master, g)                           (f32, this rank's run)
//!   send every rank the new parameters of the run                  (in their dtype)
//! ```
//!
//! Source: Kingma and Ba, "Adam", 2015; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; Rajbhandari et
//! al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.

use std::iter;
use std::ops::Range;
use std::sync::Arc;

use tilefold_core::{DType, ProblemError, Tensor, TensorView};

use crate::communicator::near_equal;
use crate::error::{CommError, Result};
use crate::host;
use crate::rank::Rank;
use crate::transport::Parcel;

/// The numbers of Adam.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamOptions {
    /// Size of a step; 0 or above.
    pub learning_rate: f32,
    /// How much of the mean gradient stays; from 0 to below 1.
    pub beta1: f32,
    /// How much of the mean square stays; from 0 to below 1.
    pub beta2: f32,
    /// Added to the root of the mean square; above 0.
    pub epsilon: f32,
    /// What a parameter loses of itself in a step, times the learning rate (decoupled, "AdamW"); 0 or above.
    pub weight_decay: f32,
    /// Factor of the sum of gradients: 1/p for their mean, or what undoes a scaled loss.
    pub gradient_scale: f32,
}

impl Default for AdamOptions {
    fn default() -> Self {
        let (learning_rate, beta1, beta2, epsilon) = (1e-3, 0.9, 0.999, 1e-8);
        Self { learning_rate, beta1, beta2, epsilon, weight_decay: 0.0, gradient_scale: 1.0 }
    }
}

/// One rank's part of the state of a [`ShardedAdam`]: what to save, and what [`ShardedAdam::from_saved`] takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdamState {
    /// Steps done.
    pub step: u32,
    /// Mean of gradients, of this rank's run of elements.
    pub first: Vec<f32>,
    /// Mean of their squares.
    pub second: Vec<f32>,
    /// Parameters before rounding, of the elements in half precision.
    pub master: Vec<f32>,
}

/// Adam over parameters that every rank has, each rank with its part of the state.
///
/// *Shapes*: any number of parameters of any shapes; ranks need not divide their elements, nor be fewer. *dtypes*: parameters
/// in f32, f16 or bf16, mixed or not; gradients in the same or another. *Memory*: on the host, 8 bytes for each element of this
/// rank's run, 12 for those in half precision; in a step the gradients and the parameters once more.
///
/// *Numerics*: f32, one element like another: `m = β₁m + (1-β₁)g`, `v = β₂v + (1-β₂)g²`,
/// `x = x·(1 - lr·decay) - lr·(m/(1-β₁ᵗ)) / (√(v/(1-β₂ᵗ)) + ε)`; the powers of β in f64. Gradients are summed in f32 in the order of
/// ranks, and are not rounded to their dtype. So parameters have the same bits on every rank, and, for the same gradients of
/// the same ranks, those of one optimizer that adds them up in that order, in f32 as in half precision; over another number of
/// ranks, sums of gradients differ by their rounding, and nothing else does. *Determinism*: the same bits on every run.
///
/// ```
/// use tilefold_comm::{AdamOptions, Communicator, Rank, ShardedAdam};
/// use tilefold_core::{Backend, Tensor, TensorView};
/// let (comm, device) = (Communicator::alone(), tilefold_backend_cpu::CpuBackend::new()?);
/// let stream = device.stream()?;
/// let rank = Rank { comm: &comm, device: &device, stream: &stream };
/// let mut weights = [Tensor::from_vec(vec![1_f32, -1.0], &[2])?];
/// let options = AdamOptions { learning_rate: 0.5, ..AdamOptions::default() };
/// let mut adam = ShardedAdam::new(&rank, options, &[weights[0].view()])?;
/// adam.step(&rank, &mut weights, &[TensorView::from_slice(&[3_f32, -7.0], &[2])?])?;
/// let values = weights[0].as_slice::<f32>()?;
/// assert!((values[0] - 0.5).abs() < 1e-6 && (values[1] + 0.5).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ShardedAdam {
    options: AdamOptions,
    parameters: Vec<Parameter>,
    /// Elements of each rank.
    counts: Vec<usize>,
    /// This rank.
    rank: usize,
    state: AdamState,
}

/// A parameter among all of them.
#[derive(Debug, PartialEq)]
struct Parameter {
    dtype: DType,
    shape: Vec<usize>,
    /// Its elements among those of all parameters.
    elements: Range<usize>,
}

/// What is the same for all elements in a step.
struct Update {
    options: AdamOptions,
    first_correction: f32,
    second_correction: f32,
    decay: f32,
}

impl ShardedAdam {
    /// A new state for `parameters`, the same on all ranks. Called by all of them.
    ///
    /// # Errors
    /// [`CommError::Setting`] for an option out of range; [`CommError::Counts`] without parameters; [`ProblemError`] for one
    /// that is not of floats; what one rank has is [`CommError::Refused`] on the others, and [`CommError::Mismatch`] when they
    /// differ.
    pub fn new(rank: &Rank<'_>, options: AdamOptions, parameters: &[TensorView<'_>]) -> Result<Self> {
        let mut adam = Self::empty(rank, options, parameters, Ok(()))?;
        for (number, range) in adam.pieces(adam.rank) {
            if adam.parameters[number].dtype != DType::F32 {
                let whole = rank.pack(&parameters[number])?;
                adam.state.master.extend(host::singles(&cut(&whole, range)?)?);
            }
        }
        let count = adam.counts[adam.rank];
        (adam.state.first, adam.state.second) = (vec![0.0; count], vec![0.0; count]);
        Ok(adam)
    }

    /// The state that any number of ranks saved, part `i` by rank `i`, for `parameters` as they were then. Called by all ranks.
    ///
    /// # Errors
    /// As [`ShardedAdam::new`]; [`CommError::Counts`] for parts that are not those of such parameters.
    pub fn from_saved(
        rank: &Rank<'_>,
        options: AdamOptions,
        parameters: &[TensorView<'_>],
        parts: &[AdamState],
    ) -> Result<Self> {
        let fits = numbered(parameters).and_then(|numbered| check_saved(&numbered, parts));
        let mut adam = Self::empty(rank, options, parameters, fits)?;
        let start = adam.counts[..adam.rank].iter().sum::<usize>();
        let own = start..start + adam.counts[adam.rank];
        let masters = halves(&adam.parameters, &(0..own.start))..halves(&adam.parameters, &(0..own.end));
        let taken = |of: fn(&AdamState) -> &Vec<f32>, run: &Range<usize>| {
            parts.iter().flat_map(of).skip(run.start).take(run.len()).copied().collect()
        };
        adam.state = AdamState {
            step: parts.first().map_or(0, |part| part.step),
            first: taken(|part| &part.first, &own),
            second: taken(|part| &part.second, &own),
            master: taken(|part| &part.master, &masters),
        };
        Ok(adam)
    }

    fn empty(rank: &Rank<'_>, options: AdamOptions, parameters: &[TensorView<'_>], fits: Result<()>) -> Result<Self> {
        let numbered = options.check().and(fits).and_then(|()| numbered(parameters));
        let text = numbered.as_ref().map(|numbered| format!("{options:?} {numbered:?}")).map_err(Clone::clone);
        rank.comm.agree("adam", text)?;
        let parameters = numbered?;
        let elements = parameters.last().map_or(0, |last| last.elements.end);
        let (counts, rank) = (near_equal(elements, rank.comm.world_size()), rank.comm.rank());
        Ok(Self { options, parameters, counts, rank, state: AdamState::default() })
    }

    /// This rank's state.
    #[must_use]
    pub fn state(&self) -> &AdamState {
        &self.state
    }

    /// Bytes of this rank's state.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let AdamState { first, second, master, .. } = &self.state;
        (first.capacity() + second.capacity() + master.capacity()) * size_of::<f32>()
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> AdamOptions {
        self.options
    }

    /// Sets the options of the steps to come, the same on all ranks: a learning rate that follows a schedule.
    ///
    /// # Errors
    /// [`CommError::Setting`].
    pub fn set_options(&mut self, options: AdamOptions) -> Result<()> {
        options.check()?;
        self.options = options;
        Ok(())
    }

    /// One step: every rank passes all parameters and its own gradients of them. Called by all ranks.
    ///
    /// # Errors
    /// [`ProblemError`] for tensors that do not fit the parameters, which the other ranks see as [`CommError::Refused`];
    /// [`CommError::Mismatch`] when ranks are at different steps, or have other options; [`CommError::WorldSize`]; what the
    /// device reports. Only what is found before the step begins leaves parameters and state as they were.
    pub fn step(&mut self, rank: &Rank<'_>, parameters: &mut [Tensor], gradients: &[TensorView<'_>]) -> Result<()> {
        let name = "adam_step";
        let checked = self.check(rank, parameters, gradients).map(|()| {
            let dtypes: Vec<DType> = gradients.iter().map(TensorView::dtype).collect();
            format!("{} {:?} {dtypes:?}", self.state.step, self.options)
        });
        rank.comm.agree(name, checked)?;
        let parcels = rank.comm.checked(name, self.parcels(rank, gradients))?;
        let received = rank.comm.exchange(name, "gradients", parcels)?;
        let updated = rank.comm.checked(name, self.update(rank, parameters, &received))?;
        drop(received);
        let runs = rank.comm.exchange(name, "parameters", vec![updated; rank.comm.world_size()])?;
        self.assemble(rank, parameters, runs)
    }

    /// Runs of elements, by parameter, that a rank has.
    fn pieces(&self, of: usize) -> Vec<(usize, Range<usize>)> {
        let start = self.counts[..of].iter().sum::<usize>();
        let own = start..start + self.counts[of];
        let pieces = self.parameters.iter().enumerate().map(|(number, parameter)| {
            let Range { start, end } = parameter.elements;
            let shared = own.start.max(start)..own.end.min(end);
            (number, shared.start.saturating_sub(start)..shared.end.saturating_sub(start))
        });
        pieces.filter(|(_, range)| !range.is_empty()).collect()
    }

    /// Each rank's run of the gradients, to be sent.
    fn parcels(&self, rank: &Rank<'_>, gradients: &[TensorView<'_>]) -> Result<Vec<Parcel>> {
        let mut parcels = vec![Parcel::new(); self.counts.len()];
        let pieces: Vec<_> = (0..self.counts.len()).map(|of| self.pieces(of)).collect();
        for (number, gradient) in gradients.iter().enumerate() {
            let whole = rank.pack(gradient)?;
            for (parcel, pieces) in parcels.iter_mut().zip(&pieces) {
                for (_, range) in pieces.iter().filter(|(of, _)| *of == number) {
                    parcel.push(Arc::new(cut(&whole, range.clone())?));
                }
            }
        }
        Ok(parcels)
    }

    /// Brings this rank's run a step further; gives its parameters, to be sent.
    fn update(&mut self, rank: &Rank<'_>, parameters: &[Tensor], received: &[Parcel]) -> Result<Parcel> {
        self.state.step = self.state.step.saturating_add(1);
        let update = Update::new(self.options, self.state.step);
        let pieces = self.pieces(self.rank);
        let AdamState { first, second, master, .. } = &mut self.state;
        let (mut first, mut second, mut master) = (first.as_mut_slice(), second.as_mut_slice(), master.as_mut_slice());
        let mut updated = Parcel::new();
        for (place, (number, range)) in pieces.into_iter().enumerate() {
            let (dtype, count) = (self.parameters[number].dtype, range.len());
            let gradients = sum(received, place, count)?;
            let mut values = if dtype == DType::F32 {
                host::singles(&cut(&*rank.pack(&parameters[number].view())?, range)?)?
            } else {
                master[..count].to_vec()
            };
            let moments = first.iter_mut().zip(second.iter_mut());
            for ((value, gradient), (first, second)) in values.iter_mut().zip(gradients).zip(moments) {
                *value = update.element(*value, gradient, first, second);
            }
            (first, second) = (&mut first[count..], &mut second[count..]);
            if dtype != DType::F32 {
                master[..count].copy_from_slice(&values);
                master = &mut master[count..];
            }
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            updated.push(Arc::new(Tensor::from_f64(&values, dtype, &[count])?));
        }
        Ok(updated)
    }

    /// Puts the runs of all ranks to their places.
    fn assemble(&self, rank: &Rank<'_>, parameters: &mut [Tensor], runs: Vec<Parcel>) -> Result<()> {
        let mut parts = vec![Parcel::new(); parameters.len()];
        for (of, run) in runs.into_iter().enumerate() {
            for ((number, _), part) in self.pieces(of).into_iter().zip(run) {
                parts[number].push(part);
            }
        }
        for ((tensor, parameter), parts) in parameters.iter_mut().zip(&self.parameters).zip(parts) {
            let whole = host::join(&parts, parameter.dtype, &parameter.shape)?;
            rank.copy(rank.unpack(Arc::new(whole))?.view(), tensor.view_mut())?;
        }
        Ok(())
    }

    fn check(&self, rank: &Rank<'_>, parameters: &[Tensor], gradients: &[TensorView<'_>]) -> Result<()> {
        let (what, expected, got) = ("optimizer", self.counts.len(), rank.comm.world_size());
        if expected != got || self.rank != rank.comm.rank() {
            return Err(CommError::WorldSize { what, expected, got }.into());
        }
        for (list, got) in [("parameters", parameters.len()), ("gradients", gradients.len())] {
            if got != self.parameters.len() {
                let expected = self.parameters.len().to_string();
                return Err(ProblemError::Length { list, expected, got }.into());
            }
        }
        for ((parameter, tensor), gradient) in self.parameters.iter().zip(parameters).zip(gradients) {
            crate::shape::exact("parameter", &tensor.view(), &parameter.shape, parameter.dtype)?;
            check_float("gradient", gradient.dtype())?;
            crate::shape::exact("gradient", gradient, &parameter.shape, gradient.dtype())?;
        }
        Ok(())
    }
}

impl AdamOptions {
    fn check(&self) -> Result<()> {
        let is_share = |value: f32| (0.0..1.0).contains(&value);
        let is_size = |value: f32| value >= 0.0 && value.is_finite();
        let settings = [
            ("learning_rate", self.learning_rate, "a number from 0", is_size(self.learning_rate)),
            ("beta1", self.beta1, "a number from 0 to below 1", is_share(self.beta1)),
            ("beta2", self.beta2, "a number from 0 to below 1", is_share(self.beta2)),
            ("epsilon", self.epsilon, "a number above 0", self.epsilon > 0.0 && self.epsilon.is_finite()),
            ("weight_decay", self.weight_decay, "a number from 0", is_size(self.weight_decay)),
            ("gradient_scale", self.gradient_scale, "a finite number", self.gradient_scale.is_finite()),
        ];
        for (parameter, got, expected, is_fine) in settings {
            if !is_fine {
                return Err(CommError::Setting { parameter, expected, got: f64::from(got) }.into());
            }
        }
        Ok(())
    }
}

impl Update {
    fn new(options: AdamOptions, step: u32) -> Self {
        let correction = |beta: f32| single(1.0 - f64::from(beta).powf(f64::from(step)));
        let decay = 1.0 - options.learning_rate * options.weight_decay;
        let (first_correction, second_correction) = (correction(options.beta1), correction(options.beta2));
        Self { options, first_correction, second_correction, decay }
    }

    fn element(&self, value: f32, gradient: f32, first: &mut f32, second: &mut f32) -> f32 {
        let AdamOptions { learning_rate, beta1, beta2, epsilon, gradient_scale, .. } = self.options;
        let gradient = gradient * gradient_scale;
        *first = beta1 * *first + (1.0 - beta1) * gradient;
        *second = beta2 * *second + (1.0 - beta2) * (gradient * gradient);
        let (mean, square) = (*first / self.first_correction, *second / self.second_correction);
        value * self.decay - learning_rate * (mean / (square.sqrt() + epsilon))
    }
}

/// An f64 rounded to f32.
fn single(value: f64) -> f32 {
    tilefold_core::Element::from_f64(value)
}

/// The sum of one piece of all ranks' gradients, in their order, in f32.
fn sum(received: &[Parcel], place: usize, count: usize) -> Result<Vec<f32>> {
    let missing = ProblemError::Missing { tensor: "gradient", reason: "every rank sends its part" };
    let mut parts = received.iter().map(|parcel| parcel.get(place).ok_or_else(|| missing.clone()));
    let Some(first) = parts.next() else { return Ok(vec![0.0; count]) };
    let mut sum = host::singles(first?)?;
    for part in parts {
        sum.iter_mut().zip(host::singles(part?)?).for_each(|(sum, value)| *sum += value);
    }
    Ok(sum)
}

/// Consecutive elements of a row-major host tensor.
fn cut(whole: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let (size, view) = (whole.dtype().size_bytes(), whole.view());
    let bytes = view.as_bytes()?.get(range.start * size..range.end * size).unwrap_or_default();
    host::tensor(bytes, whole.dtype(), &[range.len()])
}

fn numbered(parameters: &[TensorView<'_>]) -> Result<Vec<Parameter>> {
    if parameters.is_empty() {
        let (expected, got) = ("at least one".into(), "none".into());
        return Err(CommError::Counts { list: "parameters", expected, got }.into());
    }
    let mut start = 0_usize;
    let numbered = parameters.iter().map(|view| {
        check_float("parameter", view.dtype())?;
        let end = start.checked_add(view.layout().len());
        let end = end.ok_or(ProblemError::Overflow { tensor: "parameters", quantity: "number of elements" })?;
        let elements = std::mem::replace(&mut start, end)..end;
        Ok(Parameter { dtype: view.dtype(), shape: view.shape().to_vec(), elements })
    });
    numbered.collect()
}

fn check_float(tensor: &'static str, got: DType) -> Result<()> {
    if matches!(got, DType::F32 | DType::F16 | DType::BF16) {
        return Ok(());
    }
    let expected = "f32, f16 or bf16".into();
    Err(ProblemError::UnsupportedDType { tensor, expected, got }.into())
}

/// How many of these elements are in half precision.
fn halves(parameters: &[Parameter], run: &Range<usize>) -> usize {
    let halves = parameters.iter().filter(|parameter| parameter.dtype != DType::F32);
    halves.map(|Parameter { elements, .. }| (run.start.max(elements.start)..run.end.min(elements.end)).len()).sum()
}

/// Whether saved parts are those of these parameters.
fn check_saved(parameters: &[Parameter], parts: &[AdamState]) -> Result<()> {
    let list = "parts";
    let Some(first) = parts.first() else {
        let (expected, got) = ("one for each rank that saved".into(), "none".into());
        return Err(CommError::Counts { list, expected, got }.into());
    };
    let elements = parameters.last().map_or(0, |last| last.elements.end);
    let counts = near_equal(elements, parts.len());
    let starts = counts.iter().scan(0, |next, count| Some(std::mem::replace(next, *next + count)));
    for ((part, (start, count)), rank) in iter::zip(parts, starts.zip(&counts)).zip(0..) {
        let masters = halves(parameters, &(start..start + count));
        let expected = (first.step, *count, *count, masters);
        let got = (part.step, part.first.len(), part.second.len(), part.master.len());
        if expected != got {
            let text = |(step, first, second, master): (u32, usize, usize, usize)| {
                format!("part {rank} at step {step} with {first} first, {second} second moments and {master} masters")
            };
            return Err(CommError::Counts { list, expected: text(expected), got: text(got) }.into());
        }
    }
    Ok(())
}
