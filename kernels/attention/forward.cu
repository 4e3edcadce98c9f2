// Forward pass: a block owns a tile of queries of one (batch, row, head) and walks over tiles of keys.
//
// The account of it is in attention/README.md; equation numbers are those of docs/mathematics.md.
//
// Constants beside those of attention.cuh, all defined: QUERY_TILES (16 queries each) of a warp, WARPS, TILE_K, STAGES
// (buffers of keys and values: 1 or 2), QUERIES_IN_REGISTERS, ROWS_FIRST (order of blocks); 0 or 1: PRELOAD (the plain
// path may be taken), Q_PIECES, K_PIECES, V_PIECES (rows move in pieces), OUT_PAIRS (channels of out are neighbours and
// pairs aligned), LSE, LSE_LOW.
#include "../include/attention.cuh"
#include "../include/gpu.h"
#include "../include/mma.cuh"
#include "../include/params.h"
#include "../include/tile.cuh"
#include "../include/walk.cuh"

using T = ELEMENT;

constexpr int THREADS = WARPS * WARP_THREADS;
constexpr int WARP_QUERIES = 16 * QUERY_TILES;
constexpr int TILE_Q = WARPS * WARP_QUERIES;
constexpr int LANE_KEYS = TILE_K / 4;     // neighbouring keys that one lane of a quad owns
constexpr int KEY_COLUMNS = TILE_K / 8;   // products of 8 keys
constexpr int OUT_COLUMNS = (HEAD_DIM_V + 7) / 8;

using QueryTile = Tile<T, TILE_Q, HEAD_DIM, IN_ROWS>;
using KeyTileShape = Tile<T, TILE_K, HEAD_DIM, LANE_KEYS>;
using ValueTile = Tile<T, TILE_K, HEAD_DIM_V, LANE_KEYS>;
constexpr int QUERY_STEPS = QueryTile::steps + QueryTile::half_step;

// Largest row maximum, in base 2, that the plain path keeps: see attention/README.md. Without biases nothing is divided.
constexpr bool HAS_BIAS = BIAS_0 != ABSENT;
constexpr float PLAIN_LIMIT = HAS_BIAS ? 512.0f : 4194304.0f;

// Where a lane stands in the block's tile.
struct Lane {
    int group;  // row of a product, 0..7
    int quad;   // lane of the four that share a row
    int query;  // first query of the warp, in the tile
    DEVICE Lane() : group(lane_index() / 4), quad(lane_index() % 4), query(warp_index() * WARP_QUERIES) {}
    // Query, in the tile, of row half `half` of query tile `m`.
    DEVICE int row(int m, int half) const { return query + 16 * m + 8 * half + group; }
    // Key, in the tile, of column `column` (0 or 1) of product `product`.
    DEVICE int key(int product, int column) const { return quad * LANE_KEYS + 2 * product + column; }
};

// The block's work.
struct Work {
    Position at;
    i64 query;    // first query
    int queries;  // queries that exist

    DEVICE Work(const ForwardParams& params) {
        const AttentionInputs& inputs = params.inputs;
        i64 index = params.first_block + block_index();
        const i64 tiles = (inputs.seqlen_q + TILE_Q - 1) / TILE_Q;
        if constexpr (ROWS_FIRST) at.row = split_index(index, inputs.rows);
        query = split_index(index, tiles) * TILE_Q;
        at.head = split_index(index, inputs.heads);
        if constexpr (!ROWS_FIRST) at.row = split_index(index, inputs.rows);
        at.batch = index;
        queries = inputs.seqlen_q - query < TILE_Q ? (int)(inputs.seqlen_q - query) : TILE_Q;
    }
};

// Logits of the warp's queries and one tile of keys: C of the products q k.
using Scores = float[QUERY_TILES][KEY_COLUMNS][4];
// What the warp has of the output: C of the products P v.
using Output = float[QUERY_TILES][OUT_COLUMNS][4];
// One number for each of a lane's rows.
using RowValues = float[QUERY_TILES][2];

template <class Action> DEVICE void for_rows(Action action) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) action(m, half);
}

