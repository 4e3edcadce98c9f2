// Backward pass by queries: dQ (13), the gradients of biases with both axes (15), and the sums of dS over keys that biases
// without a key axis need.
//
// A block owns a tile of queries of one head. For dQ it walks over the keys of one (batch, row). For a bias gradient it owns
// a tile of keys as well and walks over the terms, the (batch, row, head) that share the bias, with its tile of the gradient
// in registers; where that tile is all keys, dQ of every term comes out on the way.
//
//   for term, for step of keys                        the next step is on its way meanwhile
//       S  = Q K^T + biases - lse                     in base 2; rows are queries
//       dP = dO V^T - delta
//       P  = 2^S,  dS = P dP                          (9), (12)
//       dB += dS                                      f32
//       dQ += dS K
//   of every term                                     dQ, summed over the warps that share its queries
//
// Constants: README.md, "Constants of the backward pass".
#include "../include/logits.cuh"

constexpr int THREADS = QUERY_WARPS * KEY_WARPS * WARP_THREADS;
constexpr int M = ROW_TILES;
constexpr int N = STEP_COLUMNS;
constexpr int TILE_Q = QUERY_WARPS * 16 * M;
// Keys of one step, and those of the block's tile of a bias gradient.
constexpr int STEP_K = KEY_WARPS * 8 * N;
constexpr int TILE_K = STEP_K * DBIAS_STEPS;
constexpr bool WANT_DBIAS = DBIAS_STEPS > 0;

using QTile = Tile<ELEMENT, HEAD_DIM>;
using VTile = Tile<ELEMENT, HEAD_DIM_V>;

// Neighbouring keys belong to one lane: a lane's columns are 2 N keys in a run, so that it reads a bias in words. In the
// tile they stand in the order of the columns.
struct KeyOrder {
    DEVICE int operator()(int row) const {
        const int warp = row / (8 * N), j = row / 8 % N, column = row % 8;
        return warp * 8 * N + column / 2 * 2 * N + 2 * j + column % 2;
    }
};

using StageQ = Stage<ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES>;
using StageDO = Stage<ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES>;
using StageK = Stage<ELEMENT, HEAD_DIM, STEP_K, THREADS, K_PIECES>;
using StageV = Stage<ELEMENT, HEAD_DIM_V, STEP_K, THREADS, V_PIECES>;

// Where things lie in shared memory: the queries of two terms in turn, the keys of two steps in turn, sums of dQ.
constexpr int DO_AT = QTile::bytes(TILE_Q);
constexpr int STATISTICS_AT = DO_AT + VTile::bytes(TILE_Q);
constexpr int QUERY_BYTES = STATISTICS_AT + 3 * TILE_Q * 4;
constexpr int QUERY_STAGES = WANT_DBIAS ? STAGES : 1;
constexpr int KEYS_AT = QUERY_STAGES * QUERY_BYTES;
constexpr int V_AT = QTile::bytes(STEP_K);
constexpr int KEY_BYTES = V_AT + VTile::bytes(STEP_K);
constexpr int SUMS_AT = KEYS_AT + STAGES * KEY_BYTES;
constexpr int SUM_PITCH = QTile::padded_channels + 4;
constexpr int SUM_BYTES = KEY_WARPS > 1 && WANT_DQ ? KEY_WARPS * TILE_Q * SUM_PITCH * 4 : 0;
static_assert(SUMS_AT + SUM_BYTES == SHARED_BYTES, "shared memory as planned");

// One bit for each of this thread's pieces: its key exists and the key mask excludes it.
template <class Stage> DEVICE u32 excluded_pieces(const AttentionInputs& in, const Position& term, i64 first_key) {
    u32 bits = 0;
    Stage::each([&](int turn, int row, int) {
        const i64 key = first_key + KeyOrder()(row);
        if (key < in.seqlen_k && !key_mask_keeps(in, term, key)) bits |= 1u << turn;
    });
    return bits;
}

