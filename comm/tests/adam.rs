//! The sharded optimizer against a plain one, to the bit: any number of ranks and of elements, half precision with masters,
//! states restored to other ranks, memory, bad input.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a panic in a test is a failed test")]

mod ranks;

use std::time::Duration;

use ranks::on_ranks;
use tilefold_comm::{AdamOptions, AdamState, CommError, Error, Rank, Result, ShardedAdam};
use tilefold_core::{DType, ProblemError, Tensor, TensorView};

const DEADLINE: Duration = Duration::from_secs(120);
const WORLDS: [usize; 5] = [1, 2, 3, 5, 8];
const STEPS: usize = 6;

/// Shapes and dtypes of parameters.
type Model = Vec<(Vec<usize>, DType)>;

/// 26 elements; 3 of them; dtypes mixed.
fn models() -> Vec<Model> {
    let of = |dtype| vec![(vec![5], dtype), (vec![3, 4], dtype), (vec![1], dtype), (vec![2, 2, 2], dtype)];
    let mut models: Vec<Model> = [DType::F32, DType::F16, DType::BF16].map(of).to_vec();
    models.push(vec![(vec![2], DType::F32), (vec![1, 1], DType::F32)]);
    models.push(vec![(vec![7], DType::BF16), (vec![4], DType::F32), (vec![3, 3], DType::F16), (vec![2], DType::F32)]);
    models
}

const OPTIONS: AdamOptions =
    AdamOptions { learning_rate: 0.01, beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.1, gradient_scale: 0.3 };

/// Neither whole nor short fractions: sums in another order have other bits.
fn noise(seed: usize, count: usize) -> Vec<f64> {
    (0..count).map(|i| ((seed * 131 + i * 17) as f64 * 0.618_034).sin()).collect()
}

fn parameters(model: &Model) -> Vec<Tensor> {
    let drawn = model.iter().enumerate().map(|(number, (shape, dtype))| {
        Tensor::from_f64(&noise(number, shape.iter().product()), *dtype, shape).unwrap()
    });
    drawn.collect()
}

fn gradients(model: &Model, step: usize, rank: usize) -> Vec<Tensor> {
    let drawn = model.iter().enumerate().map(|(number, (shape, dtype))| {
        let seed = 1000 + 100 * step + 10 * rank + number;
        Tensor::from_f64(&noise(seed, shape.iter().product()), *dtype, shape).unwrap()
    });
    drawn.collect()
}

fn views(tensors: &[Tensor]) -> Vec<TensorView<'_>> {
    tensors.iter().map(Tensor::view).collect()
}

fn singles(tensor: &Tensor) -> Vec<f32> {
    tensor.to_f64().unwrap().into_iter().map(|value| value as f32).collect()
}

fn bits(tensors: &[Tensor]) -> Vec<Vec<u8>> {
    tensors.iter().map(|tensor| tensor.storage().host_bytes().unwrap().to_vec()).collect()
}

/// Adam as the book has it, of one who has all gradients: one parameter of one dtype.
struct Plain {
    masters: Vec<f32>,
    moments: Vec<[f32; 2]>,
    step: i32,
}

impl Plain {
    fn new(parameter: &Tensor) -> Self {
        let masters = singles(parameter);
        Self { moments: vec![[0.0; 2]; masters.len()], masters, step: 0 }
    }

    /// The gradients of all ranks, in their order.
    fn step(&mut self, options: AdamOptions, gradients: &[Vec<f32>]) {
        self.step += 1;
        let corrections =
            [options.beta1, options.beta2].map(|beta| (1.0 - f64::from(beta).powf(self.step.into())) as f32);
        for (i, (x, [m, v])) in self.masters.iter_mut().zip(&mut self.moments).enumerate() {
            let sum = gradients[1..].iter().fold(gradients[0][i], |sum, of_rank| sum + of_rank[i]);
            let g = sum * options.gradient_scale;
            *m = options.beta1 * *m + (1.0 - options.beta1) * g;
            *v = options.beta2 * *v + (1.0 - options.beta2) * (g * g);
            let change = (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + options.epsilon);
            *x = *x * (1.0 - options.learning_rate * options.weight_decay) - options.learning_rate * change;
        }
    }

    fn rounded(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let values: Vec<f64> = self.masters.iter().map(|&value| value.into()).collect();
        Tensor::from_f64(&values, dtype, shape).unwrap()
    }
}

