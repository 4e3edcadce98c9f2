// Forward pass: a block owns a tile of queries of one (batch, row, head) and walks over tiles of keys.
//
// The account of it is in attention/README.md; equation numbers are those of docs/mathematics.md.
//
// Constants beside those of attention.cuh, all defined: QUERY_TILES (16 queries each, 32 on AMD) of a warp, WARPS, TILE_K,
// STAGES (buffers of keys and values: 1 or 2), QUERIES_IN_REGISTERS, SIMD_WAVES (for which registers leave room),
// ROWS_FIRST (order of blocks); 0 or 1: PRELOAD (the plain path may be taken), Q_PIECES, K_PIECES, V_PIECES (rows move in
// pieces), OUT_PAIRS (channels of out are neighbours and pairs aligned), LSE, LSE_LOW.
#include "../include/attention.cuh"
#include "../include/gpu.h"
#include "../include/params.h"
#include "../include/products.cuh"
#include "../include/walk.cuh"

using T = ELEMENT;

constexpr int THREADS = WARPS * WARP_THREADS;
constexpr int TILE_Q = WARPS * WARP_QUERIES;

// Largest reference, in base 2, next to which the plain path holds: see attention/README.md. Without biases nothing is divided.
constexpr bool HAS_BIAS = BIAS_0 != ABSENT;
constexpr float PLAIN_LIMIT = !HAS_BIAS ? 4194304.0f : sizeof(T) == 4 ? 2048.0f / HEAD_DIM : 512.0f;
// Largest sum of a lane's P in a tile that the plain path keeps: f16 ends at 2^16.
constexpr float LARGEST_SHARE = 32768.0f;

// The block's work. Each is computed anew, and takes no registers from one place to another.
struct Work {
    Position at;
    i64 query;    // first query
    int queries;  // queries that exist

    DEVICE Work(const ForwardParams& params) {
        const AttentionInputs& inputs = params.inputs;
        i64 index = params.first_block + block_index_again();
        const i64 tiles = (inputs.seqlen_q + TILE_Q - 1) / TILE_Q;
        if constexpr (ROWS_FIRST) at.row = split_index(index, inputs.rows);
        query = split_index(index, tiles) * TILE_Q;
        at.head = split_index(index, inputs.heads);
        if constexpr (!ROWS_FIRST) at.row = split_index(index, inputs.rows);
        at.batch = index;
        queries = inputs.seqlen_q - query < TILE_Q ? (int)(inputs.seqlen_q - query) : TILE_Q;
    }
};

// One number for each of a lane's rows.
using RowValues = float[LANE_ROWS];
// Sums of a lane's P, row by row.
using Shares = PairSum[LANE_ROWS];

template <class Action> DEVICE void for_rows(Action action) {
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) action(r);
}

template <class Action> DEVICE void for_groups(Action action) {
#pragma unroll
    for (int group = 0; group < KEY_GROUPS; group++) action(group);
}

DEVICE void start_with_zeros(Scores& s) {
    for_rows([&](int r) {
#pragma unroll
        for (int j = 0; j < LANE_KEYS; j++) score(s, r, j) = 0.0f;
    });
}

// ------------------------------------------------------------------------------------------------- the plain path

