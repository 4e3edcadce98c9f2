// Sums over axes: a thread has one element of the result, and adds in ascending order, 64 at a time.
//
// Constants: THREADS, ACCUMULATES (whether it is added to what was there).

fn run(group: vec3<u32>, thread: u32) {
    var rest = (group.x + group.y * params.groups_x) * THREADS + thread;
    if (rest >= params.count) {
        return;
    }
    let last = rest % params.lasts;
    rest /= params.lasts;
    let position = rest % params.positions;
    rest /= params.positions;
    let head = rest % params.heads;
    rest /= params.heads;
    let row = rest % params.rows;
    let batch = rest / params.rows;

    let source = params.source;
    var at = source.base + batch * source.batch + row * source.row + head * source.head
        + position * source.position + last * source.last;
    var total = 0.0;
    var part = 0.0;
    var parts = 0u;
    for (var chunk = 0u; chunk < params.add_chunks; chunk++) {
        for (var b = 0u; b < params.add_batches; b++) {
            for (var n = 0u; n < params.add_rows; n++) {
                for (var h = 0u; h < params.add_heads; h++) {
                    let start = at + chunk * params.chunk_stride + b * source.batch + n * source.row + h * source.head;
                    for (var i = 0u; i < params.add_positions; i++) {
                        part += load_source(start + i * source.position);
                        parts += 1u;
                        if (parts == 64u) {
                            total += part;
                            part = 0.0;
                            parts = 0u;
                        }
                    }
                }
            }
        }
    }
    let to = params.total;
    let to_at =
        to.base + batch * to.batch + row * to.row + head * to.head + position * to.position + last * to.last;
    if (ACCUMULATES) {
        total += load_total(to_at);
    }
    store_total(to_at, total + part);
}
