// Strided copy with a change of dtype: a thread has one element of the destination, whose neighbours are innermost.
//
// Constants: THREADS, AXES, SOURCE and DESTINATION (0 for bits as they are, 1 for f32, 2 for f16, 3 for bfloat16).

fn number(bits: u32) -> f32 {
    switch (SOURCE) {
        case 2u: { return from_f16(bits); }
        case 3u: { return from_bf16(bits); }
        default: { return bitcast<f32>(bits); }
    }
}

fn bits_of(x: f32) -> u32 {
    switch (DESTINATION) {
        case 2u: { return to_f16(x); }
        case 3u: { return to_bf16(x); }
        default: { return bitcast<u32>(x); }
    }
}

fn run(group: vec3<u32>, thread: u32) {
    var rest = (group.x + group.y * params.groups_x) * THREADS + thread;
    if (rest >= params.count) {
        return;
    }
    var source = params.source.base;
    var destination = params.destination.base;
    for (var i = 0u; i < AXES; i++) {
        let axis = params.axes[AXES - 1u - i];
        let index = rest % axis.x;
        rest /= axis.x;
        source += index * axis.y;
        destination += index * axis.z;
    }
    let bits = load_source(source);
    if (DESTINATION == 0u) {
        store_destination(destination, bits);
    } else {
        store_destination(destination, bits_of(number(bits)));
    }
}
