//! run, against the f64 oracle.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tilefold::reference::{self, ReferenceInputs};
use tilefold::{
    DType, EmptyRows, Inputs, Options, Products, StructuralMask, Tensor, Window, all_gradients, problem, safetensors,
};
use tilefold_benches::normal;

use crate::{failure, json, stdout};

type Tensors = BTreeMap<&'static str, Tensor>;

const TOLERANCE: f64 = 2e-5;

/// batch 2, rows 3, 5 queries, 7 keys, 4 heads on 2 key heads, head_dim 8 and 6.
fn tensors() -> Tensors {
    let dtype = DType::F32;
    let mask: Vec<f64> = (0..42_u8).map(|key| f64::from(u8::from(key % 5 != 0))).collect();
    BTreeMap::from([
        ("q", normal(dtype, &[2, 3, 5, 4, 8], 1).unwrap()),
        ("k", normal(dtype, &[2, 3, 7, 2, 8], 2).unwrap()),
        ("v", normal(dtype, &[2, 3, 7, 2, 6], 3).unwrap()),
        ("bias0", normal(dtype, &[2, 1, 4, 5, 7], 4).unwrap()),
        ("bias1", normal(dtype, &[1, 3, 1, 1, 7], 5).unwrap()),
        ("key_mask", Tensor::from_f64(&mask, DType::Bool, &[2, 3, 7]).unwrap()),
        ("gate", normal(dtype, &[2, 3, 5, 4, 6], 6).unwrap()),
        ("d_out", normal(dtype, &[2, 3, 5, 4, 6], 7).unwrap()),
    ])
}

fn write(folder: &Path, tensors: &Tensors) -> [String; 2] {
    let paths: [PathBuf; 2] = ["in", "out"].map(|name| folder.join(name).with_extension("safetensors"));
    safetensors::write(&paths[0], tensors.iter().map(|(name, tensor)| (*name, tensor))).unwrap();
    paths.map(|path| path.to_str().unwrap().to_owned())
}

/// Names and values the oracle expects in the output file.
fn expected(tensors: &Tensors, options: &Options) -> BTreeMap<String, Vec<f64>> {
    let view = |name: &str| tensors[name].view();
    let mut inputs = Inputs::new(view("q"), view("k"), view("v"));
    inputs.biases = ["bias0", "bias1"].map(view).to_vec();
    (inputs.key_mask, inputs.gate) = (Some(view("key_mask")), Some(view("gate")));
    let problem = problem(&inputs, options, all_gradients(&inputs)).unwrap();
    let Inputs { q, k, v, biases, key_mask, gate, .. } = &inputs;
    let exact =
        ReferenceInputs::from_views(&problem, q, k, v, biases, key_mask.as_ref(), None, None, gate.as_ref()).unwrap();
    let forward = reference::forward(&problem, &exact);
    let gradients = reference::backward(&problem, &exact, &tensors["d_out"].to_f64().unwrap());
    let mut named = BTreeMap::from([
        ("out".to_owned(), forward.out),
        ("lse".to_owned(), forward.lse),
        ("dq".to_owned(), gradients.dq),
        ("dk".to_owned(), gradients.dk),
        ("dv".to_owned(), gradients.dv),
        ("dgate".to_owned(), gradients.d_gate.unwrap()),
    ]);
    named.extend(gradients.dbiases.into_iter().enumerate().map(|(i, dbias)| (format!("dbias{i}"), dbias)));
    named
}

fn assert_results(path: &str, expected: &BTreeMap<String, Vec<f64>>) {
    let got = safetensors::read(path).unwrap();
    assert_eq!(got.keys().filter(|name| *name != "lse_low").collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in expected {
        let got = got[name].to_f64().unwrap();
        assert_eq!(got.len(), expected.len(), "{name}");
        for (got, expected) in got.iter().zip(expected) {
            let same = (got - expected).abs() <= TOLERANCE * (1.0 + expected.abs()) || got == expected;
            assert!(same, "{name}: {got} instead of {expected}");
        }
    }
}

#[test]
fn run_agrees_with_the_oracle_under_every_option() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let [input, output] = write(folder.path(), &tensors);
    let cases = [
        (vec![], Options::default()),
        (vec!["--products", "tf32"], Options { products: Products::Tf32, ..Options::default() }),
        (vec!["--scale", "-0.3"], Options { softmax_scale: Some(-0.3), ..Options::default() }),
        (
            vec!["--causal", "--q-offset", "2", "--alibi", "auto"],
            Options {
                mask: StructuralMask {
                    causal: true,
                    q_offset: 2,
                    alibi_slopes: Some(vec![0.25, 0.0625, 0.015_625, 0.003_906_25]),
                    ..StructuralMask::default()
                },
                ..Options::default()
            },
        ),
        (
            vec!["--window", "2,-", "--k-offset", "-1", "--kv-lengths", "7,3", "--empty-rows", "uniform"],
            Options {
                kv_lengths: Some(vec![7, 3]),
                empty_rows: EmptyRows::Uniform,
                mask: StructuralMask {
                    window: Some(Window { left: Some(2), right: None }),
                    k_offset: -1,
                    ..StructuralMask::default()
                },
                ..Options::default()
            },
        ),
    ];
    for (extra, options) in cases {
        let report = json(&[&["run", &input, &output, "--json"], extra.as_slice()].concat());
        assert_eq!(report["tensors"].as_array().unwrap().len(), 9, "{extra:?}");
        assert_results(&output, &expected(&tensors, &options));
    }
}

