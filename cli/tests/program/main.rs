//! The `tilefold` program as a user meets it: commands, exit codes, JSON, messages.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

mod bench;
mod demo;
mod machine;
mod run;

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
fn an_unknown_device_is_named_with_those_there_are() {
    let message = failure(1, &["--device", "tpu", "bench", "small"]);
    assert!(
        message.contains("`tpu`") && message.contains("known: cpu") && message.contains("tilefold doctor"),
        "{message}"
    );
}
