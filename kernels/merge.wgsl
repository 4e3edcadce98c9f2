// Adds (out, lse) over some keys into (acc_out, acc_lse) over others: docs/mathematics.md, equations (17) and (18).
//
// A thread has one query of one head.

// ln(1 + x) for 0 <= x <= 1: 2 artanh(x / (2 + x)), whose series ends after s^15 since s <= 1/3.
fn log_of_one_plus(x: f32) -> f32 {
    let s = x / (2.0 + x);
    let square = s * s;
    var sum = 1.0 / 15.0;
    sum = fma(sum, square, 1.0 / 13.0);
    sum = fma(sum, square, 1.0 / 11.0);
    sum = fma(sum, square, 1.0 / 9.0);
    sum = fma(sum, square, 1.0 / 7.0);
    sum = fma(sum, square, 1.0 / 5.0);
    sum = fma(sum, square, 1.0 / 3.0);
    return fma(sum * square, 2.0 * s, 2.0 * s);
}

// Shares of accumulator and part in their union, and the union's log-sum-exp in two parts.
struct Weights {
    acc: f32,
    part: f32,
    lse: f32,
    low: f32,
}

// NaN spreads, and so does +inf, which no sum of finite logits gives.
fn spreads(x: f32) -> bool {
    return !is_finite(x) && !is_minus_infinity(x);
}

fn weigh(acc_lse: f32, acc_low: f32, part_lse: f32, part_low: f32) -> Weights {
    if (spreads(acc_lse) || spreads(part_lse) || spreads(acc_low) || spreads(part_low)) {
        let nan = bitcast<f32>(0x7fc00000u | params.zero);
        return Weights(nan, nan, nan, 0.0);
    }
    // Without keys on one side the other stays as it is.
    if (is_minus_infinity(part_lse)) {
        return Weights(1.0, 0.0, acc_lse, select(acc_low, 0.0, is_minus_infinity(acc_lse)));
    }
    if (is_minus_infinity(acc_lse)) {
        return Weights(0.0, 1.0, part_lse, part_low);
    }
    // The sides are ordered by the whole difference: large low parts can outweigh the high ones.
    let difference = opaque(part_lse - acc_lse) + opaque(part_low - acc_low);
    let part_is_larger = difference > 0.0;
    let ratio = exp_of(-abs(difference));
    let larger_weight = 1.0 / (1.0 + ratio);
    let smaller_weight = ratio * larger_weight;
    // Two-sum: equation (5a).
    let m = select(acc_lse, part_lse, part_is_larger);
    let t = opaque(select(acc_low, part_low, part_is_larger) + log_of_one_plus(ratio));
    let lse = opaque(m + t);
    let u = opaque(lse - m);
    let low = opaque(m - opaque(lse - u)) + opaque(t - u);
    return Weights(
        select(larger_weight, smaller_weight, part_is_larger),
        select(smaller_weight, larger_weight, part_is_larger),
        lse,
        low,
    );
}

// A side without weight has no say, whatever it holds; where both are empty the accumulator stays.
fn mix(weights: Weights, acc: f32, part: f32) -> f32 {
    if (weights.part == 0.0) {
        return acc;
    }
    if (weights.acc == 0.0) {
        return part;
    }
    return fma(weights.part, part, weights.acc * acc);
}

fn run(group: vec3<u32>, thread: u32) {
    var rest = (group.x + group.y * params.groups_x) * THREADS + thread;
    if (rest >= params.count) {
        return;
    }
    // Heads are innermost: rows of channels lie by query, then by head.
    let head = rest % params.heads;
    rest /= params.heads;
    let query = rest % params.seqlen_q;
    rest /= params.seqlen_q;
    let row = rest % params.rows;
    let batch = rest / params.rows;
    let lse_at = at(params.lse, batch, row, head, query);
    let low_at = at(params.lse_low, batch, row, head, query);
    let acc_lse_at = at(params.acc_lse, batch, row, head, query);
    let acc_low_at = at(params.acc_lse_low, batch, row, head, query);
    let weights =
        weigh(load_acc_lse(acc_lse_at), load_acc_lse_low(acc_low_at), load_lse(lse_at), load_lse_low(low_at));
    store_acc_lse(acc_lse_at, weights.lse);
    store_acc_lse_low(acc_low_at, weights.low);
    let out_at = at(params.out, batch, row, head, query);
    let acc_at = at(params.acc_out, batch, row, head, query);
    for (var c = 0u; c < params.channels; c++) {
        let to = acc_at + c * params.acc_out.last;
        store_acc_out(to, mix(weights, load_acc_out(to), load_out(out_at + c * params.out.last)));
    }
}

fn at(place: Place, batch: u32, row: u32, head: u32, query: u32) -> u32 {
    return place.base + batch * place.batch + row * place.row + head * place.head + query * place.position;
}