// What one lane needs of a bias whose rows move in pieces: for each of its rows (or once, when all queries share it), its
// keys of one tile.
template <int index> struct BiasPieces {
    using B = typename Bias<index>::T;
    static constexpr bool present = PRELOAD && Bias<index>::kind >= PIECES;
    static constexpr bool by_query = Bias<index>::kind == PIECES;
    static constexpr int rows = present && by_query ? LANE_ROWS : 1;
    static constexpr int count = LANE_KEYS / PIECE_ELEMENTS<B>;
    Piece pieces[rows][present ? count : 1];

    const B* lane_data;  // the lane's keys of tile 0, at the block's first query
    i32 offsets[rows];   // of the lane's rows, in bytes; the plan keeps them below 2^31

    DEVICE void start(const AttentionInputs& inputs, const Work& work, const Lane& lane) {
        if constexpr (present) {
            const i64 stride = inputs.biases[index].strides[3];
            lane_data = bias_data<index>(inputs, work.at) + (by_query ? work.query * stride : 0) + lane.first_key();
            lane_data = (const B*)opaque((i64)lane_data);
#pragma unroll
            for (int r = 0; r < rows; r++) {
                // Queries that do not exist read the last one that does.
                const int row = lane.row(r), last = work.queries - 1;
                offsets[r] = opaque(by_query ? (i32)((row < last ? row : last) * stride * (i64)sizeof(B)) : 0);
            }
        }
    }

    // The pieces of the tile at `key` that end in a group of its keys.
    DEVICE void load(i64 key, int group) {
        if constexpr (present) {
            const char* from = (const char*)(lane_data + key);
#pragma unroll
            for (int i = 0; i < count; i++) {
                if ((PIECE_ELEMENTS<B> * (i + 1) - 1) / GROUP_KEYS != group) continue;
#pragma unroll
                for (int r = 0; r < rows; r++) pieces[r][i] = load_piece(from + offsets[r] + 16 * i);
            }
        }
    }

    DEVICE float value(int row, int key) const {
        const Piece& piece = pieces[by_query ? row : 0][key / PIECE_ELEMENTS<B>];
        const int element = key % PIECE_ELEMENTS<B>;
        if constexpr (sizeof(B) == 4) {
            return float_of(piece.words[element]);
        } else {
            const u32 word = piece.words[element / 2];
            return element % 2 == 0 ? unpack_low<B>(word) : unpack_high<B>(word);
        }
    }

    // sum + bias / scale, for a bias that varies with queries or not.
    template <bool queries> DEVICE float add(float sum, float inverse_scale, int row, int key) const {
        if constexpr (present && by_query == queries) sum = fused_multiply_add(value(row, key), inverse_scale, sum);
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
    DEVICE void load_ahead(i64 key, int group) {
        bias0.load(key, group);
        if constexpr (!BiasPieces<0>::by_query) bias1.load(key, group);
    }
    DEVICE void load_ahead(i64 key) {
        for_groups([&](int group) { load_ahead(key, group); });
    }
    DEVICE void load_now(i64 key) {
        for_groups([&](int group) {
            if constexpr (BiasPieces<0>::by_query) bias1.load(key, group);
            bias2.load(key, group);
            bias3.load(key, group);
        });
    }
    template <bool queries> DEVICE float add(float sum, float inverse_scale, int row, int key) const {
        sum = bias0.add<queries>(sum, inverse_scale, row, key);
        sum = bias1.add<queries>(sum, inverse_scale, row, key);
        sum = bias2.add<queries>(sum, inverse_scale, row, key);
        return bias3.add<queries>(sum, inverse_scale, row, key);
    }
};

// Starts a group of S with the biases over the scale; -inf where key mask or length exclude. (A bias of NaN or +inf there
// makes NaN, which leaves the plain path.)
DEVICE void start_with_biases(Scores& s, const BiasTiles& biases, float inverse_scale, const Excluded& excluded, int group) {
    constexpr bool EXCLUDES = KEY_MASK || KV_LENGTHS;
#pragma unroll
    for (int j = group * GROUP_KEYS; j < (group + 1) * GROUP_KEYS; j++) {
        const float of_key = biases.add<false>(EXCLUDES ? excluded.start(j) : 0.0f, inverse_scale, 0, j);
        for_rows([&](int r) { score(s, r, j) = biases.add<true>(of_key, inverse_scale, r, j); });
    }
    if constexpr (EXCLUDES) excluded.apply(s, group);
}

// --------------------------------------------------------------------------------------------------- the general path

// S from products to logits in base 2, with whatever the problem adds and excludes: equations (1), (2).
DEVICE void finish_logits(Scores& s, const AttentionInputs& inputs, const Work& work, const KeyTile& tile, const Lane& lane) {
    const i64 first_query = opaque(work.query);
    const int last = opaque(work.queries) - 1, first_key = opaque(lane.first_key());
    const float slope = ALIBI ? ((const float*)inputs.alibi_slopes)[work.at.head] : 0.0f;
    const u32 kept = (u32)(tile.keeps >> first_key);
    for_rows([&](int r) {
        const int row = lane.row(r);
        const i64 query = first_query + (row < last ? row : last);
        const i32 id = SEGMENTS ? segment(inputs.q_segments, work.at, query) : 0;
#pragma unroll
        for (int j = 0; j < LANE_KEYS; j++) {
            float& logit = score(s, r, j);
            const i64 key = tile.key + first_key + j;
            bool keep = kept >> j & 1;
            if (keep) {
                if constexpr (POSITIONS) keep = keep && position_keeps(inputs, query, key);
                if constexpr (SEGMENTS) keep = keep && segment(inputs.k_segments, work.at, key) == id;
                float added = biases_base2(inputs, work.at, query, key);
                if constexpr (ALIBI) added += alibi_base2(slope, distance(inputs, query, key));
                logit = fused_multiply_add(logit, inputs.scale_base2, added);
            }
            logit = keep ? logit : -INFINITE;
            one_by_one();
        }
    });
}

// ----------------------------------------------------------------------------------------------------------- softmax

// What a warp has of its rows so far, relative to a reference in base 2: equations (3a)-(3c). The reference is the maximum
// of the row's first tiles, and from then on stays, as long as no P grows large beside it.
struct Softmax {
    RowValues references;
    RowValues sums;
    float largest;  // sum of a lane's P in a tile
    bool settled;   // whether all references are such that the plain path may keep them

    DEVICE void start(Output& out) {
        for_rows([&](int r) {
            references[r] = -INFINITE;
            sums[r] = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) value(out, r, i) = 0.0f;
        });
        largest = 0.0f;
        settled = false;
    }

    // Raises the references to the maxima of S times `scale`, which is positive, and brings l and O to them; on the plain
    // path only where that stays within its range.
    template <bool plain> DEVICE bool raise(Scores& s, float scale, Output& out) {
        RowValues raised;
        float farthest = 0.0f;
        for_rows([&](int r) {
            float top = score(s, r, 0);
#pragma unroll
            for (int j = 1; j < LANE_KEYS; j++) top = maximum(top, score(s, r, j));
            raised[r] = maximum(references[r], row_maximum(top) * scale);
            farthest = maximum(farthest, magnitude(raised[r]));
        });
        settled = warp_all(farthest <= PLAIN_LIMIT);
        if (plain && !settled) return false;
        for_rows([&](int r) {
            const float factor = exp2(references[r] - finite_reference(r, raised));
            references[r] = raised[r];
            sums[r] *= factor;
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) value(out, r, i) *= factor;
        });
        return true;
    }

    // Where all logits so far are -inf any reference does.
    static DEVICE float finite_reference(int r, const RowValues& of) { return of[r] == -INFINITE ? 0.0f : of[r]; }

    // P = 2^(S scale - reference) for a group, and its sums over the lane's keys so far.
    template <bool finite> DEVICE void exponentials(Scores& s, float scale, Shares& shares, int group) const {
        for_rows([&](int r) {
            const float reference = finite ? references[r] : finite_reference(r, references);
#pragma unroll
            for (int j = group * GROUP_KEYS; j < (group + 1) * GROUP_KEYS; j += 2) {
                const Pair logits = fused_multiply_add(Pair{score(s, r, j), score(s, r, j + 1)}, scale, -reference);
                const Pair p = {exp2(logits.x), exp2(logits.y)};
                score(s, r, j) = p.x;
                score(s, r, j + 1) = p.y;
                if (j == 0) {
                    shares[r].start(p);
                } else {
                    shares[r].add(p);
                }
            }
        });
    }

    DEVICE void add(const Shares& shares) {
        for_rows([&](int r) {
            const float share = shares[r].total();
            sums[r] += share;
            largest = maximum(largest, share);
        });
    }

    // Whether the references that stayed did not serve: P grew too large, or O did, or something is NaN.
    DEVICE bool outgrown(const Output& out) const {
        bool fine = largest <= LARGEST_SHARE;
        for_rows([&](int r) {
            fine = fine && sums[r] < INFINITE;
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++) fine = fine && magnitude(value(out, r, i)) < INFINITE;
        });
        return !fine;
    }
};

