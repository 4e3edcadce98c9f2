//! The weights, and which of them are split over ranks.

use ndarray::Array2;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::config::{Config, Positions};
use super::tokens::VOCABULARY;

/// Standard deviation of weights before training.
const SPREAD: f32 = 0.02;

/// All weights, or one rank's part of them; their gradients have the same type.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// `[vocabulary, hidden]`, which also gives the logits.
    pub(super) embedding: Array2<f32>,
    /// `[positions, hidden]`, with learned positions.
    pub(super) positions: Option<Array2<f32>>,
    pub(super) layers: Vec<LayerParameters>,
    /// `[1, hidden]`.
    pub(super) final_gain: Array2<f32>,
}

/// The weights of one layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerParameters {
    /// `[1, hidden]`.
    pub(super) attention_gain: Array2<f32>,
    /// `[hidden, hidden]` each.
    pub(super) query: Array2<f32>,
    pub(super) key: Array2<f32>,
    pub(super) value: Array2<f32>,
    pub(super) output: Array2<f32>,
    /// `[1, hidden]`.
    pub(super) mlp_gain: Array2<f32>,
    /// `[hidden, mlp_hidden]`.
    pub(super) up: Array2<f32>,
    /// `[mlp_hidden, hidden]`.
    pub(super) down: Array2<f32>,
}

/// What of a weight a rank may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it: every rank has the same.
    Whole,
    /// Rows of its own positions.
    Positions,
    /// Columns of its own hidden channels of the MLP.
    MlpColumns,
    /// Rows of its own hidden channels of the MLP.
    MlpRows,
}

impl Parameters {
    /// Weights to start from, the same for the same seed, whatever the number of ranks.
    #[must_use]
    pub fn new(config: &Config, seed: u64) -> Self {
        let mut source = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = |rows: usize, columns: usize, spread: f32| {
            Array2::from_shape_simple_fn((rows, columns), || {
                let sample: f32 = StandardNormal.sample(&mut source);
                spread * sample
            })
        };
        let (hidden, mlp_hidden) = (config.hidden, config.mlp_hidden);
        // What is added to the residual stream starts smaller, so that its size does not grow with depth.
        let small = SPREAD / (2.0 * config.layers as f32).sqrt();
        let gain = || Array2::ones((1, hidden));
        let embedding = normal(VOCABULARY, hidden, SPREAD);
        let positions = (config.positions == Positions::Learned).then(|| normal(config.seqlen, hidden, SPREAD));
        let mut layer = || LayerParameters {
            attention_gain: gain(),
            query: normal(hidden, hidden, SPREAD),
            key: normal(hidden, hidden, SPREAD),
            value: normal(hidden, hidden, SPREAD),
            output: normal(hidden, hidden, small),
            mlp_gain: gain(),
            up: normal(hidden, mlp_hidden, SPREAD),
            down: normal(mlp_hidden, hidden, small),
        };
        let layers = (0..config.layers).map(|_| layer()).collect();
        Self { embedding, positions, layers, final_gain: gain() }
    }

    /// Zeros of the same shapes.
    #[must_use]
    pub fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        zeros.arrays_mut().into_iter().for_each(|array| array.fill(0.0));
        zeros
    }

    /// The name of each weight, and what of it a rank may hold, in the order of [`Parameters::arrays`].
    #[must_use]
    pub fn names(&self) -> Vec<(String, Part)> {
        let layer = |number: usize| {
            let parts = [
                ("attention_gain", Part::Whole),
                ("query", Part::Whole),
                ("key", Part::Whole),
                ("value", Part::Whole),
                ("output", Part::Whole),
                ("mlp_gain", Part::Whole),
                ("up", Part::MlpColumns),
                ("down", Part::MlpRows),
            ];
            parts.map(|(name, part)| (format!("layer{number}.{name}"), part))
        };
        let first = std::iter::once(("embedding".to_owned(), Part::Whole));
        let positions = self.positions.iter().map(|_| ("positions".to_owned(), Part::Positions));
        let layers = (0..self.layers.len()).flat_map(layer);
        first.chain(positions).chain(layers).chain([("final_gain".to_owned(), Part::Whole)]).collect()
    }

    /// The shape of each weight of a model, in the same order.
    pub(super) fn shapes(config: &Config) -> Vec<[usize; 2]> {
        let (hidden, mlp_hidden) = (config.hidden, config.mlp_hidden);
        let (gain, square) = ([1, hidden], [hidden; 2]);
        let mut shapes = vec![[VOCABULARY, hidden]];
        shapes.extend((config.positions == Positions::Learned).then_some([config.seqlen, hidden]));
        for _ in 0..config.layers {
            shapes.extend([gain, square, square, square, square, gain, [hidden, mlp_hidden], [mlp_hidden, hidden]]);
        }
        shapes.push(gain);
        shapes
    }

    /// Each weight.
    #[must_use]
    pub fn arrays(&self) -> Vec<&Array2<f32>> {
        let mut arrays = vec![&self.embedding];
        arrays.extend(&self.positions);
        for layer in &self.layers {
            arrays.extend([&layer.attention_gain, &layer.query, &layer.key, &layer.value, &layer.output]);
            arrays.extend([&layer.mlp_gain, &layer.up, &layer.down]);
        }
        arrays.push(&self.final_gain);
        arrays
    }

    /// Each weight, to be changed.
    #[must_use]
    pub fn arrays_mut(&mut self) -> Vec<&mut Array2<f32>> {
        let mut arrays = vec![&mut self.embedding];
        arrays.extend(&mut self.positions);
        for layer in &mut self.layers {
            arrays.extend([&mut layer.attention_gain, &mut layer.query, &mut layer.key, &mut layer.value]);
            arrays.extend([&mut layer.output, &mut layer.mlp_gain, &mut layer.up, &mut layer.down]);
        }
        arrays.push(&mut self.final_gain);
        arrays
    }

    /// How many numbers there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.arrays().into_iter().map(Array2::len).sum()
    }
}
