// Forward: equations (1)-(6) of docs/mathematics.md.
//
// A thread owns QUERIES queries of one head, THREADS apart, and walks over the keys, KEYS at a time; all threads of a
// workgroup are at the same keys, so that k and v are read once for all of them.
//
// Constants: THREADS, QUERIES, KEYS, Q_QUADS and V_QUADS (quads of channels), and those of the problem.

const NONE: u32 = 0xffffffffu;

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    let work = work_of(group, params.tiles, params.heads);
    let first = work.tile * (THREADS * QUERIES);
    let last = min(first + THREADS * QUERIES, params.seqlen_q) - 1u;
    let kv_head = work.head / params.group;
    let slope = slope_of(work.head);

    var query: array<u32, QUERIES>;
    var bias_row: array<vec4<u32>, QUERIES>;
    var segment: array<i32, QUERIES>;
    var q: array<array<vec4<f32>, Q_QUADS>, QUERIES>;
    var o: array<array<vec4<f32>, V_QUADS>, QUERIES>;
    var highest: array<f32, QUERIES>;
    var total: array<f32, QUERIES>;
    let q_at = place_of(params.q, work, work.head);
    let bias_origin = biases_of(work, work.head);
    for (var r = 0u; r < QUERIES; r++) {
        // Queries beyond the end do the work of the last one, and are not stored.
        query[r] = min(first + r * THREADS + thread, last);
        bias_row[r] = bias_origin + by_query(query[r]);
        if (SEGMENTS) {
            segment[r] = load_q_segments(place_of(params.q_segments, work, 0u) + query[r] * params.q_segments.position);
        }
        for (var c = 0u; c < Q_QUADS; c++) {
            q[r][c] = load4_q(q_at + query[r] * params.q.position, c);
        }
        for (var c = 0u; c < V_QUADS; c++) {
            o[r][c] = vec4<f32>();
        }
        highest[r] = LOWEST;
        total[r] = 0.0;
    }

    let keys = keys_of(first, last, kv_length(work));
    let k_origin = place_of(params.k, work, kv_head);
    let v_origin = place_of(params.v, work, kv_head);
    let mask_origin = place_of(params.key_mask, work, 0u);
    let segments_origin = place_of(params.k_segments, work, 0u);
    for (var start = keys.x; start < keys.y; start += KEYS) {
        let slot = (start - keys.x) % TILE;
        if (STAGED) {
            if (slot == 0u) {
                workgroupBarrier();
                stage_k(k_origin, start, keys.y, thread);
                stage_v(v_origin, start, keys.y, thread);
                workgroupBarrier();
            }
        }
        // Keys that the mask excludes, or that are not there, are stood in for by one that counts: what they hold may be NaN.
        var counts: array<bool, KEYS>;
        var spare = NONE;
        for (var j = 0u; j < KEYS; j++) {
            let key = start + j;
            counts[j] = key < keys.y;
            if (KEY_MASK) {
                let at = mask_origin + min(key, keys.y - 1u) * params.key_mask.position;
                counts[j] = counts[j] && load_key_mask(at);
            }
            spare = select(spare, key, counts[j]);
        }
        if (spare == NONE) {
            continue;
        }
        var s: array<array<f32, KEYS>, QUERIES>;
        for (var j = 0u; j < KEYS; j++) {
            let key = select(spare, start + j, counts[j]);
            let k_row = row_k(k_origin + key * params.k.position, slot + key - start);
            var sum: array<vec4<f32>, QUERIES>;
            for (var r = 0u; r < QUERIES; r++) {
                sum[r] = vec4<f32>();
            }
            for (var c = 0u; c < Q_QUADS; c++) {
                let k = quad_k(k_row, c);
                for (var r = 0u; r < QUERIES; r++) {
                    sum[r] = fma(q[r][c], k, sum[r]);
                }
            }
            var key_segment = 0;
            if (SEGMENTS) {
                key_segment = load_k_segments(segments_origin + key * params.k_segments.position);
            }
            let bias_key = by_key(key);
            for (var r = 0u; r < QUERIES; r++) {
                var seen = counts[j];
                if (BAND) { seen = seen && in_band(query[r], key); }
                if (SEGMENTS) { seen = seen && segment[r] == key_segment; }
                let x = logit(sum4(sum[r]), bias_at(bias_row[r] + bias_key), slope, query[r], key);
                s[r][j] = select(params.minus_infinity, x, seen);
            }
        }
        for (var r = 0u; r < QUERIES; r++) {
            var top = highest[r];
            for (var j = 0u; j < KEYS; j++) {
                top = max(top, s[r][j]);
            }
            let scale = exp_of(highest[r] - top);
            highest[r] = top;
            var sum = 0.0;
            for (var j = 0u; j < KEYS; j++) {
                s[r][j] = exp_of(s[r][j] - top);
                sum += s[r][j];
            }
            total[r] = fma(total[r], scale, sum);
            for (var c = 0u; c < V_QUADS; c++) {
                o[r][c] *= scale;
            }
        }
        for (var j = 0u; j < KEYS; j++) {
            let key = select(spare, start + j, counts[j]);
            let v_row = row_v(v_origin + key * params.v.position, slot + key - start);
            for (var c = 0u; c < V_QUADS; c++) {
                let v = quad_v(v_row, c);
                for (var r = 0u; r < QUERIES; r++) {
                    o[r][c] = fma(vec4<f32>(s[r][j]), v, o[r][c]);
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
            for (var key = 0u; key < params.seqlen_k; key++) {
                for (var c = 0u; c < V_QUADS; c++) {
                    o[r][c] += load4_v(v_origin + key * params.v.position, c);
                }
            }
            total[r] = f32(params.seqlen_k);
        }
        let factor = select(1.0 / total[r], 0.0, empty && !UNIFORM);
        let out_at = place_of(params.out, work, work.head) + index * params.out.position;
        let gate_at = place_of(params.gate, work, work.head) + index * params.gate.position;
        for (var c = 0u; c < V_QUADS; c++) {
            var x = o[r][c] * factor;
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
