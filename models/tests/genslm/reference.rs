//! The same model once more, plainly: one rank, f64, loops; gradients by central differences.

use std::collections::BTreeMap;

use tilefold_models::genslm::{Config, Parameters, Positions, VOCABULARY};

/// Half of the step of a difference: what it leaves out is its square, what rounding adds is 1e-16 over it.
const STEP: f64 = 1e-5;

/// Weights in f64 by name, row by row.
type Weights = BTreeMap<String, Vec<f64>>;

/// The loss, and its gradient with respect to every number of every weight, in the order of `Parameters::arrays`.
pub(crate) fn loss_and_gradients(config: &Config, parameters: &Parameters, tokens: &[u32]) -> (f64, Vec<Vec<f64>>) {
    let names = parameters.names().into_iter().map(|(name, _)| name);
    let values = parameters.arrays().into_iter().map(|array| array.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    let weights: Weights = names.clone().zip(values).collect();
    let gradient = |name: String| {
        let mut moved = weights.clone();
        let count = weights[&name].len();
        let mut at = |element: usize, step: f64| {
            moved.get_mut(&name).unwrap()[element] = weights[&name][element] + step;
            let loss = loss(config, &moved, tokens);
            moved.get_mut(&name).unwrap()[element] = weights[&name][element];
            loss
        };
        (0..count).map(|element| (at(element, STEP) - at(element, -STEP)) / (2.0 * STEP)).collect()
    };
    (loss(config, &weights, tokens), names.map(gradient).collect())
}

fn loss(config: &Config, weights: &Weights, tokens: &[u32]) -> f64 {
    let length = config.seqlen + 1;
    let sequences = tokens.chunks(length).map(|sequence| sequence_loss(config, weights, sequence));
    sequences.sum::<f64>() / config.tokens() as f64
}

fn sequence_loss(config: &Config, weights: &Weights, tokens: &[u32]) -> f64 {
    let h = config.hidden;
    let row = |name: &str, index: usize| weights[name][index * h..(index + 1) * h].to_vec();
    let mut x: Vec<Vec<f64>> = Vec::new();
    for (position, &token) in tokens[..config.seqlen].iter().enumerate() {
        let mut embedded = row("embedding", token as usize);
        if config.positions == Positions::Learned {
            add(&mut embedded, &row("positions", position));
        }
        x.push(embedded);
    }
    for layer in 0..config.layers {
        let of = |name: &str| &weights[&format!("layer{layer}.{name}")][..];
        let normed: Vec<Vec<f64>> = x.iter().map(|x| norm(x, of("attention_gain"))).collect();
        let project = |name: &str| normed.iter().map(|x| times(x, of(name), h)).collect::<Vec<_>>();
        let out = attention(config, project("query"), project("key"), &project("value"));
        for (x, out) in x.iter_mut().zip(&out) {
            add(x, &times(out, of("output"), h));
            let up = times(&norm(x, of("mlp_gain")), of("up"), config.mlp_hidden);
            let up: Vec<f64> = up.into_iter().map(gelu).collect();
            add(x, &times(&up, of("down"), h));
        }
    }
    let mut loss = 0.0;
    for (x, &target) in x.iter().zip(&tokens[1..]) {
        let y = norm(x, &weights["final_gain"]);
        let logits: Vec<f64> = (0..VOCABULARY).map(|token| dot(&y, &row("embedding", token))).collect();
        loss += logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[target as usize];
    }
    loss
}

fn attention(config: &Config, mut q: Vec<Vec<f64>>, mut k: Vec<Vec<f64>>, v: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let d = config.head_dim();
    if config.positions == Positions::Rope {
        for matrix in [&mut q, &mut k] {
            matrix.iter_mut().enumerate().for_each(|(position, row)| rotate(row, position as f64, d));
        }
    }
    let mut out = vec![vec![0.0; config.hidden]; q.len()];
    for head in 0..config.heads {
        let channels = head * d..(head + 1) * d;
        let slope = 2_f64.powf(-8.0 * (head + 1) as f64 / config.heads as f64);
        for i in 0..q.len() {
            let logit = |j: usize| {
                let distance = if config.positions == Positions::Alibi { slope * (i - j) as f64 } else { 0.0 };
                dot(&q[i][channels.clone()], &k[j][channels.clone()]) / (d as f64).sqrt() - distance
            };
            let p: Vec<f64> = (0..=i).map(|j| logit(j).exp()).collect();
            let sum: f64 = p.iter().sum();
            for c in channels.clone() {
                out[i][c] = p.iter().zip(v).map(|(p, v)| p * v[c]).sum::<f64>() / sum;
            }
        }
    }
    out
}

/// Channels i and i + d/2 of each head as a complex number, times e^(i · angle).
fn rotate(row: &mut [f64], position: f64, d: usize) {
    for head in row.chunks_mut(d) {
        for i in 0..d / 2 {
            let angle = position / 10_000_f64.powf(2.0 * i as f64 / d as f64);
            let (re, im) = (head[i], head[i + d / 2]);
            head[i] = re * angle.cos() - im * angle.sin();
            head[i + d / 2] = re * angle.sin() + im * angle.cos();
        }
    }
}

fn norm(x: &[f64], gain: &[f64]) -> Vec<f64> {
    let size = (dot(x, x) / x.len() as f64 + 1e-5).sqrt();
    x.iter().zip(gain).map(|(x, gain)| x / size * gain).collect()
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
}

fn times(x: &[f64], matrix: &[f64], columns: usize) -> Vec<f64> {
    let mut y = vec![0.0; columns];
    for (x, row) in x.iter().zip(matrix.chunks(columns)) {
        y.iter_mut().zip(row).for_each(|(y, weight)| *y += x * weight);
    }
    y
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &mut [f64], b: &[f64]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}
