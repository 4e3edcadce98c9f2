//! Cases whose sequence, or rows, are split over ranks, each rank a thread with a part of the operands on the device under
//! test: results are put together and held against the same oracle as those of one device.

use std::sync::Arc;

use tilefold::comm::{
    AxialAttention, Communicator, Partition, Rank, RingAttention, Shard, ShardBackward, ShardForward, SharedBias,
    UlyssesAttention, on_threads,
};
use tilefold_core::{AttentionProblem, AttentionSpec, Backend, BiasSpec, EmptyRows, Tensor};

use crate::buffer::Downloaded;
use crate::case::Case;
use crate::exchange::Results;
use crate::oracle::Expected;
use crate::suite::Trial;
use crate::values::{Host, Inputs};

/// How a sequence is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// One run of positions for each rank.
    Contiguous,
    /// One run from the front and one from the back.
    Zigzag,
    /// Ranks hold very different numbers of positions.
    Uneven,
}

impl Cut {
    /// The partition; none when a rank would be left without positions.
    fn of(self, seqlen: usize, ranks: usize) -> Option<Partition> {
        let partition = match self {
            Self::Contiguous => Partition::contiguous(seqlen, ranks),
            Self::Zigzag => Partition::zigzag(seqlen, ranks),
            Self::Uneven => {
                // One position for each rank, and of the rest half to the last, a quarter to the one before ...
                let mut counts = vec![1; ranks];
                let mut rest = seqlen.checked_sub(ranks)?;
                for count in counts.iter_mut().skip(1).rev() {
                    *count += rest.div_ceil(2);
                    rest -= rest.div_ceil(2);
                }
                counts[0] += rest;
                let mut start = 0;
                let chunks = counts.iter().map(|count| {
                    start += count;
                    std::iter::once(start - count..start).collect()
                });
                Partition::new(seqlen, chunks.collect())
            }
        };
        partition.ok()
    }
}

/// Who computes what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Keys travel.
    Ring,
    /// So many ranks split heads; the groups stand in a ring.
    Ulysses(usize),
    /// Rows are split.
    Axial(SharedBias),
}

/// How a case is computed by ranks.
#[derive(Clone, Copy, Debug)]
struct Way {
    ranks: usize,
    method: Method,
    cut: Cut,
}

const GATHERED: Method = Method::Axial(SharedBias::Gathered);
const TRAVELLING: Method = Method::Axial(SharedBias::Travelling);

/// Each case takes its turn.
#[rustfmt::skip]
const WAYS: [Way; 21] = [
    Way { ranks: 2, method: Method::Ring, cut: Cut::Contiguous },
    Way { ranks: 2, method: Method::Ulysses(2), cut: Cut::Contiguous },
    Way { ranks: 3, method: TRAVELLING, cut: Cut::Contiguous },
    Way { ranks: 3, method: Method::Ring, cut: Cut::Zigzag },
    Way { ranks: 3, method: Method::Ulysses(3), cut: Cut::Zigzag },
    Way { ranks: 2, method: GATHERED, cut: Cut::Zigzag },
    Way { ranks: 1, method: Method::Ring, cut: Cut::Zigzag },
    Way { ranks: 4, method: Method::Ulysses(2), cut: Cut::Zigzag },
    Way { ranks: 5, method: Method::Ring, cut: Cut::Contiguous },
    Way { ranks: 2, method: TRAVELLING, cut: Cut::Uneven },
    Way { ranks: 2, method: Method::Ulysses(2), cut: Cut::Uneven },
    Way { ranks: 2, method: Method::Ring, cut: Cut::Zigzag },
    Way { ranks: 5, method: Method::Ulysses(5), cut: Cut::Contiguous },
    Way { ranks: 3, method: GATHERED, cut: Cut::Uneven },
    Way { ranks: 3, method: Method::Ring, cut: Cut::Uneven },
    Way { ranks: 6, method: Method::Ulysses(2), cut: Cut::Uneven },
    Way { ranks: 8, method: Method::Ring, cut: Cut::Zigzag },
    Way { ranks: 5, method: TRAVELLING, cut: Cut::Contiguous },
    Way { ranks: 8, method: Method::Ulysses(4), cut: Cut::Zigzag },
    Way { ranks: 8, method: GATHERED, cut: Cut::Contiguous },
    Way { ranks: 8, method: Method::Ulysses(8), cut: Cut::Contiguous },
];

impl Way {
    /// A case without what is refused here: where parts over different keys are merged, a gate and the mean of v come after
    /// that; where rows are split, so would be their key lengths.
    fn fitted(self, case: &Case) -> Case {
        let mut case = case.clone();
        let spec = &mut case.spec;
        match self.method {
            Method::Ulysses(group) if group == self.ranks => {}
            Method::Ring | Method::Ulysses(_) => {
                (spec.gate, spec.gradients.gate) = (false, false);
                spec.empty_rows = EmptyRows::Zero;
            }
            Method::Axial(_) => {
                let batch = spec.batch;
                spec.kv_lengths.iter_mut().for_each(|lengths| lengths.truncate(batch));
            }
        }
        case
    }

