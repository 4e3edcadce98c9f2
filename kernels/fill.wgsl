// Sets elements to one value: a thread has one element.
//
// Constants: THREADS, AXES.

fn run(group: vec3<u32>, thread: u32) {
    var rest = (group.x + group.y * params.groups_x) * THREADS + thread;
    if (rest >= params.count) {
        return;
    }
    var at = params.destination.base;
    for (var i = 0u; i < AXES; i++) {
        let axis = params.axes[AXES - 1u - i];
        at += rest % axis.x * axis.z;
        rest /= axis.x;
    }
    store_destination(at, params.value);
}