KERNEL_WITH_BLOCKS(THREADS, MIN_BLOCKS) backward_queries(const BackwardParams params) {
    extern __shared__ __align__(16) char memory[];
    const u32 shared = shared_address(memory);
    const AttentionInputs& in = params.inputs;
    const int lane = lane_index(), query_warp = warp_index() / KEY_WARPS, key_warp = warp_index() % KEY_WARPS;

    // Axes that are summed have one entry among the owners and their size among the terms.
    const i64 owner_rows = SUMS_ROWS ? 1 : in.rows, owner_heads = SUMS_HEADS ? 1 : in.heads, owner_batch = SUMS_BATCH ? 1 : in.batch;
    const i64 term_rows = SUMS_ROWS ? in.rows : 1, term_heads = SUMS_HEADS ? in.heads : 1, term_batch = SUMS_BATCH ? in.batch : 1;
    // Blocks that read the same part of the biases are neighbours.
    i64 block = params.first_block + block_index();
    const i64 query_tiles = divided_up(in.seqlen_q, TILE_Q), key_tiles = WANT_DBIAS ? divided_up(in.seqlen_k, TILE_K) : 1;
    const i64 owner_row = block % owner_rows;
    block /= owner_rows;
    const i64 key_tile = block % key_tiles;
    block /= key_tiles;
    const i64 first_query = block % query_tiles * TILE_Q;
    block /= query_tiles;
    const i64 owner_head = block % owner_heads;
    block /= owner_heads;
    const i64 owner_in_batch = block % owner_batch, chunk = block / owner_batch;
    const i64 end_query = least(first_query + TILE_Q, in.seqlen_q);

    const i64 terms = term_batch * term_rows * term_heads;
    const i64 first_term = chunk * params.term_chunk, end_term = least(terms, first_term + params.term_chunk);
    auto term_of = [&](i64 index) {
        Position term = {owner_in_batch, owner_row, owner_head};
        if (SUMS_ROWS) {
            term.row = index % in.rows;
            index /= in.rows;
        }
        if (SUMS_HEADS) {
            term.head = index % in.heads;
            index /= in.heads;
        }
        if (SUMS_BATCH) term.batch = index;
        return term;
    };

    // Keys that some query of the tile sees, by position.
    const Range visible = POSITIONS ? visible_keys(in, first_query, end_query) : Range{0, in.seqlen_k};
    auto end_key_of = [&](const Position& term) {
        return least(visible.end, kv_length(in, term));
    };
    // Steps of a term: all of the tile, or those with visible keys.
    const i64 tile_start = WANT_DBIAS ? key_tile * TILE_K : visible.begin / STEP_K * STEP_K;
    auto steps_of = [&](const Position& term) {
        if (WANT_DBIAS) return DBIAS_STEPS;
        const i64 end = end_key_of(term);
        return end > tile_start ? (int)divided_up(end - tile_start, STEP_K) : 0;
    };

    // Keys that mask or length exclude become zeros, since NaN times P = 0 is NaN.
    u32 k_excluded = 0, v_excluded = 0;
    auto fetch_queries = [&](const Position& term, int stage) {
        const u32 to = shared + stage * QUERY_BYTES;
        const Rows<ELEMENT> q = {(const ELEMENT*)in.q.data + offset_of(in.q, term, 0, term.head), in.q.strides[2], in.q.strides[4]};
        const Rows<ELEMENT> d_o = {(const ELEMENT*)params.d_o.data + offset_of(params.d_o, term, 0, term.head),
                                   params.d_o.strides[2], params.d_o.strides[4]};
        StageQ::start(to, q, first_query, in.seqlen_q, InOrder());
        StageDO::start(to + DO_AT, d_o, first_query, in.seqlen_q, InOrder());
        fetch_statistics<TILE_Q, THREADS>(to + STATISTICS_AT, params, statistics_row(params, term), first_query);
    };
    auto fetch_keys = [&](const Position& term, int step, int stage) {
        const u32 to = shared + KEYS_AT + stage * KEY_BYTES;
        const i64 first_key = tile_start + (i64)step * STEP_K, head = term.head / in.group;
        const i64 end = kv_length(in, term);
        const Rows<ELEMENT> k = {(const ELEMENT*)in.k.data + offset_of(in.k, term, 0, head), in.k.strides[2], in.k.strides[4]};
        const Rows<ELEMENT> v = {(const ELEMENT*)in.v.data + offset_of(in.v, term, 0, head), in.v.strides[2], in.v.strides[4]};
        StageK::start(to, k, first_key, end, KeyOrder());
        StageV::start(to + V_AT, v, first_key, end, KeyOrder());
        if (KEY_MASK) {
            k_excluded = excluded_pieces<StageK>(in, term, first_key);
            v_excluded = excluded_pieces<StageV>(in, term, first_key);
        }
        copy_async_commit();
    };

    // A lane's first query, and the first key of its run in a step.
    const i64 query = first_query + query_warp * 16 * M + lane / 4;
    const int run = key_warp * 8 * N + lane % 4 * 2 * N;
    auto kept_keys = [&](const Position& term, i64 key, i64 end) {
        u32 bits = 0;
#pragma unroll
        for (int i = 0; i < 2 * N; i++) {
            if (key + i < end && (!KEY_MASK || key_mask_keeps(in, term, key + i))) bits |= 1u << i;
        }
        return bits;
    };

    FragmentA q_fragments[Q_IN_REGISTERS ? QTile::steps : 1][M], d_o_fragments[Q_IN_REGISTERS ? VTile::steps : 1][M];
    float lse[M][2], low[M][2], delta[M][2];
    Accumulator dq[M][QTile::columns] = {};
    Accumulator dbias[WANT_DBIAS ? DBIAS_STEPS : 1][M][N] = {};
    float query_sums[M][2] = {};
    bool plain = false;
    QueryBiases<M, N> biases;

    // One step of a term whose keys have arrived; fetches what comes next.
    auto compute = [&](const Position& term, u32 queries, u32 keys, i64 first_key, i64 end, u32 kept, Accumulator (&sum)[M][N]) {
        Accumulator s[M][N] = {}, dp[M][N];
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) dp[i][j][x] = delta[i][x / 2];
            }
        }
