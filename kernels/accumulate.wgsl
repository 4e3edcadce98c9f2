// destination += source in f32: a thread has one element of the destination, whose neighbours are innermost.
//
// Constants: those of axes.wgsl.

fn run(group: vec3<u32>, thread: u32) {
    let element = element_of(group, thread);
    if (element < params.count) {
        let at = places(element);
        store_destination(at.y, load_destination(at.y) + load_source(at.x));
    }
}
