// Gradient of the queries, equation (13), of a bias with a query and a key axis, equation (15), and sums of dS over keys for
// biases without a key axis.
//
// A workgroup owns a tile of queries of one entry of the bias's batch, row and head axes, and walks over all batches, rows
// and heads that broadcast to it, or over its share of them: `chunks` workgroups share a walk, and each adds to a copy of
// the gradient of its own. Without such a bias an entry is one head of one row, and a walk one step.
//
// A thread owns QUERIES queries, THREADS apart, and walks over the keys, STEP at a time; all threads of a workgroup are at the
// same keys.
// The gradient of the bias begins with zeros; each of its entries has one owner, which adds to it step by step.
//
// Constants: THREADS, QUERIES, STEP, D_Q, D_BIAS, ROW_SUMS, and those of the problem.

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    // Neighbours in the grid: tiles of queries, entries, chunks.
    let number = group.x + group.y * params.groups_x;
    let outer = number / params.tiles;
    let entry = outer % params.entries;
    let chunk = outer / params.entries;
    let entry_head = entry % params.entry_heads;
    let entry_row = entry / params.entry_heads % params.entry_rows;
    let entry_batch = entry / params.entry_heads / params.entry_rows;
    let first = number % params.tiles * (THREADS * QUERIES);
    let entry_work = Work(entry_batch, entry_row, entry_head, number % params.tiles);
    let d_bias_at = place_of(params.dbias, entry_work, entry_head) + chunk * params.chunk_stride;
    let end = min((chunk + 1u) * params.chunk, params.walks);
    for (var step = chunk * params.chunk; step < end; step++) {
        let rows = step / params.walk_heads;
        let head = entry_head + step % params.walk_heads;
        let work = Work(entry_batch + rows / params.walk_rows, entry_row + rows % params.walk_rows, head, 0u);
        // The last is 0, since grids have two axes; drivers compile anew for the values in `params`.
        walk_keys(work, first, thread, d_bias_at, group.z);
    }
}

