// Steps of a walk over keys, or queries: STEP neighbours at a time, whose loops are written out where heads are narrow.
//
// A row is SLICES slices of SLICE quads. Narrow heads have one, which stays in registers. Wide heads have several: in a step
// each slice is read again and stays for all neighbours, and what is added up lies in the workspace between steps.

// How many neighbours a step has. In wide heads a number that no compiler knows, so that the loop stays one.
fn step_size(start: u32, end: u32) -> u32 {
    if (WIDE) {
        return min(STEP, end - start);
    }
    return STEP;
}

// Keys of a step that exist and that the mask does not exclude, one bit each. The others are stood in for by one that counts:
// what they hold may be NaN.
fn counted_keys(start: u32, end: u32, mask_origin: u32) -> u32 {
    var counts = 0u;
    for (var j = 0u; j < step_size(start, end); j++) {
        var is_counted = start + j < end;
        if (KEY_MASK) {
            let at = mask_origin + min(start + j, end - 1u) * params.key_mask.position;
            is_counted = is_counted && load_key_mask(at);
        }
        counts |= select(0u, 1u << j, is_counted);
    }
    return counts;
}

fn is_counted(counts: u32, j: u32) -> bool {
    return STEP == 1u || ((counts >> j) & 1u) == 1u;
}

fn key_of(start: u32, j: u32, counts: u32) -> u32 {
    return start + select(firstLeadingBit(counts), j, is_counted(counts, j));
}
