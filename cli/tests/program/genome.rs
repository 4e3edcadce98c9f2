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
    let heads = [&quiet[..], &["2", "--heads", "3"]].concat();
    assert!(failure(1, &heads).contains("hidden: expected a multiple of 3 heads, got 128"));
}