/// Parameters after so many steps of plain optimizers, gradients those of `ranks` ranks.
fn plain(model: &Model, ranks: usize, steps: usize, of: fn(&Model, usize, usize) -> Vec<Tensor>) -> Vec<Tensor> {
    let mut plain: Vec<Plain> = parameters(model).iter().map(Plain::new).collect();
    for step in 0..steps {
        let all: Vec<Vec<Tensor>> = (0..ranks).map(|rank| of(model, step, rank)).collect();
        for (number, plain) in plain.iter_mut().enumerate() {
            plain.step(OPTIONS, &all.iter().map(|of_rank| singles(&of_rank[number])).collect::<Vec<_>>());
        }
    }
    plain.iter().zip(model).map(|(plain, (shape, dtype))| plain.rounded(*dtype, shape)).collect()
}

#[test]
fn parameters_have_the_bits_of_a_plain_optimizer() {
    for (ranks, model) in WORLDS.iter().flat_map(|ranks| models().into_iter().map(move |model| (*ranks, model))) {
        let results = on_ranks(ranks, DEADLINE, |rank| {
            let mut own = parameters(&model);
            let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            let mut steps = Vec::new();
            for step in 0..STEPS {
                adam.step(rank, &mut own, &views(&gradients(&model, step, rank.comm.rank())))?;
                steps.push(bits(&own));
            }
            Ok::<_, Error>(steps)
        });
        for (rank, steps) in results.into_iter().enumerate() {
            for (step, got) in steps.unwrap().into_iter().enumerate() {
                let expected = bits(&plain(&model, ranks, step + 1, gradients));
                assert_eq!(got, expected, "{model:?}, rank {rank} of {ranks}, step {step}");
            }
        }
    }
}

/// The order of sums is that of ranks, and shows: another number of ranks, or another order, has other bits.
#[test]
fn the_test_sees_the_order_of_sums() {
    let model = &models()[0];
    let swapped = |model: &Model, step, rank| gradients(model, step, 4 - rank);
    assert_ne!(bits(&plain(model, 5, 1, gradients)), bits(&plain(model, 5, 1, swapped)));
}

/// Against f64: what f32 loses in 50 steps.
#[test]
fn single_precision_is_near_the_formula() {
    let model = vec![(vec![40], DType::F32)];
    let results = on_ranks(3, DEADLINE, |rank| {
        let mut own = parameters(&model);
        let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
        for step in 0..50 {
            adam.step(rank, &mut own, &views(&gradients(&model, step, rank.comm.rank())))?;
        }
        own[0].to_f64().map_err(Error::from)
    });
    let [lr, beta1, beta2] = [OPTIONS.learning_rate, OPTIONS.beta1, OPTIONS.beta2].map(f64::from);
    let [epsilon, decay, scale] = [OPTIONS.epsilon, OPTIONS.weight_decay, OPTIONS.gradient_scale].map(f64::from);
    let mut exact: Vec<[f64; 3]> = noise(0, 40).into_iter().map(|x| [x, 0.0, 0.0]).collect();
    for step in 0..50 {
        let all: Vec<Vec<f64>> = (0..3).map(|rank| gradients(&model, step, rank)[0].to_f64().unwrap()).collect();
        let t = i32::try_from(step + 1).unwrap();
        for (i, [x, m, v]) in exact.iter_mut().enumerate() {
            let g = scale * all.iter().map(|of_rank| of_rank[i]).sum::<f64>();
            (*m, *v) = (beta1 * *m + (1.0 - beta1) * g, beta2 * *v + (1.0 - beta2) * g * g);
            let change = (*m / (1.0 - beta1.powi(t))) / ((*v / (1.0 - beta2.powi(t))).sqrt() + epsilon);
            *x -= lr * (decay * *x + change);
        }
    }
    for got in results {
        for (got, [exact, ..]) in got.unwrap().into_iter().zip(&exact) {
            assert!((got - exact).abs() < 5e-6, "{got} for {exact}");
        }
    }
}

