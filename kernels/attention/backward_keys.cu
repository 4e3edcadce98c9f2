// Backward pass by keys: dV (10), dK (14), and the sums of dS over queries that biases without a query axis need (15).
//
// A block owns a tile of keys of one (batch, row, key head) and walks over the queries of every head of the group; the
// numbers of the equations are those of docs/mathematics.md.
//
//   for head of the group, tile of queries            the next tile is on its way meanwhile
//       S^T  = K Q^T + biases - lse                   in base 2; rows are keys, so that
//       dP^T = V dO^T - delta                         P and dS are factors as they stand
//       P^T  = 2^S^T,  dS^T = P^T dP^T                (9), (12)
//       dV += P^T dO,  dK += dS^T Q
//
// Keys that key mask or length exclude are computed like others and written as zeros.
//
// Constants: README.md, "Constants of the backward pass".
#include "../include/key_logits.cuh"

static_assert(STAGES_AT + STAGES * STAGE_BYTES == SHARED_BYTES, "shared memory as planned");

// What a block owns: a tile of keys of one (batch, row, key head), and of the queries a chunk. Each is computed anew, and takes
// no registers from one place to another.
struct Owner {
    i64 row;
    i64 first_key;
    i64 key_head;
    i64 batch;
    i64 chunk;
    i64 key_heads;

    DEVICE Owner(const BackwardParams& params) {
        const AttentionInputs& in = params.inputs;
        key_heads = in.heads;
        split_index(key_heads, in.group);
        // Blocks that read the same part of the biases, rows of the batch, are neighbours.
        i64 block = params.first_block + block_index_again();
        row = same_in_warp(split_index(block, in.rows));
        first_key = same_in_warp(split_index(block, divided_up(in.seqlen_k, TILE_K))) * TILE_K;
        key_head = same_in_warp(split_index(block, key_heads));
        batch = same_in_warp(split_index(block, in.batch));
        chunk = same_in_warp(block);
    }
    // Of head `i` of the group.
    DEVICE Position at(const AttentionInputs& in, i64 i = 0) const { return {batch, row, key_head * in.group + i}; }
    // Number of the chunk, batch and row among all.
    DEVICE i64 rows_before(const AttentionInputs& in) const { return (chunk * in.batch + batch) * in.rows + row; }
};

// Beside f32, the sums of many channels, or segments, the owner and what is known of its keys take no registers through the loops.
constexpr bool OWNER_AGAIN = sizeof(ELEMENT) == 4 || HEAD_DIM > 128 || HEAD_DIM_V > 128 || SEGMENTS;

// Which of the lane's keys key mask and length keep.
struct Kept {
    bool keys[LANE_KEYS];
    DEVICE void look(const AttentionInputs& in, const Position& at, i64 key) {
        const i64 length = least(kv_length(in, at), in.seqlen_k);
#pragma unroll
        for (int i = 0; i < LANE_KEYS; i++) keys[i] = key + i < length && (!KEY_MASK || key_mask_keeps(in, at, key + i));
    }
};

// One row of dK or dV of a lane.
template <class T, int channels>
DEVICE void store_row(const Operand& to, i64 offset, const Gradient<channels>& gradient, int key, float factor, bool kept, const float* added) {
    T* data = (T*)to.data + offset + channel_of_lane(0) * to.strides[4];
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS<channels>; i++) {
        const int channel = channel_of_lane(i);
        // Opaque: addresses of all channels at once would take registers.
        if (i > 0) data = (T*)opaque((i64)(data + (channel - channel_of_lane(i - 1)) * to.strides[4]));
        if (channels % 8 != 0 && channel >= channels) continue;
        float value = kept ? gradient_of(gradient, key, i) * factor : 0.0f;
        if (added) value += added[channel];
        *data = from_f32<T>(value);
    }
}

// Sums of dS of one head: over a lane's queries so far, over the lanes that share its keys now; the lane's keys begin at `key`.
DEVICE void store_key_sums(float* to, float (&sums)[LANE_KEYS], i64 key, const Kept& kept, i64 seqlen_k) {
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
        const float sum = sum_of_key(sums[i]);
        if (leads_key() && key + i < seqlen_k) to[key + i] = kept.keys[i] ? sum : 0.0f;
        sums[i] = 0.0f;
    }
}

