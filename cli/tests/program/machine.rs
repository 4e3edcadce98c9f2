//! doctor, plan, verify.

use crate::{failure, json, stdout, tilefold};

#[test]
fn doctor_lists_every_device_with_a_reason_for_those_that_are_off() {
    let report = json(&["doctor", "--json"]);
    let devices = report["devices"].as_array().unwrap();
    assert!(devices.iter().any(|device| device["name"] == "cpu" && device["available"] == true));
    for device in devices.iter().filter(|device| device["available"] == false) {
        assert!(!device["reason"].as_str().unwrap().is_empty());
    }
    let simd = report["cpu"]["simd"].as_array().unwrap();
    assert_eq!(simd.iter().filter(|set| set["selected"] == true).count(), 1);
    assert_eq!(report["cpu"]["threads"], 2);
    assert!(report["memory_total_bytes"].as_u64().unwrap() > 0);
    assert_eq!(report["selected_device"], "cpu");
    let text = stdout(&["doctor"]);
    for part in ["cpu", "instruction set", "memory:", "TILEFOLD_DEVICE"] {
        assert!(text.contains(part), "{part}");
    }
}

#[test]
fn doctor_says_what_is_wrong_with_a_setting() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tilefold"))
        .args(["doctor"])
        .env("TILEFOLD_CPU_ARCH", "mmx")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(crate::text(&output.stdout).contains("TILEFOLD_CPU_ARCH=mmx"));
}

#[test]
fn plan_counts_bytes_and_finds_the_longest_sequence() {
    let plan = json(&["plan", "--shape", "5120,384,8,8", "--dtype", "bf16", "--memory", "16GiB", "--json"]);
    assert!((plan["logits_bytes"].as_f64().unwrap() / 1e9 - 12.08).abs() < 0.005);
    let passes = plan["passes"].as_array().unwrap();
    assert_eq!(passes.len(), 2);
    for pass in passes {
        let bytes = |field: &str| pass[field].as_f64().unwrap();
        assert!(bytes("fused_bytes") * 8.0 < bytes("unfused_bytes"));
        assert!(pass["fused_max_seqlen"].as_u64() > pass["unfused_max_seqlen"].as_u64());
    }
    // The longest length fits, the next does not.
    let longest = passes[1]["fused_max_seqlen"].as_u64().unwrap();
    for (length, fits) in [(longest, true), (longest + 1, false)] {
        let shape = format!("5120,{length},8,8");
        let plan = json(&["plan", "--shape", &shape, "--dtype", "bf16", "--json"]);
        let bytes = plan["passes"][1]["fused_bytes"].as_f64().unwrap();
        assert_eq!(bytes <= 17_179_869_184.0, fits, "{length}");
    }
    assert!(stdout(&["plan", "--shape", "1,64,4,32", "--biases", "none", "--gate"]).contains("unfused"));
}

#[test]
fn plan_refuses_what_is_no_problem() {
    assert!(failure(1, &["plan", "--shape", "1,2,3"]).contains("expected rows,seqlen,heads,head_dim"));
    assert!(failure(1, &["plan", "--shape", "1,0,3,4"]).contains("seqlen_q is 0"));
    assert!(failure(1, &["plan", "--shape", "1,8,3,4", "--biases", "none,pair"]).contains("stands alone"));
    assert!(failure(2, &["plan", "--shape", "1,8,3,4", "--memory", "much"]).contains("16GiB"));
}

#[test]
fn verify_runs_a_part_of_the_suite_and_reports_it_thrice() {
    let listed = stdout(&["verify", "--dtype", "f32", "--list"]);
    let name = listed.lines().find(|name| name.starts_with("f32/")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let junit = folder.path().join("verify.xml");
    let report = json(&["verify", "--filter", name, "--json", "--junit", junit.to_str().unwrap()]);
    assert!(report["passed"].as_u64().unwrap() >= 1 && report["failed"] == 0, "{report}");
    assert_eq!(report["device"], "cpu");
    assert!(!report["groups"].as_array().unwrap().is_empty());
    let xml = std::fs::read_to_string(&junit).unwrap();
    assert!(xml.contains("<testsuite ") && xml.contains(name), "{xml}");
    assert!(stdout(&["verify", "--filter", name]).contains("0 failed"));
}

#[test]
fn verify_leaves_out_what_fills_the_memory_when_asked_to() {
    assert!(stdout(&["verify", "--list"]).contains("2^31_elements"));
    assert!(!stdout(&["verify", "--list", "--no-large"]).contains("/large/"));
    let report = json(&["verify", "--no-large", "--filter", "device/", "--json"]);
    assert_eq!(report["large"], false);
}

#[test]
fn verify_finds_a_file_it_cannot_write_before_the_trials() {
    let message = failure(1, &["verify", "--filter", "device/", "--junit", "no/such/folder.xml"]);
    assert!(message.contains("--junit: cannot write no/such/folder.xml"), "{message}");
}

#[test]
fn verify_refuses_a_filter_that_leaves_nothing() {
    assert!(failure(1, &["verify", "--filter", "no such trial"]).contains("no trial's name contains"));
}

#[test]
fn help_names_every_command() {
    let help = crate::text(&tilefold(&["--help"]).stdout);
    for command in ["demo", "doctor", "verify", "bench", "run", "plan"] {
        assert!(help.contains(command), "{command}");
    }
}

/// 33B on 32 GPUs, as the paper's new system.
const TRAIN: [&str; 14] = [
    "plan",
    "train",
    "--layers",
    "80",
    "--hidden",
    "6144",
    "--heads",
    "64",
    "--tensor-ranks",
    "32",
    "--recompute",
    "full",
    "--positions",
    "partitioned",
];

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&TRAIN[..], more].concat()
}

