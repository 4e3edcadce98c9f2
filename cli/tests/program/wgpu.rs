//! Every command on the first device that wgpu finds.

use std::fs;

use crate::{json, stdout};

/// Whether there is a driver; where `TILEFOLD_REQUIRE` asks for one it has to be there.
fn is_there() -> bool {
    let report = json(&["doctor", "--json"]);
    let devices = report["devices"].as_array().unwrap();
    let device = devices.iter().find(|device| device["name"].as_str().is_some_and(|name| name.starts_with("wgpu")));
    let device = device.unwrap();
    if device["available"] == true {
        return true;
    }
    let required = std::env::var("TILEFOLD_REQUIRE").unwrap_or_default();
    assert!(!required.contains("wgpu"), "{}", device["reason"]);
    false
}

#[test]
fn commands_take_wgpu_devices() {
    if !is_there() {
        // A reason is in what `doctor` says.
        return;
    }
    let text = stdout(&["--device", "wgpu:0", "doctor"]);
    assert!(text.lines().any(|line| line.contains("wgpu") && line.contains("selected")), "{text}");
    let verified = json(&["--device", "wgpu:0", "verify", "--dtype", "f32", "--filter", "f32/gqa", "--json"]);
    assert_eq!(verified["failed"], 0, "{verified}");
    assert!(verified["passed"].as_u64().unwrap() > 3, "{verified}");
    let args = ["bench", "--shape", "2,16,2,8", "--repeats", "1", "--dtype", "f32,bf16", "--json"];
    let measured = json(&[&["--device", "wgpu:0"], &args[..]].concat());
    let entries = measured["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 6);
    assert!(entries.iter().all(|entry| entry["device"].as_str().unwrap().contains("wgpu:0")), "{measured}");

    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("small.fa"), folder.path().to_str().unwrap());
    fs::write(&file, ">a\nACDEFGHIKL\n>b\nAC-EFGHIKL\n").unwrap();
    let args = ["demo", file.to_str().unwrap(), "--no-paper-size", "--out", out, "--json"];
    let shown = json(&[&["--device", "wgpu:0"], &args[..]].concat());
    assert_eq!((&shown["passed"], shown["cases"].as_array().unwrap().len()), (&true.into(), 4), "{shown}");
}