KERNEL_WITH_BLOCKS(THREADS, MIN_BLOCKS) backward_keys(const BackwardParams params) {
    DYNAMIC_SHARED(shared);
    const u32 memory = shared_address(shared);
    const AttentionInputs& in = params.inputs;

    const Owner owner(params);
    const Position owner_at = owner.at(in);
    const i64 first_key = owner.first_key, key_head = owner.key_head;

    // Tiles of queries that see a key of the tile, within the chunk.
    i64 first_tile = owner.chunk * params.query_chunk;
    i64 end_tile = (in.seqlen_q + TILE_Q - 1) / TILE_Q;
    end_tile = least(end_tile, first_tile + params.query_chunk);
    if (first_key >= kv_length(in, owner_at)) end_tile = first_tile;
    if (POSITIONS) {
        const Range visible = visible_queries(in, first_key, least(first_key + TILE_K, in.seqlen_k));
        first_tile = greatest(first_tile, visible.begin / TILE_Q);
        end_tile = least(end_tile, (visible.end + TILE_Q - 1) / TILE_Q);
    }
    const int tiles = end_tile > first_tile ? (int)(end_tile - first_tile) : 0;
    const int in_last = (int)least(in.seqlen_q - (end_tile - 1) * TILE_Q, TILE_Q);  // queries of the last tile

    const Rows<ELEMENT> k = rows_of(in.k, owner_at, key_head), v = rows_of(in.v, owner_at, key_head);

    const i64 key = first_key + first_key_of_lane();  // the lane's first
    Kept kept;
    if (!OWNER_AGAIN) kept.look(in, owner_at, key);

    Gradient<HEAD_DIM> dk = {};
    Gradient<HEAD_DIM_V> dv = {};
    float key_sums[LANE_KEYS] = {};
    Keys keys;
    if (tiles > 0) keys.start(memory, k, v, first_key, in.seqlen_k);
    Queries queries;
    KeyBiases biases;
    u32 staged = memory + STAGES_AT;
    const u32 both_stages = 2 * staged + STAGE_BYTES;
    i64 first_query;

    // One tile, computed on the plain way or the other; `next_last` is the last query of the next tile.
    auto compute = [&](bool plain, int next_last) {
        Weights p, ds;
#pragma unroll
        for (int part = 0; part < KEY_PARTS; part++) {
            float lse[LANE_QUERIES], minus_delta[LANE_QUERIES];
            queries.statistics(staged, LSE, lse);
            if (NEEDS_DS) queries.statistics(staged, MINUS_DELTA, minus_delta);

            Scores s, dp;
            keys.logits(s, part, staged);
            // Where biases' addresses take registers, dP comes after them.
            constexpr bool late = KeyBiases::scattered;
            if (NEEDS_DS && !late) keys.gradients(dp, part, staged, minus_delta);
            if (plain) {
                biases.take<true>(s, part, in, first_query, lse, lse);
            } else {
                float low[LANE_QUERIES];
                queries.statistics(staged, LSE_LOW, low);
                biases.take<false>(s, part, in, first_query, lse, low);
            }
            if (late) one_by_one();
            if (NEEDS_DS && late) keys.gradients(dp, part, staged, minus_delta);
            // Biases of the next tile, while this one is computed.
            if (part + 1 == KEY_PARTS) biases.fetch(next_last);
            if (SEGMENTS || POSITIONS) exclude(s, dp, part, in, owner_at, key, first_query, first_key);
#pragma unroll
            for (int group = 0; group < PART_GROUPS; group++) {
                for_scores(group, [&](int i, int j) {
                    score(s, i, j) = exp2(score(s, i, j));
                    if (NEEDS_DS) score(dp, i, j) *= score(s, i, j);
                    if (WANT_KEY_SUMS) key_sums[part * PART_KEYS + i] += score(dp, i, j);
                });
                if (WANT_DV) p.take(s, part, group);
                if (WANT_DK) ds.take(dp, part, group);
            }
        }
        if (WANT_DV) add_to_dv(dv, p, staged);
        if (WANT_DK) add_to_dk(dk, ds, staged);
    };

    for (i64 i = 0; i < in.group; i++) {
        first_query = first_tile * TILE_Q;
        if (tiles > 0) {
            queries.settle();
            block_barrier();
            const BackwardParams& again = read_again(params);
            const Owner of_head = OWNER_AGAIN ? Owner(again) : owner;
            const Position at = of_head.at(again.inputs, i);
            queries.start_head(again, at, first_query);
            const int there = tiles > 1 ? TILE_Q : in_last;
            queries.fetch(staged, there);
            biases.start_head(again.inputs, at, of_head.first_key + first_key_of_lane(), first_query);
            biases.fetch(there - 1);
        }
        for (int tile = 0; tile < tiles; tile++) {
            // Without a next tile none is read, and this one's biases are once more.
            const bool more = tile + 1 < tiles;
            const int next_there = tile + 2 < tiles ? TILE_Q : in_last;
            queries.arrive(staged);
            block_barrier();
            const u32 next = STAGES == 2 ? both_stages - staged : staged;
            if (LOADS_AHEAD) queries.fetch(next, more ? next_there : 0);
            if (more) biases.advance();
            const bool plain = queries.plain(staged);
            // Known when compiling in each: two pieces of code.
            if (TWO_PIECES && MAY_BE_PLAIN && plain) {
                compute(true, next_there - 1);
            } else {
                compute(!TWO_PIECES && plain, next_there - 1);
            }
            first_query += TILE_Q;
            if (STAGES == 1 && more) {
                block_barrier();
                if (!LOADS_AHEAD) queries.fetch(staged, next_there);
            }
            staged = next;
        }
        if (WANT_KEY_SUMS) {
            const BackwardParams& again = read_again(params);
            const Owner of_sums = OWNER_AGAIN ? Owner(again) : owner;
            const i64 own_key = of_sums.first_key + first_key_of_lane(), seqlen_k = again.inputs.seqlen_k;
            if (OWNER_AGAIN) kept.look(again.inputs, of_sums.at(again.inputs), own_key);
            const i64 heads = of_sums.rows_before(again.inputs) * again.inputs.heads + of_sums.at(again.inputs, i).head;
            store_key_sums((float*)again.key_sums + heads * seqlen_k, key_sums, own_key, kept, seqlen_k);
        }
    }

    // Once more: neither takes registers through the loops.
    const BackwardParams& results = read_again(params);
    const Owner of_results = OWNER_AGAIN ? Owner(results) : owner;
    const i64 own_key = of_results.first_key + opaque(first_key_of_lane()), seqlen_k = results.inputs.seqlen_k;
    const Position at = of_results.at(results.inputs);
    if (OWNER_AGAIN) {
        kept.look(results.inputs, at, own_key);
        one_by_one();
    }
    const i64 before = of_results.rows_before(results.inputs) * of_results.key_heads + of_results.key_head;  // key heads of other blocks
    const float* uniform = UNIFORM_ROWS && WANT_DV && of_results.chunk == 0
                               ? (const float*)results.uniform_sums + before * HEAD_DIM_V
                               : nullptr;
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
        const i64 key = own_key + i;
        if (key >= seqlen_k) continue;
        if (WANT_DK) {
            if (PARTIALS) {
                const Operand to = {results.dk_partials, {0, 0, 0, 0, 1}};
                store_row<float, HEAD_DIM>(to, (before * seqlen_k + key) * HEAD_DIM, dk, i, results.inputs.scale, kept.keys[i], nullptr);
            } else {
                store_row<ELEMENT, HEAD_DIM>(results.dk, offset_of(results.dk, at, key, of_results.key_head), dk, i, results.inputs.scale, kept.keys[i], nullptr);
            }
        }
        if (WANT_DV) {
            if (PARTIALS) {
                const Operand to = {results.dv_partials, {0, 0, 0, 0, 1}};
                store_row<float, HEAD_DIM_V>(to, (before * seqlen_k + key) * HEAD_DIM_V, dv, i, 1.0f, kept.keys[i], uniform);
            } else {
                store_row<ELEMENT, HEAD_DIM_V>(results.dv, offset_of(results.dv, at, key, of_results.key_head), dv, i, 1.0f, kept.keys[i], uniform);
            }
        }
    }
}
