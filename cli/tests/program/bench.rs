//! bench.

use crate::{failure, json, stdout};

#[test]
fn bench_measures_what_it_promises() {
    let folder = tempfile::tempdir().unwrap();
    let (plot, file) = (folder.path().join("plot.svg"), folder.path().join("bench.json"));
    let args = ["bench", "--shape", "2,16,2,8", "--lengths", "16,32", "--repeats", "2", "--dtype", "f32,bf16"];
    let file_arg = format!("--json={}", file.display());
    let rest = [file_arg.as_str(), "--plot", plot.to_str().unwrap()];
    let table = stdout(&[&args[..], &rest[..]].concat());
    assert!(table.contains("GFLOP/s") && table.contains("2xLx2x8") && table.contains("2 x 32 x 2 x 8"), "{table}");
    let record: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let entries = record["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 2 * 2 * 3);
    for entry in entries {
        for field in ["workload", "device", "dtype", "pass"] {
            assert!(entry[field].is_string(), "{field}: {entry}");
        }
        for field in ["median_ms", "min_ms", "gflops"] {
            assert!(entry[field].as_f64().unwrap() > 0.0, "{field}: {entry}");
        }
        let peak = &entry["peak_bytes"];
        assert!(peak.is_null() || peak.as_u64().unwrap() > 0, "{entry}");
        assert!(entry["min_ms"].as_f64() <= entry["median_ms"].as_f64());
    }
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("forward and backward"), "{svg}");
}

#[test]
fn bench_writes_pure_json_to_stdout() {
    let record = json(&["bench", "small", "--pass", "forward", "--dtype", "f16", "--repeats", "1", "--json"]);
    assert_eq!(record["entries"][0]["workload"], "small");
    assert_eq!(record["entries"][0]["dtype"], "f16");
    assert_eq!(record["entries"].as_array().unwrap().len(), 1);
}

#[test]
fn bench_lists_the_workloads_of_the_definitions() {
    let names = json(&["bench", "--list", "--json"]);
    let expected = tilefold_benches::definitions().unwrap();
    assert_eq!(names.as_array().unwrap().len(), expected.len());
    assert!(stdout(&["bench", "--list"]).contains(&expected[0].source));
}

#[test]
fn bench_refuses_what_it_does_not_know() {
    let message = failure(1, &["bench", "alphafold9"]);
    assert!(message.contains("no workload `alphafold9`") && message.contains("msa-row-initial"), "{message}");
    assert!(failure(1, &["bench", "--shape", "2,16,2,300"]).contains("head_dim"));
    assert_eq!(failure(2, &["bench", "small", "--shape", "2,16,2,8"]).matches("cannot be used with").count(), 1);
    let huge = failure(1, &["bench", "--shape", "100000000,100000000,8,8"]);
    assert!(huge.contains("rows 100000000, seqlen 100000000, heads 8, head_dim 8"), "{huge}");
    let json = failure(1, &["bench", "small", "--json", "out.json"]);
    assert!(json.contains("no workload `out.json`") && json.contains("--json=FILE"), "{json}");
}

#[test]
fn files_that_cannot_be_written_are_found_before_anything_is_timed() {
    for argument in ["--plot=no/such/folder.svg", "--json=no/such/folder.json"] {
        let (option, path) = argument.split_once('=').unwrap();
        let message = failure(1, &["bench", "--shape", "1,8,1,8", "--repeats", "1", argument]);
        assert!(message.contains(&format!("{option}: cannot write {path}")), "{message}");
    }
}
