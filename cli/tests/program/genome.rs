//! `tilefold genome`: runs over ranks are one rank's, and what cannot be read or split is named.

use std::fs;

use crate::{failure, json, stdout};

const GENOME: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/data/NC_000932.fna");
/// Sizes that take a moment.
const SMALL: [&str; 10] = ["--tokens", "61", "--hidden", "24", "--heads", "3", "--steps", "2", "--batch", "2"];

#[test]
fn ranks_agree_with_one_rank_whatever_the_layers_are() {
    for (positions, attention, mlp) in
        [("rope", "ring", "replicated"), ("alibi", "ulysses", "tensor"), ("learned", "ring", "tensor")]
    {
        let choices = ["--positions", positions, "--attention", attention, "--mlp", mlp, "--json", "--ranks", "3"];
        let report = json(&[&["genome", GENOME], &SMALL[..], &choices].concat());
        assert_eq!(report["codons"], 51_492);
        assert_eq!((&report["passed"], report["losses"].as_array().unwrap().len()), (&true.into(), 2), "{report}");
        let rows = report["rows"].as_array().unwrap();
        let of = |name: &str| rows.iter().map(|row| row[name].as_f64().unwrap_or(f64::NAN)).collect::<Vec<_>>();
        assert_eq!(of("ranks"), [1.0, 2.0, 3.0]);
        let (activations, sent) = (of("activation_bytes"), of("bytes_sent"));
        assert!(activations[0] > activations[1] && activations[1] > activations[2], "{activations:?}");
        assert!(sent[0] == 0.0 && sent[1] > 0.0 && sent[2] > 0.0, "{sent:?}");
        assert!(of("difference")[1..].iter().all(|&difference| difference < 1e-4), "{report}");
    }
}

/// The model keeps 10 numbers of each channel of a token in a layer: the inputs of both halves, q, k, v, out, and four of
/// the MLP; and the loss takes 16 codons at a time.
#[test]
fn memory_is_what_the_plan_of_training_says() {
    const SIZES: [&str; 4] = ["--hidden", "64", "--heads", "4"];
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    for (ranks, positions, table) in
        [("1", "rope", "none"), ("4", "rope", "none"), ("1", "learned", "partitioned"), ("4", "learned", "partitioned")]
    {
        let both = ["2", "6"].map(|layers| {
            let run =
                ["--layers", layers, "--ranks", ranks, "--tokens", "1024", "--steps", "1", "--no-compare", "--json"];
            let run = [&run[..], &["--positions", positions]].concat();
            let found = json(&[&["genome", GENOME], &SIZES[..], &run].concat());
            let plan = [
                "plan",
                "train",
                "--layers",
                layers,
                "--sequence-ranks",
                ranks,
                "--seqlen",
                "1024",
                "--dtype",
                "f32",
                "--vocabulary",
                "66",
                "--vocabulary-tile",
                "16",
                "--kept-elements",
                "10",
                "--positions",
                table,
                "--json",
            ];
            let plan = json(&[&plan[..], &SIZES[..]].concat());
            let planned = |name: &str| {
                let buffers = plan["buffers"].as_array().unwrap().iter().filter(|buffer| buffer["buffer"] == name);
                buffers.map(|buffer| number(&buffer["bytes"])).sum::<f64>()
            };
            let row = found["rows"].as_array().unwrap().last().unwrap();
            let state =
                ["parameters", "gradients", "optimizer state", "position table"].map(planned).iter().sum::<f64>();
            // The plan's layers have biases, which this model does without: 11 h of 12 h² + 13 h.
            let without = number(&row["state_bytes"]) / state;
            assert!((0.98..=1.0).contains(&without), "{without}");
            [number(&row["activation_bytes"]), planned("activations"), planned("norm, logits and loss")]
        });
        let [[few, planned_few, loss], [many, planned_many, _]] = both;
        // What layers keep comes out but for the lse of attention, two numbers for each head of 16 channels, and lists.
        let ratio = (many - few) / (planned_many - planned_few);
        assert!((1.0..1.03).contains(&ratio), "{ratio}");
        // Beside it and the loss, what one layer has in work.
        let (rest, layer) = (many - planned_many - loss, planned_many / 6.0);
        assert!((0.0..layer).contains(&rest), "{rest} beside layers of {layer}");
    }
}

/// Under the launcher of the MPI library that the program is linked with.
#[cfg(feature = "mpi")]
#[test]
fn processes_compute_what_threads_do() {
    let choices = ["genome", GENOME, "--json", "--positions", "learned", "--mlp", "tensor"];
    let expected = json(&[&choices[..], &SMALL[..], &["--ranks", "3"]].concat());
    let mut launcher = std::process::Command::new("mpirun");
    // Neither a root user nor more ranks than cores are a mistake here; Open MPI 4, and 5.
    launcher.envs([
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
    ]);
    launcher.args(["-n", "3", env!("CARGO_BIN_EXE_tilefold"), "--threads", "1"]);
    let output = launcher.args(choices).args(SMALL).arg("--mpi").output().unwrap();
    assert!(output.status.success(), "{}", crate::text(&output.stderr));
    // One rank of three speaks.
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let last = |report: &serde_json::Value| report["rows"].as_array().unwrap().last().unwrap().clone();
    let (of_processes, of_threads) = (last(&found), last(&expected));
    assert_eq!((&found["passed"], &of_processes["ranks"]), (&true.into(), &3.into()), "{found}");
    // Sums have one order, whatever ranks are.
    for name in ["losses", "difference", "bytes_sent"] {
        assert_eq!(of_processes[name], of_threads[name], "{name}: {found} {expected}");
    }
}

#[test]
fn the_table_ends_with_the_verdict() {
    let text = stdout(&[&["genome", GENOME, "--ranks", "2"], &SMALL[..]].concat());
    assert!(text.contains("step   2   loss") && text.trim_end().ends_with("are those of one rank"), "{text}");
    let text = stdout(&[&["genome", GENOME, "--ranks", "2", "--no-compare"], &SMALL[..]].concat());
    assert!(!text.contains("PASS"), "{text}");
}

#[test]
fn what_is_wrong_with_genome_or_sizes_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.fna");
    let path = file.to_str().unwrap();
    fs::write(&file, "ACGT\n").unwrap();
    assert!(failure(1, &["genome", path]).contains("line 1: no FASTA header"));
    fs::write(&file, ">x\nACGTAC\n").unwrap();
    let quiet = ["genome", path, "--json", "--ranks", "2", "--tokens"];
    assert!(
        failure(1, &[&quiet[..], &["3"]].concat()).contains("tokens: expected 1 to 2, the codons of the genome, got 3")
    );
    assert!(failure(1, &[&quiet[..], &["1"]].concat()).contains("use fewer ranks"));
    let wide = failure(1, &[&quiet[..], &["2", "--hidden", "1000000000"]].concat());
    assert!(wide.contains("of host memory at least") && wide.contains("use a smaller --hidden"), "{wide}");
    let heads = [&quiet[..], &["2", "--heads", "3"]].concat();
    assert!(failure(1, &heads).contains("hidden: expected a multiple of 3 heads, got 128"));
}
