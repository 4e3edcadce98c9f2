//! What every rank does, in step with the others.

use std::time::Instant;

use anyhow::{Result, bail};
use tilefold::comm::{Partition, Rank, Reduction};
use tilefold::{Backend, Device, Tensor};
use tilefold_models::genslm::{Adam, Config, MlpKind, Model, Parameters, Positions, Tokens, VOCABULARY};

use super::compare::{self, Point};
use super::memory::Growth;
use super::report::{Report, Row};
use crate::output::{as_f64, bytes, digits, say};

/// Seed of the weights before training.
const SEED: u64 = 20_240_229;

/// What is to be done, the same on every rank.
#[derive(Debug)]
pub(super) struct Job<'t> {
    pub(super) config: Config,
    pub(super) tokens: &'t Tokens,
    pub(super) file: String,
    pub(super) steps: usize,
    pub(super) rate: f32,
    pub(super) compares: bool,
    /// Whether text is printed on the way.
    pub(super) says: bool,
}

/// What a number of ranks found.
#[derive(Debug)]
pub(super) struct Evaluated {
    pub(super) row: Row,
    /// Loss and all gradients, before and after training.
    pub(super) points: Vec<Point>,
}

impl Job<'_> {
    /// Refuses a model that host memory cannot hold, whatever is split over ranks: every rank has all weights twice, from before
    /// training and from after it, and its part of weights, gradients and Adam's state. An allocation that fails would end
    /// the program.
    pub(super) fn check_fits(&self, ranks_here: usize) -> Result<()> {
        let is_split = self.config.mlp == MlpKind::Tensor || self.config.positions == Positions::Learned;
        let own = if is_split { 0 } else { STATE_BYTES };
        let needed = self.config.weights() * as_f64(2 * size_of::<f32>() + own) * as_f64(ranks_here);
        let there = Device::cpu()?.info().memory_bytes;
        if there > 0 && needed > as_f64(there) {
            bail!(
                "{} weights on the ranks of this process need {} of host memory at least, and there are {}; use a smaller --hidden, \
                 fewer --layers, or fewer ranks",
                digits(self.config.weights()),
                bytes(needed),
                bytes(as_f64(there)),
            );
        }
        Ok(())
    }

    /// Trains over all ranks, then holds them against fewer. The report is rank 0's.
    pub(super) fn run(&self, rank: Rank<'_>, slot: usize) -> Result<Option<Report>> {
        let ranks = rank.comm.world_size();
        let is_first = rank.comm.rank() == 0;
        let before = Parameters::new(&self.config, SEED);
        let mut report = Report::new(self, ranks, before.count(), rank.device.info());
        if is_first && self.says {
            say(&report.head())?;
        }
        let after = self.train(rank, &before, &mut report)?;
        let weights = [before, after];
        let mut counts = if self.compares { vec![1, 2] } else { Vec::new() };
        counts.retain(|&count| count < ranks);
        counts.push(ranks);
        let mut found = Vec::new();
        for count in counts {
            let partition = Partition::zigzag(self.config.seqlen, count)?;
            found.extend(self.evaluate_over(rank, slot, count, partition, &weights)?);
        }
        let mut other_order = None;
        if self.compares {
            let partition = backwards(self.config.seqlen, ranks)?;
            other_order = self.evaluate_over(rank, slot, 1, partition, &weights)?;
        }
        if !is_first {
            return Ok(None);
        }
        compare::judge(&mut report, found, other_order);
        Ok(Some(report))
    }

    /// Steps over all ranks; the weights they lead to, whole, on every rank.
    fn train(&self, rank: Rank<'_>, before: &Parameters, report: &mut Report) -> Result<Parameters> {
        let partition = Partition::zigzag(self.config.seqlen, rank.comm.world_size())?;
        let model = Model::new(rank, self.config.clone(), partition)?;
        let mut weights = model.scatter(before)?;
        let mut adam = Adam::new(&weights, self.rate);
        for step in 0..self.steps {
            let start = Instant::now();
            let tokens = self.tokens.windows(step * self.config.batch, self.config.batch, self.config.seqlen)?;
            let (loss, gradients) = model.loss_and_gradients(&weights, &tokens)?;
            adam.update(&mut weights, &gradients)?;
            report.losses.push(loss);
            if self.says && rank.comm.rank() == 0 {
                let seconds = start.elapsed().as_secs_f64();
                say(&format!("step {:>3}   loss {loss:.5}   {seconds:.2} s", step + 1))?;
            }
        }
        Ok(model.gather(&weights)?)
    }

    /// The first `count` ranks evaluate, the others wait. What they found is rank 0's.
    fn evaluate_over(
        &self,
        rank: Rank<'_>,
        slot: usize,
        count: usize,
        partition: Partition,
        weights: &[Parameters],
    ) -> Result<Option<Evaluated>> {
        let is_member = rank.comm.rank() < count;
        let group = rank.comm.split(u32::from(is_member), 0)?;
        if !is_member {
            return Ok(None);
        }
        let model = Model::new(Rank { comm: &group, ..rank }, self.config.clone(), partition)?;
        let evaluated = self.evaluate(&model, slot, weights)?;
        Ok((group.rank() == 0).then_some(evaluated))
    }

    /// Loss and gradients of the genome's first sequences, with each of the weights.
    fn evaluate(&self, model: &Model<'_>, slot: usize, weights: &[Parameters]) -> Result<Evaluated> {
        let tokens = self.tokens.windows(0, self.config.batch, self.config.seqlen)?;
        let (mut points, mut measured) = (Vec::new(), [0_f32; 4]);
        for whole in weights {
            let training = Growth::of(slot);
            let own = model.scatter(whole)?;
            // Only to be counted: nothing is updated here.
            let adam = Adam::new(&own, self.rate);
            let (sent, step, start) = (model.bytes_sent(), Growth::of(slot), Instant::now());
            let (loss, gradients) = model.loss_and_gradients(&own, &tokens)?;
            let seconds = start.elapsed().as_secs_f32();
            let (state, activations) = (training.bytes(), step.peak_bytes().saturating_sub(step.bytes()));
            drop(adam);
            measured = [activations as f32, state as f32, (model.bytes_sent() - sent) as f32, seconds];
            points.push(Point { loss, gradients: model.gather(&gradients)? });
        }
        let comm = model.rank().comm;
        let largest = comm.all_reduce(&Tensor::from_vec(measured.to_vec(), &[4])?.view(), Reduction::Max)?;
        let &[activations, state, sent, seconds] = largest.as_slice::<f32>()? else {
            anyhow::bail!("the ranks' measurements got lost")
        };
        let losses = points.iter().map(|point| point.loss).collect();
        let row = Row {
            ranks: comm.world_size(),
            activation_bytes: activations.into(),
            state_bytes: state.into(),
            bytes_sent: sent.into(),
            seconds: seconds.into(),
            losses,
            difference: None,
            of_tolerance: None,
            worst: None,
        };
        Ok(Evaluated { row, points })
    }
}

/// Weight, gradient, and Adam's two means.
const STATE_BYTES: usize = 4 * size_of::<f32>();

/// One rank that holds the chunks of `ranks` ranks from the last to the first: sums over tokens have another order, and
/// attention is merged from other pieces.
fn backwards(seqlen: usize, ranks: usize) -> tilefold::comm::Result<Partition> {
    let parts = Partition::zigzag(seqlen, ranks)?;
    let mut chunks: Vec<_> = (0..ranks).flat_map(|rank| parts.chunks(rank).to_vec()).collect();
    chunks.sort_unstable_by_key(|chunk| std::cmp::Reverse(chunk.start));
    Partition::new(seqlen, vec![chunks])
}

impl Job<'_> {
    /// One line on the model.
    pub(super) fn model(&self, weights: usize) -> String {
        let Config { layers, hidden, heads, seqlen, batch, positions, attention, mlp, .. } = &self.config;
        format!(
            "{layers} layers, {hidden} channels, {heads} heads, vocabulary {VOCABULARY}, {weights} weights; {batch} x {seqlen} codons a \
             step; {positions:?} positions, {attention:?} attention, {mlp:?} MLP"
        )
    }
}