/// 100 steps of 1e-4 from 1.0, each below half of what bf16 tells apart there: the master counts them.
#[test]
fn steps_too_small_for_half_precision_add_up() {
    let results = on_ranks(2, DEADLINE, |rank| {
        let mut own = [Tensor::from_f64(&[1.0], DType::BF16, &[1])?];
        let options = AdamOptions { learning_rate: 1e-4, ..AdamOptions::default() };
        let mut adam = ShardedAdam::new(rank, options, &views(&own))?;
        for _ in 0..100 {
            adam.step(rank, &mut own, &[TensorView::from_slice(&[1_f32], &[1])?])?;
        }
        own[0].to_f64().map_err(Error::from)
    });
    for value in results {
        assert_eq!(value.unwrap(), [0.988_281_25], "1 - 0.01 rounded to bf16's 2^-8 below 1");
    }
}

#[test]
fn decay_is_decoupled_from_gradients() {
    let results = on_ranks(3, DEADLINE, |rank| {
        let mut own = [Tensor::from_f64(&[8.0, -4.0], DType::F32, &[2])?];
        let options = AdamOptions { learning_rate: 0.5, weight_decay: 0.5, ..AdamOptions::default() };
        let mut adam = ShardedAdam::new(rank, options, &views(&own))?;
        for _ in 0..2 {
            adam.step(rank, &mut own, &[TensorView::from_slice(&[0_f32; 2], &[2])?])?;
        }
        own[0].to_f64().map_err(Error::from)
    });
    for value in results {
        assert_eq!(value.unwrap(), [4.5, -2.25]);
    }
}

/// The gradients of rank 0, and none of the others: the same sums for any number of ranks.
fn of_the_first(model: &Model, step: usize, rank: usize) -> Vec<Tensor> {
    if rank == 0 {
        return gradients(model, step, 0);
    }
    model.iter().map(|(shape, dtype)| Tensor::zeros(*dtype, shape).unwrap()).collect()
}

/// Steps from a state, or from none; gives parameters and states.
fn resumed(
    rank: &Rank<'_>,
    model: &Model,
    saved: Option<(&[Tensor], &[AdamState])>,
    steps: std::ops::Range<usize>,
) -> Result<(Vec<Tensor>, AdamState)> {
    let mut own = match saved {
        Some((parameters, _)) => parameters.iter().map(|tensor| rank.dense(&tensor.view())).collect::<Result<_>>()?,
        None => parameters(model),
    };
    let mut adam = match saved {
        Some((_, parts)) => ShardedAdam::from_saved(rank, OPTIONS, &views(&own), parts)?,
        None => ShardedAdam::new(rank, OPTIONS, &views(&own))?,
    };
    for step in steps {
        adam.step(rank, &mut own, &views(&of_the_first(model, step, rank.comm.rank())))?;
    }
    Ok((own, adam.state().clone()))
}

#[test]
fn a_state_is_restored_to_any_number_of_ranks() {
    for model in models() {
        let expected = bits(&plain(&model, 1, STEPS, of_the_first));
        for ranks in WORLDS {
            let saved: Result<Vec<_>> =
                on_ranks(ranks, DEADLINE, |rank| resumed(rank, &model, None, 0..3)).into_iter().collect();
            let (mut parameters, parts): (Vec<_>, Vec<_>) = saved.unwrap().into_iter().unzip();
            let parameters = parameters.swap_remove(ranks - 1);
            for to in WORLDS {
                let saved = Some((parameters.as_slice(), parts.as_slice()));
                for result in on_ranks(to, DEADLINE, |rank| resumed(rank, &model, saved, 3..STEPS)) {
                    let (got, state) = result.unwrap();
                    assert_eq!(bits(&got), expected, "{model:?}: {ranks} ranks to {to}");
                    assert_eq!(state.step, 6);
                }
            }
        }
    }
}

#[test]
fn a_rank_holds_its_share_of_the_state() {
    let count = 10_007;
    for (dtype, bytes) in [(DType::F32, 8), (DType::BF16, 12)] {
        for ranks in WORLDS {
            let held = on_ranks(ranks, DEADLINE, |rank| {
                let mut own = [Tensor::zeros(dtype, &[count])?];
                let gradient = Tensor::zeros(dtype, &[count])?;
                let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
                adam.step(rank, &mut own, &[gradient.view()])?;
                Ok::<_, Error>(adam.state_bytes())
            });
            let held: Vec<usize> = held.into_iter().map(Result::unwrap).collect();
            assert_eq!(held.iter().sum::<usize>(), bytes * count, "{ranks} ranks");
            assert!(held.iter().all(|&held| held <= bytes * count.div_ceil(ranks)), "{ranks} ranks: {held:?}");
        }
    }
}

