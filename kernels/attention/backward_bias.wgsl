// Gradient of a bias with a query and a key axis, equation (15).
//
// A workgroup owns QUERIES queries by THREADS keys of one entry of the bias's batch, row and head axes, and walks over all
// that broadcast to it, or over its share of them: `chunks` workgroups share the walk, and each writes sums of its own. A
// thread owns one key; all threads of a workgroup are at the same queries.

fn run(group: vec3<u32>, thread: u32) {
    if (!is_work(group)) {
        return;
    }
    // Neighbours in the grid: tiles of keys, tiles of queries, entries of the outer axes, chunks.
    let number = group.x + group.y * params.groups_x;
    let key_tile = number % params.tiles;
    let by_rows = number / params.tiles;
    let query_tile = by_rows % params.query_tiles;
    let outer = by_rows / params.query_tiles;
    let entry = outer % params.entries;
    let chunk = outer / params.entries;
    // Entries of the bias, and how many of the problem's batches, rows and heads broadcast to each.
    let entry_head = entry % params.bias_heads;
    let entry_row = entry / params.bias_heads % params.bias_rows;
    let entry_batch = entry / params.bias_heads / params.bias_rows;

    let first_query = query_tile * QUERIES;
    let first_key = key_tile * THREADS;
    let key_index = first_key + thread;
    let key = min(key_index, params.seqlen_k - 1u);
    var query: array<u32, QUERIES>;
    var sum_ds: array<f32, QUERIES>;
    for (var r = 0u; r < QUERIES; r++) {
        query[r] = min(first_query + r, params.seqlen_q - 1u);
        sum_ds[r] = 0.0;
    }

    let end = min((chunk + 1u) * params.chunk, params.walks);
    for (var walk = chunk * params.chunk; walk < end; walk++) {
        let head = entry_head + walk % params.walk_heads;
        let walk_rows = walk / params.walk_heads;
        let work = Work(
            entry_batch + walk_rows / params.walk_rows, entry_row + walk_rows % params.walk_rows, head, 0u);
        let kv_head = head / params.group;
        let slope = slope_of(head);
        var counts = key < kv_length(work);
        if (KEY_MASK) {
            counts = counts && load_key_mask(place_of(params.key_mask, work, 0u) + key * params.key_mask.position);
        }
        var key_segment = 0;
        if (SEGMENTS) {
            key_segment = load_k_segments(place_of(params.k_segments, work, 0u) + key * params.k_segments.position);
        }
        let k_at = place_of(params.k, work, kv_head) + key * params.k.position;
        let v_at = place_of(params.v, work, kv_head) + key * params.v.position;
        let q_origin = place_of(params.q, work, head);
        let d_out_origin = place_of(params.d_out, work, head);
        let statistics_at = place_of(params.statistics, work, head);
        let bias_key = biases_of(work, head) + by_key(key);
        var q_row: array<Row_q, QUERIES>;
        var d_out_row: array<Row_d_out, QUERIES>;
        var sum: array<vec4<f32>, QUERIES>;
        var d_sum: array<vec4<f32>, QUERIES>;
        for (var r = 0u; r < QUERIES; r++) {
            q_row[r] = row_q(q_origin + query[r] * params.q.position);
            d_out_row[r] = row_d_out(d_out_origin + query[r] * params.d_out.position);
            sum[r] = vec4<f32>();
            d_sum[r] = vec4<f32>();
        }
        for (var c = 0u; c < Q_QUADS; c++) {
            let k = load4_k(k_at, c);
            for (var r = 0u; r < QUERIES; r++) {
                sum[r] = fma(quad_q(q_row[r], c), k, sum[r]);
            }
        }
        for (var c = 0u; c < V_QUADS; c++) {
            let v = load4_v(v_at, c);
            for (var r = 0u; r < QUERIES; r++) {
                d_sum[r] = fma(quad_d_out(d_out_row[r], c), v, d_sum[r]);
            }
        }
        for (var r = 0u; r < QUERIES; r++) {
            let row = statistics_of(statistics_at, query[r]);
            let s = logit(sum4(sum[r]), bias_at(bias_key + by_query(query[r])), slope, query[r], key);
            var seen = counts && !row.is_empty;
            if (BAND) { seen = seen && in_band(query[r], key); }
            if (SEGMENTS) {
                let at = place_of(params.q_segments, work, 0u) + query[r] * params.q_segments.position;
                seen = seen && load_q_segments(at) == key_segment;
            }
            if (BIASES > 0u) { seen = seen && !is_minus_infinity(s); }
            sum_ds[r] += select(0.0, probability(s, row) * (sum4(d_sum[r]) - row.delta), seen);
        }
    }

    if (key_index < params.seqlen_k) {
        let entry_at = params.dbias.base + entry_batch * params.dbias.batch + entry_row * params.dbias.row
            + entry_head * params.dbias.head + key * params.dbias.last + chunk * params.chunk_stride;
        for (var r = 0u; r < QUERIES; r++) {
            if (first_query + r < params.seqlen_q) {
                store_dbias(entry_at + query[r] * params.dbias.position, sum_ds[r]);
            }
        }
    }
}
