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
#include "../include/logits.cuh"

constexpr int THREADS = WARPS * WARP_THREADS;
constexpr int M = ROW_TILES;
constexpr int N = TILE_Q / 8;
constexpr int TILE_K = WARPS * 16 * M;
constexpr bool NEEDS_DS = WANT_DK || WANT_KEY_SUMS;

using QTile = Tile<ELEMENT, HEAD_DIM>;
using VTile = Tile<ELEMENT, HEAD_DIM_V>;

// Neighbouring keys belong to one lane: a lane's rows of the accumulators are 2 M keys in a run, so that it reads a bias
// in words. In the tile they stand in the order of the fragments' rows.
struct KeyOrder {
    DEVICE int operator()(int row) const {
        const int warp = row / (16 * M), i = row / 16 % M, half = row / 8 % 2, lane = row % 8;
        return warp * 16 * M + (lane * M + i) * 2 + half;
    }
};

// Neighbouring queries belong to one lane too.
struct QueryOrder {
    DEVICE int operator()(int row) const { return row % 8 / 2 * 2 * N + row / 8 * 2 + row % 2; }
};

using StageK = Stage<ELEMENT, HEAD_DIM, TILE_K, THREADS, K_PIECES>;
using StageV = Stage<ELEMENT, HEAD_DIM_V, TILE_K, THREADS, V_PIECES>;
using StageQ = Stage<ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES>;
using StageDO = Stage<ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES>;

// Where things lie in shared memory.
constexpr int V_AT = QTile::bytes(TILE_K);
constexpr int STAGES_AT = V_AT + (NEEDS_DS ? VTile::bytes(TILE_K) : 0);
constexpr int DO_AT = QTile::bytes(TILE_Q);
constexpr int STATISTICS_AT = DO_AT + VTile::bytes(TILE_Q);
constexpr int STAGE_BYTES = STATISTICS_AT + 3 * TILE_Q * 4;
static_assert(STAGES_AT + STAGES * STAGE_BYTES == SHARED_BYTES, "shared memory as planned");

// One row of dK or dV of a lane, channels 8 c + 2 (l % 4) and the next.
template <class T, int channels>
DEVICE void store_row(const Operand& to, i64 offset, const Accumulator (&acc)[Tile<ELEMENT, channels>::columns], int half,
                      float factor, bool kept, const float* added) {
    T* data = (T*)to.data + offset + 2 * (lane_index() % 4) * to.strides[4];
#pragma unroll
    for (int c = 0; c < Tile<ELEMENT, channels>::columns; c++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int channel = 8 * c + 2 * (lane_index() % 4) + e;
            if (channel >= channels) continue;
            float value = kept ? acc[c][2 * half + e] * factor : 0.0f;
            if (added) value += added[channel];
            data[e * to.strides[4]] = from_f32<T>(value);
        }
        // Opaque: the addresses of all channels would take registers at once.
        data = (T*)opaque((i64)(data + 8 * to.strides[4]));
    }
}

// Sums of dS of one head: over a lane's queries so far, over its four lanes now.
DEVICE void store_key_sums(float* to, float (&sums)[M][2], const i64 (&keys)[M][2], const bool (&kept)[M][2], i64 seqlen_k) {
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = sums[i][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (lane_index() % 4 == 0 && keys[i][half] < seqlen_k) to[keys[i][half]] = kept[i][half] ? sum : 0.0f;
            sums[i][half] = 0.0f;
        }
    }
}

KERNEL_WITH_BLOCKS(THREADS, MIN_BLOCKS) backward_keys(const BackwardParams params) {
    extern __shared__ __align__(16) char memory[];
    const u32 shared = shared_address(memory);
    const AttentionInputs& in = params.inputs;
    const int lane = lane_index(), warp = warp_index();

    // Blocks that read the same part of the biases, rows of the batch, are neighbours.
    i64 block = params.first_block + block_index();
    const i64 key_heads = in.heads / in.group, key_tiles = (in.seqlen_k + TILE_K - 1) / TILE_K;
    const i64 row = block % in.rows;
    block /= in.rows;
    const i64 first_key = block % key_tiles * TILE_K;
    block /= key_tiles;
    const i64 key_head = block % key_heads;
    block /= key_heads;
    const i64 batch = block % in.batch, chunk = block / in.batch;
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

    // The tile of queries that is fetched next.
    StageWalk<StageQ, ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES, QueryOrder> q_walk;
    StageWalk<StageDO, ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES, QueryOrder> d_o_walk;
    StatisticsWalk<TILE_Q, THREADS> statistics_walk;
    auto start_head = [&](i64 head) {
        const i64 first = first_tile * TILE_Q;
        const Operand& d_o = params.d_o;
        q_walk.start({(const ELEMENT*)in.q.data + offset_of(in.q, owner_at, 0, head), in.q.strides[2], in.q.strides[4]}, first);
        d_o_walk.start({(const ELEMENT*)d_o.data + offset_of(d_o, owner_at, 0, head), d_o.strides[2], d_o.strides[4]}, first);
        statistics_walk.start(params, {batch, row, head}, first);
    };
    // Of the tile `there` queries exist; with none, nothing is read.
    auto fetch = [&](u32 to, int there) {
        q_walk.next(to, there);
        d_o_walk.next(to + DO_AT, there);
        statistics_walk.next(to + STATISTICS_AT, there > 0 ? TILE_Q : 0);
        copy_async_commit();
    };

    Accumulator dk[M][QTile::columns] = {}, dv[M][VTile::columns] = {};
    float key_sums[M][2] = {};
    bool kept[M][2];
    i64 keys[M][2];
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            keys[i][half] = first_key + warp * 16 * M + (lane / 4 * M + i) * 2 + half;
            kept[i][half] = keys[i][half] < length && (!KEY_MASK || key_mask_keeps(in, owner_at, keys[i][half]));
        }
    }

    if (tiles > 0) {
        StageWalk<StageK, ELEMENT, HEAD_DIM, TILE_K, THREADS, K_PIECES, KeyOrder> k_walk;
        StageWalk<StageV, ELEMENT, HEAD_DIM_V, TILE_K, THREADS, V_PIECES, KeyOrder> v_walk;
        k_walk.start(k, first_key);
        k_walk.fetch(shared, in.seqlen_k - first_key);
        if (NEEDS_DS) {
            v_walk.start(v, first_key);
            v_walk.fetch(shared + V_AT, in.seqlen_k - first_key);
        }
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();
    }
    FragmentA k_fragments[K_IN_REGISTERS ? QTile::steps : 1][M], v_fragments[K_IN_REGISTERS ? VTile::steps : 1][M];
    if (K_IN_REGISTERS && tiles > 0) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            const int first_row = (warp * M + i) * 16;
