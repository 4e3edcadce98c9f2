//! The layers put together: the loss of a step and all gradients, over ranks.
//!
//! ```text
//! x = embedding[token] (+ position)
//! each layer:  x += attention(rope(norm(x) · query), rope(norm(x) · key), norm(x) · value) · output
//!              x += gelu(norm(x) · up) · down
//! loss = cross-entropy(norm(x) · embeddingᵀ, next token)
//! ```

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, array};
use tilefold::Tensor;
use tilefold::comm::sequence_parallel::maps::{Copy, Gather, Map, Reduce, Scatter, Split};
use tilefold::comm::sequence_parallel::position::PositionTable;
use tilefold::comm::{Partition, Rank};

use super::attention::{Attention, Kept as AttentionKept, bytes_sent};
use super::config::{Config, MlpKind};
use super::error::{Error, Result};
use super::host::apply;
use super::loss::tied_cross_entropy;
use super::mlp::Mlp;
use super::norm;
use super::parameters::{LayerParameters, Parameters, Part};
use super::tokens::VOCABULARY;

/// One rank's end of a model whose sequence is split over ranks.
///
/// *Memory*: a rank keeps, of each layer, seven matrices `[batch · tokens of this rank, hidden]` and one
/// `[.., mlp_hidden]`, whatever the length of the whole sequence; with [`MlpKind::Tensor`] two `[batch · seqlen, hidden]` are
/// there for a moment. *Determinism*: the same bits on every run with the same partition.
#[derive(Debug)]
pub struct Model<'r> {
    rank: Rank<'r>,
    config: Config,
    partition: Partition,
    /// Positions of this rank's tokens.
    places: Vec<usize>,
    attention: Attention,
    mlp: Mlp,
}

/// What a layer's backward pass needs.
struct Kept {
    /// Before attention, and before the MLP.
    x: [Array2<f32>; 2],
    attention: AttentionKept,
    /// The MLP's channels before the gelu.
    mlp: Array2<f32>,
}

impl<'r> Model<'r> {
    /// Checks sizes against each other and against the partition of the sequence. Called by all ranks of `rank.comm`.
    ///
    /// # Errors
    /// [`Error::Config`]; what [`tilefold::comm`] says of the partition.
    pub fn new(rank: Rank<'r>, config: Config, partition: Partition) -> Result<Self> {
        config.check()?;
        let (expected, got) = (rank.comm.world_size(), partition.ranks());
        if expected != got {
            let (field, expected) = ("partition", format!("one over {expected} ranks"));
            return Err(Error::Config { field, expected, got: got.to_string() });
        }
        let attention = Attention::new(&rank, &config, &partition)?;
        let places: Vec<usize> = partition.positions(rank.comm.rank()).collect();
        let mlp = Mlp::new(&rank, &config, &partition);
        let model = Self { rank, config, partition, places, attention, mlp };
        model.mlp_split(0)?;
        Ok(model)
    }