    /// Whether a case can be computed so.
    fn applies(self, spec: &AttentionSpec) -> bool {
        let merges = !spec.gate && spec.empty_rows == EmptyRows::Zero;
        let sequence = spec.seqlen_q >= self.ranks && spec.seqlen_k >= self.ranks;
        match self.method {
            Method::Ring => sequence && merges,
            Method::Ulysses(group) => sequence && spec.heads >= group && (merges || group == self.ranks),
            Method::Axial(_) => {
                let by_row = spec.kv_lengths.as_ref().is_some_and(|lengths| lengths.len() > spec.batch);
                spec.rows >= self.ranks && spec.seqlen_q >= self.ranks && !by_row
            }
        }
    }

    /// The name of a case's trial.
    fn name(self, case: &Case) -> String {
        format!("{}/sharded/{}/{}/{}", case.spec.precision(), case.group, case.name, self.title())
    }

    fn title(self) -> String {
        let method = match self.method {
            Method::Ring => "ring".to_owned(),
            Method::Ulysses(group) => format!("ulysses_{group}"),
            Method::Axial(shared) => format!("axial_{shared:?}"),
        };
        format!("{}_ranks_{method}_{:?}", self.ranks, self.cut).to_lowercase()
    }
}

/// A case and which rank holds what of it.
struct Sharded<'a> {
    case: &'a Case,
    way: Way,
    rows: Partition,
    queries: Partition,
    keys: Partition,
}

/// An axis that ranks hold parts of; none for what every rank has whole.
type Axis<'p> = Option<(usize, &'p Partition)>;

impl<'a> Sharded<'a> {
    fn new(case: &'a Case, way: Way) -> Result<Self, String> {
        let cut = |size: usize| way.cut.of(size, way.ranks);
        let one = || Partition::contiguous(1, 1).map_err(text);
        let s = &case.spec;
        let short = || format!("shorter than {} ranks", way.ranks);
        let queries = cut(s.seqlen_q).ok_or_else(short)?;
        let (rows, keys) = match way.method {
            Method::Axial(_) => (cut(s.rows).ok_or_else(short)?, one()?),
            _ => (one()?, cut(s.seqlen_k).ok_or_else(short)?),
        };
        Ok(Self { case, way, rows, queries, keys })
    }

    /// The axis that is split of an operand or result with queries, at `axis` where rows are not.
    fn of_queries(&self, axis: usize) -> Axis<'_> {
        if self.is_axial() { Some((1, &self.rows)) } else { Some((axis, &self.queries)) }
    }

    fn of_keys(&self) -> Axis<'_> {
        if self.is_axial() { Some((1, &self.rows)) } else { Some((2, &self.keys)) }
    }

    fn of_bias(&self, bias: &BiasSpec) -> Axis<'_> {
        match (self.is_axial(), bias.shape) {
            (true, [_, 1, _, 1, _]) | (false, [.., 1, 1]) => None,
            (true, [_, 1, ..]) => Some((3, &self.queries)),
            (true, _) => Some((1, &self.rows)),
            (false, [.., 1, _]) => Some((4, &self.keys)),
            (false, _) => Some((3, &self.queries)),
        }
    }

    fn is_axial(&self) -> bool {
        matches!(self.way.method, Method::Axial(_))
    }
}

/// One trial for each case that can be split: those with every feature at once and those of the Evoformer in all ways, less what
/// a way refuses, the others in one. With `few`, for a slow device, every eighth case in one way.
pub(crate) fn trials(device: &Arc<dyn Backend>, table: &[Case], few: bool) -> Vec<Trial> {
    let mut trials: Vec<Trial> = table.first().map(|case| heads_across_groups(device, case)).into_iter().collect();
    for (number, case) in table.iter().enumerate().step_by(if few { 8 } else { 1 }) {
        let is_whole = matches!(case.group, "everything" | "workload") && !few;
        let turn = WAYS.iter().cycle().skip(number).take(WAYS.len());
        let turn = turn.map(|way| (way, if is_whole { way.fitted(case) } else { case.clone() }));
        let turn = turn.filter(|(way, case)| way.applies(&case.spec));
        let count = if is_whole { WAYS.len() } else { 1 };
        for (&way, case) in turn.take(count) {
            let (name, device) = (way.name(&case), Arc::clone(device));
            trials.push(Trial::new("sharded", name, move || check(&*device, &case, way)));
        }
    }
    trials
}