// Whether it holds in some thread of the block; `flags` holds WARPS words that nobody else uses until the next barrier.
DEVICE bool block_any(bool predicate, u32* flags) {
    block_barrier();
    flags[warp_index()] = warp_any(predicate);
    block_barrier();
    bool any = false;
    for (int i = 0; i < WARPS; i++) any = any || flags[i] != 0;
    block_barrier();
    return same_in_warp(any);
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

// A row of out or the gate: a lane's channels, counted from its first.
template <class T> struct LaneRow {
    T* data = nullptr;
    i64 stride = 0;
    DEVICE LaneRow() {}
    DEVICE LaneRow(const Operand& operand, const Work& work, i64 query, const Lane& lane) : stride(operand.strides[4]) {
        T* const row = (T*)operand.data + work.at.batch * operand.strides[0] + work.at.row * operand.strides[1] +
                       query * operand.strides[2] + work.at.head * operand.strides[3];
        // Opaque: channels are then added to one address. The compiler would compute one for each.
        data = (T*)opaque((i64)(row + lane.channel(0) * stride));
    }
    DEVICE T& operator[](int i) const { return data[i * stride]; }
};

// Two channels of the output, gated: equation (6). The first is number `i` of the row, the lane's first is `lane_channel`.
template <class T> DEVICE void store_pair(const LaneRow<T>& to, const LaneRow<const T>& gate, int lane_channel, int i, float first, float second) {
    float values[2] = {first, second};
    const auto exists = [&](int x) { return HEAD_DIM_V % 8 == 0 || lane_channel + i + x < HEAD_DIM_V; };
    if constexpr (GATE) {
#pragma unroll
        for (int x = 0; x < 2; x++)
            if (exists(x)) values[x] *= sigmoid(to_f32(gate[i + x]));
    }
    if constexpr (OUT_PAIRS) {
        if constexpr (sizeof(T) == 2) {
            *(u32*)(to.data + i) = pack<T>(values[0], values[1]);
        } else {
            *(u64*)(to.data + i) = (u64)bits_of(values[1]) << 32 | bits_of(values[0]);
        }
    } else {
#pragma unroll
        for (int x = 0; x < 2; x++)
            if (exists(x)) to[i + x] = from_f32<T>(values[x]);
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
DEVICE void finish(const ForwardParams& params, const Work& work, const Lane& lane, Softmax& softmax, const Output& out,
                   const Rows<T>& values, float* shared) {
    bool empty = false;
    for_rows([&](int r) {
        softmax.sums[r] = row_sum(softmax.sums[r]);
        empty = empty || (lane.row(r) < work.queries && softmax.sums[r] == 0.0f);
    });
    float* const mean = shared;
    if constexpr (UNIFORM_ROWS) {
        if (block_any(empty, (u32*)shared)) mean_of_values(mean, shared + HEAD_DIM_V, values, params.inputs.seqlen_k);
    }
    for_rows([&](int r) {
        if (lane.row(r) >= work.queries) return;
        const i64 query = work.query + lane.row(r);
        const float sum = softmax.sums[r];
        if ((LSE || LSE_LOW) && lane.leads()) store_lse(params, work, query, softmax.references[r], sum);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        const LaneRow<T> to(params.out, work, query, lane);
        const LaneRow<const T> gate = GATE ? LaneRow<const T>(params.inputs.gate, work, query, lane) : LaneRow<const T>();
#pragma unroll
        for (int c = 0; c < LANE_CHANNELS; c += 2) {
            const int channel = lane.channel(c);
            if (HEAD_DIM_V % 8 != 0 && channel >= HEAD_DIM_V) continue;
            float pair[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                pair[i] = value(out, r, c + i) * inverse;
                if (UNIFORM_ROWS && sum == 0.0f && channel + i < HEAD_DIM_V) pair[i] = mean[channel + i];
            }
            store_pair<T>(to, gate, lane.channel(0), Lane::step(c), pair[0], pair[1]);
        }
    });
}

// ------------------------------------------------------------------------------------------------------- the kernel

KERNEL_WITH_WAVES(THREADS, SIMD_WAVES) attention_forward(const ForwardParams params) {
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
    i64 kv_head = work.at.head;
    split_index(kv_head, inputs.group);
    const Rows<T> k = rows_of(inputs.k, kv_head), v = rows_of(inputs.v, kv_head);
    KeyLoader key_loader(k);
    ValueLoader value_loader(v);
    const auto start_loading = [&](int stage, const KeyTile& tile) {
        key_loader.start(shared_keys + stage * KeyTileShape::size, tile.key, tile.keeps);
        value_loader.start(shared_values + stage * ValueTile::size, tile.key, tile.keeps);
        copies_started();
    };

    Queries queries;
    queries.start(rows_of(inputs.q, work.at.head), work.query, work.queries, shared_queries, lane);
    copies_started();
    BiasTiles biases;
    biases.start(inputs, work, lane);
    const float inverse_scale = 1.0f / inputs.scale;
    Output out;
    Softmax softmax;

    // Once more, with references that follow the maxima, where those that stay do not serve.
    for (bool careful = !PRELOAD;; careful = true) {
        const ForwardParams& again = read_again(params);
        const Work work(again);
        // The next tile of keys, on its way.
        KeyWalk<TILE_K> walk(again.inputs, work.at, work.query, work.queries);
        if (!walk.done()) {
            start_loading(0, walk.tile);
            if (walk.tile.cover == FULL) biases.load_ahead(walk.tile.key);
        }
        copies_arrived();
        block_barrier();
        queries.load();
        softmax.start(out);

        for (int stage = 0; !walk.done();) {
            const KeyTile tile = walk.tile;
            copies_arrived();
            key_loader.arrive(shared_keys + stage * KeyTileShape::size);
            value_loader.arrive(shared_values + stage * ValueTile::size);
            block_barrier();
            walk.advance();
            const bool more = !walk.done();
            if (LOADS_AHEAD && more) start_loading(1 - stage, walk.tile);
            const Piece* const keys = shared_keys + stage * KeyTileShape::size;
            const Piece* const tile_values = shared_values + stage * ValueTile::size;

            Scores s;
            Weights p;
            Shares shares;
            const bool ahead = more && walk.tile.cover == FULL;
            const bool plain = PRELOAD && tile.cover == FULL && !careful;
            const Excluded excluded(tile.keeps, lane);
            const auto add_share = [&] {
                softmax.add(shares);
                add_values(out, p, tile_values, lane);
            };
            if (plain) biases.load_now(tile.key);
            if (plain && softmax.settled) {
                // Without a next tile this one's biases are loaded once more, which costs less than a branch.
                const i64 next = ahead ? walk.tile.key : tile.key;
                // Exponentials of one group beside products of the next.
#pragma unroll
                for (int group = 0; group <= KEY_GROUPS; group++) {
                    if (group < KEY_GROUPS) {
                        start_with_biases(s, biases, inverse_scale, excluded, group);
                        if constexpr (!ONE_TAIL) biases.load_ahead(next, group);
                        add_logits(s, queries, keys, group);
                    }
                    if (group > 0) {
                        softmax.exponentials<true>(s, inputs.scale_base2, shares, group - 1);
                        weights_of(p, s, group - 1);
                    }
                }
                if constexpr (!ONE_TAIL) add_share();
                keep_apart();
            } else {
                float scale = inputs.scale_base2;
                bool in_range = false;
                if (plain) {
                    for_groups([&](int group) {
                        start_with_biases(s, biases, inverse_scale, excluded, group);
                        add_logits(s, queries, keys, group);
                    });
                    in_range = softmax.raise<true>(s, scale, out);
                }
                if (!in_range) {
                    start_with_zeros(s);
                    for_groups([&](int group) { add_logits(s, queries, keys, group); });
                    const ForwardParams& again = read_again(params);
                    finish_logits(s, again.inputs, PRELOAD && WORK_AGAIN ? Work(again) : work, tile, lane);
                    // Read again, so that finish_logits may use the registers.
                    queries.load();
                    scale = 1.0f;
                    softmax.raise<false>(s, scale, out);
                }
                for_groups([&](int group) {
                    softmax.exponentials<false>(s, scale, shares, group);
                    weights_of(p, s, group);
                });
                if (!ONE_TAIL && ahead) biases.load_ahead(walk.tile.key);
                if constexpr (!ONE_TAIL) add_share();
            }
            if constexpr (ONE_TAIL) {
                if (ahead) biases.load_ahead(walk.tile.key);
                add_share();
            }

            if (STAGES == 2) {
                stage = 1 - stage;
            } else if (more) {
                block_barrier();
                if (!LOADS_AHEAD) start_loading(0, walk.tile);
            }
        }
        if (careful || !block_any(softmax.outgrown(out), (u32*)shared_keys)) break;
    }

    finish(read_again(params), Work(read_again(params)), lane, softmax, out, v, (float*)shared);
}
