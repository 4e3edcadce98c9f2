//! The features against their definitions, written out in `f64` without the short cuts of the code under test.

use tilefold::evoformer::Variant;

use super::super::alignment::Alignment;
use super::linear::{Linear, layer_norm};
use super::representation::{OUTER_CHANNELS, ResidueEmbedding, add_outer_product_mean, relative_position};
use super::residue::{RESIDUE_CLASSES, class, deletion_features};
use super::*;

const FIBRONECTIN: &str = include_str!("../../../../examples/data/PF00041_seed.sto");

/// Three sequences with gaps, deletions, an unknown residue, and a column (the fourth) without residues.
const SMALL: &str = ">t\nACD-WX\n>a\nA-aaD-YB\n>b\n--D-kWU\n";

const SMALL_OPTIONS: FeatureOptions =
    FeatureOptions { msa_channels: 12, pair_channels: 10, msa_heads: 3, pair_heads: 2, head_dim: 4, seed: 5 };

fn small() -> Alignment {
    Alignment::parse(SMALL, "small.a3m").unwrap()
}

fn small_inputs() -> EvoformerInputs {
    EvoformerInputs::new(MsaFeatures::new(&small()).unwrap(), SMALL_OPTIONS).unwrap()
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (place, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() < 1e-4, "value {place} is {got}, expected {expected}");
    }
}

/// `x weights`, row by row, in `f64`.
fn product(x: &[f64], map: &Linear, n_in: usize) -> Vec<f64> {
    let n_out = map.row(0).len();
    let outputs = x.chunks_exact(n_in).flat_map(|x| {
        (0..n_out).map(move |out| x.iter().enumerate().map(|(input, x)| x * f64::from(map.row(input)[out])).sum())
    });
    outputs.collect()
}