// A of q, in registers or loaded for every tile of keys.
struct Queries {
    u32 words[QUERIES_IN_REGISTERS ? QUERY_TILES : 1][QUERIES_IN_REGISTERS ? QUERY_STEPS : 1][4];
    const Piece* tile;
    int query;

    DEVICE void load(const Piece* shared, int first) {
        tile = shared;
        query = first;
        if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int step = 0; step < QUERY_STEPS; step++)
                    load_left<QueryTile>(words[m][step], tile, query + 16 * m, step);
        }
    }
    DEVICE void left(u32 (&a)[4], int m, int step) const {
        if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = words[m][step][i];
        } else {
            load_left<QueryTile>(a, tile, query + 16 * m, step);
        }
    }
};

DEVICE void start_with_zeros(Scores& s) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int n = 0; n < KEY_COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = 0.0f;
}

// Some terms of S += q k, for one tile of keys.
template <int terms> DEVICE void add_logit_terms(Scores& s, const Queries& queries, const Piece* keys) {
    constexpr int products = products_of_load<KeyTileShape>, words = 4 / products;
#pragma unroll
    for (int step = 0; step < QUERY_STEPS; step += 2) {
        Factor<T, 4> a[QUERY_TILES][2];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int i = 0; i < 2 && step + i < QUERY_STEPS; i++) {
                u32 raw[4];
                queries.left(raw, m, step + i);
                a[m][i] = factor<T>(raw);
            }
#pragma unroll
        for (int n = 0; n < KEY_COLUMNS; n += products) {
            u32 b[4];
            load_right<KeyTileShape, LANE_KEYS>(b, keys, n, step);
#pragma unroll
            for (int p = 0; p < products; p++)
#pragma unroll
                for (int i = 0; i < 2 && step + i < QUERY_STEPS; i++) {
                    const bool half = KeyTileShape::half_step && step + i == KeyTileShape::steps;
                    const int at = p * words + 2 * i;
                    const u32 pair[2] = {b[at], b[half ? at : at + 1]};
                    const Factor<T, 2> right = factor<T>(pair);
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++) {
                        if constexpr (KeyTileShape::half_step) {
                            if (half) {
                                mma_step<terms>(s[m][n + p], half_of(a[m][i]), half_of(right));
                                continue;
                            }
                        }
                        mma_step<terms>(s[m][n + p], a[m][i], right);
                    }
                }
        }
    }
}

// S += q k, for one tile of keys.
template <class T> DEVICE void add_logits(Scores& s, const Queries& queries, const Piece* keys) {
    if constexpr (sizeof(T) == 4) add_logit_terms<SMALL_TERMS>(s, queries, keys);
    add_logit_terms<LARGE_TERMS>(s, queries, keys);
}

// Some terms of P v for one tile of keys and 8 channels, f32.
template <int terms, class T>
DEVICE void add_share_terms(float (&share)[QUERY_TILES][4], const Factor<T, 4> (&p)[QUERY_TILES][KEY_COLUMNS],
                            const Piece* values, int column) {
#pragma unroll
    for (int n = 0; n < KEY_COLUMNS; n++) {
        u32 b[2];
        load_right_columns<ValueTile, LANE_KEYS>(b, values, n, column);
        const Factor<T, 2> right = factor<T>(b);
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++) mma_step<terms>(share[m], p[m][n], right);
    }
}

