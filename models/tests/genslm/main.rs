//! The sharded model against the same model written plainly: the loss and the gradient of every number of every weight.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a panic in a test is a failed test")]

mod reference;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use tilefold::comm::{CommError, Partition, Rank, on_threads};
use tilefold::{Backend, CpuBackend};
use tilefold_models::genslm::{
    Adam, AttentionKind, Config, Error, MlpKind, Model, Parameters, Positions, Result, Tokens, mean_over_replicas,
};

/// How far f32 may be from f64, of the largest gradient of a weight: sums of up to some hundred terms, each rounded to 2^-24,
/// through two layers whose sums cancel in part. Measured: 1.3e-6 on one rank.
const TOLERANCE: f64 = 1e-5;

const POSITIONS: [Positions; 3] = [Positions::Rope, Positions::Alibi, Positions::Learned];
const ATTENTIONS: [AttentionKind; 2] = [AttentionKind::Ring, AttentionKind::Ulysses];
const MLPS: [MlpKind; 2] = [MlpKind::Replicated, MlpKind::Tensor];

/// No size divides another: 13 tokens and 11 hidden channels over up to 5 ranks.
fn config(positions: Positions) -> Config {
    Config {
        layers: 2,
        hidden: 20,
        heads: 5,
        mlp_hidden: 11,
        seqlen: 13,
        batch: 2,
        positions,
        attention: AttentionKind::Ring,
        mlp: MlpKind::Replicated,
    }
}

/// Weights large enough that no layer is nearly linear.
fn weights(config: &Config) -> Parameters {
    let mut source = ChaCha8Rng::seed_from_u64(7);
    let mut weights = Parameters::new(config, 7);
    for array in weights.arrays_mut() {
        let centre = if array.nrows() == 1 { 1.0 } else { 0.0 };
        array.mapv_inplace(|_| {
            let sample: f32 = StandardNormal.sample(&mut source);
            centre + 0.4 * sample
        });
    }
    weights
}

fn tokens(config: &Config) -> Vec<u32> {
    let nucleotides: Vec<u8> = (0..3 * config.tokens()).map(|i| b"ACGTN"[(i * i + i / 7 + i / 5) % 5]).collect();
    let genome = Tokens::parse(&[b">x\n", &nucleotides[..]].concat(), "x").unwrap();
    genome.windows(0, config.batch, config.seqlen).unwrap()
}

/// What each rank gives.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Rank<'_>) -> Result<T> + Sync) -> Vec<Result<T>> {
    let results = on_threads(ranks, |comm| {
        let device = CpuBackend::new().unwrap().with_threads(1).unwrap();
        let stream = device.stream().unwrap();
        work(Rank { comm: &comm, device: &device, stream: &stream })
    });
    results.into_iter().map(|result| result.unwrap()).collect()
}

#[test]
fn weights_are_counted_before_they_are_there() {
    for positions in POSITIONS {
        let config = Config { layers: 3, mlp_hidden: 7, ..config(positions) };
        assert_eq!(config.weights(), Parameters::new(&config, 1).count() as f64);
    }
    let huge = Config { hidden: 1 << 31, mlp_hidden: 1 << 33, ..config(Positions::Rope) };
    assert!(huge.weights() > 1e20);
}

/// Loss and all gradients of a run over ranks, whole; the same on every rank.
fn run(config: &Config, partition: &Partition) -> (f32, Parameters) {
    let (weights, tokens) = (weights(config), tokens(config));
    let results = on_ranks(partition.ranks(), |rank| {
        let model = Model::new(rank, config.clone(), partition.clone())?;
        let own = model.scatter(&weights)?;
        let (loss, gradients) = model.loss_and_gradients(&own, &tokens)?;
        Ok((loss, model.gather(&gradients)?))
    });
    let mut results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    let first = results.swap_remove(0);
    assert!(results.iter().all(|result| *result == first), "ranks differ");
    first
}

/// Each weight whose gradient is off, by how much of its largest.
fn wrong(got: &Parameters, expected: &[Vec<f64>]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (((name, _), got), expected) in got.names().into_iter().zip(got.arrays()).zip(expected) {
        let size = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        let errors = got.iter().zip(expected).map(|(&got, x)| (f64::from(got) - x).abs());
        // What is not a number is not close.
        let close = errors.clone().filter(|&error| error <= TOLERANCE * size).count();
        if close != expected.len() || got.len() != expected.len() {
            wrong.push(format!("{name}: up to {:e} of {size:e}", errors.fold(0.0, f64::max)));
        }
    }
    wrong
}

