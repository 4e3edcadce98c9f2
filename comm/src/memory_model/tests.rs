//! Formulas against numbers worked out by hand, and what must hold for every training.

use super::paper::{self, GPUS, System};
use super::*;

/// h = 8, a = 4, L = 3, V = 10: Ψ = 3 (12 · 64 + 13 · 8) + 12 · 8 = 2712.
const SMALL: Model = Model { layers: 3, hidden: 8, heads: 4, vocabulary: 10 };
const PARAMETERS: f64 = 2712.0;

fn bytes(training: &Training, seqlen: u64, name: &str) -> f64 {
    let buffers = training.buffers(seqlen).unwrap();
    buffers
        .iter()
        .filter(|buffer| buffer.name == name && buffer.place == Place::Device)
        .map(|buffer| buffer.bytes)
        .sum()
}

fn state(training: &Training) -> f64 {
    ["parameters", "gradients", "optimizer state"].iter().map(|name| bytes(training, 1, name)).sum()
}

fn close(got: f64, expected: f64) {
    assert!((got - expected).abs() <= 1e-9 * expected.abs(), "expected {expected}, got {got}");
}

#[test]
fn the_state_is_that_of_the_zero_paper() {
    close(SMALL.parameters(), PARAMETERS);
    let with = |zero, data_ranks| Training { zero, data_ranks, ..Training::new(SMALL) };
    close(state(&with(ZeroStage::Off, 8)), 16.0 * PARAMETERS);
    close(state(&with(ZeroStage::OptimizerState, 8)), (4.0 + 12.0 / 8.0) * PARAMETERS);
    close(state(&with(ZeroStage::Gradients, 8)), (2.0 + 14.0 / 8.0) * PARAMETERS);
    close(state(&with(ZeroStage::Parameters, 8)), 2.0 * PARAMETERS);
    // Over t as well; gradients in f32; everything in f32.
    close(state(&Training { tensor_ranks: 4, ..with(ZeroStage::OptimizerState, 2) }), 2.5 * PARAMETERS);
    close(state(&Training { f32_gradients: true, ..with(ZeroStage::Parameters, 2) }), 9.0 * PARAMETERS);
    close(state(&Training { element_bytes: 4, ..with(ZeroStage::Off, 1) }), 16.0 * PARAMETERS);
    // ZeRO-3 holds one layer's parameters whole: 2 (12 · 64 + 13 · 8) / t.
    close(bytes(&Training { tensor_ranks: 2, ..with(ZeroStage::Parameters, 2) }, 1, "gathered parameters"), 872.0);
}

#[test]
fn activations_are_those_of_korthikanti() {
    // s = 6, b = 2: sbh = 96, as²b = 288.
    let with = |tensor_ranks, sequence_parallel, recompute, fused_attention| Training {
        batch: 2,
        tensor_ranks,
        sequence_parallel,
        recompute,
        fused_attention,
        ..Training::new(SMALL)
    };
    let kept = |training| bytes(&training, 6, "activations") / 3.0;
    // Table 2, by row.
    close(kept(with(1, false, Recompute::None, false)), 96.0 * 34.0 + 5.0 * 288.0);
    close(kept(with(4, false, Recompute::None, false)), 96.0 * (10.0 + 24.0 / 4.0) + 5.0 * 288.0 / 4.0);
    close(kept(with(4, true, Recompute::None, false)), (96.0 * 34.0 + 5.0 * 288.0) / 4.0);
    close(kept(with(4, false, Recompute::Selective, false)), 96.0 * (10.0 + 24.0 / 4.0));
    close(kept(with(4, true, Recompute::Selective, false)), 96.0 * 34.0 / 4.0);
    close(kept(with(4, false, Recompute::Full, false)), 96.0 * 2.0);
    // Fused attention is selective recomputation.
    close(kept(with(4, true, Recompute::None, true)), 96.0 * 34.0 / 4.0);
    // Checkpoints are shared out by sequence parallelism, or when asked for.
    close(kept(with(4, true, Recompute::Full, true)), 48.0);
    close(kept(Training { partition_activations: true, ..with(4, false, Recompute::Full, true) }), 48.0);
    // f32: 16 elements of 4 bytes and 2 dropout masks; 2 elements and a mask for each pair.
    let f32 = Training { element_bytes: 4, ..with(1, false, Recompute::None, false) };
    close(kept(f32), 96.0 * 66.0 + 9.0 * 288.0);

    let work = |training| bytes(&training, 6, "layer computed again");
    close(work(with(4, true, Recompute::Full, false)), (96.0 * 34.0 + 5.0 * 288.0) / 4.0);
    close(work(with(4, false, Recompute::Full, true)), 96.0 * (10.0 + 24.0 / 4.0));
    close(work(with(4, true, Recompute::Selective, false)), 5.0 * 288.0 / 4.0);
    close(work(with(4, true, Recompute::None, false)) + work(with(4, true, Recompute::Selective, true)), 0.0);

    // 4sbh/t (1 + V/h); without sequence parallelism the two inputs are whole.
    close(bytes(&with(4, true, Recompute::Full, true), 6, "norm, logits and loss"), 96.0 * (1.0 + 10.0 / 8.0));
    let whole = with(4, false, Recompute::Full, true);
    close(bytes(&whole, 6, "norm, logits and loss"), 4.0 * 96.0 + 4.0 * 96.0 * 10.0 / 8.0 / 4.0);
}