// O += P v, with P as C of the first product.
template <class T> DEVICE void add_values(Output& out, const Scores& p, const Piece* values) {
    if constexpr (sizeof(T) == 4) {
        Factor<T, 4> a[QUERY_TILES][KEY_COLUMNS];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int n = 0; n < KEY_COLUMNS; n++) {
                const u32 raw[4] = {bits_of(p[m][n][0]), bits_of(p[m][n][2]), bits_of(p[m][n][1]), bits_of(p[m][n][3])};
                a[m][n] = factor<T>(raw);
            }
#pragma unroll
        for (int c = 0; c < OUT_COLUMNS; c++) {
            // The tile's share, small terms first: what the matrix unit cuts off is then small, and O is added in f32.
            float share[QUERY_TILES][4] = {};
            add_share_terms<SMALL_TERMS, T>(share, a, values, c);
            add_share_terms<LARGE_TERMS, T>(share, a, values, c);
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[m][c][i] += share[m][i];
        }
    } else {
        constexpr int STEPS = KEY_COLUMNS / 2;  // of 16 keys: two products' columns
        Factor<T, 4> a[QUERY_TILES][STEPS];
#pragma unroll
        for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
            for (int k = 0; k < STEPS; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* c = p[m][2 * k + i / 2];
                    a[m][k].high[i] = pack<T>(c[2 * (i % 2)], c[2 * (i % 2) + 1]);
                }
#pragma unroll
        for (int k = 0; k < STEPS; k++)
#pragma unroll
            for (int c = 0; c + 1 < OUT_COLUMNS; c += 2) {
                u32 b[4];
                load_right_transposed<ValueTile, LANE_KEYS>(b, values, 2 * k, c);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++)
                        mma_step<LARGE_TERMS>(out[m][c + i], a[m][k], Factor<T, 2>{{b[2 * i], b[2 * i + 1]}});
            }
        if constexpr (OUT_COLUMNS % 2 == 1) {
            constexpr int c = OUT_COLUMNS - 1;
#pragma unroll
            for (int k = 0; k < STEPS; k += 2) {
                u32 b[4];
                load_right_transposed_column<ValueTile, LANE_KEYS>(b, values, 2 * k, c);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++)
                        mma_step<LARGE_TERMS>(out[m][c], a[m][k + i], Factor<T, 2>{{b[2 * i], b[2 * i + 1]}});
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------- the plain path

// What one lane needs of a bias whose rows move in pieces: for each of its rows (or once, when all queries share it), its
// keys of one tile.
template <int index> struct BiasPieces {
    using B = typename Bias<index>::T;
    static constexpr bool present = PRELOAD && Bias<index>::kind >= PIECES;
    static constexpr bool by_query = Bias<index>::kind == PIECES;
    static constexpr int count = LANE_KEYS / PIECE_ELEMENTS<B>;
    Piece pieces[present ? (by_query ? QUERY_TILES : 1) : 1][present && by_query ? 2 : 1][present ? count : 1];

    const B* lane_data;                       // the lane's keys of tile 0, at the block's first query
    i32 offsets[present && by_query ? QUERY_TILES : 1][2];  // of the lane's rows, in bytes; the plan keeps them below 2^31

    DEVICE void start(const AttentionInputs& inputs, const Work& work, const Lane& lane) {
        if constexpr (present) {
            const i64 stride = inputs.biases[index].strides[3];
            lane_data = bias_data<index>(inputs, work.at) + (by_query ? work.query * stride : 0) + lane.quad * LANE_KEYS;
#pragma unroll
            for (int m = 0; m < (by_query ? QUERY_TILES : 1); m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // Queries that do not exist read the last one that does.
                    const int row = lane.row(m, half), last = work.queries - 1;
                    offsets[m][half] = opaque(by_query ? (i32)((row < last ? row : last) * stride * (i64)sizeof(B)) : 0);
                }
        }
    }

    DEVICE void load(i64 key) {
        if constexpr (present) {
            const char* from = (const char*)(lane_data + key);
#pragma unroll
            for (int m = 0; m < (by_query ? QUERY_TILES : 1); m++)
#pragma unroll
                for (int half = 0; half < (by_query ? 2 : 1); half++)
#pragma unroll
                    for (int i = 0; i < count; i++)
                        pieces[m][half][i] = load_piece(from + offsets[m][half] + 16 * i);
        }
    }

    // Key `key` of the lane's, 0 .. LANE_KEYS.
    DEVICE float value(int m, int half, int key) const {
        const Piece& piece = pieces[by_query ? m : 0][by_query ? half : 0][key / PIECE_ELEMENTS<B>];
        const int element = key % PIECE_ELEMENTS<B>;
        if constexpr (sizeof(B) == 4) {
            return float_of(piece.words[element]);
        } else {
            const u32 word = piece.words[element / 2];
            return element % 2 == 0 ? unpack_low<B>(word) : unpack_high<B>(word);
        }
    }

    // sum + bias / scale, for a bias that varies with queries or not.
    template <bool queries> DEVICE float add(float sum, float inverse_scale, int m, int half, int key) const {
        if constexpr (present && by_query == queries) sum = fused_multiply_add(value(m, half, key), inverse_scale, sum);
        return sum;
    }
};

// The pieces of all biases for one tile. The first bias that varies with queries is loaded a tile ahead.
struct BiasTiles {
    BiasPieces<0> bias0;
    BiasPieces<1> bias1;
    BiasPieces<2> bias2;
    BiasPieces<3> bias3;
    DEVICE void start(const AttentionInputs& inputs, const Work& work, const Lane& lane) {
        bias0.start(inputs, work, lane);
        bias1.start(inputs, work, lane);
        bias2.start(inputs, work, lane);
        bias3.start(inputs, work, lane);
    }
    DEVICE void load_ahead(i64 key) {
        bias0.load(key);
        if constexpr (!BiasPieces<0>::by_query) bias1.load(key);
    }
    DEVICE void load_now(i64 key) {
        if constexpr (BiasPieces<0>::by_query) bias1.load(key);
        bias2.load(key);
        bias3.load(key);
    }
    template <bool queries> DEVICE float add(float sum, float inverse_scale, int m, int half, int key) const {
        sum = bias0.add<queries>(sum, inverse_scale, m, half, key);
        sum = bias1.add<queries>(sum, inverse_scale, m, half, key);
        sum = bias2.add<queries>(sum, inverse_scale, m, half, key);
        return bias3.add<queries>(sum, inverse_scale, m, half, key);
    }
};

// Starts S with the biases over the scale; -inf where the key mask excludes.
DEVICE void start_with_biases(Scores& s, const BiasTiles& biases, float inverse_scale, u64 keeps, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < KEY_COLUMNS; n++)
#pragma unroll
        for (int column = 0; column < 2; column++) {
            const int key = 2 * n + column;
            const float of_key = biases.add<false>(0.0f, inverse_scale, 0, 0, key);
#pragma unroll
            for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    s[m][n][2 * half + column] = biases.add<true>(of_key, inverse_scale, m, half, key);
        }
    if constexpr (KEY_MASK || KV_LENGTHS) {
        if (keeps != ~0ull >> (64 - TILE_K)) {
            const u32 kept = (u32)(keeps >> (lane.quad * LANE_KEYS));
#pragma unroll
            for (int n = 0; n < KEY_COLUMNS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const bool keep = kept >> (2 * n + i % 2) & 1;
#pragma unroll
                    for (int m = 0; m < QUERY_TILES; m++) s[m][n][i] = keep ? s[m][n][i] : -INFINITE;
                }
        }
    }
}

