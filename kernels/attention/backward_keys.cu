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

// One row of dK or dV of a lane.
template <class T, int channels>
DEVICE void store_row(const Operand& to, i64 offset, const Gradient<channels>& gradient, int key, float factor, bool kept, const float* added) {
    T* data = (T*)to.data + offset;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS<channels>; i++) {
        const int channel = channel_of_lane(i);
        if (channel >= channels) continue;
        float value = kept ? gradient_of(gradient, key, i) * factor : 0.0f;
        if (added) value += added[channel];
        data[channel * to.strides[4]] = from_f32<T>(value);
    }
}

// Sums of dS of one head: over a lane's queries so far, over the lanes that share its keys now; the lane's keys begin at `key`.
DEVICE void store_key_sums(float* to, float (&sums)[LANE_KEYS], i64 key, const bool (&kept)[LANE_KEYS], i64 seqlen_k) {
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
        const float sum = sum_of_key(sums[i]);
        if (leads_key() && key + i < seqlen_k) to[key + i] = kept[i] ? sum : 0.0f;
        sums[i] = 0.0f;
    }
}

KERNEL_WITH_BLOCKS(THREADS, MIN_BLOCKS) backward_keys(const BackwardParams params) {
    DYNAMIC_SHARED(shared);
    const u32 memory = shared_address(shared);
    const AttentionInputs& in = params.inputs;

    // Blocks that read the same part of the biases, rows of the batch, are neighbours.
    i64 block = params.first_block + block_index();
    const i64 key_heads = in.heads / in.group, key_tiles = (in.seqlen_k + TILE_K - 1) / TILE_K;
    const i64 row = same_in_warp(split_index(block, in.rows)), first_key = same_in_warp(split_index(block, key_tiles)) * TILE_K;
    const i64 key_head = same_in_warp(split_index(block, key_heads)), batch = same_in_warp(split_index(block, in.batch));
    const i64 chunk = same_in_warp(block);
    const Position owner_at = {batch, row, key_head * in.group};

    const i64 length = kv_length(in, owner_at);
    // Tiles of queries that see a key of the tile, within the chunk.
    i64 first_tile = chunk * params.query_chunk;
    i64 end_tile = (in.seqlen_q + TILE_Q - 1) / TILE_Q;
    end_tile = least(end_tile, first_tile + params.query_chunk);
    if (first_key >= length) end_tile = first_tile;
    if (POSITIONS) {
        const Range visible = visible_queries(in, first_key, least(first_key + TILE_K, in.seqlen_k));
        first_tile = greatest(first_tile, visible.begin / TILE_Q);
        end_tile = least(end_tile, (visible.end + TILE_Q - 1) / TILE_Q);
    }
    const int tiles = end_tile > first_tile ? (int)(end_tile - first_tile) : 0;
    const int in_last = (int)least(in.seqlen_q - (end_tile - 1) * TILE_Q, TILE_Q);  // queries of the last tile

    const Rows<ELEMENT> k = {(const ELEMENT*)in.k.data + offset_of(in.k, owner_at, 0, key_head), in.k.strides[2], in.k.strides[4]};
    const Rows<ELEMENT> v = {(const ELEMENT*)in.v.data + offset_of(in.v, owner_at, 0, key_head), in.v.strides[2], in.v.strides[4]};

    const i64 key = first_key + first_key_of_lane();  // the lane's first
    bool kept[LANE_KEYS];
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) kept[i] = key + i < length && (!KEY_MASK || key_mask_keeps(in, owner_at, key + i));

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
            if (NEEDS_DS) keys.gradients(dp, part, staged, minus_delta);
            if (plain) {
                biases.take<true>(s, part, in, first_query, lse, lse);
            } else {
                float low[LANE_QUERIES];
                queries.statistics(staged, LSE_LOW, low);
                biases.take<false>(s, part, in, first_query, lse, low);
            }
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

    for (i64 head = key_head * in.group; head < (key_head + 1) * in.group; head++) {
        first_query = first_tile * TILE_Q;
        if (tiles > 0) {
            queries.settle();
            block_barrier();
            const BackwardParams& again = read_again(params);
            queries.start_head(again, {batch, row, head}, first_query);
            const int there = tiles > 1 ? TILE_Q : in_last;
            queries.fetch(staged, there);
            biases.start_head(again.inputs, {batch, row, head}, first_key + first_key_of_lane(), first_query);
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
            const i64 heads = ((chunk * in.batch + batch) * in.rows + row) * in.heads + head;
            store_key_sums((float*)params.key_sums + heads * in.seqlen_k, key_sums, key, kept, in.seqlen_k);
        }
    }

    const i64 owner = ((chunk * in.batch + batch) * in.rows + row) * key_heads + key_head;
    const float* uniform = UNIFORM_ROWS && WANT_DV && chunk == 0
                               ? (const float*)params.uniform_sums + ((batch * in.rows + row) * key_heads + key_head) * HEAD_DIM_V
                               : nullptr;
    // Once more: neither takes registers through the loops.
    const i64 own_key = first_key + opaque(first_key_of_lane());
    const BackwardParams& results = read_again(params);
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
        if (own_key + i >= results.inputs.seqlen_k) continue;
        if (WANT_DK) {
            if (PARTIALS) {
                const Operand to = {results.dk_partials, {0, 0, 0, 0, 1}};
                store_row<float, HEAD_DIM>(to, (owner * results.inputs.seqlen_k + own_key + i) * HEAD_DIM, dk, i, results.inputs.scale, kept[i], nullptr);
            } else {
                store_row<ELEMENT, HEAD_DIM>(results.dk, offset_of(results.dk, owner_at, own_key + i, key_head), dk, i, results.inputs.scale, kept[i], nullptr);
            }
        }
        if (WANT_DV) {
            if (PARTIALS) {
                const Operand to = {results.dv_partials, {0, 0, 0, 0, 1}};
                store_row<float, HEAD_DIM_V>(to, (owner * results.inputs.seqlen_k + own_key + i) * HEAD_DIM_V, dv, i, 1.0f, kept[i], uniform);
            } else {
                store_row<ELEMENT, HEAD_DIM_V>(results.dv, offset_of(results.dv, owner_at, own_key + i, key_head), dv, i, 1.0f, kept[i], uniform);
            }
        }
    }
}
