// Products and tiles of the backward pass by keys: one file for each vendor, with the same names.
//
//   WARP_KEYS             keys of a warp
//   LANE_KEYS             neighbours that a lane owns of the block's keys, the first of which is first_key_of_lane()
//   QUERY_PARTS           parts of a tile of queries, PART_ROWS each, computed one after the other; of a part a lane owns
//                         PART_QUERIES neighbours, the first of which is first_query_of_lane()
//   KEY_PARTS             parts of a lane's keys, PART_KEYS each, whose numbers are computed at once
//   Scores                S, P, dP or dS of a part of both; score(s, key, query) are a lane's numbers
//   PART_GROUPS           of a part; for_pairs(group, action): action(key, query) for all numbers of one, by two queries
//   sum_of_key(x)         over the lanes that share a key; leads_key(): one of them
//   Keys                  k and v of the warp's keys as factors: start(...), logits(s, key part, query, tile),
//                         gradients(dp, key part, query, tile, queries), of the part that begins with the tile's `query`
//   Queries               tiles of q, dO and statistics: settle(), then a barrier, start_head(...); fetch(tile, left),
//                         arrive(tile), then a barrier; LOADS_AHEAD: the next tile may be fetched while its
//                         buffer is in use; statistics(tile, kind, query, to): lse, its low part or -delta of a lane's queries
//   BiasRuns              a bias of a lane's keys and queries, where it is read in runs of keys
//   Weights               P or dS as a factor: take(s, key part, group)
//   Gradient              dK or dV of a warp's keys: add_to_dk(dk, weights, query, tile), add_to_dv(dv, weights, query, tile);
//                         gradient_of(gradient, key, i) is of channel_of_lane(i), i below LANE_CHANNELS
//   TWO_PIECES            the plain way through a tile and the other are two pieces of code, from its start to its end
//   STAGES_AT, STAGE_BYTES       where the buffers of tiles begin in shared memory, and their size; MEMORY_BYTES: of all
#pragma once

#include "backward.cuh"
#include "params.h"
#include "rows.cuh"

constexpr int THREADS = WARPS * WARP_THREADS;
constexpr bool NEEDS_DS = WANT_DK || WANT_KEY_SUMS;

// Whether a bias is read number by number, where it is added.
template <int index> constexpr bool IS_SCATTERED = Bias<index>::kind == STRIDED || (Bias<index>::kind == PIECES && !RUNS);
constexpr bool SCATTERED = IS_SCATTERED<0> || IS_SCATTERED<1> || IS_SCATTERED<2> || IS_SCATTERED<3>;

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