/// Ranks send p - 1 of p parts of the gradients and as much of the parameters, in their dtype.
#[test]
fn a_step_sends_gradients_and_parameters_once() {
    let (ranks, count) = (4, 1000);
    for dtype in [DType::F32, DType::BF16] {
        let sent = on_ranks(ranks, DEADLINE, |rank| {
            let mut own = [Tensor::zeros(dtype, &[count])?];
            let gradient = Tensor::zeros(dtype, &[count])?;
            let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            adam.step(rank, &mut own, &[gradient.view()])?;
            let told = rank.comm.traffic()["adam_step"];
            Ok::<_, Error>(told.bytes_sent)
        });
        for sent in sent {
            // What ranks agree on is some text besides.
            let (sent, tensors) = (sent.unwrap(), 2 * dtype.size_bytes() as u64 * 3 * 250);
            assert!((tensors..tensors + 3 * 400).contains(&sent), "{sent} bytes for {tensors}");
        }
    }
}

#[test]
fn options_out_of_range_are_refused() {
    type Edit = fn(&mut AdamOptions);
    let edits: [(&str, Edit); 8] = [
        ("learning_rate", |options| options.learning_rate = -1.0),
        ("learning_rate", |options| options.learning_rate = f32::NAN),
        ("beta1", |options| options.beta1 = 1.0),
        ("beta2", |options| options.beta2 = -0.1),
        ("epsilon", |options| options.epsilon = 0.0),
        ("epsilon", |options| options.epsilon = f32::INFINITY),
        ("weight_decay", |options| options.weight_decay = f32::INFINITY),
        ("gradient_scale", |options| options.gradient_scale = f32::NAN),
    ];
    for (name, edit) in edits {
        let is_own =
            |error: &Error| matches!(error, Error::Comm(CommError::Setting { parameter, .. }) if *parameter == name);
        let results = on_ranks(2, DEADLINE, |rank| {
            let own = [Tensor::zeros(DType::F32, &[3])?];
            let mut options = OPTIONS;
            edit(&mut options);
            let mut fine = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            assert!(fine.set_options(options).as_ref().is_err_and(is_own));
            assert_eq!(fine.options(), OPTIONS);
            ShardedAdam::new(rank, if rank.comm.rank() == 1 { options } else { OPTIONS }, &views(&own))
        });
        for (rank, result) in results.into_iter().enumerate() {
            let error = result.unwrap_err();
            let is_told = matches!(error, Error::Comm(CommError::Refused { rank: 1, .. }));
            assert!(if rank == 1 { is_own(&error) } else { is_told }, "{name}, rank {rank}: {error:?}");
        }
    }
}

/// Rank 1 passes something else than the others.
#[test]
fn tensors_that_do_not_fit_reach_every_rank() {
    type Edit = fn(&mut Vec<Tensor>, &mut Vec<Tensor>);
    let edits: [(&str, Edit); 6] = [
        ("gradient's shape", |_, gradients| gradients[0] = Tensor::zeros(DType::F32, &[4]).unwrap()),
        ("gradient's axes", |_, gradients| gradients[0] = Tensor::zeros(DType::F32, &[3, 1]).unwrap()),
        ("gradient's dtype", |_, gradients| gradients[0] = Tensor::zeros(DType::I32, &[3]).unwrap()),
        ("gradients", |_, gradients| gradients.truncate(1)),
        ("parameters", |parameters, _| parameters.truncate(0)),
        ("parameter's dtype", |parameters, _| parameters[0] = Tensor::zeros(DType::F16, &[3]).unwrap()),
    ];
    for (name, edit) in edits {
        let results = on_ranks(3, DEADLINE, |rank| {
            let two = || vec![Tensor::zeros(DType::F32, &[3]).unwrap(), Tensor::zeros(DType::F32, &[2]).unwrap()];
            let (mut own, mut gradients) = (two(), two());
            let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            if rank.comm.rank() == 1 {
                edit(&mut own, &mut gradients);
            }
            let result = adam.step(rank, &mut own, &views(&gradients));
            assert!(rank.comm.is_usable());
            assert_eq!(adam.state().step, 0);
            result
        });
        for (rank, result) in results.into_iter().enumerate() {
            let error = result.unwrap_err();
            let is_told = matches!(error, Error::Comm(CommError::Refused { rank: 1, .. }));
            let is_own = matches!(
                error,
                Error::Problem(
                    ProblemError::Shape { .. }
                        | ProblemError::Rank { .. }
                        | ProblemError::UnsupportedDType { .. }
                        | ProblemError::Length { .. }
                )
            );
            assert!(if rank == 1 { is_own } else { is_told }, "{name}, rank {rank}: {error:?}");
        }
    }
}

