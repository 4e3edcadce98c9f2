// What all passes share: which work a workgroup has, which keys a query sees, and logits.

struct Work {
    batch: u32,
    row: u32,
    head: u32,
    tile: u32,
}

// Tiles of a head are neighbours, then heads of a row.
fn work_of(group: vec3<u32>, tiles: u32, heads: u32) -> Work {
    let number = group.x + group.y * params.groups_x;
    let in_row = number / tiles;
    let row = in_row / heads;
    return Work(row / params.rows, row % params.rows, in_row % heads, number % tiles);
}

fn is_work(group: vec3<u32>) -> bool {
    return group.x + group.y * params.groups_x < params.groups;
}

fn place_of(place: Place, work: Work, head: u32) -> u32 {
    return place.base + work.batch * place.batch + work.row * place.row + head * place.head;
}

// Keys of a row that count, from the front.
fn kv_length(work: Work) -> u32 {
    if (KV_LENGTHS) {
        return load_kv_lengths(place_of(params.kv_lengths, work, 0u));
    }
    return params.seqlen_k;
}

// Keys that some query of first ..= last sees, clamped to 0 .. length.
fn keys_of(first: u32, last: u32, length: u32) -> vec2<u32> {
    if (!BAND) {
        return vec2<u32>(0u, length);
    }
    let start = max(i32(first) + params.lowest, 0);
    let end = min(i32(last) + params.highest + 1, i32(length));
    return vec2<u32>(u32(start), u32(max(end, start)));
}

// Queries that see some key of first ..= last.
fn queries_of(first: u32, last: u32) -> vec2<u32> {
    if (!BAND) {
        return vec2<u32>(0u, params.seqlen_q);
    }
    let start = max(i32(first) - params.highest, 0);
    let end = min(i32(last) - params.lowest + 1, i32(params.seqlen_q));
    return vec2<u32>(u32(start), u32(max(end, start)));
}

fn in_band(query: u32, key: u32) -> bool {
    let distance = i32(key) - i32(query);
    return distance >= params.lowest && distance <= params.highest;
}

// Where the biases of one query, or of one key, begin.
fn biases_of(work: Work, head: u32) -> vec4<u32> {
    return vec4<u32>(
        place_of(params.bias0, work, head),
        place_of(params.bias1, work, head),
        place_of(params.bias2, work, head),
        place_of(params.bias3, work, head),
    );
}

fn by_query(query: u32) -> vec4<u32> {
    return query * vec4<u32>(
        params.bias0.position, params.bias1.position, params.bias2.position, params.bias3.position);
}

fn by_key(key: u32) -> vec4<u32> {
    return key * vec4<u32>(params.bias0.last, params.bias1.last, params.bias2.last, params.bias3.last);
}

// Finite terms are kept from overflowing in their sum.
fn term(x: f32) -> f32 {
    if (BIASES == 1u) {
        return x;
    }
    return select(x, clamp(x, -LARGEST_BIAS, LARGEST_BIAS), is_finite(x));
}

fn bias_at(at: vec4<u32>) -> f32 {
    var sum = 0.0;
    if (BIASES > 0u) { sum = term(load_bias0(at.x)); }
    if (BIASES > 1u) { sum += term(load_bias1(at.y)); }
    if (BIASES > 2u) { sum += term(load_bias2(at.z)); }
    if (BIASES > 3u) { sum += term(load_bias3(at.w)); }
    return sum;
}

fn slope_of(head: u32) -> f32 {
    if (ALIBI) {
        return bitcast<f32>(load_slopes(params.slopes.base + head));
    }
    return 0.0;
}

// The distance of a query and a key of one row, for ALiBi. One of the two parts of the offset is 0.
fn distance_of(query: u32, key: u32) -> f32 {
    return abs(params.far_offset + f32(params.near_offset + i32(key) - i32(query)));
}

// Equation (1), in the same order in every pass, since backward has to meet the rounding of forward.
fn logit(product: f32, bias: f32, slope: f32, query: u32, key: u32) -> f32 {
    var s = params.scale * product;
    if (BIASES > 0u) { s += bias; }
    if (ALIBI) { s = fma(-slope, distance_of(query, key), s); }
    return s;
}