// --------------------------------------------------------------------------------------------------- the general path

// S from products to logits in base 2, with whatever the problem adds and excludes: equations (1), (2).
DEVICE void finish_logits(Scores& s, const AttentionInputs& inputs, const Work& work, const KeyTile& tile, const Lane& lane) {
    const i64 first_query = opaque(work.query);
    const int last = opaque(work.queries) - 1, quad = opaque(lane.quad);
    const float slope = ALIBI ? ((const float*)inputs.alibi_slopes)[work.at.head] : 0.0f;
    const u32 kept = (u32)(tile.keeps >> (quad * LANE_KEYS));
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = lane.row(m, half);
            const i64 query = first_query + (row < last ? row : last);
            const i32 id = SEGMENTS ? segment(inputs.q_segments, work.at, query) : 0;
#pragma unroll
            for (int n = 0; n < KEY_COLUMNS; n++)
#pragma unroll
                for (int column = 0; column < 2; column++) {
                    float& logit = s[m][n][2 * half + column];
                    const i64 key = tile.key + quad * LANE_KEYS + 2 * n + column;
                    bool keep = kept >> (2 * n + column) & 1;
                    if (keep) {
                        if constexpr (POSITIONS) keep = keep && position_keeps(inputs, query, key);
                        if constexpr (SEGMENTS) keep = keep && segment(inputs.k_segments, work.at, key) == id;
                        float added = biases_base2(inputs, work.at, query, key);
                        if constexpr (ALIBI) added += alibi_base2(slope, distance(inputs, query, key));
                        logit = fused_multiply_add(logit, inputs.scale_base2, added);
                    }
                    logit = keep ? logit : -INFINITE;
                }
        }
}

