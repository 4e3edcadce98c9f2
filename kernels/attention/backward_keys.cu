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
    T* data = (T*)to.data + offset;
#pragma unroll
    for (int c = 0; c < Tile<ELEMENT, channels>::columns; c++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int channel = 8 * c + 2 * (lane_index() % 4) + e;
            if (channel >= channels) continue;
            float value = kept ? acc[c][2 * half + e] * factor : 0.0f;
            if (added) value += added[channel];
            data[channel * to.strides[4]] = from_f32<T>(value);
        }
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
    const int steps = tiles * (int)in.group;

    const Rows<ELEMENT> k = {(const ELEMENT*)in.k.data + offset_of(in.k, owner_at, 0, key_head), in.k.strides[2], in.k.strides[4]};
    const Rows<ELEMENT> v = {(const ELEMENT*)in.v.data + offset_of(in.v, owner_at, 0, key_head), in.v.strides[2], in.v.strides[4]};

    // The tile of queries that is fetched next, and the one that is computed.
    i64 next_head = key_head * in.group, next_tile = first_tile;
    StageWalk<StageQ, ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES> q_walk;
    StageWalk<StageDO, ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES> d_o_walk;
    StatisticsWalk<TILE_Q, THREADS> statistics_walk;
    auto start_head = [&]() {
        const i64 first = first_tile * TILE_Q;
        const Operand& d_o = params.d_o;
        q_walk.start({(const ELEMENT*)in.q.data + offset_of(in.q, owner_at, 0, next_head), in.q.strides[2], in.q.strides[4]}, first);
        d_o_walk.start({(const ELEMENT*)d_o.data + offset_of(d_o, owner_at, 0, next_head), d_o.strides[2], d_o.strides[4]}, first);
        statistics_walk.start(params, {batch, row, next_head}, first);
    };
    auto fetch = [&](int stage) {
        const u32 to = shared + STAGES_AT + stage * STAGE_BYTES;
        const i64 first = next_tile * TILE_Q, left = in.seqlen_q - first;
        q_walk.next(to, left);
        d_o_walk.next(to + DO_AT, left);
        statistics_walk.next(to + STATISTICS_AT, params.padded_queries - first);
        copy_async_commit();
        next_tile++;
        if (next_tile == end_tile) {
            next_tile = first_tile;
            next_head++;
            if (next_head < (key_head + 1) * in.group) start_head();
        }
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

    if (steps > 0) {
        StageK::start(shared, k, first_key, in.seqlen_k, KeyOrder());
        if (NEEDS_DS) StageV::start(shared + V_AT, v, first_key, in.seqlen_k, KeyOrder());
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();
        start_head();
        fetch(0);
    }
    FragmentA k_fragments[K_IN_REGISTERS ? QTile::steps : 1][M], v_fragments[K_IN_REGISTERS ? VTile::steps : 1][M];
    if (K_IN_REGISTERS && steps > 0) {
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
    i64 head = key_head * in.group, tile = first_tile;
    if (steps > 0) {
        biases.start_head(in, {batch, row, head}, keys[0][0]);
        biases.fetch(in, tile * TILE_Q);
    }
    for (int step = 0; step < steps; step++) {
        const int stage = STAGES == 2 ? step % 2 : 0;
        const u32 staged = shared + STAGES_AT + stage * STAGE_BYTES;
        const i64 first_query = tile * TILE_Q;
        copy_async_wait<0>();
        block_barrier();

        float lse[N][2], delta[N][2];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const u32 from = staged + STATISTICS_AT + (8 * j + 2 * (lane % 4)) * 4;
            load_shared_pair(lse[j], from);
            if (NEEDS_DS) load_shared_pair(delta[j], from + 2 * TILE_Q * 4);
        }
        if (first_query + TILE_Q > in.seqlen_q) {
            // Queries beyond the last: P = 0.
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (first_query + 8 * j + 2 * (lane % 4) + e >= in.seqlen_q) lse[j][e] = INFINITE;
                }
            }
        }

        Accumulator s[M][N], dp[M][N];
        if (STAGES == 2 && step + 1 < steps) fetch(1 - stage);

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
            const auto minus_delta = [&](int, int j, int y) { return delta[j][y % 2]; };
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
            if (!STARTS_FROM_DELTA) add_to_all(dp, minus_delta);
        }
        bool plain = true;
#pragma unroll
        for (int i = 0; i < TILE_Q; i += WARP_THREADS) plain = plain && allows_plain(float_of(load_shared(staged + STATISTICS_AT + (i + lane % TILE_Q) * 4)));
        if (sizeof(ELEMENT) == 2 && warp_all(plain)) {
            biases.take<true>(s, in, first_query, lse, lse);
        } else {
            float low[N][2];
#pragma unroll
            for (int j = 0; j < N; j++) load_shared_pair(low[j], staged + STATISTICS_AT + (TILE_Q + 8 * j + 2 * (lane % 4)) * 4);
            biases.take<false>(s, in, first_query, lse, low);
        }
        // Biases of the next tile, while this one is computed.
        if (tile + 1 == end_tile) {
            tile = first_tile;
            head++;
            if (step + 1 < steps) biases.start_head(in, {batch, row, head}, keys[0][0]);
        } else {
            tile++;
        }
        if (step + 1 < steps) biases.fetch(in, tile * TILE_Q);

        if (SEGMENTS || POSITIONS) {
            exclude_by_key<M, N>(s, dp, in, owner_at, keys[0][0], first_query, first_key, TILE_K);
        }

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
        if (STAGES == 1 && step + 1 < steps) {
            block_barrier();
            fetch(0);
        }

        if (WANT_KEY_SUMS && tile == first_tile) {
            // The last tile of a head; `head` is the next one already.
            const i64 heads = ((chunk * in.batch + batch) * in.rows + row) * in.heads + head - 1;
            store_key_sums((float*)params.key_sums + heads * in.seqlen_k, key_sums, keys, kept, in.seqlen_k);
        }
    }
    if (WANT_KEY_SUMS && steps == 0) {
        for (i64 h = key_head * in.group; h < (key_head + 1) * in.group; h++) {
            const i64 heads = ((chunk * in.batch + batch) * in.rows + row) * in.heads + h;
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
