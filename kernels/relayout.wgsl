// Strided copy with a change of dtype: a thread has one element of the destination, whose neighbours are innermost.
//
// Constants: those of axes.wgsl, SOURCE and DESTINATION (0 for bits as they are, 1 for f32, 2 for f16, 3 for bfloat16).

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
    let element = element_of(group, thread);
    if (element >= params.count) {
        return;
    }
    let at = places(element);
    let bits = load_source(at.x);
    if (DESTINATION == 0u) {
        store_destination(at.y, bits);
    } else {
        store_destination(at.y, bits_of(number(bits)));
    }
}