#[test]
fn masks_positions_and_gathered_tensors_are_divided_as_they_are() {
    let plain = Training { tensor_ranks: 4, ..Training::new(SMALL) };
    for (mask, each) in [(DenseMask::None, 0.0), (DenseMask::Bool, 1.0), (DenseMask::F32, 4.0)] {
        let training = Training { mask, ..plain };
        close(bytes(&training, 10, "mask"), each * 100.0);
        close(bytes(&training, 10, "mask, the copy it is built from"), 0.0);
        let copied = Training { mask_is_copied: true, ..training };
        close(bytes(&copied, 10, "mask, the copy it is built from"), each * 100.0);
    }
    let table = |positions, zero| bytes(&Training { positions, zero, data_ranks: 2, ..plain }, 10, "position table");
    close(table(Positions::None, ZeroStage::Off), 0.0);
    close(table(Positions::Replicated, ZeroStage::Off), 16.0 * 80.0);
    close(table(Positions::Partitioned, ZeroStage::Off), 16.0 * 80.0 / 4.0);
    close(table(Positions::Partitioned, ZeroStage::OptimizerState), 10.0 * 80.0 / 4.0);
    // 2 tensors of 2sbh, whatever t; none where nothing is gathered.
    let gathered = |training: Training| bytes(&training, 10, "gathered sequence");
    let parallel = Training { sequence_parallel: true, ..plain };
    close(gathered(parallel), 4.0 * 80.0);
    close(gathered(Training { gathered_copies: 3, ..parallel }), 6.0 * 80.0);
    close(gathered(plain) + gathered(Training { tensor_ranks: 1, ..parallel }), 0.0);
}