/// Three query heads share a key head, and ranks have two of them or one: some need two key heads, some share one. `like`: the
/// dtype.
fn heads_across_groups(device: &Arc<dyn Backend>, like: &Case) -> Trial {
    let mut spec = AttentionSpec::new(like.spec.dtype, 2, 1, 11, 6, 8);
    (spec.kv_heads, spec.products, spec.mask.causal) = (2, like.spec.products, true);
    spec.biases = vec![BiasSpec { shape: [1, 1, 6, 11, 11], dtype: spec.dtype }];
    let case = Case::new("gqa", "6over2_on_4", spec.with_all_gradients());
    let way = Way { ranks: 4, method: Method::Ulysses(4), cut: Cut::Contiguous };
    let (name, device) = (way.name(&case), Arc::clone(device));
    Trial::new("sharded", name, move || check(&*device, &case, way))
}

/// Runs a case over ranks and holds it against the oracle; gives the largest error as a fraction of what is allowed.
fn check(device: &dyn Backend, case: &Case, way: Way) -> Result<f64, String> {
    let check = || {
        let inputs = Inputs::draw(case);
        let sharded = Sharded::new(case, way)?;
        let run = || on_ranks(way.ranks, |comm| run(device, comm, &sharded, &inputs));
        let parts = run()?;
        if case.group == "everything" {
            same_bits(&parts, &run()?)?;
        }
        let results = gathered(&sharded, &parts)?;
        let split = if sharded.is_axial() { &sharded.queries } else { &sharded.keys };
        let chunks: usize = (0..way.ranks).map(|rank| split.chunks(rank).len()).sum();
        let whole_rows = match way.method {
            Method::Ring => false,
            Method::Ulysses(group) => group == way.ranks,
            Method::Axial(_) => true,
        };
        Expected::of(case, &inputs)?.check_sharded(case, u32::try_from(chunks).map_err(text)?, whole_rows, &results)
    };
    check().map_err(|message| format!("{}, seed {:#x}: {message}", way.name(case), case.seed))
}

fn same_bits(first: &[Part], second: &[Part]) -> Result<(), String> {
    let names = |parts: &[Part]| {
        parts.iter().map(|part| part.iter().map(|(name, _)| name.clone()).collect()).collect::<Vec<Vec<_>>>()
    };
    if names(first) != names(second) {
        return Err("a second run has other results".to_owned());
    }
    for (rank, (first, second)) in first.iter().zip(second).enumerate() {
        for ((name, a), (_, b)) in first.iter().zip(second) {
            if a.view().as_bytes().map_err(text)? != b.view().as_bytes().map_err(text)? {
                return Err(format!("{name} of rank {rank} differs in a second run"));
            }
        }
    }
    Ok(())
}

/// One rank's results, by name.
type Part = Vec<(String, Tensor)>;

fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&Communicator) -> Result<T, String> + Sync) -> Result<Vec<T>, String> {
    let results = on_threads(ranks, |comm| work(&comm)).into_iter();
    results.map(|result| result.unwrap_or_else(|_| Err("a rank panicked".to_owned()))).collect()
}