// ----------------------------------------------------------------------------------------------------------- softmax

// The new row maxima in base 2, of what came before and of S times `scale`, which is positive.
DEVICE void row_maxima(RowValues& to, const RowValues& before, const Scores& s, float scale) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = maximum(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < KEY_COLUMNS; n++) top = maximum(top, maximum(s[m][n][2 * half], s[m][n][2 * half + 1]));
            to[m][half] = maximum(before[m][half], quad_maximum(top) * scale);
        }
}

// Whether the plain path's arithmetic holds for every row of the warp.
DEVICE bool in_plain_range(const RowValues& maxima) {
    float farthest = 0.0f;
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) farthest = maximum(farthest, magnitude(maxima[m][half]));
    return warp_all(farthest <= PLAIN_LIMIT);
}

// P = 2^(S scale - reference), row sums, and O and row sums brought from the old maximum to the new reference, which is the
// new maximum or, where that is -inf, 0: equations (3a)-(3c).
DEVICE void exponentials(Scores& s, float scale, const RowValues& maxima, const RowValues& references, RowValues& sums, Output& out) {
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float reference = references[m][half];
            const float factor = exp2(maxima[m][half] - reference);
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEY_COLUMNS; n++)
#pragma unroll
                for (int column = 0; column < 2; column++) {
                    float& score = s[m][n][2 * half + column];
                    score = exp2(fused_multiply_add(score, scale, -reference));
                    sum = n + column == 0 ? score : sum + score;
                }
            sums[m][half] = fused_multiply_add(sums[m][half], factor, sum);
#pragma unroll
            for (int c = 0; c < OUT_COLUMNS; c++) {
                out[m][c][2 * half] *= factor;
                out[m][c][2 * half + 1] *= factor;
            }
        }
}

// ---------------------------------------------------------------------------------------------------------- the end

// log2 of a positive number; error below 1e-14.
DEVICE double log2_exactly(float x) {
    const u32 least = 0x3f3504f3;  // sqrt(1/2): the mantissa is taken between there and sqrt(2)
    const i32 exponent = (i32)(bits_of(x) - least) >> 23;
    const double mantissa = float_of(bits_of(x) - ((u32)exponent << 23));
    const double t = (mantissa - 1.0) / (mantissa + 1.0);  // ln m = 2 artanh t
    double series = 1.0 / 19.0;
#pragma unroll
    for (int odd = 17; odd > 0; odd -= 2) series = series * (t * t) + 1.0 / odd;
    return exponent + 2.0 * 1.4426950408889634 * t * series;
}

// lse and what rounding takes from it: equations (5), (5a).
DEVICE void store_lse(const ForwardParams& params, const Work& work, i64 query, float maximum, float sum) {
    const bool empty = sum == 0.0f, finite = sum < INFINITE && maximum < INFINITE;  // false for NaN
    const double exact = finite ? (maximum + log2_exactly(sum)) * 0.6931471805599453 : NOT_A_NUMBER;
    const float high = empty ? -INFINITE : (float)exact;
    const float low = empty || !finite ? 0.0f : (float)(exact - high);
    const auto store = [&](const Operand& to, float value) {
        ((float*)to.data)[work.at.batch * to.strides[0] + work.at.row * to.strides[1] + work.at.head * to.strides[2] +
                          query * to.strides[3]] = value;
    };
    if constexpr (LSE) store(params.lse, high);
    if constexpr (LSE_LOW) store(params.lse_low, low);
}

