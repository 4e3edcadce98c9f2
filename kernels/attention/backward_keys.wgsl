// Gradients of keys and values, equations (14) and (10), and sums of dS over queries for biases without a query axis.
//
// A thread owns KEYS keys of one key head, THREADS apart, and walks over the heads of its group and their queries; all
// threads of a workgroup are at the same query.

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    let work = work_of(group, params.tiles, params.heads / params.group);
    let kv_head = work.head;
    let first = work.tile * (THREADS * KEYS);
    let last = min(first + THREADS * KEYS, params.seqlen_k) - 1u;
    let length = kv_length(work);

    var key: array<u32, KEYS>;
    var counts: array<bool, KEYS>;
    var bias_key: array<vec4<u32>, KEYS>;
    var segment: array<i32, KEYS>;
    var k: array<array<vec4<f32>, Q_QUADS>, KEYS>;
    var v: array<array<vec4<f32>, V_QUADS>, KEYS>;
    var dk: array<array<vec4<f32>, Q_QUADS>, KEYS>;
    var dv: array<array<vec4<f32>, V_QUADS>, KEYS>;
    let k_at = place_of(params.k, work, kv_head);
    let v_at = place_of(params.v, work, kv_head);
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
        for (var c = 0u; c < Q_QUADS; c++) {
            k[r][c] = load4_k(k_at + key[r] * params.k.position, c);
            dk[r][c] = vec4<f32>();
        }
        for (var c = 0u; c < V_QUADS; c++) {
            v[r][c] = load4_v(v_at + key[r] * params.v.position, c);
            dv[r][c] = vec4<f32>();
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
        for (var query = queries.x; query < queries.y; query++) {
            let slot = (query - queries.x) % TILE;
            if (STAGED) {
                if (slot == 0u) {
                    workgroupBarrier();
                    stage_q(q_origin, query, queries.y, thread);
                    stage_d_out(d_out_origin, query, queries.y, thread);
                    workgroupBarrier();
                }
            }
            let row = statistics_of(statistics_at, query);
            var query_segment = 0;
            if (SEGMENTS) {
                query_segment = load_q_segments(segments_origin + query * params.q_segments.position);
            }
            let bias_row = bias_origin + by_query(query);
            let q_row = row_q(q_origin + query * params.q.position, slot);
            let d_out_row = row_d_out(d_out_origin + query * params.d_out.position, slot);
            var sum: array<vec4<f32>, KEYS>;
            var d_sum: array<vec4<f32>, KEYS>;
            for (var r = 0u; r < KEYS; r++) {
                sum[r] = vec4<f32>();
                d_sum[r] = vec4<f32>();
            }
            for (var c = 0u; c < Q_QUADS; c++) {
                let q = quad_q(q_row, c);
                for (var r = 0u; r < KEYS; r++) {
                    sum[r] = fma(q, k[r][c], sum[r]);
                }
            }
            for (var c = 0u; c < V_QUADS; c++) {
                let d_out = quad_d_out(d_out_row, c);
                for (var r = 0u; r < KEYS; r++) {
                    d_sum[r] = fma(d_out, v[r][c], d_sum[r]);
                }
            }
            var p: array<f32, KEYS>;
            var ds: array<f32, KEYS>;
            for (var r = 0u; r < KEYS; r++) {
                let s = logit(sum4(sum[r]), bias_at(bias_row + bias_key[r]), slope, query, key[r]);
                var seen = counts[r] && !row.is_empty;
                if (BAND) { seen = seen && in_band(query, key[r]); }
                if (SEGMENTS) { seen = seen && segment[r] == query_segment; }
                if (BIASES > 0u) { seen = seen && !is_minus_infinity(s); }
                p[r] = select(0.0, probability(s, row), seen);
                ds[r] = select(0.0, p[r] * (sum4(d_sum[r]) - row.delta), seen);
                column_sum[r] += ds[r];
                if (UNIFORM) {
                    p[r] = select(p[r], 1.0 / f32(params.seqlen_k), row.is_empty);
                }
            }
            for (var c = 0u; c < Q_QUADS; c++) {
                let q = quad_q(q_row, c);
                for (var r = 0u; r < KEYS; r++) {
                    dk[r][c] = fma(vec4<f32>(ds[r]), q, dk[r][c]);
                }
            }
            for (var c = 0u; c < V_QUADS; c++) {
                let d_out = quad_d_out(d_out_row, c);
                for (var r = 0u; r < KEYS; r++) {
                    dv[r][c] = fma(vec4<f32>(p[r]), d_out, dv[r][c]);
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
                store4_dk(at, c, params.scale * dk[r][c]);
            }
        }
        if (D_V) {
            let at = place_of(params.dv, work, kv_head) + index * params.dv.position;
            for (var c = 0u; c < V_QUADS; c++) {
                store4_dv(at, c, dv[r][c]);
            }
        }
    }
}
