// What the passes of backward share: a query's statistics and equations (9) and (12).

struct Statistics {
    lse: f32,
    low: f32,
    delta: f32,
    is_empty: bool,
}

fn statistics_of(origin: u32, query: u32) -> Statistics {
    let at = origin + query * params.statistics.position;
    let lse = load_statistics(at);
    return Statistics(lse, load_statistics(at + 1u), load_statistics(at + 2u), is_minus_infinity(lse));
}

// Equation (9), for a key that the query sees.
fn probability(s: f32, row: Statistics) -> f32 {
    return exp_of((s - row.lse) - row.low);
}
