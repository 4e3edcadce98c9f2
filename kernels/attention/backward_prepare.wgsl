// What the passes of backward need of each query: lse in its two parts and delta, equation (8); with a gate, the gradient of
// the ungated output, equation (7), and that of the gate, equation (16).
//
// A thread has one query of one head.

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    // 0, since grids have two axes; drivers compile anew for the values in `params`.
    let nothing = group.z;
    let work = work_of(group, params.tiles, params.heads);
    let query = work.tile * THREADS + thread;
    if (query >= params.seqlen_q) {
        return;
    }
    let out_at = place_of(params.out, work, work.head) + query * params.out.position;
    let d_out_at = place_of(params.d_out, work, work.head) + query * params.d_out.position;
    let gate_at = place_of(params.gate, work, work.head) + query * params.gate.position;
    let gated_at = place_of(params.gated, work, work.head) + query * params.gated.position;
    let d_gate_at = place_of(params.d_gate, work, work.head) + query * params.d_gate.position;
    var sum = vec4<f32>();
    // Not written out: nothing stays in registers. A compiler that does not know the end does not do it either.
    for (var c = 0u; c < V_QUADS + nothing; c++) {
        let d_out = load4_d_out(d_out_at, c);
        let product = d_out * load4_out(out_at, c);
        sum += product;
        if (GATE) {
            let g = load4_gate(gate_at, c);
            if (GATED) {
                store4_gated(gated_at, c, d_out * vec4<f32>(sigmoid(g.x), sigmoid(g.y), sigmoid(g.z), sigmoid(g.w)));
            }
            if (D_GATE) {
                let falling = vec4<f32>(sigmoid(-g.x), sigmoid(-g.y), sigmoid(-g.z), sigmoid(-g.w));
                store4_d_gate(d_gate_at, c, product * falling);
            }
        }
    }
    if (STATISTICS) {
        let at = place_of(params.statistics, work, work.head) + query * params.statistics.position;
        store_statistics(at, load_lse(place_of(params.lse, work, work.head) + query * params.lse.position));
        store_statistics(at + 1u,
            load_lse_low(place_of(params.lse_low, work, work.head) + query * params.lse_low.position));
        store_statistics(at + 2u, sum4(sum));
    }
}