/// Layer norm in `f64`.
fn normalised(x: &[f64], channels: usize) -> Vec<f64> {
    let count = f64::from(u32::try_from(channels).unwrap());
    let rows = x.chunks_exact(channels).flat_map(|row| {
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        row.iter().map(move |x| (x - mean) / (variance + 1e-5).sqrt())
    });
    rows.collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

#[test]
fn residues_have_the_classes_of_alphafold() {
    let classes: Vec<u8> = b"ARNDCQEGHILKMFPSTWYV".iter().map(|&residue| class(residue)).collect();
    assert_eq!(classes, [0, 14, 11, 2, 1, 13, 3, 5, 6, 7, 9, 8, 10, 4, 12, 15, 16, 18, 19, 17]);
    let others: Vec<u8> = b"BZUXJO-".iter().map(|&residue| class(residue)).collect();
    assert_eq!(others, [2, 3, 1, 20, 20, 20, 21]);
}

#[test]
fn deletions_become_a_flag_and_a_bounded_value() {
    assert_eq!(deletion_features(0), [0.0, 0.0]);
    assert_eq!(deletion_features(3), [1.0, 0.5]); // 2/pi * atan(1)
    assert!((deletion_features(1)[1] - 0.204_832_8).abs() < 1e-6);
    assert_eq!(deletion_features(u32::MAX), deletion_features(65_535));
}

#[test]
fn offsets_are_clipped_at_both_ends() {
    let cases = [((0, 0), 32), ((5, 4), 33), ((4, 5), 31), ((0, 32), 0), ((0, 900), 0), ((32, 0), 64), ((900, 0), 64)];
    for ((i, j), expected) in cases {
        assert_eq!(relative_position(i, j), expected, "{i} - {j}");
    }
}

#[test]
fn masks_are_false_at_gaps_and_at_empty_columns() {
    let features = MsaFeatures::new(&small()).unwrap();
    let expected = [[1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1]];
    assert_eq!(features.mask(), expected.as_flattened().iter().map(|&bit| bit == 1).collect::<Vec<_>>());
    let pairs = features.pair_mask();
    for (place, &kept) in pairs.iter().enumerate() {
        assert_eq!(kept, place / 6 != 3 && place % 6 != 3, "pair {place}");
    }
}

#[test]
fn tiling_repeats_and_crops_along_both_axes() {
    let alignment = small();
    let whole = MsaFeatures::new(&alignment).unwrap();
    for (n_seq, n_res) in [(7, 15), (2, 4), (3, 6), (1, 1)] {
        let tiled = MsaFeatures::tiled(&alignment, n_seq, n_res).unwrap();
        assert_eq!(tiled.classes().len(), n_seq * n_res);
        for place in 0..n_seq * n_res {
            let source = place / n_res % 3 * 6 + place % n_res % 6;
            assert_eq!(tiled.classes()[place], whole.classes()[source]);
            assert_eq!(tiled.deletions()[place], whole.deletions()[source]);
        }
    }
}

#[test]
fn a_linear_map_is_a_matrix_product_for_any_number_of_rows() {
    let map = Linear::dense(7, 5, 1, 2);
    for rows in [1, 7, 8, 9, 33] {
        let mut x = vec![0.0; rows * 7];
        linear::fill_normal(&mut x, 3, 4);
        assert_close(&map.apply("x", &x).unwrap(), &product(&wide(&x), &map, 7));
    }
}

#[test]
fn layer_norm_centres_and_scales_each_row() {
    let mut rows = vec![0.0; 6 * 9];
    linear::fill_normal(&mut rows, 1, 1);
    let expected = normalised(&wide(&rows), 9);
    layer_norm(&mut rows, 9);
    assert_close(&rows, &expected);
}

#[test]
fn the_msa_representation_is_its_definition() {
    let features = MsaFeatures::new(&small()).unwrap();
    let channels = SMALL_OPTIONS.msa_channels;
    let residue = Linear::table(RESIDUE_CLASSES, channels, 5, stream::MSA_RESIDUE);
    let deletion = Linear::table(2, channels, 5, stream::MSA_DELETION);
    let target = Linear::table(RESIDUE_CLASSES, channels, 5, stream::MSA_TARGET);
    let mut expected = Vec::new();
    for (place, (&class, &count)) in features.classes().iter().zip(features.deletions()).enumerate() {
        for channel in 0..channels {
            let [flag, value] = deletion_features(count);
            let sum = residue.row(usize::from(class))[channel]
                + flag * deletion.row(0)[channel]
                + value * deletion.row(1)[channel]
                + target.row(usize::from(features.target()[place % 6]))[channel];
            expected.push(f64::from(sum));
        }
    }
    assert_eq!(features.deletions().iter().sum::<u32>(), 3);
    assert_close(small_inputs().msa(), &normalised(&expected, channels));
}

#[test]
fn the_outer_product_mean_is_its_definition() {
    // Wider than a block of rows, so that the blocks' seams are in it.
    const N_RES: usize = 19;
    let features = MsaFeatures::tiled(&small(), 3, N_RES).unwrap();
    let inputs = EvoformerInputs::new(features, SMALL_OPTIONS).unwrap();
    let (features, channels) = (inputs.features(), SMALL_OPTIONS.pair_channels);
    let [left, right] = [stream::OUTER_LEFT, stream::OUTER_RIGHT].map(|stream| {
        let map = Linear::dense(12, OUTER_CHANNELS, 5, stream);
        product(&wide(inputs.msa()), &map, 12)
    });
    let out_map = Linear::dense(OUTER_CHANNELS * OUTER_CHANNELS, channels, 5, stream::OUTER_OUT);
    let mask = features.mask();
    let mut expected = Vec::new();
    for (i, j) in (0..N_RES).flat_map(|i| (0..N_RES).map(move |j| (i, j))) {
        let mut mean = vec![0.0; OUTER_CHANNELS * OUTER_CHANNELS];
        let common: Vec<usize> = (0..3).filter(|s| mask[s * N_RES + i] && mask[s * N_RES + j]).collect();
        for s in &common {
            for (place, mean) in mean.iter_mut().enumerate() {
                let a = left[(s * N_RES + i) * OUTER_CHANNELS + place / OUTER_CHANNELS];
                let b = right[(s * N_RES + j) * OUTER_CHANNELS + place % OUTER_CHANNELS];
                *mean += a * b / (1e-3 + f64::from(u32::try_from(common.len()).unwrap()));
            }
        }
        expected.extend(product(&mean, &out_map, OUTER_CHANNELS * OUTER_CHANNELS));
    }
    let mut pair = vec![0.0; N_RES * N_RES * channels];
    add_outer_product_mean(&mut pair, inputs.msa(), features, inputs.options()).unwrap();
    assert_close(&pair, &expected);
}

#[test]
fn each_variant_has_its_shapes_its_weights_and_untransposed_operands() {
    let inputs = small_inputs();
    let expected = [
        (Variant::MsaRow, [1, 3, 6, 3, 4], Some(stream::MSA_ROW)),
        (Variant::MsaColumn, [1, 3, 6, 3, 4], None),
        (Variant::TriangleStarting, [1, 6, 6, 2, 4], Some(stream::TRIANGLE_STARTING)),
        (Variant::TriangleEnding, [1, 6, 6, 2, 4], Some(stream::TRIANGLE_ENDING)),
    ];
    assert_eq!(expected.map(|(variant, ..)| variant), Variant::ALL);
    for (variant, shape, first_stream) in expected {
        let got = inputs.variant(variant).unwrap();
        assert_eq!(got.shape, shape);
        let count = shape.iter().product::<usize>();
        for tensor in [&got.q, &got.k, &got.v, &got.gate, &got.d_out] {
            assert_eq!(tensor.len(), count);
        }
        assert!(got.q != got.k && got.k != got.v && got.v != got.gate);
        assert_eq!(got.mask.len(), shape[1] * shape[2]);
        assert_eq!(got.bias.is_some(), first_stream.is_some());
        if let (Some(bias), Some(first)) = (&got.bias, first_stream) {
            let heads = shape[3];
            let by_pair = product(&wide(inputs.pair()), &Linear::dense(10, heads, 5, first + stream::BIAS), 10);
            let by_head: Vec<f64> = (0..heads * 36).map(|place| by_pair[place % 36 * heads + place / 36]).collect();
            assert_eq!(got.bias_shape(), [1, 1, heads, 6, 6]);
            assert_close(bias, &by_head);
        }
    }
    let weights = Variant::ALL.map(|variant| inputs.variant(variant).unwrap().q);
    assert!(weights[0] != weights[1] && weights[2] != weights[3], "two variants share weights");
    let row = inputs.variant(Variant::MsaRow).unwrap();
    let map = Linear::dense(12, 12, 5, stream::MSA_ROW + stream::Q);
    assert_close(&row.q, &product(&wide(inputs.msa()), &map, 12));
}

#[test]
fn values_depend_on_the_seed_and_not_on_the_threads() {
    let build = |seed, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let features = MsaFeatures::new(&small()).unwrap();
            let inputs = EvoformerInputs::new(features, FeatureOptions { seed, ..SMALL_OPTIONS }).unwrap();
            inputs.variant(Variant::TriangleEnding).unwrap()
        })
    };
    assert_eq!(build(1, 1), build(1, 3));
    assert_ne!(build(1, 1).q, build(2, 1).q);
}