// One head of one row.
fn walk_keys(work: Work, first: u32, thread: u32, d_bias_at: u32, nothing: u32) {
    let last = min(first + THREADS * QUERIES, params.seqlen_q) - 1u;
    let kv_head = work.head / params.group;
    let slope = slope_of(work.head);

    var query: array<u32, QUERIES>;
    var bias_row: array<vec4<u32>, QUERIES>;
    var segment: array<i32, QUERIES>;
    var row: array<Statistics, QUERIES>;
    var q: array<array<vec4<f32>, Q_SLICE>, QUERIES>;
    var d_out: array<array<vec4<f32>, V_SLICE>, QUERIES>;
    var dq: array<array<vec4<f32>, Q_SLICE>, QUERIES>;
    var row_sum: array<f32, QUERIES>;
    var q_at: array<u32, QUERIES>;
    var d_out_at: array<u32, QUERIES>;
    var sums_at: array<u32, QUERIES>;
    let q_origin = place_of(params.q, work, work.head);
    let d_out_origin = place_of(params.d_out, work, work.head);
    let sums_origin = place_of(params.sums, work, work.head);
    let statistics_at = place_of(params.statistics, work, work.head);
    let bias_origin = biases_of(work, work.head);
    for (var r = 0u; r < QUERIES; r++) {
        query[r] = min(first + r * THREADS + thread, last);
        bias_row[r] = bias_origin + by_query(query[r]);
        row[r] = statistics_of(statistics_at, query[r]);
        if (SEGMENTS) {
            segment[r] = load_q_segments(place_of(params.q_segments, work, 0u) + query[r] * params.q_segments.position);
        }
        q_at[r] = q_origin + query[r] * params.q.position;
        d_out_at[r] = d_out_origin + query[r] * params.d_out.position;
        sums_at[r] = sums_origin + (first + r * THREADS + thread) * params.sums.position;
        for (var c = 0u; c < Q_SLICE; c++) {
            if (!WIDE) { q[r][c] = load4_q(q_at[r], c); }
        }
        for (var c = 0u; c < V_SLICE; c++) {
            if (!WIDE) { d_out[r][c] = load4_d_out(d_out_at[r], c); }
        }
        for (var c = 0u; c < Q_QUADS; c++) {
            if (WIDE) { store4_sums(sums_at[r], c, vec4<f32>()); } else { dq[r][c] = vec4<f32>(); }
        }
        row_sum[r] = 0.0;
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
        // Gradients of the probabilities, then of the logits.
        var ds: array<array<f32, STEP>, QUERIES>;
        for (var slice = 0u; slice < V_SLICES; slice++) {
            for (var r = 0u; r < QUERIES; r++) {
                for (var c = 0u; c < V_SLICE; c++) {
                    if (WIDE) { d_out[r][c] = load4_d_out(d_out_at[r], slice * V_SLICE + c); }
                }
            }
            for (var j = 0u; j < size; j++) {
                let key = key_of(start, j, counts);
                let v_row = row_v(v_origin + key * params.v.position, slot + key - start, slice);
                var sum: array<vec4<f32>, QUERIES>;
                for (var r = 0u; r < QUERIES; r++) {
                    sum[r] = vec4<f32>(ds[r][j], 0.0, 0.0, 0.0);
                }
                for (var c = 0u; c < V_SLICE; c++) {
                    let v = quad_v(v_row, c);
                    for (var r = 0u; r < QUERIES; r++) {
                        sum[r] = fma(d_out[r][c], v, sum[r]);
                    }
                }
                for (var r = 0u; r < QUERIES; r++) {
                    ds[r][j] = sum4(sum[r]);
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
                let x = logit(s[r][j], bias_at(bias_row[r] + bias_key), slope, query[r], key);
                var seen = is_counted(counts, j) && !row[r].is_empty;
                if (BAND) { seen = seen && in_band(query[r], key); }
                if (SEGMENTS) { seen = seen && segment[r] == key_segment; }
                if (BIASES > 0u) { seen = seen && !is_minus_infinity(x); }
                ds[r][j] = select(0.0, probability(x, row[r]) * (ds[r][j] - row[r].delta), seen);
                row_sum[r] += ds[r][j];
                if (D_BIAS) {
                    if (is_counted(counts, j) && first + r * THREADS + thread <= last) {
                        let at = d_bias_at + query[r] * params.dbias.position + key * params.dbias.last;
                        store_dbias(at, load_dbias(at) + ds[r][j]);
                    }
                }
            }
        }
        for (var slice = 0u; slice < Q_SLICES; slice++) {
            for (var r = 0u; r < QUERIES; r++) {
                for (var c = 0u; c < Q_SLICE; c++) {
                    if (WIDE) { dq[r][c] = load4_sums(sums_at[r], slice * Q_SLICE + c); }
                }
            }
            for (var j = 0u; j < size; j++) {
                let key = key_of(start, j, counts);
                let k_row = row_k(k_origin + key * params.k.position, slot + key - start, slice);
                for (var c = 0u; c < Q_SLICE; c++) {
                    let k = quad_k(k_row, c);
                    for (var r = 0u; r < QUERIES; r++) {
                        dq[r][c] = fma(vec4<f32>(ds[r][j]), k, dq[r][c]);
                    }
                }
            }
            for (var r = 0u; r < QUERIES; r++) {
                for (var c = 0u; c < Q_SLICE; c++) {
                    if (WIDE) { store4_sums(sums_at[r], slice * Q_SLICE + c, dq[r][c]); }
                }
            }
        }
    }

    for (var r = 0u; r < QUERIES; r++) {
        let index = first + r * THREADS + thread;
        if (index > last) {
            continue;
        }
        if (D_Q) {
            let at = place_of(params.dq, work, work.head) + index * params.dq.position;
            for (var c = 0u; c < Q_QUADS; c++) {
                var x: vec4<f32>;
                if (WIDE) { x = load4_sums(sums_at[r], c); } else { x = dq[r][c]; }
                store4_dq(at, c, params.scale * x);
            }
        }
        if (ROW_SUMS) {
            store_row_sums(place_of(params.row_sums, work, work.head) + index * params.row_sums.position, row_sum[r]);
        }
    }
}
