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
// Keys of one step, which a warp takes in parts of 8 N, and those of the block's tile of a bias gradient.
constexpr int STEP_K = KEY_WARPS * 8 * N * STEP_PARTS;
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

// Where things lie in shared memory: the queries of two terms in turn, the keys of two steps in turn, halves of dQ.
constexpr int DO_AT = QTile::bytes(TILE_Q);
constexpr int STATISTICS_AT = DO_AT + VTile::bytes(TILE_Q);
constexpr int QUERY_BYTES = STATISTICS_AT + 3 * TILE_Q * 4;
constexpr int QUERY_STAGES = WANT_DBIAS ? STAGES : 1;
constexpr int KEYS_AT = QUERY_STAGES * QUERY_BYTES;
constexpr int V_AT = QTile::bytes(STEP_K);
constexpr int KEY_BYTES = V_AT + VTile::bytes(STEP_K);
constexpr int SUMS_AT = KEYS_AT + STAGES * KEY_BYTES;
constexpr int SUM_PITCH = QTile::padded_channels + 8;
static_assert(!WANT_DQ || KEY_WARPS == 1 || (KEY_WARPS == 2 && M == 2), "two warps that share queries halve the sums");
constexpr int SUM_BYTES = KEY_WARPS > 1 && WANT_DQ ? TILE_Q * SUM_PITCH * 4 : 0;
static_assert(SUMS_AT + SUM_BYTES == SHARED_BYTES, "shared memory as planned");