#pragma unroll
            for (int s = 0; s < QTile::steps; s++) k_fragments[s][i] = load_a<ELEMENT, HEAD_DIM>(shared, first_row, s);
#pragma unroll
            for (int s = 0; s < VTile::steps; s++) {
                if (NEEDS_DS) v_fragments[s][i] = load_a<ELEMENT, HEAD_DIM_V>(shared + V_AT, first_row, s);
            }
        }
    }

    KeyBiases<M, N> biases;
    u32 staged = shared + STAGES_AT;
    const u32 both_stages = 2 * staged + STAGE_BYTES;
    i64 first_query;

    // One tile, computed on the plain way or the other; `next_last` is the last query of the next tile.
    auto compute = [&](bool plain, int next_last) {
        float lse[2 * N], low[2 * N], delta[2 * N];
        const u32 statistics = staged + STATISTICS_AT + first_of_lane<N>() * 4;
        // Before the products, which hide the wait, where registers have room.
        constexpr bool STATISTICS_FIRST = !STEP_BY_STEP<ELEMENT, HEAD_DIM> && !STEP_BY_STEP<ELEMENT, HEAD_DIM_V>;
        const auto load_lse = [&] {
            load_shared_run(lse, statistics);
            if (!plain) load_shared_run(low, statistics + TILE_Q * 4);
        };
        if (STATISTICS_FIRST) load_lse();
        if (NEEDS_DS && (STATISTICS_FIRST || STARTS_FROM_DELTA)) load_shared_run(delta, statistics + 2 * TILE_Q * 4);

        Accumulator s[M][N], dp[M][N];
#pragma unroll
        for (int pass = 0; pass < PASSES<ELEMENT>; pass++) {
#pragma unroll
            for (int x = 0; x < QTile::steps; x++) {
                if (!K_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) k_fragments[0][i] = load_a<ELEMENT, HEAD_DIM>(shared, (warp * M + i) * 16, x);
                }
                const auto zero = [](int, int, int) { return 0.0f; };
                multiply_rows<ELEMENT, HEAD_DIM>(s, k_fragments[K_IN_REGISTERS ? x : 0], staged, 0, pass, x, zero);
            }
        }
        if (NEEDS_DS) {
            const auto minus_delta = [&](int, int j, int y) { return delta[2 * j + y % 2]; };
            const auto start = [&](int i, int j, int y) { return STARTS_FROM_DELTA ? minus_delta(i, j, y) : 0.0f; };
#pragma unroll
            for (int pass = 0; pass < PASSES<ELEMENT>; pass++) {
#pragma unroll
                for (int x = 0; x < VTile::steps; x++) {
                    if (!K_IN_REGISTERS) {
#pragma unroll
                        for (int i = 0; i < M; i++) v_fragments[0][i] = load_a<ELEMENT, HEAD_DIM_V>(shared + V_AT, (warp * M + i) * 16, x);
                    }
                    multiply_rows<ELEMENT, HEAD_DIM_V>(dp, v_fragments[K_IN_REGISTERS ? x : 0], staged + DO_AT, 0, pass, x, start);
                }
            }
            if (!STATISTICS_FIRST && !STARTS_FROM_DELTA) load_shared_run(delta, statistics + 2 * TILE_Q * 4);
            if (!STARTS_FROM_DELTA) add_to_all(dp, minus_delta);
        }
        if (!STATISTICS_FIRST) load_lse();
        if (plain) {
            biases.take<true>(s, in, first_query, lse, lse);
        } else {
            biases.take<false>(s, in, first_query, lse, low);
        }
        // Biases of the next tile, while this one is computed.
        biases.fetch(next_last);
        if (SEGMENTS || POSITIONS) exclude_by_key<M, N>(s, dp, in, owner_at, keys[0][0], first_query, first_key, TILE_K);

        FragmentA p_factors[M][TILE_Q / row_step<ELEMENT>], ds_factors[M][TILE_Q / row_step<ELEMENT>];
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    s[i][j][x] = exp2(s[i][j][x]);
                    if (NEEDS_DS) dp[i][j][x] *= s[i][j][x];
                    if (WANT_KEY_SUMS) key_sums[i][x / 2] += dp[i][j][x];
                }
            }