#[test]
fn real_inputs_are_finite_and_of_unit_scale() {
    let alignment = Alignment::parse(FIBRONECTIN, "fn3").unwrap();
    let features = MsaFeatures::tiled(&alignment, 20, 40).unwrap();
    let inputs = EvoformerInputs::new(features, FeatureOptions::default()).unwrap();
    for variant in Variant::ALL {
        let got = inputs.variant(variant).unwrap();
        for tensor in
            [Some(&got.q), Some(&got.k), Some(&got.v), Some(&got.gate), got.bias.as_ref()].into_iter().flatten()
        {
            let squares = tensor.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            let rms = (squares / f64::from(u32::try_from(tensor.len()).unwrap())).sqrt();
            assert!((0.5..2.0).contains(&rms), "{variant:?}: {rms}");
        }
    }
}

#[test]
fn an_extra_msa_row_is_the_embedding_normalised_and_projected() {
    let options = ExtraMsaOptions { n_seq: 5, n_res: 8, channels: 6, heads: 3, head_dim: 2, seed: 9 };
    let extra = ExtraMsa::new(&small(), options).unwrap();
    let features = MsaFeatures::tiled(&small(), 5, 8).unwrap();
    assert_eq!(extra.shape(), [1, 5, 8, 3, 2]);
    assert_eq!(extra.mask(), features.mask());
    assert_eq!(extra.bias().len(), 3 * 8 * 8);
    let embedding = ResidueEmbedding::new(6, 9);
    let mut row = vec![0.0; extra.row_len()];
    let roles = [(ExtraMsaTensor::Q, stream::Q), (ExtraMsaTensor::K, stream::K), (ExtraMsaTensor::V, stream::V)];
    for (sequence, (tensor, role)) in (0..5).flat_map(|sequence| roles.map(|role| (sequence, role))) {
        let mut embedded = vec![0.0; 8 * 6];
        for (place, out) in (sequence * 8..).zip(embedded.chunks_exact_mut(6)) {
            embedding.add(features.classes()[place], features.deletions()[place], out);
        }
        let map = Linear::dense(6, 6, 9, stream::EXTRA_MSA + role);
        extra.fill_row(tensor, sequence, &mut row).unwrap();
        assert_close(&row, &product(&normalised(&wide(&embedded), 6), &map, 6));
    }
}