// Two neighbouring elements that are aligned as one.
template <class T> DEVICE void store_pair(T* to, float x, float y) {
    if constexpr (sizeof(T) == 4) {
        *(u64*)to = (u64)bits_of(y) << 32 | bits_of(x);
    } else {
        *(u32*)to = pack<T>(x, y);
    }
}

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
        if (SUMS_ROWS) term.row = split_index(index, in.rows);
        if (SUMS_HEADS) term.head = split_index(index, in.heads);
        if (SUMS_BATCH) term.batch = index;
        return term;
    };
    // The term after another, rows first; whether nothing but the row has changed.
    auto advance = [&](Position& term) {
        if (SUMS_ROWS) {
            if (++term.row < in.rows) return true;
            term.row = 0;
        }
        if (SUMS_HEADS) {
            if (++term.head < in.heads) return false;
            term.head = 0;
        }
        if (SUMS_BATCH) term.batch++;
        return false;
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
    StageWalk<StageQ, ELEMENT, HEAD_DIM, TILE_Q, THREADS, Q_PIECES> q_walk;
    StageWalk<StageDO, ELEMENT, HEAD_DIM_V, TILE_Q, THREADS, DO_PIECES> d_o_walk;
    StatisticsWalk<TILE_Q, THREADS> statistics_walk;
    StageWalk<StageK, ELEMENT, HEAD_DIM, STEP_K, THREADS, K_PIECES, KeyOrder> k_walk;
    StageWalk<StageV, ELEMENT, HEAD_DIM_V, STEP_K, THREADS, V_PIECES, KeyOrder> v_walk;
    auto start_walks = [&](const Position& term) {
        const i64 head = term.head / in.group;
        const Operand& d_o = params.d_o;
        q_walk.start({(const ELEMENT*)in.q.data + offset_of(in.q, term, 0, term.head), in.q.strides[2], in.q.strides[4]}, first_query);
        d_o_walk.start({(const ELEMENT*)d_o.data + offset_of(d_o, term, 0, term.head), d_o.strides[2], d_o.strides[4]}, first_query);
        statistics_walk.start(params, term, first_query);
        k_walk.start({(const ELEMENT*)in.k.data + offset_of(in.k, term, 0, head), in.k.strides[2], in.k.strides[4]}, tile_start);
        v_walk.start({(const ELEMENT*)in.v.data + offset_of(in.v, term, 0, head), in.v.strides[2], in.v.strides[4]}, tile_start);
    };
    // To the next row, from the end of a tile of keys.
    auto advance_walks = [&]() {
        q_walk.shift(in.q.strides[1]);
        d_o_walk.shift(params.d_o.strides[1]);
        statistics_walk.shift(in.heads * params.padded_queries);
        k_walk.shift(in.k.strides[1] - TILE_K * in.k.strides[2]);
        v_walk.shift(in.v.strides[1] - TILE_K * in.v.strides[2]);
    };
    auto fetch_queries = [&](int stage) {
        const u32 to = shared + stage * QUERY_BYTES;
        const i64 left = in.seqlen_q - first_query;
        q_walk.fetch(to, left);
        d_o_walk.fetch(to + DO_AT, left);
        statistics_walk.fetch(to + STATISTICS_AT, params.padded_queries - first_query);
    };
    auto fetch_keys = [&](const Position& term, int step, int stage) {
        const u32 to = shared + KEYS_AT + stage * KEY_BYTES;
        const i64 first_key = tile_start + (i64)step * STEP_K, left = greatest(kv_length(in, term) - first_key, 0);
        k_walk.next(to, left);
        v_walk.next(to + V_AT, left);
        if (KEY_MASK) {
            k_excluded = excluded_pieces<StageK>(in, term, first_key);
            v_excluded = excluded_pieces<StageV>(in, term, first_key);
        }
        copy_async_commit();
    };

    // A lane's first query, and the first key of its run in the first part of a step.
    const i64 query = first_query + query_warp * 16 * M + lane / 4;
    const int run = key_warp * 8 * N + lane % 4 * 2 * N;
    // Bit i: mask and length keep key `key + i`.
    auto kept_keys = [&](const Position& term, i64 key, i64 end) {
        const int there = (int)least(greatest(end - key, 0), 2 * N);
        u32 bits = (u32)((1ull << there) - 1);
        if (KEY_MASK) {
#pragma unroll
            for (int i = 0; i < 2 * N; i++) {
                if (i < there && !key_mask_keeps(in, term, key + i)) bits &= ~(1u << i);
            }
        }
        return bits;
    };

    FragmentA q_fragments[Q_IN_REGISTERS ? QTile::steps : 1][M], d_o_fragments[Q_IN_REGISTERS ? VTile::steps : 1][M];
    float lse[M][2], delta[M][2];
    Accumulator dq[M][QTile::columns] = {};
    Accumulator dbias[WANT_DBIAS ? DBIAS_STEPS * STEP_PARTS : 1][M][N] = {};
    float query_sums[M][2] = {};
    bool plain = false;
    QueryBiases<M, N> biases;

    // One part of a step whose keys have arrived: 8 N keys of each warp.
    auto compute = [&](const Position& term, u32 queries, u32 keys, i64 first_key, int part, i64 end, Accumulator (&sum)[M][N]) {
        Accumulator s[M][N], dp[M][N];
        const int first_row = (part * KEY_WARPS + key_warp) * 8 * N;
        const i64 key = first_key + part * KEY_WARPS * 8 * N + run;
        biases.fetch(in, key);
        const bool all_kept = !KEY_MASK && first_key + STEP_K <= end;
        const u32 kept = all_kept ? 0 : kept_keys(term, key, end);
        const auto zero = [](int, int, int) { return 0.0f; };
#pragma unroll
        for (int pass = 0; pass < PASSES<ELEMENT>; pass++) {
#pragma unroll
            for (int x = 0; x < QTile::steps; x++) {
                if (!Q_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) q_fragments[0][i] = load_a<ELEMENT, HEAD_DIM>(queries, (query_warp * M + i) * 16, x);
                }
                multiply_rows<ELEMENT, HEAD_DIM>(s, q_fragments[Q_IN_REGISTERS ? x : 0], keys, first_row, pass, x, zero);
            }
#pragma unroll
            for (int x = 0; x < VTile::steps; x++) {
                if (!Q_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < M; i++) d_o_fragments[0][i] = load_a<ELEMENT, HEAD_DIM_V>(queries + DO_AT, (query_warp * M + i) * 16, x);
                }
                multiply_rows<ELEMENT, HEAD_DIM_V>(dp, d_o_fragments[Q_IN_REGISTERS ? x : 0], keys + V_AT, first_row, pass, x,
                                                   [&](int i, int, int y) { return STARTS_FROM_DELTA ? delta[i][y / 2] : 0.0f; });
            }
        }
        if (!STARTS_FROM_DELTA) add_to_all(dp, [&](int i, int, int y) { return delta[i][y / 2]; });
        if (plain) {
            biases.take<true>(s, in, key, lse, lse);
        } else {
            float low[M][2];
#pragma unroll
            for (int i = 0; i < M; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    low[i][half] = float_of(load_shared(queries + STATISTICS_AT + (TILE_Q + (query_warp * M + i) * 16 + 8 * half + lane / 4) * 4));
                }
            }
            biases.take<false>(s, in, key, lse, low);
        }
        if (SEGMENTS || POSITIONS || !all_kept) {
            exclude_by_query<M, N>(s, dp, in, term, query, key, first_query, first_key, TILE_Q, STEP_K, all_kept ? (u32)((1ull << 2 * N) - 1) : kept);
        }
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
            ProductOverRows<ELEMENT, HEAD_DIM, M, steps>::run(dq, factors, keys, first_row);
        }
    };

    // One row of 16 queries of dQ.
    auto store_rows = [&](const Position& term, i64 to_query, const Accumulator (&sums)[QTile::columns]) {
        const i64 part = ((key_tile * in.batch + term.batch) * in.rows + term.row) * in.heads + term.head;
        const i64 partial = part * in.seqlen_q * HEAD_DIM;
        ELEMENT* to = (ELEMENT*)params.dq.data + (DQ_PARTIALS ? 0 : offset_of(params.dq, term, to_query, term.head));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (to_query + 8 * half >= in.seqlen_q) continue;
            ELEMENT* row = to + 8 * half * params.dq.strides[2];
            float* partial_row = (float*)params.dq_partials + partial + (to_query + 8 * half) * HEAD_DIM;
#pragma unroll
            for (int c = 0; c < QTile::columns; c++) {
                const int channel = 8 * c + 2 * (lane % 4);
                const float x = sums[c][2 * half] * in.scale, y = sums[c][2 * half + 1] * in.scale;
                if (DQ_PARTIALS && HEAD_DIM % 8 == 0) {
                    *(u64*)(partial_row + channel) = (u64)bits_of(y) << 32 | bits_of(x);
                } else if (!DQ_PARTIALS && DQ_PIECES) {
                    store_pair(row + channel, x, y);
                } else {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (channel + e >= HEAD_DIM) continue;
                        if (DQ_PARTIALS) {
                            partial_row[channel + e] = e == 0 ? x : y;
                        } else {
                            row[(channel + e) * params.dq.strides[4]] = from_f32<ELEMENT>(e == 0 ? x : y);
                        }
                    }
                }
            }
        }
    };
    // dQ of a term. Of two warps that share queries each gives the other one half and stores the other.
    auto store_dq = [&](const Position& term) {
        if constexpr (KEY_WARPS == 1) {
#pragma unroll
            for (int i = 0; i < M; i++) store_rows(term, query + 16 * i, dq[i]);
        } else {
            Accumulator own[QTile::columns];
            const u32 sums = shared + SUMS_AT + lane / 4 * SUM_PITCH * 4 + 2 * (lane % 4) * 4;
            const u32 given = sums + (query_warp * 2 + key_warp) * 16 * SUM_PITCH * 4;
            const u32 taken = sums + (query_warp * 2 + 1 - key_warp) * 16 * SUM_PITCH * 4;
#pragma unroll
            for (int c = 0; c < QTile::columns; c++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float other[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int x = 2 * half + e;
                        own[c][x] = key_warp == 0 ? dq[0][c][x] : dq[1][c][x];
                        other[e] = key_warp == 0 ? dq[1][c][x] : dq[0][c][x];
                    }
                    store_shared_pair(given + (8 * half * SUM_PITCH + 8 * c) * 4, other[0], other[1]);
                }
            }
            block_barrier();
#pragma unroll
            for (int c = 0; c < QTile::columns; c++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float other[2];
                    load_shared_pair(other, taken + (8 * half * SUM_PITCH + 8 * c) * 4);
                    own[c][2 * half] += other[0];
                    own[c][2 * half + 1] += other[1];
                }
            }
            store_rows(term, query + 16 * key_warp, own);
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int c = 0; c < QTile::columns; c++) {
#pragma unroll
                for (int x = 0; x < 4; x++) dq[i][c][x] = 0.0f;
            }
        }
    };

    Position term = term_of(first_term);
    bool same_outer = false;  // only the row has changed from the last term to this one
    const int first_steps = first_term < end_term ? steps_of(term) : 0;
    if (first_steps > 0) {
        start_walks(term);
        fetch_queries(0);
        fetch_keys(term, 0, 0);
    }
    int parity = 0;  // of the first step of the term
    for (i64 index = first_term; index < end_term; index++) {
        const i64 end = end_key_of(term);
        const int query_stage = QUERY_STAGES == 2 ? (int)((index - first_term) % 2) : 0;
        const u32 queries = shared + query_stage * QUERY_BYTES;
        if (same_outer) {
            biases.advance_row(in);
        } else {
            biases.start(in, term, query);
        }
        const int steps = WANT_DBIAS ? DBIAS_STEPS : first_steps;
        Position next = term;
        // Of the step after `step`, in this term or the next one.
        auto fetch_after = [&](int step) {
            const int stage = STAGES == 2 ? (parity + step + 1) % 2 : 0;
            if (step + 1 < steps) {
                fetch_keys(term, step + 1, stage);
            } else if (WANT_DBIAS && index + 1 < end_term) {
                same_outer = advance(next);
                if (same_outer) {
                    advance_walks();
                } else {
                    start_walks(next);
                }
                fetch_queries(QUERY_STAGES == 2 ? 1 - query_stage : 0);
                fetch_keys(next, 0, stage);
            }
        };
        // What a lane needs of its queries.
        auto load_queries = [&]() {
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
                    delta[i][half] = float_of(load_shared(from + 2 * TILE_Q * 4));
                    plain = plain && allows_plain(lse[i][half]);
                }
            }
            plain = warp_all(plain);
        };
        // Waits for the keys of a step, fetches those of the next; the address of the step's.
        auto arrive = [&](int step) {
            const u32 keys = shared + KEYS_AT + (STAGES == 2 ? (parity + step) % 2 : 0) * KEY_BYTES;
            copy_async_wait<0>();
            if (KEY_MASK) {
                StageK::clear(keys, [&](int turn) { return (k_excluded >> turn & 1) != 0; });
                StageV::clear(keys + V_AT, [&](int turn) { return (v_excluded >> turn & 1) != 0; });
            }
            block_barrier();
            if (STAGES == 2) fetch_after(step);
            if (step == 0) load_queries();
            return keys;
        };
        auto leave = [&](int step) {
            if (STAGES == 1) {
                block_barrier();
                fetch_after(step);
            }
        };
        if constexpr (WANT_DBIAS) {
#pragma unroll
            for (int step = 0; step < DBIAS_STEPS; step++) {
                const u32 keys = arrive(step);
                const i64 first_key = tile_start + step * STEP_K;
                if (first_key < end && first_key + STEP_K > visible.begin) {
#pragma unroll
                    for (int part = 0; part < STEP_PARTS; part++) compute(term, queries, keys, first_key, part, end, dbias[step * STEP_PARTS + part]);
                }
                leave(step);
            }
        } else {
            for (int step = 0; step < steps; step++) {
                const u32 keys = arrive(step);
#pragma unroll
                for (int part = 0; part < STEP_PARTS; part++) compute(term, queries, keys, tile_start + (i64)step * STEP_K, part, end, dbias[0]);
                leave(step);
            }
        }
        if (WANT_DQ) store_dq(term);
        term = next;
        parity = (parity + steps) % 2;
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
        for (int part = 0; part < DBIAS_STEPS * STEP_PARTS; part++) {
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
                            const i64 key = tile_start + part * KEY_WARPS * 8 * N + run + 2 * j + e;
                            if (key >= in.seqlen_k) continue;
                            const float value = dbias[part][i][j][2 * half + e];
                            if (DBIAS_PARTIALS) {
                                const i64 owner = ((chunk * owner_batch + owner_in_batch) * owner_rows + owner_row) * owner_heads + owner_head;
                                ((float*)params.dbias_partials)[(owner * in.seqlen_q + to_query) * in.seqlen_k + key] = value;
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
