// What lies between the products: each entry point has one thread for a logit, a row of logits, or an element of the bias.

struct Params {
    // Rows, heads, queries and keys of what is bound.
    rows: u32, heads: u32, queries: u32, keys: u32,
    // Whether sums begin with what is there.
    adds: u32, unused0: u32, unused1: u32, unused2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> from_a: array<f32>;
@group(0) @binding(2) var<storage, read> from_b: array<f32>;
@group(0) @binding(3) var<storage, read_write> to: array<f32>;

// Threads of a grid over two axes.
fn number(group: vec3<u32>, local: u32) -> u32 {
    return (group.x + group.y * 65535u) * 64u + local;
}

// Logits plus bias, from_a.
@compute @workgroup_size(64)
fn add_bias(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let at = number(group, local);
    let size = params.heads * params.queries * params.keys;
    if (at < params.rows * size) {
        to[at] += from_a[at % size] + 0.0 * from_b[0];
    }
}

// Probabilities in place of logits.
@compute @workgroup_size(64)
fn softmax(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = number(group, local);
    if (row >= params.rows * params.heads * params.queries) {
        return;
    }
    let at = row * params.keys;
    var top = to[at] + 0.0 * (from_a[0] + from_b[0]);
    for (var j = 1u; j < params.keys; j++) {
        top = max(top, to[at + j]);
    }
    var sum = 0.0;
    for (var j = 0u; j < params.keys; j++) {
        let p = exp(to[at + j] - top);
        to[at + j] = p;
        sum += p;
    }
    let factor = 1.0 / sum;
    for (var j = 0u; j < params.keys; j++) {
        to[at + j] *= factor;
    }
}

// Gradients of logits in place of gradients of probabilities, which are from_a.
@compute @workgroup_size(64)
fn softmax_backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = number(group, local);
    if (row >= params.rows * params.heads * params.queries) {
        return;
    }
    let at = row * params.keys;
    var delta = 0.0 * from_b[0];
    for (var j = 0u; j < params.keys; j++) {
        delta = fma(from_a[at + j], to[at + j], delta);
    }
    for (var j = 0u; j < params.keys; j++) {
        to[at + j] = from_a[at + j] * (to[at + j] - delta);
    }
}

// Sum of logit gradients, from_a, over rows.
@compute @workgroup_size(64)
fn sum_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let at = number(group, local);
    let size = params.heads * params.queries * params.keys;
    if (at >= size) {
        return;
    }
    var sum = 0.0 * from_b[0];
    if (params.adds == 1u) {
        sum += to[at];
    }
    for (var row = 0u; row < params.rows; row++) {
        sum += from_a[row * size + at];
    }
    to[at] = sum;
}
