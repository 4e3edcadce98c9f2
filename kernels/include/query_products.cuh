// Products and tiles of the passes with queries for rows of S: one file for each vendor, with the same names.
//
//   TILE_Q, TILE_K        queries and keys of a block's tile; PARTS parts of the keys, PART_KEYS each, whose numbers are computed
//                         at once
//   LANE_QUERIES          that a lane owns: those of the tile from lane.query on, Lane::further_query(i) further
//   LANE_KEYS             neighbours that it owns of a part, the first of which is Lane::key_of(thread) in part 0; a bias is read
//                         in LANE_RUNS runs of RUN_KEYS
//   lane.after(x)         the same lane, whose factors need not be loaded before x is known
//   Scores                S, dP or dS of a part; score(s, query, key) are a lane's numbers; for_pairs(action):
//                         action(query, key) for all of them, by two keys
//   sum_of_query(x)       over the lanes that share a query; leads_query(): one of them
//   QueryRows             q, dO and statistics of a warp's queries: load(...), multiply(s, dp, keys, part), lse, load_low(...)
//   QueriesWalk, KeysWalk tiles on their way: start(...); fetch(to), then arrive(tile) and a barrier; LOADS_AHEAD: the next tile may
//                         be fetched while its buffer is in use; copies_started(): after what was fetched at once
//   QUERY_BYTES, KEY_BYTES       of a tile of each in shared memory
//   keeps_all_of_lane(keys)      whether mask and length keep every key of the tile: all lanes together
//   QuerySums             dQ of a warp's queries: clear(dq), add_keys(dq, ds, keys, part, ...)
//   QueryGradient         where it goes: start(...), shift(...), store(...)
//   Notes                 numbers that a block needs seldom, the same in all threads
#pragma once

#include "backward.cuh"
#include "params.h"
#include "rows.cuh"

constexpr int THREADS = WARPS * WARP_THREADS;
constexpr bool CAN_EXCLUDE = KEY_MASK || KV_LENGTHS;

#if defined(__HIP__)
#include "query_products_hip.cuh"
#else
#include "query_products_cuda.cuh"
#endif

// Calls `action(query, key)` for all numbers of a part.
template <class Action> DEVICE void for_scores(Action action) {
    for_pairs([&](int query, int key) {
        action(query, key);
        action(query, key + 1);
    });
}