#[test]
fn run_writes_the_gradients_asked_for_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = write(folder.path(), &tensors());
    for (grad, names) in [
        ("none", vec!["lse", "lse_low", "out"]),
        ("v,bias1", vec!["dbias1", "dv", "lse", "lse_low", "out"]),
        ("gate", vec!["dgate", "lse", "lse_low", "out"]),
    ] {
        assert!(stdout(&["run", &input, &output, "--grad", grad]).contains("forward"));
        assert_eq!(safetensors::read(&output).unwrap().keys().collect::<Vec<_>>(), names, "{grad}");
    }
}

#[test]
fn axes_may_be_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let shapes: [(&str, [&[usize]; 3]); 6] = [
        ("q", [&[1, 1, 6, 2, 8], &[1, 6, 2, 8], &[6, 2, 8]]),
        ("k", [&[1, 1, 6, 2, 8], &[1, 6, 2, 8], &[6, 2, 8]]),
        ("v", [&[1, 1, 6, 2, 8], &[1, 6, 2, 8], &[6, 2, 8]]),
        ("d_out", [&[1, 1, 6, 2, 8], &[1, 6, 2, 8], &[6, 2, 8]]),
        ("bias0", [&[1, 1, 2, 6, 6], &[1, 2, 6, 6], &[2, 6, 6]]),
        ("key_mask", [&[1, 1, 6], &[1, 6], &[6]]),
    ];
    let results = [0, 1, 2].map(|form| {
        let tensor = |name: &str, shape: &[usize], seed| match name {
            "key_mask" => Tensor::from_f64(&[1.0, 1.0, 0.0, 1.0, 1.0, 0.0], DType::Bool, shape).unwrap(),
            _ => normal(DType::BF16, shape, seed).unwrap(),
        };
        let tensors =
            shapes.iter().zip(1..).map(|((name, forms), seed)| (*name, tensor(name, forms[form], seed))).collect();
        let [input, output] = write(folder.path(), &tensors);
        stdout(&["run", &input, &output]);
        let got = safetensors::read(&output).unwrap();
        assert_eq!(got["dq"].shape(), shapes[0].1[form]);
        assert_eq!(got["dbias0"].shape(), shapes[4].1[form]);
        assert_eq!(got["lse"].shape(), &[1, 1, 2, 6][form..]);
        ["out", "dq", "dk", "dv", "dbias0", "lse"].map(|name| got[name].to_f64().unwrap())
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

#[test]
fn run_names_the_tensor_that_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let f32s = |shape: &[usize]| normal(DType::F32, shape, 1).unwrap();
    let segments = || Some(Tensor::from_f64(&[0.0; 42], DType::I32, &[2, 3, 7]).unwrap());
    let cases: [(&str, Option<Tensor>, &str); 10] = [
        ("k", None, "no tensor `k`"),
        ("k", Some(f32s(&[2, 3, 7, 2, 9])), "k: head_dim must be 8, got 9"),
        ("bias1", Some(f32s(&[1, 3, 1, 2, 7])), "bias1: seqlen_q must be 1 or 5 to broadcast, got 2"),
        ("bias3", Some(f32s(&[1, 1, 1, 1, 1])), "tensor `bias3` without `bias2`"),
        ("gate", Some(f32s(&[2, 3, 5, 4, 7])), "gate: head_dim_v must be 6, got 7"),
        ("key_mask", Some(f32s(&[2, 3, 7])), "key_mask: dtype must be bool, got f32"),
        ("d_out", None, "no tensor `d_out`"),
        ("d_out", Some(f32s(&[2, 3, 5, 4, 7])), "d_out: head_dim_v must be 6, got 7"),
        ("k_segments", segments(), "tensor `k_segments` without `q_segments`"),
        ("weights", Some(f32s(&[1])), "unknown tensor `weights`"),
    ];
    for (name, tensor, part) in cases {
        let mut tensors = tensors();
        tensors.remove(name);
        tensors.extend(tensor.map(|tensor| (name, tensor)));
        let [input, output] = write(folder.path(), &tensors);
        let message = failure(1, &["run", &input, &output, "--grad", "all"]);
        assert!(message.contains(part) && message.contains(&input), "{part}: {message}");
        assert!(!Path::new(&output).exists());
    }
}

#[test]
fn run_refuses_files_it_must_not_touch_or_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = write(folder.path(), &tensors());
    let before = fs::read(&input).unwrap();
    assert!(failure(1, &["run", &input, &input]).contains("is the input"));
    let other_name = format!("{}/./in.safetensors", folder.path().display());
    assert!(failure(1, &["run", &input, &other_name]).contains("is the input"));
    assert_eq!(fs::read(&input).unwrap(), before);
    assert!(failure(1, &["run", "absent.safetensors", &output]).contains("absent.safetensors"));
    assert!(failure(1, &["run", &input, "no/such/out.safetensors"]).contains("a folder that exists"));
    assert!(failure(1, &["run", &input, folder.path().to_str().unwrap()]).contains("OUT.safetensors: cannot write"));
    assert!(failure(1, &["run", &input, &output, "--kv-lengths", "8,8"]).contains("kv_lengths[0]: expected 0..=7"));
    assert!(failure(1, &["run", &input, &output, "--alibi", "1,2"]).contains("alibi_slopes: expected 4"));
    assert!(failure(1, &["run", &input, &output, "--scale", "nan"]).contains("softmax_scale"));
    assert!(failure(1, &["run", &input, &output, "--grad", "bias2"]).contains("no tensor `bias2`"));
    for name in ["bias00", "bias+1"] {
        assert!(failure(1, &["run", &input, &output, "--grad", name]).contains(&format!("got `{name}`")));
    }
    assert!(!Path::new(&output).exists());
    stdout(&["run", &input, &output, "--alibi", "-0.5,1,0,2"]);
    fs::write(&input, b"no tensors").unwrap();
    assert!(failure(1, &["run", &input, &output]).contains("not a safetensors file"));
}
