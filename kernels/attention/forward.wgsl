// Forward: equations (1)-(6) of docs/mathematics.md.
//
// A thread owns QUERIES queries of one head, THREADS apart, and walks over the keys, STEP at a time; all threads of a
// workgroup are at the same keys, so that k and v are read once for all of them.
//
// Constants: THREADS, QUERIES, STEP, Q_QUADS and V_QUADS (quads of channels: Q_SLICES slices of Q_SLICE), and those of the
// problem.

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    // 0, since grids have two axes; drivers compile anew for the values in `params`.
    let nothing = group.z;
    let work = work_of(group, params.tiles, params.heads);
    let first = work.tile * (THREADS * QUERIES);
    let last = min(first + THREADS * QUERIES, params.seqlen_q) - 1u;
    let kv_head = work.head / params.group;
    let slope = slope_of(work.head);

    var query: array<u32, QUERIES>;
    var bias_row: array<vec4<u32>, QUERIES>;
    var segment: array<i32, QUERIES>;
    var q_at: array<u32, QUERIES>;
    var sums_at: array<u32, QUERIES>;
    var q: array<array<vec4<f32>, Q_SLICE>, QUERIES>;
    var o: array<array<vec4<f32>, V_SLICE>, QUERIES>;
    var highest: array<f32, QUERIES>;
    var total: array<f32, QUERIES>;
    let q_origin = place_of(params.q, work, work.head);
    let sums_origin = place_of(params.sums, work, work.head);
    let bias_origin = biases_of(work, work.head);
    for (var r = 0u; r < QUERIES; r++) {
        // Queries beyond the end do the work of the last one, and are not stored.
        query[r] = min(first + r * THREADS + thread, last);
        bias_row[r] = bias_origin + by_query(query[r]);
        if (SEGMENTS) {
            segment[r] = load_q_segments(place_of(params.q_segments, work, 0u) + query[r] * params.q_segments.position);
        }
        q_at[r] = q_origin + query[r] * params.q.position;
        sums_at[r] = sums_origin + (first + r * THREADS + thread) * params.sums.position;
        for (var c = 0u; c < Q_SLICE; c++) {
            if (!WIDE) { q[r][c] = load4_q(q_at[r], c); }
        }
        for (var c = 0u; c < V_QUADS; c++) {
            if (WIDE) { store4_sums(sums_at[r], c, vec4<f32>()); } else { o[r][c] = vec4<f32>(); }
        }
        highest[r] = LOWEST;
        total[r] = 0.0;
    }

    let keys = keys_of(first, last, kv_length(work));
    let k_origin = place_of(params.k, work, kv_head);
    let v_origin = place_of(params.v, work, kv_head);
    let mask_origin = place_of(params.key_mask, work, 0u);
    let segments_origin = place_of(params.k_segments, work, 0u);
    for (var start = keys.x; start < keys.y; start += STEP) {
        let slot = (start - keys.x) % TILE;
        if (STAGED) {
            if (slot == 0u) {
                workgroupBarrier();
                stage_k(k_origin, start, keys.y, thread);
                stage_v(v_origin, start, keys.y, thread);
                workgroupBarrier();
            }
        }
        let counts = counted_keys(start, keys.y, mask_origin);
        if (counts == 0u) {
            continue;
        }
        let size = step_size(start, keys.y);
        var s: array<array<f32, STEP>, QUERIES>;
        for (var slice = 0u; slice < Q_SLICES; slice++) {
            for (var r = 0u; r < QUERIES; r++) {
                for (var c = 0u; c < Q_SLICE; c++) {
                    if (WIDE) { q[r][c] = load4_q(q_at[r], slice * Q_SLICE + c); }
                }
            }
            for (var j = 0u; j < size; j++) {
                let key = key_of(start, j, counts);
                let k_row = row_k(k_origin + key * params.k.position, slot + key - start, slice);
                var sum: array<vec4<f32>, QUERIES>;
                for (var r = 0u; r < QUERIES; r++) {
                    sum[r] = vec4<f32>(s[r][j], 0.0, 0.0, 0.0);
                }
                for (var c = 0u; c < Q_SLICE; c++) {
                    let k = quad_k(k_row, c);
                    for (var r = 0u; r < QUERIES; r++) {
                        sum[r] = fma(q[r][c], k, sum[r]);
                    }
                }
                for (var r = 0u; r < QUERIES; r++) {
                    s[r][j] = sum4(sum[r]);
                }
            }
        }
        for (var j = 0u; j < size; j++) {
            let key = key_of(start, j, counts);
            var key_segment = 0;
            if (SEGMENTS) {
                key_segment = load_k_segments(segments_origin + key * params.k_segments.position);
            }
            let bias_key = by_key(key);
            for (var r = 0u; r < QUERIES; r++) {
                var seen = is_counted(counts, j);
                if (BAND) { seen = seen && in_band(query[r], key); }
                if (SEGMENTS) { seen = seen && segment[r] == key_segment; }
                let x = logit(s[r][j], bias_at(bias_row[r] + bias_key), slope, query[r], key);
                s[r][j] = select(params.minus_infinity, x, seen);
            }
        }
        var scale: array<f32, QUERIES>;
        for (var r = 0u; r < QUERIES; r++) {
            var top = highest[r];
            for (var j = 0u; j < size; j++) {
                top = max(top, s[r][j]);
            }
            scale[r] = exp_of(highest[r] - top);
            highest[r] = top;
            var sum = 0.0;
            for (var j = 0u; j < size; j++) {
                s[r][j] = exp_of(s[r][j] - top);
                sum += s[r][j];
            }
            total[r] = fma(total[r], scale[r], sum);
        }
        for (var slice = 0u; slice < V_SLICES; slice++) {
            for (var r = 0u; r < QUERIES; r++) {
                for (var c = 0u; c < V_SLICE; c++) {
                    if (WIDE) { o[r][c] = load4_sums(sums_at[r], slice * V_SLICE + c); }
                    o[r][c] *= scale[r];
                }
            }
            for (var j = 0u; j < size; j++) {
                let key = key_of(start, j, counts);
                let v_row = row_v(v_origin + key * params.v.position, slot + key - start, slice);
                for (var c = 0u; c < V_SLICE; c++) {
                    let v = quad_v(v_row, c);
                    for (var r = 0u; r < QUERIES; r++) {
                        o[r][c] = fma(vec4<f32>(s[r][j]), v, o[r][c]);
                    }
                }
            }
            for (var r = 0u; r < QUERIES; r++) {
                for (var c = 0u; c < V_SLICE; c++) {
                    if (WIDE) { store4_sums(sums_at[r], slice * V_SLICE + c, o[r][c]); }
                }
            }
        }
    }

    for (var r = 0u; r < QUERIES; r++) {
        let index = first + r * THREADS + thread;
        if (index > last) {
            continue;
        }
        let empty = total[r] == 0.0;
        if (empty && UNIFORM) {
            total[r] = f32(params.seqlen_k);
        }
        let factor = select(1.0 / total[r], 0.0, empty && !UNIFORM);
        let out_at = place_of(params.out, work, work.head) + index * params.out.position;
        let gate_at = place_of(params.gate, work, work.head) + index * params.gate.position;
        for (var c = 0u; c < V_QUADS; c++) {
            var x: vec4<f32>;
            if (WIDE) { x = load4_sums(sums_at[r], c); } else { x = o[r][c]; }
            if (empty && UNIFORM) {
                x = values_of_all(v_origin, c);
            }
            x *= factor;
            if (GATE) {
                let g = load4_gate(gate_at, c);
                x *= vec4<f32>(sigmoid(g.x), sigmoid(g.y), sigmoid(g.z), sigmoid(g.w));
            }
            store4_out(out_at, c, x);
        }
        if (LSE || LSE_LOW) {
            // Two-sum: equation (5a).
            let t = select(total[r], log_of(total[r]), is_finite(total[r]));
            let lse = opaque(highest[r] + t);
            let u = opaque(lse - highest[r]);
            let low = opaque(highest[r] - opaque(lse - u)) + opaque(t - u);
            if (LSE) {
                let at = place_of(params.lse, work, work.head) + index * params.lse.position;
                store_lse(at, select(lse, params.minus_infinity, empty));
            }
            if (LSE_LOW) {
                let at = place_of(params.lse_low, work, work.head) + index * params.lse_low.position;
                store_lse_low(at, select(low, 0.0, empty));
            }
        }
    }
}

// Four channels of the sum over all keys.
fn values_of_all(v_origin: u32, quad: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var key = 0u; key < params.seqlen_k; key++) {
        sum += load4_v(v_origin + key * params.v.position, quad);
    }
    return sum;
}