#[test]
fn ranks_that_differ_are_told_so() {
    type Call = fn(&Rank<'_>, bool) -> Result<()>;
    let calls: [(&str, Call); 4] = [
        ("shapes", |rank, odd| {
            let own = [Tensor::zeros(DType::F32, &[if odd { 3 } else { 4 }])?];
            ShardedAdam::new(rank, OPTIONS, &views(&own)).map(|_| ())
        }),
        ("learning rate", |rank, odd| {
            let mut own = [Tensor::zeros(DType::F32, &[3])?];
            let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            adam.set_options(AdamOptions { learning_rate: if odd { 0.1 } else { 0.2 }, ..OPTIONS })?;
            let gradient = Tensor::zeros(DType::F32, &[3])?;
            adam.step(rank, &mut own, &[gradient.view()])
        }),
        ("dtype of gradients", |rank, odd| {
            let mut own = [Tensor::zeros(DType::F32, &[3])?];
            let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            let gradient = Tensor::zeros(if odd { DType::F16 } else { DType::F32 }, &[3])?;
            adam.step(rank, &mut own, &[gradient.view()])
        }),
        ("call", |rank, odd| {
            let mut own = [Tensor::zeros(DType::F32, &[3])?];
            let mut adam = ShardedAdam::new(rank, OPTIONS, &views(&own))?;
            if odd {
                return rank.comm.barrier();
            }
            let gradient = Tensor::zeros(DType::F32, &[3])?;
            adam.step(rank, &mut own, &[gradient.view()])
        }),
    ];
    for (name, call) in calls {
        for result in on_ranks(3, DEADLINE, |rank| call(rank, rank.comm.rank() == 2)) {
            assert!(matches!(result, Err(Error::Comm(CommError::Mismatch { .. }))), "{name}: {result:?}");
        }
    }
}

#[test]
fn other_ranks_and_other_parts_are_refused() {
    let part =
        |count: usize, step| AdamState { step, first: vec![0.0; count], second: vec![0.0; count], master: vec![] };
    let mastered = AdamState { master: vec![0.0], ..part(3, 1) };
    let uneven = AdamState { second: vec![0.0; 2], ..part(3, 1) };
    let saved: [(&str, Vec<AdamState>); 6] = [
        ("none", vec![]),
        ("too many elements", vec![part(6, 1)]),
        ("cut in another way", vec![part(2, 1), part(3, 1)]),
        ("other steps", vec![part(3, 1), part(2, 2)]),
        ("masters of f32", vec![mastered, part(2, 1)]),
        ("unlike moments", vec![uneven, part(2, 1)]),
    ];
    for (name, parts) in saved {
        let results = on_ranks(2, DEADLINE, |rank| {
            let own = [Tensor::zeros(DType::F32, &[5])?];
            ShardedAdam::from_saved(rank, OPTIONS, &views(&own), &parts)
        });
        for result in results {
            let is_own = matches!(result, Err(Error::Comm(CommError::Counts { list: "parts", .. })));
            assert!(is_own, "{name}: {result:?}");
        }
    }
    let empty = on_ranks(2, DEADLINE, |rank| ShardedAdam::new(rank, OPTIONS, &[]));
    assert!(empty.iter().all(|made| matches!(made, Err(Error::Comm(CommError::Counts { list: "parameters", .. })))));
    let results = on_ranks(3, DEADLINE, |rank| {
        let mut own = [Tensor::zeros(DType::F32, &[5])?];
        let alone = tilefold_comm::Communicator::alone();
        let mut adam = ShardedAdam::new(&Rank { comm: &alone, ..*rank }, OPTIONS, &views(&own))?;
        let gradient = Tensor::zeros(DType::F32, &[5])?;
        adam.step(rank, &mut own, &[gradient.view()])
    });
    for result in results {
        assert!(matches!(result, Err(Error::Comm(CommError::WorldSize { expected: 1, got: 3, .. }))), "{result:?}");
    }
}
