// Matrix products of the forward pass: one file for each vendor, with the same names.
//
//   Lane                 row(r), first_key(), channel(i): what a lane holds of the block's tile; LANE_ROWS, LANE_KEYS, LANE_CHANNELS
//   Scores, Output       S or P, and O, of a warp; score(s, r, key), value(out, r, channel) are a lane's numbers of them
//   Queries              the warp's queries as a factor
//   KEY_GROUPS           parts of a tile's keys, GROUP_KEYS of a lane's, that are multiplied one after another
//   add_logits           S += q k, for one group
//   Weights, weights_of  P as a factor, for one group
//   add_values           O += P v
//   row_maximum, row_sum over the lanes that share a row
#pragma once

#if defined(__HIP__)
#error "the HIP side of the products is missing"
#else
#include "products_cuda.cuh"
#endif