#[test]
fn ranks_that_divide_the_sequence_alone_hold_all_weights() {
    let mask = DenseMask::Bool;
    let one = Training { mask, positions: Positions::Partitioned, element_bytes: 4, ..Training::new(SMALL) };
    let four = Training { sequence_ranks: 4, ..one };
    close(state(&four), state(&one));
    close(state(&Training { zero: ZeroStage::OptimizerState, ..four }), (8.0 + 8.0 / 4.0) * PARAMETERS);
    // Ranks along the sequence hold other rows of the table, and the same weights.
    let table = |positions| {
        bytes(&Training { positions, zero: ZeroStage::OptimizerState, data_ranks: 2, ..four }, 60, "position table")
    };
    close(table(Positions::Partitioned), (8.0 + 8.0 / 2.0) * 480.0 / 4.0);
    close(table(Positions::Replicated), (8.0 + 8.0 / 8.0) * 480.0);
    for name in ["activations", "mask", "position table", "norm, logits and loss"] {
        close(bytes(&four, 60, name), bytes(&one, 60, name) / 4.0);
    }
    // 10 elements of 4 bytes for each of s · h = 480, in 3 layers; 8 s h + 4 s · 6 for the loss.
    let own = Training { kept_elements: Some(10), vocabulary_tile: Some(6), ..four };
    close(bytes(&own, 60, "activations"), 3.0 * 40.0 * 480.0 / 4.0);
    close(bytes(&own, 60, "norm, logits and loss"), (8.0 * 480.0 + 24.0 * 60.0) / 4.0);
    // Of 10 / 2 logits of a rank, 3 at a time, or all.
    let halves = |tile| bytes(&Training { tensor_ranks: 2, vocabulary_tile: tile, ..one }, 60, "norm, logits and loss");
    close(halves(Some(3)), 8.0 * 480.0 + 4.0 * 60.0 * 3.0);
    close(halves(Some(7)), halves(None));
    close(bytes(&Training { vocabulary_tile: Some(11), ..one }, 60, "norm, logits and loss"), 8.0 * 480.0 + 2400.0);
}

#[test]
fn offloaded_activations_leave_two_layers_on_the_device() {
    let training = Training { offload_activations: true, recompute: Recompute::Full, ..Training::new(SMALL) };
    close(bytes(&training, 10, "activations"), 2.0 * 160.0);
    let buffers = training.buffers(10).unwrap();
    let on_host: f64 = buffers.iter().filter(|buffer| buffer.place == Place::Host).map(|buffer| buffer.bytes).sum();
    close(on_host, 3.0 * 160.0);
    let on_device: f64 = buffers.iter().filter(|buffer| buffer.place == Place::Device).map(|buffer| buffer.bytes).sum();
    close(training.device_bytes(10).unwrap(), on_device);
    let one_layer = Training { model: Model { layers: 1, ..SMALL }, ..training };
    close(bytes(&one_layer, 10, "activations"), 160.0);
}

/// Trainings that differ in everything.
fn trainings() -> Vec<Training> {
    let mut all = Vec::new();
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        for mask in [DenseMask::None, DenseMask::Bool, DenseMask::F32] {
            for positions in [Positions::None, Positions::Replicated, Positions::Partitioned] {
                for flags in 0..16_u8 {
                    let flag = |bit: u8| flags >> bit & 1 == 1;
                    all.push(Training {
                        batch: 2,
                        tensor_ranks: 4,
                        data_ranks: 2,
                        recompute,
                        mask,
                        positions,
                        sequence_parallel: flag(0),
                        fused_attention: flag(1),
                        partition_activations: flag(2),
                        offload_activations: flag(3),
                        ..Training::new(Model { layers: 6, hidden: 64, heads: 8, vocabulary: 100 })
                    });
                }
            }
        }
    }
    all
}

