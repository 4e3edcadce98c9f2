// Backward pass by queries: dQ (13), and the sums of dS over keys that biases without a key axis need (15).
//
// A block owns a tile of queries of one (batch, row, head) and walks over the keys that they see.
//
//   for tile of keys, for part of it                  the next tile is on its way meanwhile
//       S  = Q K^T + biases - lse                     in base 2; rows are queries
//       dP = dO V^T - delta
//       dS = 2^S dP                                   (9), (12)
//       dQ += dS K
//
// A tile whose keys are all seen, and whose lse is small, is one piece of code; any other is another.
//
// Constants: README.md, "Constants of the backward pass".
#include "../include/query_logits.cuh"

constexpr int KEYS_AT = QUERY_BYTES;
static_assert(KEYS_AT + STAGES * KEY_BYTES == SHARED_BYTES, "shared memory as planned");

KERNEL_WITH_BLOCKS(THREADS, MIN_BLOCKS) backward_queries(const BackwardParams params) {
    DYNAMIC_SHARED(shared);
    const u32 memory = shared_address(shared);
    const AttentionInputs& in = params.inputs;
    const Lane lane;

    // Blocks that read the same part of the biases are neighbours.
    i64 block = params.first_block + block_index();
    const i64 query_tiles = divided_up(in.seqlen_q, TILE_Q);
    Position at;
    at.row = split_index(block, in.rows);
    const i64 first_query = split_index(block, query_tiles) * TILE_Q;
    at.head = split_index(block, in.heads);
    at.batch = block;
    i64 key_head = at.head;
    split_index(key_head, in.group);
    const int queries_there = (int)least(in.seqlen_q - first_query, TILE_Q);

    // Keys that some query of the tile sees.
    const Range visible = POSITIONS ? visible_keys(in, first_query, first_query + queries_there) : Range{0, in.seqlen_k};
    const i64 end = least(visible.end, kv_length(in, at));
    i64 first_key = visible.begin / TILE_K * TILE_K;
    const int tiles = end > first_key ? (int)divided_up(end - first_key, TILE_K) : 0;

    QuerySums dq = {};
    float query_sums[LANE_QUERIES] = {};
    QueryRows queries;
    QueryBiases<false> biases;
    const int key = Lane::key_of(thread_index());
    // The last run of a tile from `first` on, from the lane's first key: it is read instead of those that do not exist.
    auto last_run = [&](i64 first) { return RUNS ? (int)least(in.seqlen_k - first, TILE_K) - RUN_KEYS - key : 0; };

    // One tile that has arrived, its first part's biases fetched.
    auto compute = [&](bool fast, u32 keys, bool plain, bool all) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Scores s, dp;
            if (!fast) one_by_one();
            queries.multiply(s, dp, keys, part, lane);
            if (fast) {
                const i64 first = BY_ELEMENT ? opaque(first_key + key + part * PART_KEYS) : 0;
                biases.take<true>(s, BY_ELEMENT ? read_again(params).inputs : in, first, part, queries.lse, queries.lse);
            } else {
                general_logits(s, dp, queries, biases, read_again(params).inputs, at, lane, first_query, first_key, key + part * PART_KEYS, part, plain, all);
            }
            // Biases of the next part, while this one is computed.
            if (part + 1 < PARTS) {
                biases.fetch((part + 1) * PART_KEYS, fast ? TILE_K : last_run(first_key));
            } else {
                biases.next_keys(TILE_K);
                biases.fetch(0, last_run(first_key + TILE_K));
            }
            weigh(dp, s);
            if (WANT_QUERY_SUMS) for_scores([&](int i, int j) { query_sums[i] += score(dp, i, j); });
            if (WANT_DQ) add_keys(dq, dp, keys, part, lane, false);
        }
    };

    if (tiles > 0) {
        QueriesWalk queries_walk;
        KeysWalk keys_walk;
        queries_walk.start(params, at, first_query, queries_there);
        keys_walk.start(in, at, key_head, first_key);
        queries_walk.fetch(memory, queries_there, (int)least(params.padded_queries - first_query, TILE_Q));
        // Tiles are fetched one ahead, and looked at two ahead.
        i64 left = end - first_key;
        auto look = [&]() {
            keys_walk.look((int)least(greatest(left, 0), TILE_K));
            keys_walk.shift_mask(TILE_K * keys_walk.mask_stride);
            left -= TILE_K;
        };
        auto fetch = [&](int stage) {
            keys_walk.fetch(memory + KEYS_AT + stage * KEY_BYTES);
            keys_walk.shift(TILE_K * in.k.strides[2], TILE_K * in.v.strides[2]);
        };
        look();
        fetch(0);
        copies_started();
        look();
        biases.start(in, at, first_query + lane.query, first_key + key);
        biases.fetch(0, last_run(first_key));

        for (int tile = 0; tile < tiles; tile++) {
            const int stage = STAGES == 2 ? tile % 2 : 0;
            const u32 keys = memory + KEYS_AT + stage * KEY_BYTES;
            keys_walk.arrive(keys);
            if (tile == 0) queries_walk.arrive(queries, memory);
            block_barrier();
            auto fetch_next = [&]() {
                if (tile + 1 < tiles) {
                    fetch(STAGES == 2 ? 1 - stage : 0);
                    look();
                }
                copies_started();
            };
            if (LOADS_AHEAD) fetch_next();
            if (tile == 0) queries.load(lane, queries_there);
            const bool uncut = first_key + TILE_K <= end && !(POSITIONS && cuts(band(in, first_query, first_key), TILE_Q, TILE_K));
            const bool plain = queries.allows_plain_of_lane(queries_there), all = keeps_all_of_lane(keys);
            if (MAY_BE_PLAIN && !SEGMENTS && uncut && warp_all(plain && all)) {
                compute(true, keys, true, true);
            } else {
                compute(false, keys, warp_all(plain), first_key + TILE_K <= end && warp_all(all));
            }
            first_key += TILE_K;
            if (STAGES == 1) block_barrier();
            if (!LOADS_AHEAD) fetch_next();
        }
    }

    const BackwardParams& results = read_again(params);
    if (WANT_DQ) {
        QueryGradient<ELEMENT, DQ_PIECES> gradient;
        gradient.start((ELEMENT*)results.dq.data + offset_of(results.dq, at, first_query, at.head), results.dq.strides[2], results.dq.strides[4], lane);
        gradient.store(dq, lane.query, queries_there, results.inputs.scale);
    }
    if (WANT_QUERY_SUMS) {
        float* const sums = (float*)results.query_sums + ((at.batch * results.inputs.rows + at.row) * results.inputs.heads + at.head) * results.inputs.seqlen_q + first_query;
#pragma unroll
        for (int i = 0; i < LANE_QUERIES; i++) {
            const float sum = sum_of_query(query_sums[i]);
            const int query = lane.query + Lane::further_query(i);
            if (leads_query() && query < queries_there) sums[query] = sum;
        }
    }
}
