// Which elements of two strided tensors of one shape belong together.
//
// Constants: THREADS, AXES.

// The number of this thread's element, neighbours innermost.
fn element_of(group: vec3<u32>, thread: u32) -> u32 {
    return (group.x + group.y * params.groups_x) * THREADS + thread;
}

// Where it lies in the source and in the destination.
fn places(element: u32) -> vec2<u32> {
    var rest = element;
    var places = vec2<u32>(params.source.base, params.destination.base);
    for (var i = 0u; i < AXES; i++) {
        let axis = params.axes[AXES - 1u - i];
        places += (rest % axis.x) * vec2<u32>(axis.y, axis.z);
        rest /= axis.x;
    }
    return places;
}