#[test]
fn memory_grows_with_the_sequence_and_falls_with_ranks_and_stages() {
    for training in trainings() {
        let at = |training: Training, seqlen| training.device_bytes(seqlen).unwrap();
        let lengths = [1, 2, 3, 17, 1000, 1 << 20, 1 << 39];
        assert!(lengths.windows(2).all(|pair| at(training, pair[0]) < at(training, pair[1])), "{training:?}");
        let less = |other| assert!(at(other, 4096) <= at(training, 4096), "{training:?} against {other:?}");
        less(Training { tensor_ranks: 8, ..training });
        less(Training { data_ranks: 4, ..training });
        less(Training { zero: ZeroStage::OptimizerState, ..training });
        less(Training { fused_attention: true, ..training });
        less(Training { partition_activations: true, ..training });
        less(Training { mask: DenseMask::None, ..training });
        let memory = 1_u64 << 30;
        let longest = training.longest(memory).unwrap();
        assert!(at(training, longest) <= real(memory) && at(training, longest + 1) > real(memory), "{training:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let model = Model { layers: 64, hidden: 6144, heads: 64, vocabulary: 50_257 };
    let training = Training::new(model);
    let name = |memory_gb: u64| match training.longest(memory_gb * 1_000_000_000) {
        Err(ModelError::DoesNotFit { buffer, .. }) => buffer,
        other => panic!("{memory_gb} GB: {other:?}"),
    };
    // Ψ is 29.3e9.
    assert_eq!([name(58), name(117), name(468)], ["parameters", "gradients", "optimizer state"]);
    assert!(training.longest(470_000_000_000).is_ok());
    let message = training.longest(1 << 30).unwrap_err().to_string();
    assert!(message.starts_with("parameters does not fit: with the buffers before it 58.61 GB"), "{message}");
    let masked = Training { mask: DenseMask::Bool, ..Training::new(SMALL) };
    assert!(matches!(masked.longest(44_000), Err(ModelError::DoesNotFit { buffer: "activations", .. })));
}

#[test]
fn sizes_that_cannot_be_are_errors() {
    let plain = Training::new(SMALL);
    let zero = [
        (Training { model: Model { layers: 0, ..SMALL }, ..plain }, "layers"),
        (Training { model: Model { hidden: 0, ..SMALL }, ..plain }, "hidden"),
        (Training { model: Model { heads: 0, ..SMALL }, ..plain }, "heads"),
        (Training { model: Model { vocabulary: 0, ..SMALL }, ..plain }, "vocabulary"),
        (Training { batch: 0, ..plain }, "batch"),
        (Training { tensor_ranks: 0, ..plain }, "tensor_ranks"),
        (Training { data_ranks: 0, ..plain }, "data_ranks"),
    ];
    for (training, parameter) in zero {
        assert_eq!(training.buffers(1), Err(ModelError::Zero { parameter }));
    }
    let message = |training: Training| training.longest(1 << 40).unwrap_err().to_string();
    assert_eq!(message(Training { tensor_ranks: 3, ..plain }), "heads = 4 must be a multiple of tensor_ranks = 3");
    assert_eq!(
        message(Training { model: Model { heads: 3, ..SMALL }, ..plain }),
        "hidden = 8 must be a multiple of heads = 3"
    );
    assert_eq!(message(Training { element_bytes: 1, ..plain }), "element_bytes: expected 2 or 4, got 1");
}

/// What was computed from the formulas when they were written down, in K tokens: a change of the model shows here.
#[test]
fn the_comparison_with_the_paper_is_as_stated() {
    let rows = paper::compare();
    let fitted = rows.iter().filter_map(|row| Some((row.fitted_k?, row.published_k)));
    let (got, errors): (Vec<f64>, Vec<f64>) = fitted.map(|(k, published)| (k.round(), k / published - 1.0)).unzip();
    assert_eq!(got, [196.0, 433.0, 506.0, 130.0, 375.0, 459.0]);
    assert!(errors.iter().all(|error| error.abs() < 0.04), "{errors:?}");

    let predicted = |name, system, variant: usize| -> Vec<f64> {
        let of_row = rows.iter().filter(|row| row.published.name == name && row.published.system == system);
        of_row.skip(variant * GPUS.len()).take(GPUS.len()).map(|row| row.predicted_k.clone().unwrap().round()).collect()
    };
    let expected = [
        ("25B", System::New, 0, [420.0, 770.0, 840.0]),
        ("25B", System::Old, 0, [22.0, 29.0, 32.0]),
        ("25B", System::Old, 1, [39.0, 57.0, 62.0]),
        ("25B", System::MegatronLm, 0, [30.0, 50.0, 54.0]),
        ("33B", System::New, 0, [335.0, 684.0, 763.0]),
        ("33B", System::Old, 0, [17.0, 24.0, 27.0]),
        ("33B", System::Old, 1, [36.0, 55.0, 60.0]),
        ("33B", System::MegatronLm, 0, [25.0, 46.0, 51.0]),
    ];
    assert_eq!(rows.len(), expected.len() * GPUS.len());
    for (name, system, variant, lengths) in expected {
        assert_eq!(predicted(name, system, variant), lengths, "{name} {system:?} {variant}");
    }
}
