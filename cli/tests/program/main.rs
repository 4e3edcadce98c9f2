//! The `tilefold` program as a user meets it: commands, exit codes, JSON, messages.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod bench;
mod demo;
mod genome;
mod machine;
mod run;
#[cfg(feature = "wgpu")]
mod wgpu;

use std::process::{Command, Output};

use serde_json::Value;

/// The program with arguments, two threads, and no variables of the caller's.
fn tilefold(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tilefold"));
    for variable in ["TILEFOLD_DEVICE", "TILEFOLD_REQUIRE"] {
        command.env_remove(variable);
    }
    command.args(["--threads", "2"]).args(args).output().unwrap()
}

/// Output of a run that succeeds.
fn stdout(args: &[&str]) -> String {
    let output = tilefold(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// JSON of a run that succeeds: nothing else may be on stdout.
fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// Message of a run that fails with a code, and prints no results.
fn failure(code: i32, args: &[&str]) -> String {
    let output = tilefold(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "", "{args:?}");
    text(&output.stderr)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn usage_errors_end_with_code_2() {
    for args in [
        &["nothing"] as &[&str],
        &["plan"],
        &["--threads", "0", "doctor"],
        &["bench", "--dtype", "f64"],
        &["run", "one"],
    ] {
        assert!(failure(2, args).contains("Usage") || failure(2, args).contains("error:"), "{args:?}");
    }
}

#[test]
fn a_closed_stdout_does_not_hide_a_failure() {
    for (arch, code) in [("mmx", 1), ("auto", 0)] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_tilefold"));
        command.arg("doctor").stdout(writer);
        match arch {
            "auto" => command.env_remove("TILEFOLD_CPU_ARCH"),
            arch => command.env("TILEFOLD_CPU_ARCH", arch),
        };
        assert_eq!(command.status().unwrap().code(), Some(code), "{arch}");
    }
}

#[test]
fn threads_that_are_no_number_or_cannot_start_are_an_error() {
    let program = env!("CARGO_BIN_EXE_tilefold");
    let output = Command::new(program).arg("doctor").env("RAYON_NUM_THREADS", "abc").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("RAYON_NUM_THREADS=abc: expected a number"), "{}", text(&output.stderr));
    if cfg!(target_os = "linux") {
        // A stack of 64 GiB cannot be mapped in 4 GiB, so the first thread fails and all else has room: many small stacks
        // would leave none for whichever allocation comes next, which ends the program.
        let output = Command::new("sh")
            .args(["-c", &format!("ulimit -v 4000000; exec {program} bench small")])
            .env("RAYON_NUM_THREADS", "200")
            .env("RUST_MIN_STACK", (1_u64 << 36).to_string())
            .output()
            .unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.starts_with("error: cannot start the worker threads (200)"), "{message}");
    }
}

#[test]
fn an_unknown_device_is_named_with_those_there_are() {
    let message = failure(1, &["--device", "tpu", "bench", "small"]);
    assert!(
        message.contains("`tpu`")
            && message.contains("known: ")
            && message.contains("cpu")
            && message.contains("tilefold doctor"),
        "{message}"
    );
}
