// Rotary position embedding: docs/mathematics.md, equations (19)-(21).
//
// A thread has one slot of one position, for all heads: a pair of channels that is turned, or a channel that is copied. So
// each angle is computed once.
//
// Constants: THREADS, INTERLEAVED (pairs 2i, 2i + 1; otherwise i, i + pairs).

// The upper half of a product of 32 bits.
fn multiply_high(a: u32, b: u32) -> u32 {
    let a_low = a & 0xffffu;
    let a_high = a >> 16u;
    let b_low = b & 0xffffu;
    let b_high = b >> 16u;
    let low = a_low * b_low;
    let first = a_high * b_low + (low >> 16u);
    let second = a_low * b_high + (first & 0xffffu);
    return a_high * b_high + (first >> 16u) + (second >> 16u);
}

// The upper half of first + step * row, modulo 2^64; the lower halves come first.
fn turn_of(angle: vec4<u32>, row: u32) -> u32 {
    let low = angle.z * row;
    let carry = u32(low + angle.x < low);
    return angle.y + angle.w * row + multiply_high(angle.z, row) + carry;
}

// Sine and cosine of an angle in 2^32ths of a turn, within 2^-23.
//
// The nearest quarter turn exchanges and negates them; what is left, up to an eighth of a turn t, goes into
// sin 2 pi t = t (2 pi + P(t^2)) and cos 2 pi t = 1 + t^2 Q(t^2), Chebyshev interpolations.
fn rotation_of(turn: u32) -> vec2<f32> {
    let quarter = (turn + (1u << 29u)) >> 30u;
    let t = f32(bitcast<i32>(turn - (quarter << 30u))) * 2.3283064365386963e-10;
    let square = t * t;
    var p = fma(41.589542, square, -76.70129);
    p = fma(p, square, 81.60523);
    p = fma(p, square, -41.3417);
    p = fma(p, square, -1.7484556e-7);
    var q = fma(59.424107, square, -85.44882);
    q = fma(q, square, 64.93937);
    q = fma(q, square, -19.739208);
    let sine = fma(t, 6.2831855, t * p);
    let cosine = fma(q, square, 1.0);
    let exchanged = (quarter & 1u) == 1u;
    let sine_of = select(sine, cosine, exchanged);
    let cosine_of = select(cosine, sine, exchanged);
    return vec2<f32>(
        bitcast<f32>(bitcast<u32>(sine_of) ^ ((quarter >> 1u) << 31u)),
        bitcast<f32>(bitcast<u32>(cosine_of) ^ (((quarter + 1u) >> 1u) << 31u)),
    );
}

fn at(place: Place, batch: u32, row: u32, position: u32, channel: u32) -> u32 {
    return place.base + batch * place.batch + row * place.row + position * place.position + channel * place.last;
}

fn run(group: vec3<u32>, thread: u32) {
    var rest = (group.x + group.y * params.groups_x) * THREADS + thread;
    if (rest >= params.count) {
        return;
    }
    let slot = rest % params.slots;
    rest /= params.slots;
    let position = rest % params.seqlen;
    rest /= params.seqlen;
    let row = rest % params.rows;
    let batch = rest / params.rows;
    if (slot >= params.pairs) {
        let channel = params.pairs + slot;
        var source = at(params.source, batch, row, position, channel);
        var destination = at(params.destination, batch, row, position, channel);
        for (var head = 0u; head < params.heads; head++) {
            store_destination(destination, load_source(source));
            source += params.source.head;
            destination += params.destination.head;
        }
        return;
    }
    let rotation = rotation_of(turn_of(params.angles[slot], position));
    let first = select(slot, 2u * slot, INTERLEAVED);
    let apart = select(params.pairs, 1u, INTERLEAVED);
    var source = at(params.source, batch, row, position, first);
    var destination = at(params.destination, batch, row, position, first);
    for (var head = 0u; head < params.heads; head++) {
        let x = load_source(source);
        let y = load_source(source + apart * params.source.last);
        store_destination(destination, fma(x, rotation.y, -(y * rotation.x)));
        store_destination(destination + apart * params.destination.last, fma(x, rotation.x, y * rotation.y));
        source += params.source.head;
        destination += params.destination.head;
    }
}
