// Products and tiles of the backward pass by keys: one file for each vendor, with the same names.
//
//   WARP_KEYS             keys of a warp
//   LANE_KEYS, LANE_QUERIES      neighbours that a lane owns: first_key_of_lane() of the block's keys, first_query_of_lane()
//                         of a tile of queries
//   KEY_PARTS             parts of a lane's keys, PART_KEYS each, whose numbers are computed at once
//   Scores                S, P, dP or dS of a part and a tile of queries; score(s, key, query) are a lane's numbers
//   PART_GROUPS           of a part; for_pairs(group, action): action(key, query) for all numbers of one, by two queries
//   sum_of_key(x)         over the lanes that share a key; leads_key(): one of them
//   Keys                  k and v of the warp's keys as factors: start(...), logits(s, part, tile),
//                         gradients(dp, part, tile, delta)
//   Queries               tiles of q, dO and statistics: settle(), then a barrier, start_head(...); fetch(tile, there),
//                         arrive(tile), then a barrier; LOADS_AHEAD: the next tile may be fetched while its
//                         buffer is in use; statistics(tile, kind, to): lse, its low part or -delta of a lane's queries
//   BiasRuns              a bias of a lane's keys and queries, where it is read in runs of keys
//   Weights               P or dS as a factor: take(s, part, group)
//   Gradient              dK or dV of a warp's keys: add_to_dk(dk, weights, tile), add_to_dv(dv, weights, tile);
//                         gradient_of(gradient, key, i) is of channel_of_lane(i), i below LANE_CHANNELS
//   TWO_PIECES            the plain way through a tile and the other are two pieces of code, from its start to its end
//   STAGES_AT, STAGE_BYTES       where the buffers of tiles begin in shared memory, and their size
#pragma once

#include "backward.cuh"
#include "params.h"
#include "rows.cuh"

constexpr int THREADS = WARPS * WARP_THREADS;
constexpr bool NEEDS_DS = WANT_DK || WANT_KEY_SUMS;

// Kinds of statistics.
constexpr int LSE = 0;
constexpr int LSE_LOW = 1;
constexpr int MINUS_DELTA = 2;

#if defined(__HIP__)
#include "key_products_hip.cuh"
#else
#include "key_products_cuda.cuh"
#endif

// Calls `action(key, query)` for all numbers of a group.
template <class Action> DEVICE void for_scores(int group, Action action) {
    for_pairs(group, [&](int key, int query) {
        action(key, query);
        action(key, query + 1);
    });
}