fn run(device: &dyn Backend, comm: &Communicator, sharded: &Sharded<'_>, inputs: &Inputs) -> Result<Part, String> {
    let stream = device.stream().map_err(text)?;
    let rank = Rank { comm, device, stream: &stream };
    let part = |host: &Host, axis: Axis<'_>| match axis {
        Some((axis, partition)) => {
            upload(&rank, &host.select(axis, &partition.positions(comm.rank()).collect::<Vec<_>>()))
        }
        None => upload(&rank, host),
    };
    let (of_queries, of_keys) = (sharded.of_queries(2), sharded.of_keys());
    let spec = &sharded.case.spec;
    let q = part(&inputs.q, of_queries)?;
    let biases = spec.biases.iter().zip(&inputs.biases).map(|(bias, host)| part(host, sharded.of_bias(bias)));
    let biases = biases.collect::<Result<Vec<_>, _>>()?;
    let key_mask = inputs.key_mask.as_ref().map(|host| part(host, of_keys)).transpose()?;
    let q_segments = inputs.segments.as_ref().map(|[host, _]| part(host, of_queries)).transpose()?;
    let k_segments = inputs.segments.as_ref().map(|[_, host]| part(host, of_keys)).transpose()?;
    let gate = inputs.gate.as_ref().map(|host| part(host, of_queries)).transpose()?;
    let shard = Shard {
        q: q.view(),
        k: Arc::new(part(&inputs.k, of_keys)?),
        v: Arc::new(part(&inputs.v, of_keys)?),
        biases: biases.iter().map(Tensor::view).collect(),
        key_mask: key_mask.as_ref().map(Tensor::view),
        q_segments: q_segments.as_ref().map(Tensor::view),
        k_segments: k_segments.as_ref().map(Tensor::view),
        gate: gate.as_ref().map(Tensor::view),
    };
    let d_out = part(&inputs.d_out, of_queries)?;
    let d_out = d_out.view();
    let (spec, queries, keys) = (spec.clone(), sharded.queries.clone(), sharded.keys.clone());
    let named = |ShardForward { out, lse, lse_low }| {
        vec![("out".to_owned(), out), ("lse".to_owned(), lse), ("lse_low".to_owned(), lse_low)]
    };
    let (mut part, backward) = match sharded.way.method {
        Method::Ring => {
            let ring = RingAttention::new(spec, queries, keys).map_err(text)?;
            let forward = ring.forward(&rank, &shard).map_err(text)?;
            let backward = ring.backward(&rank, &shard, &forward, &d_out).map_err(text)?;
            (named(forward), backward)
        }
        Method::Ulysses(group) => {
            let ulysses = UlyssesAttention::new(comm, spec, queries, keys, group).map_err(text)?;
            let forward = ulysses.forward(&rank, &shard).map_err(text)?;
            let backward = ulysses.backward(&rank, &forward, &d_out).map_err(text)?;
            (vec![("out".to_owned(), forward.out)], backward)
        }
        Method::Axial(shared) => {
            let axial = AxialAttention::new(spec, sharded.rows.clone(), queries, shared).map_err(text)?;
            let forward = axial.forward(&rank, &shard).map_err(text)?;
            let backward = axial.backward(&rank, &shard, &forward, &d_out).map_err(text)?;
            (named(forward), backward)
        }
    };
    let ShardBackward { dq, dk, dv, d_gate, dbiases } = backward;
    for (name, gradient) in [("dq", dq), ("dk", dk), ("dv", dv), ("d_gate", d_gate)] {
        part.extend(gradient.map(|gradient| (name.to_owned(), gradient)));
    }
    for (number, gradient) in dbiases.into_iter().enumerate() {
        part.extend(gradient.map(|gradient| (format!("dbias{number}"), gradient)));
    }
    let download = |(name, tensor): (String, Tensor)| {
        let host = rank.pack_shared(&Arc::new(tensor)).and_then(|tensor| rank.own(tensor));
        Ok((name, host.map_err(text)?))
    };
    part.into_iter().map(download).collect()
}

/// Results of the whole sequence from those of the ranks.
fn gathered(sharded: &Sharded<'_>, parts: &[Part]) -> Result<Results, String> {
    let spec = &sharded.case.spec;
    let problem = AttentionProblem::new(spec.clone()).map_err(text)?;
    let mut results = Results::new();
    for (number, (name, _)) in parts[0].iter().enumerate() {
        let (shape, axis) = match name.as_str() {
            "out" | "d_gate" => (problem.out_shape().to_vec(), sharded.of_queries(2)),
            "dq" => (problem.q_shape().to_vec(), sharded.of_queries(2)),
            "dk" => (problem.k_shape().to_vec(), sharded.of_keys()),
            "dv" => (problem.v_shape().to_vec(), sharded.of_keys()),
            "lse" | "lse_low" => (problem.lse_shape().to_vec(), sharded.of_queries(3)),
            _ => {
                let bias = name.strip_prefix("dbias").and_then(|number| spec.biases.get(number.parse::<usize>().ok()?));
                let bias = bias.ok_or_else(|| format!("{name}: no such result"))?;
                (bias.shape.to_vec(), sharded.of_bias(bias))
            }
        };
        let mut values = vec![f64::NAN; shape.iter().product()];
        for (rank, part) in parts.iter().enumerate() {
            let own = part[number].1.to_f64().map_err(text)?;
            let Some((axis, partition)) = axis else {
                // Every rank has the same, to the bit.
                if rank > 0 && own != values {
                    return Err(format!("{name}: rank {rank} has other values than rank 0"));
                }
                values = own;
                continue;
            };
            place(&mut values, &own, &shape, axis, &partition.positions(rank).collect::<Vec<_>>());
        }
        results.push((name.clone(), Downloaded { values, bytes: Vec::new() }));
    }
    Ok(results)
}

/// Puts a rank's entries of an axis to their positions in the whole.
fn place(whole: &mut [f64], own: &[f64], shape: &[usize], axis: usize, positions: &[usize]) {
    let inner: usize = shape[axis + 1..].iter().product();
    let outers = whole.chunks_mut(shape[axis] * inner).zip(own.chunks(positions.len() * inner));
    for (whole, own) in outers {
        for (own, position) in own.chunks(inner).zip(positions) {
            whole[position * inner..(position + 1) * inner].copy_from_slice(own);
        }
    }
}

fn upload(rank: &Rank<'_>, host: &Host) -> Result<Tensor, String> {
    let tensor = Tensor::from_f64(&host.values, host.dtype, &host.shape).map_err(text)?;
    rank.unpack(Arc::new(tensor)).and_then(|tensor| rank.own(tensor)).map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
