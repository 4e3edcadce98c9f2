//! The side-by-side runner's view of tilefold: JSON lines in, JSON lines out.

#![allow(clippy::unwrap_used, reason = "a panic in a test is a failed test")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use tilefold::{DType, Tensor, safetensors};
use tilefold_benches::{Launch, Pass, Workload, find};

struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tilefold-peer"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (requests, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, requests, answers }
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.requests, "{request}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn quit(mut self) {
        writeln!(self.requests, "{}", json!({"cmd": "quit"})).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

/// A small workload, its results, and a file with its inputs as the runner writes them.
fn launched(folder: &tempfile::TempDir) -> (Launch, String) {
    let workload = Workload { rows: 3, seqlen: 12, ..find("small").unwrap() };
    let device = tilefold::Device::cpu().unwrap();
    let mut launch = Launch::of_workload(&device, &workload, DType::F32, Pass::Both).unwrap();
    launch.timed(Pass::Both).unwrap();
    let from = launch.operands();
    let again =
        |tensor: &Tensor, shape: &[usize]| Tensor::from_f64(&tensor.to_f64().unwrap(), tensor.dtype(), shape).unwrap();
    let shape = [3, 12, 4, 32];
    let named = [
        ("q", again(&from.q, &shape)),
        ("k", again(&from.k, &shape)),
        ("v", again(&from.v, &shape)),
        ("d_out", again(from.d_out.as_ref().unwrap(), &shape)),
        ("bias", again(&from.biases[0], &[4, 12, 12])),
        ("mask", again(from.key_mask.as_ref().unwrap(), &[3, 12])),
    ];
    let path = folder.path().join("inputs.safetensors").to_str().unwrap().to_owned();
    safetensors::write(&path, named.iter().map(|(name, tensor)| (*name, tensor))).unwrap();
    (launch, path)
}

#[test]
fn a_peer_computes_what_a_launch_does() {
    let folder = tempfile::tempdir().unwrap();
    let (launch, inputs) = launched(&folder);
    let mut peer = Peer::start();
    let load =
        json!({"cmd": "load", "inputs": inputs, "dtype": "f32", "pass": "fwdbwd", "scale": 32_f64.sqrt().recip()});
    assert_eq!(peer.ask(&load), json!({"ok": true}));
    let seconds = peer.ask(&json!({"cmd": "run", "repeats": 2}));
    let seconds = seconds["seconds"].as_array().unwrap();
    assert!(seconds.len() == 2 && seconds.iter().all(|seconds| seconds.as_f64().unwrap() > 0.0));
    let results = folder.path().join("results.safetensors");
    assert_eq!(peer.ask(&json!({"cmd": "save", "path": results})), json!({"ok": true}));
    assert!(peer.ask(&json!({"cmd": "peak"}))["rss_peak_bytes"].as_u64() > Some(0) || !cfg!(target_os = "linux"));
    peer.quit();

    let got = safetensors::read(&results).unwrap();
    assert_eq!(got.keys().collect::<Vec<_>>(), ["dbias", "dk", "dq", "dv", "out"]);
    assert_eq!((got["out"].shape(), got["dbias"].shape()), (&[3, 12, 4, 32][..], &[4, 12, 12][..]));
    let backward = launch.backward_results().unwrap();
    let expected = [
        ("out", Some(&launch.forward_results().out)),
        ("dq", backward.dq.as_ref()),
        ("dk", backward.dk.as_ref()),
        ("dv", backward.dv.as_ref()),
        ("dbias", backward.dbiases[0].as_ref()),
    ];
    for (name, expected) in expected {
        assert_eq!(got[name].to_f64(), expected.unwrap().to_f64(), "{name}");
    }
}

#[test]
fn a_peer_refuses_with_a_reason_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (_, inputs) = launched(&folder);
    let mut peer = Peer::start();
    let load =
        |dtype: &str, pass: &str, inputs: &str| json!({"cmd": "load", "inputs": inputs, "dtype": dtype, "pass": pass});
    for (request, part) in [
        (json!({"cmd": "run", "repeats": 1}), "nothing loaded"),
        (json!({"cmd": "sing"}), "request"),
        (load("bf16", "fwd", &inputs), "q: expected bf16, got f32"),
        (load("f32", "sideways", &inputs), "pass: expected fwd or fwdbwd"),
        (load("f32", "fwd", "absent.safetensors"), "absent.safetensors"),
    ] {
        let answer = peer.ask(&request);
        assert_eq!(answer["ok"], false, "{answer}");
        assert!(answer["reason"].as_str().unwrap().contains(part), "{answer}");
    }
    assert_eq!(peer.ask(&load("f32", "fwd", &inputs)), json!({"ok": true}));
    peer.quit();
}