fn partitions(seqlen: usize, ranks: usize) -> [(&'static str, Partition); 3] {
    let contiguous = Partition::contiguous(seqlen, ranks).unwrap();
    let backwards = (0..ranks).rev().map(|rank| {
        let chunk = contiguous.chunks(rank)[0].clone();
        let middle = chunk.start.midpoint(chunk.end);
        vec![middle..chunk.end, chunk.start..middle]
    });
    let backwards = Partition::new(seqlen, backwards.collect()).unwrap();
    [("zigzag", Partition::zigzag(seqlen, ranks).unwrap()), ("contiguous", contiguous), ("backwards", backwards)]
}

fn check_all(positions: Positions) {
    let config = config(positions);
    let (loss, gradients) = reference::loss_and_gradients(&config, &weights(&config), &tokens(&config));
    for ranks in [1, 2, 3, 5] {
        for (name, partition) in partitions(config.seqlen, ranks) {
            for attention in ATTENTIONS {
                for mlp in MLPS {
                    let config = Config { attention, mlp, ..config.clone() };
                    let what = format!("{ranks} ranks, {name}, {positions:?}, {attention:?}, {mlp:?}");
                    let (got, got_gradients) = run(&config, &partition);
                    assert!((f64::from(got) - loss).abs() <= TOLERANCE * loss, "{what}: {got} for {loss}");
                    let wrong = wrong(&got_gradients, &gradients);
                    assert!(wrong.is_empty(), "{what}: {wrong:?}");
                }
            }
        }
    }
}

#[test]
fn rope_over_ranks() {
    check_all(Positions::Rope);
}

#[test]
fn alibi_over_ranks() {
    check_all(Positions::Alibi);
}

#[test]
fn learned_positions_over_ranks() {
    check_all(Positions::Learned);
}

/// Data parallel and sequence parallel: two groups of two ranks, a sequence each, against the whole batch.
#[test]
fn groups_with_a_sequence_each() {
    for positions in POSITIONS {
        for (attention, mlp) in ATTENTIONS.into_iter().zip(MLPS) {
            let whole = Config { attention, mlp, ..config(positions) };
            let partition = Partition::zigzag(whole.seqlen, 2).unwrap();
            let (loss, gradients) = run(&whole, &partition);
            let (weights, tokens) = (weights(&whole), tokens(&whole));
            let half = Config { batch: 1, ..whole.clone() };
            let results = on_ranks(4, |rank| {
                let (group, member) = (rank.comm.rank() / 2, rank.comm.rank() % 2);
                let sequence = rank.comm.split(group as u32, 0)?;
                let replicas = rank.comm.split(member as u32, 0)?;
                let model = Model::new(Rank { comm: &sequence, ..rank }, half.clone(), partition.clone())?;
                let tokens = &tokens[group * (half.seqlen + 1)..][..half.seqlen + 1];
                let (loss, gradients) = model.loss_and_gradients(&model.scatter(&weights)?, tokens)?;
                let (loss, gradients) = mean_over_replicas(&Rank { comm: &replicas, ..rank }, loss, gradients)?;
                Ok((loss, model.gather(&gradients)?))
            });
            let expected: Vec<Vec<f64>> =
                gradients.arrays().iter().map(|array| array.iter().map(|&x| f64::from(x)).collect()).collect();
            for result in results {
                let (got, got_gradients) = result.unwrap();
                assert!((got - loss).abs() <= TOLERANCE as f32 * loss, "{got} for {loss}");
                assert_eq!(wrong(&got_gradients, &expected), [""; 0], "{positions:?}, {attention:?}");
            }
        }
    }
}

/// Every rank takes the same steps, a second run takes them again, and they lead down.
#[test]
fn training_goes_down_and_repeats() {
    for positions in POSITIONS {
        let config = Config { mlp: MlpKind::Tensor, ..config(positions) };
        let tokens = tokens(&config);
        let partition = Partition::zigzag(config.seqlen, 3).unwrap();
        let train = || {
            on_ranks(3, |rank| {
                let model = Model::new(rank, config.clone(), partition.clone())?;
                let mut weights = model.scatter(&Parameters::new(&config, 1))?;
                let (mut adam, mut losses) = (Adam::new(&weights, 1e-2), Vec::new());
                for _ in 0..12 {
                    let (loss, gradients) = model.loss_and_gradients(&weights, &tokens)?;
                    adam.update(&mut weights, &gradients)?;
                    losses.push(loss);
                }
                Ok((losses, model.gather(&weights)?))
            })
        };
        let [first, again] = [train(), train()].map(|ranks| ranks.into_iter().map(Result::unwrap).collect::<Vec<_>>());
        assert!(first.iter().chain(&again).all(|rank| *rank == first[0]), "{positions:?}");
        let losses = &first[0].0;
        assert!(losses[11] < losses[0] - 1.0, "{losses:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let message = |config: Config, ranks: usize, tokens: &[u32]| {
        let results = on_ranks(ranks, |rank| {
            let partition = Partition::contiguous(13, ranks)?;
            let model = Model::new(rank, config.clone(), partition)?;
            model.loss_and_gradients(&model.scatter(&Parameters::new(&config, 1))?, tokens).map(|_| ())
        });
        results[0].as_ref().unwrap_err().to_string()
    };
    let good = config(Positions::Rope);
    let tokens = tokens(&good);
    for (config, ranks, expected) in [
        (Config { heads: 3, ..good.clone() }, 1, "hidden: expected a multiple of 3 heads, got 20"),
        (Config { heads: 4, ..good.clone() }, 1, "hidden: expected an even number of channels a head"),
        (Config { layers: 0, ..good.clone() }, 1, "layers: expected at least 1, got 0"),
        (Config { attention: AttentionKind::Ulysses, ..good.clone() }, 6, "group: expected 1 to 5 ranks"),
        (Config { seqlen: 12, ..good.clone() }, 2, "queries: expected a partition of 12, got 13"),
        (Config { batch: 1, ..good.clone() }, 1, "tokens: expected 14 tokens, got 28"),
    ] {
        let message = message(config, ranks, &tokens);
        assert!(message.starts_with(expected), "{message}");
    }
    let mut beyond = tokens.clone();
    beyond[3] = 66;
    assert_eq!(message(good.clone(), 1, &beyond), "tokens: expected tokens below 66, got 66");
    let narrow = Config { mlp: MlpKind::Tensor, mlp_hidden: 2, ..good };
    let results = on_ranks(3, |rank| Model::new(rank, narrow.clone(), Partition::zigzag(13, 3)?).map(|_| ()));
    for result in results {
        let empty = CommError::EmptyShard { rank: 2, seqlen: 2 };
        assert!(matches!(result, Err(Error::Comm(tilefold::comm::Error::Comm(error))) if error == empty));
    }
    let more = Parameters::new(&Config { layers: 3, ..narrow.clone() }, 1);
    let wider = Parameters::new(&Config { mlp_hidden: 3, ..narrow.clone() }, 1);
    let results = on_ranks(2, |rank| {
        let model = Model::new(rank, narrow.clone(), Partition::zigzag(13, 2)?)?;
        let whole = Parameters::new(&narrow, 1);
        let mut own = model.scatter(&whole)?;
        let errors = [
            model.scatter(&more).err(),
            model.scatter(&wider).err(),
            model.loss_and_gradients(&whole, &tokens).err(),
            Adam::new(&own, 1e-3).update(&mut own, &whole).err(),
            Model::new(rank, narrow.clone(), Partition::zigzag(13, 1)?).err(),
        ];
        Ok(errors.map(|error| error.map_or_else(String::new, |error| error.to_string())))
    });
    for result in results {
        let messages = result.unwrap();
        assert_eq!(messages[0], "parameters: expected 18 weights, got 26");
        assert_eq!(messages[1], "parameters: expected layer0.up [20, 2], got [20, 3]");
        assert_eq!(messages[2], "parameters: expected layer0.up [20, 1], got [20, 2]");
        assert!(messages[3].starts_with("gradients: expected shapes [(66, 20)"), "{}", messages[3]);
        assert_eq!(messages[4], "partition: expected one over 2 ranks, got 1");
    }
}
