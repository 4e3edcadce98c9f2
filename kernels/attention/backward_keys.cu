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

static_assert(MEMORY_BYTES == SHARED_BYTES, "shared memory as planned");

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

// Queries that a block walks over: those of its chunk in tiles that see a key of its own.
struct Walked {
    i64 first;
    int count;

    DEVICE Walked(const BackwardParams& params, const Owner& owner) {
        const AttentionInputs& in = params.inputs;
        i64 first_tile = owner.chunk * params.query_chunk;
        i64 end_tile = least((in.seqlen_q + TILE_Q - 1) / TILE_Q, first_tile + params.query_chunk);
        if (owner.first_key >= kv_length(in, owner.at(in))) end_tile = first_tile;
        if (POSITIONS) {
            const Range visible = visible_queries(in, owner.first_key, least(owner.first_key + TILE_K, in.seqlen_k));
            first_tile = greatest(first_tile, visible.begin / TILE_Q);
            end_tile = least(end_tile, (visible.end + TILE_Q - 1) / TILE_Q);
        }
        first = first_tile * TILE_Q;
        count = end_tile > first_tile ? (int)(least(in.seqlen_q, end_tile * TILE_Q) - first) : 0;
    }
};

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

    Keys keys;
    {
        const Owner owner(params);
        const Position at = owner.at(in);
        if (Walked(params, owner).count > 0) keys.start(memory, rows_of(in.k, at, owner.key_head), rows_of(in.v, at, owner.key_head), owner.first_key, in.seqlen_k);
    }
    Gradient<HEAD_DIM> dk = {};
    Gradient<HEAD_DIM_V> dv = {};
    float key_sums[LANE_KEYS] = {};
    Queries queries;
    KeyBiases biases;
    u32 staged = memory + STAGES_AT;
    const u32 both_stages = 2 * staged + STAGE_BYTES;

    // Of the head that is walked over, where something is excluded.
    Position at;
    i64 first_key;

    // Biases of the next part, or of the next tile, of which `left` queries are left.
    auto fetch_biases = [&](int part, int left) {
        if (part + 1 < QUERY_PARTS) {
            biases.fetch((part + 1) * PART_ROWS, left + TILE_Q);
        } else {
            biases.advance();
            biases.fetch(0, left);
        }
    };
    // What logits need of the problem: read again where that is seldom or addresses take registers, unless those are the keys' own.
    auto problem = [&](bool seldom) -> const AttentionInputs& { return SCATTERED || (seldom && K_IN_REGISTERS) ? read_again(params).inputs : in; };
    // One tile, computed on the plain way or the other, from `first_query` on; `left` queries come after it.
    auto compute = [&](bool plain, i64 first_query, int left) {
        // Addresses of single elements, of all parts at once, would take registers.
        constexpr int parts_at_once = SCATTERED ? 1 : QUERY_PARTS;
#pragma unroll parts_at_once
        for (int part = 0; part < QUERY_PARTS; part++) {
            const int own_query = part * PART_ROWS;
            const i64 first_of_part = first_query + own_query;
            if (POSITIONS && QUERY_PARTS > 1) {
                const Band bounds = band(problem(true), first_of_part, first_key);
                if (bounds.low >= TILE_K || bounds.high <= -PART_ROWS) {
                    fetch_biases(part, left);
                    continue;
                }
            }
            Weights p, ds;
#pragma unroll
            for (int key_part = 0; key_part < KEY_PARTS; key_part++) {
                float lse[PART_QUERIES];
                queries.statistics(staged, LSE, own_query, lse);

                Scores s, dp;
                keys.logits(s, key_part, own_query, staged);
                // Where biases' addresses take registers, dP comes after them.
                if (NEEDS_DS && !SCATTERED) keys.gradients(dp, key_part, own_query, staged, queries);
                if (plain) {
                    biases.take<true>(s, key_part, problem(false), first_of_part, lse, lse);
                } else {
                    float low[PART_QUERIES];
                    queries.statistics(staged, LSE_LOW, own_query, low);
                    biases.take<false>(s, key_part, problem(true), first_of_part, lse, low);
                }
                if (SCATTERED) one_by_one();
                if (NEEDS_DS && SCATTERED) keys.gradients(dp, key_part, own_query, staged, queries);
                if (key_part + 1 == KEY_PARTS) fetch_biases(part, left);
                if (SEGMENTS || POSITIONS) exclude(s, dp, key_part, problem(true), at, first_key + first_key_of_lane(), first_of_part, first_key);
#pragma unroll
                for (int group = 0; group < PART_GROUPS; group++) {
                    for_scores(group, [&](int i, int j) {
                        score(s, i, j) = exp2(score(s, i, j));
                        if (NEEDS_DS) score(dp, i, j) *= score(s, i, j);
                        if (WANT_KEY_SUMS) key_sums[key_part * PART_KEYS + i] += score(dp, i, j);
                    });
                    if (WANT_DV) p.take(s, key_part, group);
                    if (WANT_DK) ds.take(dp, key_part, group);
                }
            }
            // Keeps loads of the next part out of this one, where registers have no room for them.
            if (QUERY_PARTS > 1) one_by_one();
            if (WANT_DV) add_to_dv(dv, p, own_query, staged);
            if (WANT_DK) add_to_dk(dk, ds, own_query, staged);
        }
    };

    int head_of_group = 0;
    do {
        const BackwardParams& of_head = read_again(params);
        const Owner owner(of_head);
        const Walked walked(of_head, owner);
        at = owner.at(of_head.inputs, head_of_group);
        first_key = owner.first_key;
        bool plain = false;
        if (walked.count > 0) {
            queries.settle();
            block_barrier();
            queries.start_head(of_head, at, walked.first);
            queries.fetch(staged, walked.count);
            biases.start_head(of_head.inputs, at, first_key + first_key_of_lane(), walked.first);
            biases.fetch(0, walked.count);
            plain = allows_plain_of_all(of_head, at, walked.first, walked.count);
        }
        auto walk = [&](bool plain) {
            for (int left = walked.count - TILE_Q; left > -TILE_Q; left -= TILE_Q) {
                queries.arrive(staged);
                block_barrier();
                const u32 next = STAGES == 2 ? both_stages - staged : staged;
                if (LOADS_AHEAD) queries.fetch(next, left);
                compute(plain, walked.first + (walked.count - TILE_Q - left), left);
                if (STAGES == 1 && left > 0) {
                    block_barrier();
                    if (!LOADS_AHEAD) queries.fetch(staged, left);
                }
                staged = next;
            }
        };
        // Known when compiling in each: two loops, which share no registers.
        if (TWO_PIECES && plain) {
            walk(true);
        } else {
            walk(!TWO_PIECES && plain);
        }
        if (WANT_KEY_SUMS) {
            const BackwardParams& again = read_again(params);
            const Owner of_sums(again);
            const i64 own_key = of_sums.first_key + first_key_of_lane(), seqlen_k = again.inputs.seqlen_k;
            Kept kept;
            kept.look(again.inputs, of_sums.at(again.inputs), own_key);
            const i64 heads = of_sums.rows_before(again.inputs) * again.inputs.heads + of_sums.at(again.inputs, head_of_group).head;
            store_key_sums((float*)again.key_sums + heads * seqlen_k, key_sums, own_key, kept, seqlen_k);
        }
    } while (++head_of_group < (int)read_again(params).inputs.group);

    // Once more: neither takes registers through the loops.
    const BackwardParams& results = read_again(params);
    const Owner of_results(results);
    const i64 own_key = of_results.first_key + opaque(first_key_of_lane()), seqlen_k = results.inputs.seqlen_k;
    at = of_results.at(results.inputs);
    Kept kept;
    kept.look(results.inputs, at, own_key);
    one_by_one();
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