#[test]
fn extra_msa_gradients_differ_by_row_and_repeat_for_a_seed() {
    let options = ExtraMsaOptions { n_seq: 2, n_res: 6, channels: 6, heads: 3, head_dim: 2, seed: 9 };
    let extra = ExtraMsa::new(&small(), options).unwrap();
    let row = |sequence| {
        let mut row = vec![0.0; extra.row_len()];
        extra.fill_row(ExtraMsaTensor::DOut, sequence, &mut row).unwrap();
        row
    };
    assert_eq!(row(0), row(0));
    assert_ne!(row(0), row(1));
}

#[test]
fn memory_that_is_not_given_is_an_error() {
    let error = reserved::<u64>("kinds", usize::MAX / 2).unwrap_err();
    assert_eq!(error, FeatureError::NoMemory { tensor: "kinds", bytes: usize::MAX });
    assert!(error.to_string().starts_with("kinds: no memory for"), "{error}");
    assert_eq!(zeros("x", &[2, 3]), Ok(vec![0.0; 6]));
}

#[test]
fn impossible_sizes_are_refused() {
    let alignment = small();
    let zero = MsaFeatures::tiled(&alignment, 0, 4).unwrap_err();
    assert_eq!(zero.to_string(), "number of sequences is 0; give at least 1");
    assert!(matches!(MsaFeatures::tiled(&alignment, usize::MAX, 2), Err(FeatureError::TooLarge { .. })));
    let no_heads = FeatureOptions { msa_heads: 0, ..SMALL_OPTIONS };
    assert!(matches!(
        EvoformerInputs::new(MsaFeatures::new(&alignment).unwrap(), no_heads),
        Err(FeatureError::Zero { what: "number of MSA heads" })
    ));
    let huge = ExtraMsaOptions { n_seq: 1 << 40, ..ExtraMsaOptions::default() };
    assert!(matches!(ExtraMsa::new(&alignment, huge), Err(FeatureError::TooLarge { .. })));

    let extra =
        ExtraMsa::new(&alignment, ExtraMsaOptions { n_seq: 2, n_res: 3, ..ExtraMsaOptions::default() }).unwrap();
    let mut row = vec![0.0; extra.row_len()];
    assert_eq!(extra.fill_row(ExtraMsaTensor::Q, 2, &mut row), Err(FeatureError::NoSuchRow { row: 2, n_seq: 2 }));
    row.push(0.0);
    assert_eq!(
        extra.fill_row(ExtraMsaTensor::Q, 0, &mut row),
        Err(FeatureError::RowLength { expected: 192, got: 193 })
    );
}
