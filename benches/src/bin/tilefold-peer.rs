//! tilefold as one peer of the side-by-side runner: JSON lines on stdin, JSON lines on stdout.
//!
//! | request | answer |
//! |---|---|
//! | `{"cmd":"load","inputs":"x.safetensors","dtype":"f32","pass":"fwd","scale":0.17,"causal":false}` | `{"ok":true}` or `{"ok":false,"reason":".."}` |
//! | `{"cmd":"run","repeats":5}` | `{"seconds":[..]}` |
//! | `{"cmd":"save","path":"y.safetensors"}` | `{"ok":true}` |
//! | `{"cmd":"peak"}` | `{"rss_peak_bytes":n}` |
//! | `{"cmd":"quit"}` | none |
//!
//! `pass` is `fwd` or `fwdbwd`. Inputs: q, k, v, d_out `[N, L, H, D]`, mask u8 `[N, L]`, bias `[H, L, L]`, in the dtype; k, v and
//! the key axes may have another length than q. Results: out, and for `fwdbwd` dq, dk, dv, dbias. Memory is
//! allocated by `load`; `run` times the launches alone. A request that fails is answered with `{"ok":false,"reason":".."}`.

use std::io::{BufRead, Write, stdin, stdout};
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};
use tilefold::{Device, Error, Gradients, Options, StructuralMask, Tensor, all_gradients, safetensors};
use tilefold_benches::{Launch, Omitted, Operands, Pass, peak_rss_bytes};

#[derive(Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
enum Request {
    Load(Load),
    Run { repeats: usize },
    Save { path: PathBuf },
    Peak,
    Quit,
}

#[derive(Deserialize)]
struct Load {
    inputs: PathBuf,
    dtype: String,
    pass: String,
    scale: Option<f64>,
    #[serde(default)]
    causal: bool,
}

/// Why a request cannot be answered.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Tilefold(#[from] Error),
    #[error(transparent)]
    Problem(#[from] tilefold::ProblemError),
    #[error("request: {0}")]
    Request(#[from] serde_json::Error),
    #[error("{0}")]
    Wrong(String),
}

/// What `load` prepared.
struct Loaded {
    launch: Launch,
    pass: Pass,
}

fn main() -> std::io::Result<()> {
    let mut loaded = None;
    for line in stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?).map_err(Refusal::from) {
            Ok(Request::Quit) => break,
            Ok(request) => answer(request, &mut loaded),
            Err(refusal) => Err(refusal),
        };
        let answer = answer.unwrap_or_else(|refusal| json!({"ok": false, "reason": refusal.to_string()}));
        let mut out = stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn answer(request: Request, loaded: &mut Option<Loaded>) -> Result<Value, Refusal> {
    let ready = |loaded: &mut Option<Loaded>| {
        loaded.take().ok_or_else(|| Refusal::Wrong("nothing loaded; send `load` first".into()))
    };
    match request {
        Request::Load(load) => {
            *loaded = None;
            *loaded = Some(Loaded::new(&load)?);
            Ok(json!({"ok": true}))
        }
        Request::Run { repeats } => {
            let mut ready = ready(loaded)?;
            let seconds = ready.run(repeats);
            *loaded = Some(ready);
            Ok(json!({"seconds": seconds?}))
        }
        Request::Save { path } => {
            let ready = ready(loaded)?;
            let saved = ready.save(&path);
            *loaded = Some(ready);
            saved.map(|()| json!({"ok": true}))
        }
        Request::Peak => Ok(json!({"rss_peak_bytes": peak_rss_bytes()})),
        Request::Quit => Ok(Value::Null),
    }
}

impl Loaded {
    fn new(load: &Load) -> Result<Self, Refusal> {
        let pass = match load.pass.as_str() {
            "fwd" => Pass::Forward,
            "fwdbwd" => Pass::Both,
            other => return Err(Refusal::Wrong(format!("pass: expected fwd or fwdbwd, got {other}"))),
        };
        let operands = operands(load, pass)?;
        let gradients = match pass {
            Pass::Forward => Gradients::default(),
            _ => all_gradients(&operands.inputs()?),
        };
        let mask = StructuralMask { causal: load.causal, ..StructuralMask::default() };
        let options = Options { softmax_scale: load.scale, mask, ..Options::default() };
        let launch = Launch::new(&Device::best().map_err(Error::from)?, operands, &options, gradients)?;
        Ok(Self { launch, pass })
    }

    fn run(&mut self, repeats: usize) -> Result<Vec<f64>, Refusal> {
        (0..repeats).map(|_| Ok(self.launch.timed(self.pass)?.as_secs_f64())).collect()
    }

    fn save(&self, path: &PathBuf) -> Result<(), Refusal> {
        let mut named = vec![("out", &self.launch.forward_results().out)];
        if let Some(backward) = self.launch.backward_results() {
            let dbias = backward.dbiases.first().and_then(Option::as_ref);
            let gradients = [("dq", backward.dq.as_ref()), ("dk", backward.dk.as_ref()), ("dv", backward.dv.as_ref())];
            let gradients = gradients.into_iter().chain([("dbias", dbias)]);
            named.extend(gradients.filter_map(|(name, tensor)| Some((name, tensor?))));
        }
        Ok(safetensors::write(path, named)?)
    }
}

fn operands(load: &Load, pass: Pass) -> Result<Operands, Refusal> {
    let mut tensors = safetensors::read(&load.inputs)?;
    let mut take = |name: &str| tensors.remove(name);
    let missing = |name: &str| Refusal::Wrong(format!("{}: no tensor `{name}`", load.inputs.display()));
    let mut needed = |name: &str| -> Result<Tensor, Refusal> {
        let tensor = take(name).ok_or_else(|| missing(name))?;
        if tensor.dtype().to_string() == load.dtype {
            return Ok(tensor);
        }
        Err(Refusal::Wrong(format!("{name}: expected {}, got {}", load.dtype, tensor.dtype())))
    };
    let mut operands = Operands::new(needed("q")?, needed("k")?, needed("v")?);
    if pass.has_gradients() {
        operands.d_out = Some(needed("d_out")?);
    }
    operands.biases = take("bias").into_iter().collect();
    operands.key_mask = take("mask");
    operands.omitted = Omitted::Batch;
    Ok(operands)
}