#pragma unroll
            for (int x = 0; x < TILE_Q / row_step<ELEMENT>; x++) {
                const int j = x * row_step<ELEMENT> / 8, other = j + (row_step<ELEMENT> == 16 ? 1 : 0);
                if (WANT_DV) p_factors[i][x] = as_factor<ELEMENT>(s[i][j], s[i][other]);
                if (WANT_DK) ds_factors[i][x] = as_factor<ELEMENT>(dp[i][j], dp[i][other]);
            }
        }
        if (WANT_DV) ProductOverRows<ELEMENT, HEAD_DIM_V, M, TILE_Q / row_step<ELEMENT>>::run(dv, p_factors, staged + DO_AT, 0);
        if (WANT_DK) ProductOverRows<ELEMENT, HEAD_DIM, M, TILE_Q / row_step<ELEMENT>>::run(dk, ds_factors, staged, 0);
    };

    for (i64 head = key_head * in.group; head < (key_head + 1) * in.group; head++) {
        first_query = first_tile * TILE_Q;
        if (tiles > 0) {
            copy_async_wait<0>();
            block_barrier();
            start_head(head);
            const int there = tiles > 1 ? TILE_Q : in_last;
            fetch(staged, there);
            biases.start_head(in, {batch, row, head}, keys[0][0], first_query);
            biases.fetch(there - 1);
        }
        for (int tile = 0; tile < tiles; tile++) {
            // Without a next tile none is read, and this one's biases are once more.
            const bool more = tile + 1 < tiles;
            const int next_there = tile + 2 < tiles ? TILE_Q : in_last;
            copy_async_wait<0>();
            block_barrier();
            const u32 next = STAGES == 2 ? both_stages - staged : staged;
            if (STAGES == 2) fetch(next, more ? next_there : 0);
            if (more) biases.advance();
            bool plain = MAY_BE_PLAIN;
            if (MAY_BE_PLAIN) {
#pragma unroll
                for (int i = 0; i < TILE_Q; i += WARP_THREADS) plain = plain && allows_plain(float_of(load_shared(staged + STATISTICS_AT + (i + lane % TILE_Q) * 4)));
                plain = warp_all(plain);
            }
            // Known when compiling in each: two pieces of code.
            if (MAY_BE_PLAIN && plain) {
                compute(true, next_there - 1);
            } else {
                compute(false, next_there - 1);
            }
            first_query += TILE_Q;
            if (STAGES == 1 && more) {
                block_barrier();
                fetch(staged, next_there);
            }
            staged = next;
        }
        if (WANT_KEY_SUMS) {
            const i64 heads = ((chunk * in.batch + batch) * in.rows + row) * in.heads + head;
            store_key_sums((float*)params.key_sums + heads * in.seqlen_k, key_sums, keys, kept, in.seqlen_k);
        }
    }

    const i64 owner = ((chunk * in.batch + batch) * in.rows + row) * key_heads + key_head;
    const float* uniform = UNIFORM_ROWS && WANT_DV && chunk == 0
                               ? (const float*)params.uniform_sums + ((batch * in.rows + row) * key_heads + key_head) * HEAD_DIM_V
                               : nullptr;
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const i64 key = keys[i][half];
            if (key >= in.seqlen_k) continue;
            if (WANT_DK) {
                if (PARTIALS) {
                    const Operand to = {params.dk_partials, {0, 0, 0, 0, 1}};
                    store_row<float, HEAD_DIM>(to, (owner * in.seqlen_k + key) * HEAD_DIM, dk[i], half, in.scale, kept[i][half], nullptr);
                } else {
                    store_row<ELEMENT, HEAD_DIM>(params.dk, offset_of(params.dk, owner_at, key, key_head), dk[i], half, in.scale, kept[i][half], nullptr);
                }
            }
            if (WANT_DV) {
                if (PARTIALS) {
                    const Operand to = {params.dv_partials, {0, 0, 0, 0, 1}};
                    store_row<float, HEAD_DIM_V>(to, (owner * in.seqlen_k + key) * HEAD_DIM_V, dv[i], half, 1.0f, kept[i][half], uniform);
                } else {
                    store_row<ELEMENT, HEAD_DIM_V>(params.dv, offset_of(params.dv, owner_at, key, key_head), dv[i], half, 1.0f, kept[i][half], uniform);
                }
            }
        }
    }
}
