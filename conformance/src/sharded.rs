//! Cases whose sequence is split over ranks, each rank a thread with a part of the operands on the device under test: results
//! are put together and held against the same oracle as those of one device.

use std::sync::Arc;

use tilefold::comm::{
    Communicator, Partition, Rank, RingAttention, Shard, ShardBackward, ShardForward, UlyssesAttention,
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
                    vec![start - count..start]
                });
                Partition::new(seqlen, chunks.collect())
            }
        };
        partition.ok()
    }
}

/// How a case is computed by ranks.
#[derive(Clone, Copy, Debug)]
struct Way {
    /// How many there are.
    ranks: usize,
    /// How many of them split heads; the groups stand in a ring.
    group: usize,
    cut: Cut,
}

/// Each case takes its turn.
#[rustfmt::skip]
const WAYS: [Way; 13] = [
    Way { ranks: 2, group: 1, cut: Cut::Contiguous },
    Way { ranks: 2, group: 2, cut: Cut::Contiguous },
    Way { ranks: 3, group: 1, cut: Cut::Zigzag },
    Way { ranks: 3, group: 3, cut: Cut::Zigzag },
    Way { ranks: 1, group: 1, cut: Cut::Zigzag },
    Way { ranks: 4, group: 2, cut: Cut::Zigzag },
    Way { ranks: 5, group: 1, cut: Cut::Contiguous },
    Way { ranks: 2, group: 2, cut: Cut::Uneven },
    Way { ranks: 2, group: 1, cut: Cut::Zigzag },
    Way { ranks: 5, group: 5, cut: Cut::Contiguous },
    Way { ranks: 3, group: 1, cut: Cut::Uneven },
    Way { ranks: 6, group: 2, cut: Cut::Uneven },
    Way { ranks: 8, group: 1, cut: Cut::Zigzag },
];

impl Way {
    /// Whether a case can be computed so: with several groups, a gate and the mean of v come after the last merge.
    fn applies(self, spec: &AttentionSpec) -> bool {
        let is_whole = self.group == self.ranks && self.ranks > 1;
        let merges = !spec.gate && spec.empty_rows == EmptyRows::Zero;
        let fits = spec.seqlen_q >= self.ranks && spec.seqlen_k >= self.ranks && spec.heads >= self.group;
        fits && (is_whole || merges)
    }

    fn title(self) -> String {
        let Self { ranks, group, cut } = self;
        let way = if group == 1 { "ring".into() } else { format!("ulysses_{group}") };
        format!("{ranks}_ranks_{way}_{cut:?}").to_lowercase()
    }
}

/// One trial for each case that can be split: with every feature at once in all ways, the others in one.
pub(crate) fn trials(device: &Arc<dyn Backend>, table: &[Case]) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (number, case) in table.iter().enumerate() {
        let turn = WAYS.iter().cycle().skip(number).take(WAYS.len()).filter(|way| way.applies(&case.spec));
        let count = if case.group == "everything" { WAYS.len() } else { 1 };
        for &way in turn.take(count) {
            let name = format!("{}/sharded/{}/{}/{}", case.spec.precision(), case.group, case.name, way.title());
            let (device, case) = (Arc::clone(device), case.clone());
            trials.push(Trial::new("sharded", name, move || check(&*device, &case, way)));
        }
    }
    trials
}

/// Runs a case over ranks and holds it against the oracle; gives the largest error as a fraction of what is allowed.
fn check(device: &dyn Backend, case: &Case, way: Way) -> Result<f64, String> {
    let check = || {
        let inputs = Inputs::draw(case);
        let partitions = [case.spec.seqlen_q, case.spec.seqlen_k].map(|seqlen| way.cut.of(seqlen, way.ranks));
        let [Some(queries), Some(keys)] = partitions else { return Err("sequence shorter than ranks".to_owned()) };
        let run = |comm: &Communicator| run(device, comm, case, way, &inputs, &queries, &keys);
        let parts = on_ranks(way.ranks, run)?;
        let results = gathered(case, &parts, &queries, &keys)?;
        let chunks: usize = (0..way.ranks).map(|rank| keys.chunks(rank).len()).sum();
        Expected::of(case, &inputs)?.check_sharded(case, u32::try_from(chunks).map_err(text)?, &results)
    };
    check().map_err(|message| format!("{}, seed {:#x}, {way:?}: {message}", case.title(), case.seed))
}

/// One rank's results, by name.
type Part = Vec<(String, Tensor)>;

fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&Communicator) -> Result<T, String> + Sync) -> Result<Vec<T>, String> {
    let work = &work;
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            Communicator::threads(ranks).into_iter().map(|comm| scope.spawn(move || work(&comm))).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let results = results.into_iter().map(|result| result.unwrap_or_else(|_| Err("a rank panicked".to_owned())));
    results.collect()
}