#pragma unroll
        for (int x = 0; x < QTile::steps; x++) {
            if (!Q_IN_REGISTERS) {
#pragma unroll
                for (int i = 0; i < M; i++) q_fragments[0][i] = load_a<ELEMENT, HEAD_DIM>(queries, (query_warp * M + i) * 16, x);
            }
            multiply_rows<ELEMENT, HEAD_DIM>(s, q_fragments[Q_IN_REGISTERS ? x : 0], keys, key_warp * 8 * N, x);
        }
#pragma unroll
        for (int x = 0; x < VTile::steps; x++) {
            if (!Q_IN_REGISTERS) {
#pragma unroll
                for (int i = 0; i < M; i++) d_o_fragments[0][i] = load_a<ELEMENT, HEAD_DIM_V>(queries + DO_AT, (query_warp * M + i) * 16, x);
            }
            multiply_rows<ELEMENT, HEAD_DIM_V>(dp, d_o_fragments[Q_IN_REGISTERS ? x : 0], keys + V_AT, key_warp * 8 * N, x);
        }
        if (plain) {
            biases.take<true>(s, in, first_key + run, lse, low);
        } else {
            biases.take<false>(s, in, first_key + run, lse, low);
        }
        exclude_by_query<M, N>(s, dp, in, term, query, first_key + run, first_query, first_key, TILE_Q, STEP_K, kept);
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    dp[i][j][x] *= exp2(s[i][j][x]);
                    if (WANT_DBIAS) sum[i][j][x] += dp[i][j][x];
                    if (WANT_QUERY_SUMS) query_sums[i][x / 2] += dp[i][j][x];
                }
            }
        }
        if (WANT_DQ) {
            constexpr int steps = 8 * N / row_step<ELEMENT>;
            FragmentA factors[M][steps];
#pragma unroll
            for (int i = 0; i < M; i++) {
#pragma unroll
                for (int x = 0; x < steps; x++) {
                    const int j = x * row_step<ELEMENT> / 8, other = j + (row_step<ELEMENT> == 16 ? 1 : 0);
                    factors[i][x] = as_factor<ELEMENT>(dp[i][j], dp[i][other]);
                }
            }
            ProductOverRows<ELEMENT, HEAD_DIM, M, steps>::run(dq, factors, keys, key_warp * 8 * N);
        }
    };

    auto store_dq = [&](const Position& term) {
        auto store = [&](i64 to_query, int channel, float value) {
            if (to_query >= in.seqlen_q || channel >= HEAD_DIM) return;
            if (DQ_PARTIALS) {
                const i64 part = ((key_tile * in.batch + term.batch) * in.rows + term.row) * in.heads + term.head;
                ((float*)params.dq_partials)[(part * in.seqlen_q + to_query) * HEAD_DIM + channel] = value * in.scale;
            } else {
                ELEMENT* to = (ELEMENT*)params.dq.data + offset_of(params.dq, term, to_query, term.head);
                to[channel * params.dq.strides[4]] = from_f32<ELEMENT>(value * in.scale);
            }
        };
        const u32 sums = shared + SUMS_AT;
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int c = 0; c < QTile::columns; c++) {
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int channel = 8 * c + 2 * (lane % 4) + x % 2;
                    if (KEY_WARPS == 1) {
                        store(query + 16 * i + 8 * (x / 2), channel, dq[i][c][x]);
                    } else {
                        const int row = key_warp * TILE_Q + (query_warp * M + i) * 16 + 8 * (x / 2) + lane / 4;
                        store_shared(sums + (row * SUM_PITCH + channel) * 4, dq[i][c][x]);
                    }
                    dq[i][c][x] = 0.0f;
                }
            }
        }
        if (KEY_WARPS > 1) {
            block_barrier();
            for (int index = thread_index(); index < TILE_Q * QTile::padded_channels; index += THREADS) {
                const int row = index / QTile::padded_channels, channel = index % QTile::padded_channels;
                float sum = 0.0f;
#pragma unroll
                for (int part = 0; part < KEY_WARPS; part++) {
                    sum += float_of(load_shared(sums + ((part * TILE_Q + row) * SUM_PITCH + channel) * 4));
                }
                store(first_query + row, channel, sum);
            }
        }
    };

    // The step that is fetched next, and the one that is computed.
    i64 next_term = first_term;
    int next_step = 0, fetched = 0;
    auto fetch = [&]() {
        if (next_term >= end_term) return;
        const Position term = term_of(next_term);
        if (next_step == 0) {
            fetch_queries(term, QUERY_STAGES == 2 ? (int)((next_term - first_term) % 2) : 0);
        }
        fetch_keys(term, next_step, STAGES == 2 ? fetched % 2 : 0);
        fetched++;
        next_step++;
        if (next_step == steps_of(term)) {
            next_step = 0;
            next_term++;
        }
    };
    if (first_term < end_term && steps_of(term_of(first_term)) > 0) fetch();
    int computed = 0;
    for (i64 index = first_term; index < end_term; index++) {
        const Position term = term_of(index);
        const i64 end = end_key_of(term);
        const u32 queries = shared + (QUERY_STAGES == 2 ? (int)((index - first_term) % 2) : 0) * QUERY_BYTES;
        biases.start(in, term, query);
        const int steps = steps_of(term);
        auto one_step = [&](int step, Accumulator (&sum)[M][N]) {
            const i64 first_key = tile_start + (i64)step * STEP_K;
            const u32 keys = shared + KEYS_AT + (STAGES == 2 ? computed % 2 : 0) * KEY_BYTES;
            biases.fetch(in, first_key + run);
            const u32 kept = kept_keys(term, first_key + run, end);
            copy_async_wait<0>();
            if (KEY_MASK) {
                StageK::clear(keys, [&](int turn) { return (k_excluded >> turn & 1) != 0; });
                StageV::clear(keys + V_AT, [&](int turn) { return (v_excluded >> turn & 1) != 0; });
            }
            block_barrier();
            if (STAGES == 2) fetch();
            if (step == 0) {
                plain = sizeof(ELEMENT) == 2;
#pragma unroll
                for (int i = 0; i < M; i++) {
                    const int first_row = (query_warp * M + i) * 16;
                    if (Q_IN_REGISTERS) {
#pragma unroll
                        for (int x = 0; x < QTile::steps; x++) q_fragments[x][i] = load_a<ELEMENT, HEAD_DIM>(queries, first_row, x);
#pragma unroll
                        for (int x = 0; x < VTile::steps; x++) d_o_fragments[x][i] = load_a<ELEMENT, HEAD_DIM_V>(queries + DO_AT, first_row, x);
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const u32 from = queries + STATISTICS_AT + (first_row + 8 * half + lane / 4) * 4;
                        lse[i][half] = query + 16 * i + 8 * half < in.seqlen_q ? float_of(load_shared(from)) : INFINITE;
                        low[i][half] = float_of(load_shared(from + TILE_Q * 4));
                        delta[i][half] = float_of(load_shared(from + 2 * TILE_Q * 4));
                        plain = plain && allows_plain(lse[i][half]);
                    }
                }
                plain = warp_all(plain);
            }
            if (first_key < end && first_key + STEP_K > visible.begin) compute(term, queries, keys, first_key, end, kept, sum);
            computed++;
            if (STAGES == 1) {
                block_barrier();
                fetch();
            }
        };
        if constexpr (WANT_DBIAS) {
#pragma unroll
            for (int step = 0; step < DBIAS_STEPS; step++) one_step(step, dbias[step]);
        } else {
            for (int step = 0; step < steps; step++) one_step(step, dbias[0]);
        }
        if (WANT_DQ) store_dq(term);
    }

    if (WANT_QUERY_SUMS) {
        const i64 sums = ((owner_in_batch * in.rows + owner_row) * in.heads + owner_head) * in.seqlen_q;
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = query_sums[i][half];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const i64 to = query + 16 * i + 8 * half;
                if (lane % 4 == 0 && to < in.seqlen_q) ((float*)params.query_sums)[sums + to] = sum;
            }
        }
    }
    if (WANT_DBIAS) {
#pragma unroll
        for (int step = 0; step < DBIAS_STEPS; step++) {
#pragma unroll
            for (int i = 0; i < M; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const i64 to_query = query + 16 * i + 8 * half;
                    if (to_query >= in.seqlen_q) continue;
#pragma unroll
                    for (int j = 0; j < N; j++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const i64 key = tile_start + step * STEP_K + run + 2 * j + e;
                            if (key >= in.seqlen_k) continue;
                            const float value = dbias[step][i][j][2 * half + e];
                            if (DBIAS_PARTIALS) {
                                const i64 part = ((chunk * owner_batch + owner_in_batch) * owner_rows + owner_row) * owner_heads + owner_head;
                                ((float*)params.dbias_partials)[(part * in.seqlen_q + to_query) * in.seqlen_k + key] = value;
                            } else {
#define STORE(index, T)                                                                                                     \
    ((T*)params.dbiases[index].data)[offset_of(params.dbiases[index], {owner_in_batch, owner_row, 0}, owner_head, to_query) +          \
                                     key * params.dbiases[index].strides[4]] = from_f32<T>(value);
                                DBIAS_LIST(STORE)
#undef STORE
                            }
                        }
                    }
                }
            }
        }
    }
}
