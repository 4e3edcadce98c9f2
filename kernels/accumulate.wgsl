// destination += source in f32: a thread has one element of the destination, whose neighbours are innermost.
//
// Constants: THREADS, AXES.

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
    store_destination(destination, load_destination(destination) + load_source(source));
}