    /// The rank this is an end of.
    #[must_use]
    pub fn rank(&self) -> Rank<'r> {
        self.rank
    }

    /// Bytes this rank has sent to others since its communicator was made.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        bytes_sent(self.rank.comm) + self.attention.bytes_sent()
    }

    /// This rank's part of all weights.
    ///
    /// # Errors
    /// [`Error::Config`] for weights of another model; those of [`tilefold::comm`].
    pub fn scatter(&self, whole: &Parameters) -> Result<Parameters> {
        self.check(whole, |_, size| size)?;
        self.with_split(whole, |split, array| {
            let shape = array.shape().to_vec();
            apply(&self.rank, &Scatter(split), array, &shape)
        })
    }

    /// All weights, or gradients, from each rank's part of them. Called by all ranks.
    ///
    /// # Errors
    /// As [`Model::scatter`].
    pub fn gather(&self, part: &Parameters) -> Result<Parameters> {
        self.check_own(part)?;
        self.with_split(part, |split, array| {
            let shape = array.shape().to_vec();
            apply(&self.rank, &Gather(split), array, &shape)
        })
    }

    /// The mean loss over all tokens, and its gradients with respect to this rank's part of the weights; those of what every
    /// rank holds are summed over ranks. Called by all ranks with the same tokens: `batch` sequences of `seqlen + 1`, of which
    /// each but the first is to be predicted from those before it.
    ///
    /// # Errors
    /// [`Error::Config`] for weights of another model or rank, another number of tokens, or one beyond the vocabulary; what [`tilefold::comm`] reports.
    pub fn loss_and_gradients(&self, parameters: &Parameters, tokens: &[u32]) -> Result<(f32, Parameters)> {
        self.check_own(parameters)?;
        let (inputs, targets) = self.own(tokens)?;
        let mut gradients = parameters.zeros_like();
        let mut x = self.embed(parameters, &inputs)?;
        let mut kept = Vec::with_capacity(parameters.layers.len());
        for layer in &parameters.layers {
            let (next, of_layer) = self.layer(layer, x)?;
            kept.push(of_layer);
            x = next;
        }
        let y = norm::forward(&x, &parameters.final_gain);
        let (count, embedding) = (self.config.tokens(), &parameters.embedding);
        let (loss, dy) = tied_cross_entropy(&y, embedding, &targets, count, &mut gradients.embedding);
        drop(y);
        let mut dx = norm::backward(&x, &parameters.final_gain, &dy, &mut gradients.final_gain);
        drop((x, dy));
        for (layer, of_layer) in parameters.layers.iter().zip(&mut gradients.layers).rev() {
            let Some(kept) = kept.pop() else { break };
            dx = self.layer_backward(layer, kept, dx, of_layer)?;
        }
        self.embed_backward(parameters, &inputs, dx, &mut gradients)?;
        self.sum_over_ranks(&mut gradients)?;
        let loss = apply(&self.rank, &Reduce, array![[loss]], &[1, 1])?;
        Ok((loss[[0, 0]], gradients))
    }

    /// This rank's tokens, and what follows each.
    fn own(&self, tokens: &[u32]) -> Result<(Vec<usize>, Vec<u32>)> {
        let (length, expected) = (self.config.seqlen + 1, self.config.batch * (self.config.seqlen + 1));
        let wrong = |expected: String, got: String| Error::Config { field: "tokens", expected, got };
        if tokens.len() != expected {
            return Err(wrong(format!("{expected} tokens"), tokens.len().to_string()));
        }
        let mut inputs = Vec::new();
        for &token in tokens {
            let index = usize::try_from(token).ok().filter(|&token| token < VOCABULARY);
            inputs.push(index.ok_or_else(|| wrong(format!("tokens below {VOCABULARY}"), token.to_string()))?);
        }
        let at = |sequence: usize| self.places.iter().map(move |place| sequence * length + place);
        let places = || (0..self.config.batch).flat_map(at);
        Ok((places().map(|place| inputs[place]).collect(), places().map(|place| tokens[place + 1]).collect()))
    }

    fn embed(&self, parameters: &Parameters, tokens: &[usize]) -> Result<Array2<f32>> {
        let mut x = parameters.embedding.select(ndarray::Axis(0), tokens);
        if let Some(rows) = &parameters.positions {
            let found = self.table(rows)?.lookup(self.rank.comm, &self.places)?;
            let found = ndarray::aview1(found.as_slice::<f32>()?).into_shape_with_order(self.table_shape())?;
            for mut sequence in x.axis_chunks_iter_mut(ndarray::Axis(0), self.places.len()) {
                sequence += &found;
            }
        }
        Ok(x)
    }

    fn embed_backward(
        &self,
        parameters: &Parameters,
        tokens: &[usize],
        dx: Array2<f32>,
        gradients: &mut Parameters,
    ) -> Result<()> {
        for (dx, &token) in dx.rows().into_iter().zip(tokens) {
            let mut row = gradients.embedding.row_mut(token);
            row += &dx;
        }
        if let (Some(rows), Some(gradient)) = (&parameters.positions, &mut gradients.positions) {
            let mut sum = Array2::<f32>::zeros(self.table_shape());
            for sequence in dx.axis_chunks_iter(ndarray::Axis(0), self.places.len()) {
                sum += &sequence;
            }
            let sum = Tensor::from_vec(sum.into_raw_vec_and_offset().0, &self.table_shape())?;
            let own = self.table(rows)?.gradient(self.rank.comm, &self.places, &sum.view())?;
            let own = ndarray::aview1(own.as_slice::<f32>()?).into_shape_with_order(gradient.raw_dim())?;
            gradient.assign(&own);
        }
        Ok(())
    }

    /// The positions' table, of which this rank has a run of rows; its tokens may stand elsewhere.
    fn table(&self, rows: &Array2<f32>) -> Result<PositionTable> {
        let shape = [rows.nrows(), rows.ncols()];
        let elements = rows.iter().copied().collect();
        let partition = self.table_split()?.partition;
        Ok(PositionTable::new(self.rank.comm, partition, Tensor::from_vec(elements, &shape)?)?)
    }

    /// Rows of this rank's tokens.
    fn table_shape(&self) -> [usize; 2] {
        [self.places.len(), self.config.hidden]
    }

    fn layer(&self, weights: &LayerParameters, x: Array2<f32>) -> Result<(Array2<f32>, Kept)> {
        let rank = &self.rank;
        let a = norm::forward(&x, &weights.attention_gain);
        let qkv = [a.dot(&weights.query), a.dot(&weights.key), a.dot(&weights.value)];
        drop(a);
        let (out, attention) = self.attention.forward(rank, qkv)?;
        let middle = &x + &out.dot(&weights.output);
        drop(out);
        let m = norm::forward(&middle, &weights.mlp_gain);
        let (y, mlp) = self.mlp.forward(rank, weights, m)?;
        Ok((y + &middle, Kept { x: [x, middle], attention, mlp }))
    }

    fn layer_backward(
        &self,
        weights: &LayerParameters,
        kept: Kept,
        dy: Array2<f32>,
        gradients: &mut LayerParameters,
    ) -> Result<Array2<f32>> {
        let (rank, Kept { x: [x, middle], attention, mlp }) = (&self.rank, kept);
        let m = norm::forward(&middle, &weights.mlp_gain);
        let dm = self.mlp.backward(rank, weights, (m, mlp), dy.clone(), gradients)?;
        let d_middle = dy + norm::backward(&middle, &weights.mlp_gain, &dm, &mut gradients.mlp_gain);
        drop((middle, dm));
        let out = self.attention.out(rank, &attention)?;
        general_mat_mul(1.0, &out.t(), &d_middle, 1.0, &mut gradients.output);
        drop(out);
        let d_qkv = self.attention.backward(rank, &attention, d_middle.dot(&weights.output.t()))?;
        drop(attention);
        let a = norm::forward(&x, &weights.attention_gain);
        let mut da = Array2::zeros(a.raw_dim());
        let matrices = [&weights.query, &weights.key, &weights.value];
        let sums = [&mut gradients.query, &mut gradients.key, &mut gradients.value];
        for ((d, weights), sum) in d_qkv.into_iter().zip(matrices).zip(sums) {
            general_mat_mul(1.0, &a.t(), &d, 1.0, sum);
            general_mat_mul(1.0, &d, &weights.t(), 1.0, &mut da);
        }
        Ok(d_middle + norm::backward(&x, &weights.attention_gain, &da, &mut gradients.attention_gain))
    }

    /// Every rank uses all of a replicated weight for its own tokens, [`Copy`]: gradients are summed over ranks. A weight
    /// that is split has its whole gradient already.
    fn sum_over_ranks(&self, gradients: &mut Parameters) -> Result<()> {
        let names = gradients.names();
        for ((_, part), gradient) in names.into_iter().zip(gradients.arrays_mut()) {
            if self.split(part)?.is_none() {
                let shape = gradient.shape().to_vec();
                *gradient = apply(&self.rank, &Copy.adjoint(), std::mem::take(gradient), &shape)?;
            }
        }
        Ok(())
    }

    /// `change` applied to each weight that is split.
    fn with_split(
        &self,
        parameters: &Parameters,
        change: impl Fn(Split, Array2<f32>) -> Result<Array2<f32>>,
    ) -> Result<Parameters> {
        let mut changed = parameters.clone();
        for ((_, part), array) in parameters.names().into_iter().zip(changed.arrays_mut()) {
            if let Some(split) = self.split(part)? {
                *array = change(split, std::mem::take(array))?;
            }
        }
        Ok(changed)
    }

    /// Whether these are this rank's part of the model's weights.
    fn check_own(&self, parameters: &Parameters) -> Result<()> {
        self.check(parameters, |split, _| split.partition.count(self.rank.comm.rank()))
    }

    /// Whether each weight has its shape, where `held` says how much there is of an axis that is split.
    fn check(&self, parameters: &Parameters, held: impl Fn(&Split, usize) -> usize) -> Result<()> {
        let (names, shapes) = (parameters.names(), Parameters::shapes(&self.config));
        let wrong = |expected, got| Err(Error::Config { field: "parameters", expected, got });
        if names.len() != shapes.len() {
            return wrong(format!("{} weights", shapes.len()), names.len().to_string());
        }
        for (((name, part), mut expected), array) in names.into_iter().zip(shapes).zip(parameters.arrays()) {
            if let Some(split) = self.split(part)? {
                expected[split.axis] = held(&split, expected[split.axis]);
            }
            if array.shape() != expected {
                return wrong(format!("{name} {expected:?}"), format!("{:?}", array.shape()));
            }
        }
        Ok(())
    }

    /// How a weight is split over ranks.
    fn split(&self, part: Part) -> Result<Option<Split>> {
        match part {
            Part::Whole => Ok(None),
            Part::Positions => Ok(Some(self.table_split()?)),
            Part::MlpColumns => self.mlp_split(1),
            Part::MlpRows => self.mlp_split(0),
        }
    }

    fn table_split(&self) -> Result<Split> {
        Ok(Split::contiguous(0, self.config.seqlen, self.partition.ranks())?)
    }

    fn mlp_split(&self, axis: usize) -> Result<Option<Split>> {
        let split = || Split::contiguous(axis, self.config.mlp_hidden, self.partition.ranks());
        Ok((self.config.mlp == MlpKind::Tensor).then(split).transpose()?)
    }
}

/// The mean of loss and gradients over replicas: groups of ranks that each have other sequences, as many, of which `replicas`
/// connects those with the same part of the weights. Called by all of them.
///
/// # Errors
/// Those of [`tilefold::comm`].
pub fn mean_over_replicas(replicas: &Rank<'_>, loss: f32, mut gradients: Parameters) -> Result<(f32, Parameters)> {
    let share = 1.0 / replicas.comm.world_size() as f32;
    for gradient in gradients.arrays_mut() {
        let shape = gradient.shape().to_vec();
        *gradient = apply(replicas, &Reduce, std::mem::take(gradient), &shape)? * share;
    }
    let loss = apply(replicas, &Reduce, array![[loss]], &[1, 1])?;
    Ok((loss[[0, 0]] * share, gradients))
}