// Two channels of the output, gated: equation (6).
template <class T> DEVICE void store_pair(const ForwardParams& params, const Work& work, i64 query, int channel, float first, float second) {
    const auto at = [&](const Operand& operand) {
        return (T*)operand.data + work.at.batch * operand.strides[0] + work.at.row * operand.strides[1] +
               query * operand.strides[2] + work.at.head * operand.strides[3];
    };
    float values[2] = {first, second};
    T* to = at(params.out);
    if constexpr (GATE) {
        const T* gate = at(params.inputs.gate);
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (channel + i < HEAD_DIM_V) values[i] *= sigmoid(to_f32(gate[(channel + i) * params.inputs.gate.strides[4]]));
    }
    if constexpr (OUT_PAIRS) {
        if constexpr (sizeof(T) == 2) {
            *(u32*)(to + channel) = pack<T>(values[0], values[1]);
        } else {
            *(u64*)(to + channel) = (u64)bits_of(values[1]) << 32 | bits_of(values[0]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (channel + i < HEAD_DIM_V) to[(channel + i) * params.out.strides[4]] = from_f32<T>(values[i]);
    }
}

// The mean of v over all keys, by all threads: each adds every THREADS-th key, with the rounding errors kept; the partial
// sums are added in order of threads. `sums` holds 2 THREADS numbers.
DEVICE void mean_of_values(float* mean, float* sums, const Rows<T>& values, i64 keys) {
    for (int channel = 0; channel < HEAD_DIM_V; channel++) {
        float sum = 0.0f, rest = 0.0f;
        const auto include = [&](float value) {
            const float next = add(sum, value), seen = add(next, -sum);
            rest = add(rest, add(add(sum, -add(next, -seen)), add(value, -seen)));
            sum = next;
        };
        for (i64 key = thread_index(); key < keys; key += THREADS)
            include(to_f32(values.data[key * values.row_stride + channel * values.channel_stride]));
        block_barrier();
        sums[2 * thread_index()] = sum;
        sums[2 * thread_index() + 1] = rest;
        block_barrier();
        if (thread_index() == 0) {
            sum = 0.0f;
            rest = 0.0f;
            for (int i = 0; i < 2 * THREADS; i++) include(sums[i]);
            mean[channel] = (sum + rest) / (float)keys;
        }
    }
    block_barrier();
}

// Divides by the row sums and stores what belongs to the warp's queries.
DEVICE void finish(const ForwardParams& params, const Work& work, const Lane& lane, const RowValues& maxima, RowValues& sums, const Output& out,
                   const Rows<T>& values, float* shared) {
    bool empty = false;
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sums[m][half] = quad_sum(sums[m][half]);
            empty = empty || (lane.row(m, half) < work.queries && sums[m][half] == 0.0f);
        }
    float* const mean = shared;
    if constexpr (UNIFORM_ROWS) {
        u32* const flags = (u32*)shared;
        block_barrier();
        flags[warp_index()] = warp_any(empty);
        block_barrier();
        bool any = false;
        for (int i = 0; i < WARPS; i++) any = any || flags[i] != 0;
        block_barrier();
        if (any) mean_of_values(mean, shared + HEAD_DIM_V, values, params.inputs.seqlen_k);
    }
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (lane.row(m, half) >= work.queries) continue;
            const i64 query = work.query + lane.row(m, half);
            const float sum = sums[m][half];
            if ((LSE || LSE_LOW) && lane.quad == 0) store_lse(params, work, query, maxima[m][half], sum);
            const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
            for (int c = 0; c < OUT_COLUMNS; c++) {
                const int channel = 8 * c + 2 * lane.quad;
                if (HEAD_DIM_V % 8 != 0 && channel >= HEAD_DIM_V) continue;
                float pair[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    pair[i] = out[m][c][2 * half + i] * inverse;
                    if (UNIFORM_ROWS && sum == 0.0f && channel + i < HEAD_DIM_V) pair[i] = mean[channel + i];
                }
                store_pair<T>(params, work, query, channel, pair[0], pair[1]);
            }
        }
}

// ------------------------------------------------------------------------------------------------------- the kernel

