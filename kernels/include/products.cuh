// Matrix products of the forward pass: one file for each vendor, with the same names.
//
//   Lane                  row(r), first_key(), channel(i): what a lane holds of the block's tile; leads(): one of those that
//                         share a row; LANE_ROWS, LANE_KEYS, LANE_CHANNELS
//   KeyLoader, ValueLoader   tiles of k and v: start(tile, first, keeps), arrive(tile), then a barrier; LOADS_AHEAD: the next
//                         tile may start while this one's buffer is in use
//   copies_started, copies_arrived   after the starts of a tile; before its arrivals
//   Scores, Output        S or P, and O, of a warp; score(s, r, key), value(out, r, channel) are a lane's numbers of them
//   Queries               the warp's queries as a factor: start(...), load()
//   KEY_GROUPS            parts of a tile's keys, GROUP_KEYS of a lane's, that are multiplied one after another
//   Excluded              the keys that key mask and lengths exclude: where logits start, and what else it takes
//   add_logits            S += q k, for one group
//   Weights, weights_of   P as a factor, for one group
//   add_values            O += P v
//   row_maximum, row_sum  over the lanes that share a row
#pragma once

// Here, since files are inlined where they are first named, whichever side of a condition that is.
#include "gpu.h"
#include "rows.cuh"

#if defined(__HIP__)
#include "products_hip.cuh"
#else
#include "products_cuda.cuh"
#endif