fn run(
    device: &dyn Backend,
    comm: &Communicator,
    case: &Case,
    way: Way,
    inputs: &Inputs,
    queries: &Partition,
    keys: &Partition,
) -> Result<Part, String> {
    let stream = device.stream().map_err(text)?;
    let rank = Rank { comm, device, stream: &stream };
    let (my_queries, my_keys): (Vec<usize>, Vec<usize>) =
        (queries.positions(comm.rank()).collect(), keys.positions(comm.rank()).collect());
    let upload = |host: &Host| upload(&rank, host);
    let of_queries = |host: &Host, axis| upload(&host.select(axis, &my_queries));
    let of_keys = |host: &Host, axis| upload(&host.select(axis, &my_keys));
    let q = of_queries(&inputs.q, 2)?;
    let biases = case.spec.biases.iter().zip(&inputs.biases).map(|(bias, host)| match bias.shape {
        [.., 1, 1] => upload(host),
        [.., 1, _] => of_keys(host, 4),
        _ => of_queries(host, 3),
    });
    let biases = biases.collect::<Result<Vec<_>, _>>()?;
    let key_mask = inputs.key_mask.as_ref().map(|host| of_keys(host, 2)).transpose()?;
    let q_segments = inputs.segments.as_ref().map(|[host, _]| of_queries(host, 2)).transpose()?;
    let k_segments = inputs.segments.as_ref().map(|[_, host]| of_keys(host, 2)).transpose()?;
    let gate = inputs.gate.as_ref().map(|host| of_queries(host, 2)).transpose()?;
    let shard = Shard {
        q: q.view(),
        k: Arc::new(of_keys(&inputs.k, 2)?),
        v: Arc::new(of_keys(&inputs.v, 2)?),
        biases: biases.iter().map(Tensor::view).collect(),
        key_mask: key_mask.as_ref().map(Tensor::view),
        q_segments: q_segments.as_ref().map(Tensor::view),
        k_segments: k_segments.as_ref().map(Tensor::view),
        gate: gate.as_ref().map(Tensor::view),
    };
    let d_out = of_queries(&inputs.d_out, 2)?;
    let (spec, queries, keys) = (case.spec.clone(), queries.clone(), keys.clone());
    let (mut part, backward) = if way.group == 1 {
        let ring = RingAttention::new(spec, queries, keys).map_err(text)?;
        let forward = ring.forward(&rank, &shard).map_err(text)?;
        let backward = ring.backward(&rank, &shard, &forward, &d_out.view()).map_err(text)?;
        let ShardForward { out, lse, lse_low } = forward;
        (vec![("out".to_owned(), out), ("lse".to_owned(), lse), ("lse_low".to_owned(), lse_low)], backward)
    } else {
        let ulysses = UlyssesAttention::new(comm, spec, queries, keys, way.group).map_err(text)?;
        let forward = ulysses.forward(&rank, &shard).map_err(text)?;
        let backward = ulysses.backward(&rank, &forward, &d_out.view()).map_err(text)?;
        (vec![("out".to_owned(), forward.out)], backward)
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
fn gathered(case: &Case, parts: &[Part], queries: &Partition, keys: &Partition) -> Result<Results, String> {
    let problem = AttentionProblem::new(case.spec.clone()).map_err(text)?;
    let mut results = Results::new();
    for (number, (name, _)) in parts[0].iter().enumerate() {
        let (shape, axis, partition) = match name.as_str() {
            "out" | "d_gate" => (problem.out_shape().to_vec(), 2, Some(queries)),
            "dq" => (problem.q_shape().to_vec(), 2, Some(queries)),
            "dk" => (problem.k_shape().to_vec(), 2, Some(keys)),
            "dv" => (problem.v_shape().to_vec(), 2, Some(keys)),
            "lse" | "lse_low" => (problem.lse_shape().to_vec(), 3, Some(queries)),
            _ => {
                let bias =
                    name.strip_prefix("dbias").and_then(|number| case.spec.biases.get(number.parse::<usize>().ok()?));
                let BiasSpec { shape, .. } = bias.ok_or_else(|| format!("{name}: no such result"))?;
                match shape {
                    [.., 1, 1] => (shape.to_vec(), 0, None),
                    [.., 1, _] => (shape.to_vec(), 4, Some(keys)),
                    _ => (shape.to_vec(), 3, Some(queries)),
                }
            }
        };
        let mut values = vec![f64::NAN; shape.iter().product()];
        for (rank, part) in parts.iter().enumerate() {
            let own = part[number].1.to_f64().map_err(text)?;
            let Some(partition) = partition else {
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