KERNEL(THREADS) attention_forward(const ForwardParams params) {
    DYNAMIC_SHARED(shared);
    const AttentionInputs& inputs = params.inputs;
    const Work work(params);
    const Lane lane;
    Piece* const shared_queries = shared;
    Piece* const shared_keys = shared_queries + QueryTile::size;
    Piece* const shared_values = shared_keys + STAGES * KeyTileShape::size;

    const auto rows_of = [&](const Operand& operand, i64 head) {
        const T* data = (const T*)operand.data + work.at.batch * operand.strides[0] + work.at.row * operand.strides[1] +
                        head * operand.strides[3];
        return Rows<T>{data, operand.strides[2], operand.strides[4]};
    };
    const i64 kv_head = work.at.head / inputs.group;
    const Rows<T> k = rows_of(inputs.k, kv_head), v = rows_of(inputs.v, kv_head);
    const TileLoader<QueryTile, Q_PIECES, THREADS> load_queries(rows_of(inputs.q, work.at.head));
    const TileLoader<KeyTileShape, K_PIECES, THREADS> key_loader(k);
    const TileLoader<ValueTile, V_PIECES, THREADS> value_loader(v);
    const auto load_keys = [&](int stage, const KeyTile& tile) {
        const auto keeps = [&](int row) { return (tile.keeps >> row & 1) != 0; };
        key_loader.load(shared_keys + stage * KeyTileShape::size, tile.key, keeps);
        value_loader.load(shared_values + stage * ValueTile::size, tile.key, keeps);
        copy_async_commit();
    };

    // The next tile of keys, on its way.
    KeyWalk<TILE_K> walk(inputs, work.at, work.query, work.queries);
    BiasTiles biases;
    biases.start(inputs, work, lane);
    load_queries.load(shared_queries, work.query, [&](int row) { return row < work.queries; });
    if (!walk.done()) {
        load_keys(0, walk.tile);
        if (walk.tile.cover == FULL) biases.load_ahead(walk.tile.key);
        walk.read_ahead();
    }
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    Queries queries;
    queries.load(shared_queries, lane.query);

    const float inverse_scale = 1.0f / inputs.scale;
    Output out = {};
    RowValues maxima, sums = {};
#pragma unroll
    for (int m = 0; m < QUERY_TILES; m++) maxima[m][0] = maxima[m][1] = -INFINITE;

    for (int stage = 0; !walk.done();) {
        const KeyTile tile = walk.tile;
        copy_async_wait<0>();
        block_barrier();
        walk.advance();
        const bool more = !walk.done();
        if (STAGES == 2 && more) load_keys(1 - stage, walk.tile);
        const Piece* const keys = shared_keys + stage * KeyTileShape::size;

        Scores s;
        RowValues new_maxima, references;
        float scale = inputs.scale_base2;
        bool plain = PRELOAD && tile.cover == FULL;
        if (plain) {
            biases.load_now(tile.key);
            start_with_biases(s, biases, inverse_scale, tile.keeps, lane);
        }
        if (more) walk.read_ahead();
        if (plain) {
            add_logits<T>(s, queries, keys);
            row_maxima(new_maxima, maxima, s, scale);
            for_rows([&](int m, int half) { references[m][half] = new_maxima[m][half]; });
            plain = in_plain_range(new_maxima);
        }
        if (!plain) {
            start_with_zeros(s);
            add_logits<T>(s, queries, keys);
            finish_logits(s, inputs, work, tile, lane);
            // Read again, so that finish_logits may use the registers.
            queries.load(shared_queries, lane.query);
            scale = 1.0f;
            row_maxima(new_maxima, maxima, s, scale);
            for_rows([&](int m, int half) {
                references[m][half] = new_maxima[m][half] == -INFINITE ? 0.0f : new_maxima[m][half];
            });
        }
        exponentials(s, scale, maxima, references, sums, out);
        for_rows([&](int m, int half) { maxima[m][half] = new_maxima[m][half]; });
        // Not earlier: here P takes half the registers that S took.
        if (more && walk.tile.cover == FULL) biases.load_ahead(walk.tile.key);
        add_values<T>(out, s, shared_values + stage * ValueTile::size);

        if (STAGES == 2) {
            stage = 1 - stage;
        } else if (more) {
            block_barrier();
            load_keys(0, walk.tile);
        }
    }

    finish(params, work, lane, maxima, sums, out, v, (float*)shared);
}
