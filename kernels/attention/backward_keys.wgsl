// Gradients of keys and values, equations (14) and (10), and sums of dS over queries for biases without a query axis.
//
// A thread owns KEYS keys of one key head, THREADS apart, and walks over the heads of its group and their queries, STEP at a
// time; all threads of a workgroup are at the same queries.

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    // 0, since grids have two axes; drivers compile anew for the values in `params`.
    let nothing = group.z;
    let work = work_of(group, params.tiles, params.heads / params.group);
    let kv_head = work.head;
    let first = work.tile * (THREADS * KEYS);
    let last = min(first + THREADS * KEYS, params.seqlen_k) - 1u;
    let length = kv_length(work);

    var key: array<u32, KEYS>;
    var counts: array<bool, KEYS>;
    var bias_key: array<vec4<u32>, KEYS>;
    var segment: array<i32, KEYS>;
    var k: array<array<vec4<f32>, Q_SLICE>, KEYS>;
    var v: array<array<vec4<f32>, V_SLICE>, KEYS>;
    var dk: array<array<vec4<f32>, Q_SLICE>, KEYS>;
    var dv: array<array<vec4<f32>, V_SLICE>, KEYS>;
    var k_at: array<u32, KEYS>;
    var v_at: array<u32, KEYS>;
    var sums_at: array<u32, KEYS>;
    let k_origin = place_of(params.k, work, kv_head);
    let v_origin = place_of(params.v, work, kv_head);
    let sums_origin = place_of(params.sums, work, kv_head);
    for (var r = 0u; r < KEYS; r++) {
        key[r] = min(first + r * THREADS + thread, last);
        counts[r] = key[r] < length;
        if (KEY_MASK) {
            counts[r] = counts[r]
                && load_key_mask(place_of(params.key_mask, work, 0u) + key[r] * params.key_mask.position);
        }
        bias_key[r] = by_key(key[r]);
        if (SEGMENTS) {
            segment[r] = load_k_segments(place_of(params.k_segments, work, 0u) + key[r] * params.k_segments.position);
        }
        k_at[r] = k_origin + key[r] * params.k.position;
        v_at[r] = v_origin + key[r] * params.v.position;
        sums_at[r] = sums_origin + (first + r * THREADS + thread) * params.sums.position;
        for (var c = 0u; c < Q_SLICE; c++) {
            if (!WIDE) { k[r][c] = load4_k(k_at[r], c); }
        }
        for (var c = 0u; c < V_SLICE; c++) {
            if (!WIDE) { v[r][c] = load4_v(v_at[r], c); }
        }
        for (var c = 0u; c < Q_QUADS; c++) {
            if (WIDE) { store4_sums(sums_at[r], c, vec4<f32>()); } else { dk[r][c] = vec4<f32>(); }
        }
        for (var c = 0u; c < V_QUADS; c++) {
            if (WIDE) { store4_sums(sums_at[r], Q_QUADS + c, vec4<f32>()); } else { dv[r][c] = vec4<f32>(); }
        }
    }

    var queries = queries_of(first, last);
    if (UNIFORM) {
        // An empty row spreads over all keys, wherever they are.
        queries = vec2<u32>(0u, params.seqlen_q);
    }
    let segments_origin = place_of(params.q_segments, work, 0u);
    for (var member = 0u; member < params.group; member++) {
        let head = kv_head * params.group + member;
        let slope = slope_of(head);
        let q_origin = place_of(params.q, work, head);
        let d_out_origin = place_of(params.d_out, work, head);
        let statistics_at = place_of(params.statistics, work, head);
        let bias_origin = biases_of(work, head);
        var column_sum: array<f32, KEYS>;
        for (var r = 0u; r < KEYS; r++) {
            column_sum[r] = 0.0;
        }
        for (var start = queries.x; start < queries.y; start += STEP) {
            let slot = (start - queries.x) % TILE;
            if (STAGED) {
                if (slot == 0u) {
                    workgroupBarrier();
                    stage_q(q_origin, start, queries.y, thread);
                    stage_d_out(d_out_origin, start, queries.y, thread);
                    workgroupBarrier();
                }
            }
            let size = step_size(start, queries.y);
            var s: array<array<f32, STEP>, KEYS>;
            for (var slice = 0u; slice < Q_SLICES; slice++) {
                for (var r = 0u; r < KEYS; r++) {
                    for (var c = 0u; c < Q_SLICE; c++) {
                        if (WIDE) { k[r][c] = load4_k(k_at[r], slice * Q_SLICE + c); }
                    }
                }
                for (var i = 0u; i < size; i++) {
                    let q_row = row_q(q_origin + (start + i) * params.q.position, slot + i, slice);
                    var sum: array<vec4<f32>, KEYS>;
                    for (var r = 0u; r < KEYS; r++) {
                        sum[r] = vec4<f32>(s[r][i], 0.0, 0.0, 0.0);
                    }
                    for (var c = 0u; c < Q_SLICE; c++) {
                        let q = quad_q(q_row, c);
                        for (var r = 0u; r < KEYS; r++) {
                            sum[r] = fma(q, k[r][c], sum[r]);
                        }
                    }
                    for (var r = 0u; r < KEYS; r++) {
                        s[r][i] = sum4(sum[r]);
                    }
                }
            }
            // Gradients of the probabilities, then of the logits.
            var ds: array<array<f32, STEP>, KEYS>;
            for (var slice = 0u; slice < V_SLICES; slice++) {
                for (var r = 0u; r < KEYS; r++) {
                    for (var c = 0u; c < V_SLICE; c++) {
                        if (WIDE) { v[r][c] = load4_v(v_at[r], slice * V_SLICE + c); }
                    }
                }
                for (var i = 0u; i < size; i++) {
                    let d_out_row = row_d_out(d_out_origin + (start + i) * params.d_out.position, slot + i, slice);
                    var sum: array<vec4<f32>, KEYS>;
                    for (var r = 0u; r < KEYS; r++) {
                        sum[r] = vec4<f32>(ds[r][i], 0.0, 0.0, 0.0);
                    }
                    for (var c = 0u; c < V_SLICE; c++) {
                        let d_out = quad_d_out(d_out_row, c);
                        for (var r = 0u; r < KEYS; r++) {
                            sum[r] = fma(d_out, v[r][c], sum[r]);
                        }
                    }
                    for (var r = 0u; r < KEYS; r++) {
                        ds[r][i] = sum4(sum[r]);
                    }
                }
            }
            var p: array<array<f32, STEP>, KEYS>;
            for (var i = 0u; i < size; i++) {
                let query = start + i;
                let row = statistics_of(statistics_at, query);
                var query_segment = 0;
                if (SEGMENTS) {
                    query_segment = load_q_segments(segments_origin + query * params.q_segments.position);
                }
                let bias_row = bias_origin + by_query(query);
                for (var r = 0u; r < KEYS; r++) {
                    let x = logit(s[r][i], bias_at(bias_row + bias_key[r]), slope, query, key[r]);
                    var seen = counts[r] && !row.is_empty;
                    if (BAND) { seen = seen && in_band(query, key[r]); }
                    if (SEGMENTS) { seen = seen && segment[r] == query_segment; }
                    if (BIASES > 0u) { seen = seen && !is_minus_infinity(x); }
                    p[r][i] = select(0.0, probability(x, row), seen);
                    ds[r][i] = select(0.0, p[r][i] * (ds[r][i] - row.delta), seen);
                    column_sum[r] += ds[r][i];
                    if (UNIFORM) {
                        p[r][i] = select(p[r][i], 1.0 / f32(params.seqlen_k), row.is_empty);
                    }
                }
            }
            for (var slice = 0u; slice < Q_SLICES; slice++) {
                for (var r = 0u; r < KEYS; r++) {
                    for (var c = 0u; c < Q_SLICE; c++) {
                        if (WIDE) { dk[r][c] = load4_sums(sums_at[r], slice * Q_SLICE + c); }
                    }
                }
                for (var i = 0u; i < size; i++) {
                    let q_row = row_q(q_origin + (start + i) * params.q.position, slot + i, slice);
                    for (var c = 0u; c < Q_SLICE; c++) {
                        let q = quad_q(q_row, c);
                        for (var r = 0u; r < KEYS; r++) {
                            dk[r][c] = fma(vec4<f32>(ds[r][i]), q, dk[r][c]);
                        }
                    }
                }
                for (var r = 0u; r < KEYS; r++) {
                    for (var c = 0u; c < Q_SLICE; c++) {
                        if (WIDE) { store4_sums(sums_at[r], slice * Q_SLICE + c, dk[r][c]); }
                    }
                }
            }
            for (var slice = 0u; slice < V_SLICES; slice++) {
                for (var r = 0u; r < KEYS; r++) {
                    for (var c = 0u; c < V_SLICE; c++) {
                        if (WIDE) { dv[r][c] = load4_sums(sums_at[r], Q_QUADS + slice * V_SLICE + c); }
                    }
                }
                for (var i = 0u; i < size; i++) {
                    let d_out_row = row_d_out(d_out_origin + (start + i) * params.d_out.position, slot + i, slice);
                    for (var c = 0u; c < V_SLICE; c++) {
                        let d_out = quad_d_out(d_out_row, c);
                        for (var r = 0u; r < KEYS; r++) {
                            dv[r][c] = fma(vec4<f32>(p[r][i]), d_out, dv[r][c]);
                        }
                    }
                }
                for (var r = 0u; r < KEYS; r++) {
                    for (var c = 0u; c < V_SLICE; c++) {
                        if (WIDE) { store4_sums(sums_at[r], Q_QUADS + slice * V_SLICE + c, dv[r][c]); }
                    }
                }
            }
        }
        if (COLUMN_SUMS) {
            for (var r = 0u; r < KEYS; r++) {
                let index = first + r * THREADS + thread;
                if (index <= last) {
                    let at = place_of(params.column_sums, work, head) + index * params.column_sums.position;
                    store_column_sums(at, column_sum[r]);
                }
            }
        }
    }

    for (var r = 0u; r < KEYS; r++) {
        let index = first + r * THREADS + thread;
        if (index > last) {
            continue;
        }
        if (D_K) {
            let at = place_of(params.dk, work, kv_head) + index * params.dk.position;
            for (var c = 0u; c < Q_QUADS; c++) {
                var x: vec4<f32>;
                if (WIDE) { x = load4_sums(sums_at[r], c); } else { x = dk[r][c]; }
                store4_dk(at, c, params.scale * x);
            }
        }
        if (D_V) {
            let at = place_of(params.dv, work, kv_head) + index * params.dv.position;
            for (var c = 0u; c < V_QUADS; c++) {
                var x: vec4<f32>;
                if (WIDE) { x = load4_sums(sums_at[r], Q_QUADS + c); } else { x = dv[r][c]; }
                store4_dv(at, c, x);
            }
        }
    }
}