#[test]
fn plan_train_counts_buffers_and_finds_the_longest_sequence() {
    let plan = json(&train(&["--sequence-parallel", "--memory", "40GiB", "--json"]));
    let buffers = plan["buffers"].as_array().unwrap();
    let sum: f64 = buffers.iter().map(|buffer| buffer["bytes"].as_f64().unwrap()).sum();
    let device = plan["device_bytes"].as_f64().unwrap();
    assert!((sum - device).abs() < 1.0 && device <= 40.0 * 1_073_741_824.0);
    assert_eq!(plan["seqlen"], plan["max_seqlen"]);
    assert_eq!((plan["max_seqlen"].as_f64().unwrap() / 1024.0).round(), 335.0);
    let divided = |name: &str| buffers.iter().find(|buffer| buffer["buffer"] == name).unwrap()["divided_by"].clone();
    assert_eq!([divided("parameters"), divided("gathered sequence")], ["t", "-"]);

    let masked =
        json(&train(&["--mask", "bool", "--mask-copied", "--attention", "unfused", "--seqlen", "1000", "--json"]));
    let mask = masked["buffers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|buffer| buffer["buffer"].as_str().unwrap().starts_with("mask"));
    assert_eq!(mask.map(|buffer| buffer["bytes"].as_f64().unwrap()).sum::<f64>(), 2e6);
    assert!(masked["max_seqlen"].is_null());
    let offloaded = json(&train(&["--offload-activations", "--seqlen", "1000", "--json"]));
    assert!(offloaded["host_bytes"].as_f64().unwrap() > 0.0);
    let text = stdout(&train(&["--zero", "3", "--data-ranks", "2", "--memory", "40GiB"]));
    for part in ["optimizer state", "t N", "gathered parameters", "longest sequence in 42.9 GB", "not in it"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn plan_train_compares_with_the_paper() {
    let rows = json(&["plan", "train", "--compare", "paper", "--json"]);
    let fits = rows.as_array().unwrap().iter().filter_map(|row| row["fit_k"].as_f64());
    assert_eq!(fits.map(f64::round).collect::<Vec<_>>(), [196.0, 433.0, 506.0, 130.0, 375.0, 459.0]);
    let worst = rows.as_array().unwrap().iter().filter_map(|row| row["fit_error_percent"].as_f64()).map(f64::abs);
    assert!(worst.fold(0.0, f64::max) < 4.0);
    let text = stdout(&["plan", "train", "--compare", "paper"]);
    for part in ["new Megatron-DeepSpeed", "+119 %", "the simple model is wrong", "predicts nothing beyond"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn plan_train_refuses_what_cannot_be() {
    assert!(failure(1, &train(&["--memory", "15GiB"])).contains("optimizer state does not fit"));
    assert!(failure(1, &train(&["--mask-copied", "--seqlen", "8"])).contains("there is no mask"));
    let ranks = ["plan", "train", "--layers", "2", "--hidden", "64", "--heads", "4", "--seqlen", "8", "--tensor-ranks"];
    assert!(failure(1, &[&ranks[..], &["3"]].concat()).contains("heads = 4 must be a multiple of tensor_ranks = 3"));
    assert!(failure(2, &[&ranks[..], &["0"]].concat()).contains("0 is not in 1.."));
    assert!(failure(2, &["plan", "train", "--layers", "2"]).contains("--hidden"));
    assert!(failure(2, &train(&[])).contains("--seqlen"));
    assert!(failure(2, &train(&["--seqlen", "8", "--zero", "4"])).contains("possible values"));
    assert!(failure(2, &["plan", "--shape", "1,8,3,4", "train", "--compare", "paper"]).contains("error:"));
}
