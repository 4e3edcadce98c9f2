// Backward pass by tiles of a bias: gradients of biases with both axes (15), and dQ (13) where there is room for both.
//
// A block owns a tile of queries and keys of one bias and walks over the terms, the (batch, row, head) that share it, with its
// tile of the gradient in registers. dQ of a term comes out on the way: whole where the tile is all keys, and otherwise as
// partial sums.
//
//   for term                                          the next term is on its way meanwhile
//       for part of the keys
//           S  = Q K^T + biases - lse                 in base 2; rows are queries
//           dP = dO V^T - delta
//           dS = 2^S dP                               (9), (12)
//           dB += dS                                  f32
//           dQ += dS K
//       dQ of the term is stored
//
// A term whose keys of the tile are all kept, and whose lse is small, is one piece of code; any other is another.
//
// Constants: README.md, "Constants of the backward pass".
#include "../include/query_logits.cuh"

// Shared memory: two terms in turn.
constexpr int STAGE_BYTES = QUERY_BYTES + KEY_BYTES;
constexpr int NOTES_AT = STAGES * STAGE_BYTES;
constexpr int NOTES_BYTES = Notes<8>::bytes;
static_assert(NOTES_AT + NOTES_BYTES == SHARED_BYTES, "shared memory as planned");

// dQ of a term, or its partial sums in f32.
template <bool partial> struct GradientOfTerm : QueryGradient<ELEMENT, DQ_PIECES> {
    DEVICE void start_term(const BackwardParams& params, const Position& at, i64 first_query, i64, const Lane& lane) {
        start((ELEMENT*)params.dq.data + offset_of(params.dq, at, first_query, at.head), params.dq.strides[2], params.dq.strides[4], lane);
    }
    DEVICE void next_row(const BackwardParams& params) { shift(opaque(params.dq.strides[1])); }
};
template <> struct GradientOfTerm<true> : QueryGradient<float, HEAD_DIM % 8 == 0> {
    DEVICE void start_term(const BackwardParams& params, const Position& at, i64 first_query, i64 key_tile, const Lane& lane) {
        const AttentionInputs& in = params.inputs;
        const i64 row = ((key_tile * in.batch + at.batch) * in.rows + at.row) * in.heads + at.head;
        start((float*)params.dq_partials + (row * in.seqlen_q + first_query) * HEAD_DIM, HEAD_DIM, 1, lane);
    }
    DEVICE void next_row(const BackwardParams& params) { shift(opaque(params.row_queries) * HEAD_DIM); }
};

// What a block owns: axes that are summed have one entry among the owners and their size among the terms.
struct Owner {
    i64 batch, row, head;
    i64 first_query, key_tile, first_key;
    i64 chunk;

    // Blocks that read the same part of the biases are neighbours.
    DEVICE Owner(const BackwardParams& params, i64 block) {
        const AttentionInputs& in = params.inputs;
        row = split_index(block, SUMS_ROWS ? 1 : in.rows);
        key_tile = split_index(block, divided_up(in.seqlen_k, TILE_K));
        first_key = key_tile * TILE_K;
        first_query = split_index(block, divided_up(in.seqlen_q, TILE_Q)) * TILE_Q;
        head = split_index(block, SUMS_HEADS ? 1 : in.heads);
        batch = split_index(block, SUMS_BATCH ? 1 : in.batch);
        chunk = block;
    }
};

// What the rows of one head seldom need: where the block's tile and the first row are, which terms are left.
struct BlockNotes : Notes<8> {
    DEVICE void keep(i64 block, i64 first_query, i64 first_key, const Position& first, i64 key_head, i64 left_terms) {
        write({block, first_query, first_key, first.batch, first.row, first.head, key_head, left_terms});
    }
    DEVICE i64 block() const { return (*this)[0]; }
    DEVICE i64 first_query() const { return (*this)[1]; }
    DEVICE i64 first_key() const { return (*this)[2]; }
    DEVICE Position term(int row) const { return {(*this)[3], (*this)[4] + row, (*this)[5]}; }
    DEVICE i64 key_head() const { return (*this)[6]; }
    DEVICE i64 left_terms() const { return (*this)[7]; }
};

KERNEL_WITH_BLOCKS(THREADS, MIN_BLOCKS) backward_bias(const BackwardParams params) {
    DYNAMIC_SHARED(shared);
    const u32 memory = shared_address(shared);
    const AttentionInputs& in = params.inputs;
    const Lane lane;
    BlockNotes notes;
    notes.address = memory + NOTES_AT;

    const i64 block = params.first_block + block_index();
    const Owner owner(params, block);
    const i64 first_query = owner.first_query, first_key = owner.first_key;

    const i64 term_rows = SUMS_ROWS ? in.rows : 1, term_heads = SUMS_HEADS ? in.heads : 1, term_batch = SUMS_BATCH ? in.batch : 1;
    const i64 terms = term_batch * term_rows * term_heads;
    const i64 first_term = owner.chunk * params.term_chunk, end_term = least(terms, first_term + params.term_chunk);
    // Divisions come here, where few registers are taken.
    Position next = {owner.batch, owner.row, owner.head};
    i64 index = first_term;
    if (SUMS_ROWS) next.row = split_index(index, in.rows);
    if (SUMS_HEADS) next.head = split_index(index, in.heads);
    if (SUMS_BATCH) next.batch = index;
    i64 key_head = next.head;
    split_index(key_head, in.group);

    // What positions let a query see is the same for all terms.
    const Band bounds = POSITIONS ? band(in, first_query, first_key) : Band{0, 0};
    const bool sees = !POSITIONS || (bounds.low < TILE_K && bounds.high > -TILE_Q);
    const int queries_there = opaque((int)least(in.seqlen_q - first_query, TILE_Q));
    const int statistics_there = (int)least(params.padded_queries - first_query, TILE_Q);
    const int keys_there = (int)least(in.seqlen_k - first_key, TILE_K);
    const bool uncut = keys_there == TILE_K && !(POSITIONS && cuts(bounds, TILE_Q, TILE_K));
    // The last run of a lane whose first key is `key`: it is read instead of those that do not exist.
    auto last_run = [&](int key) { return RUNS ? opaque(keys_there) - RUN_KEYS - key : 0; };

    Scores dbias[PARTS] = {};
    QueryRows queries;
    QueryBiases<BIASES_STAY> biases;
    GradientOfTerm<DQ_PARTIALS> gradient;
    int turn = 0;  // of two, of shared memory

    // The keys of one term, which have arrived. The first part's biases have been fetched.
    auto compute = [&](bool fast, QuerySums& dq, u32 keys, int row, bool plain, bool all, bool more) {
        if (!fast) biases.hide();
        // Seldom wanted.
        const int key = fast && !BY_ELEMENT ? 0 : Lane::key_of(thread_index_again());
        // Of the part before, what the next one's loads wait for: products, where its biases take registers anyway, or dS.
        float before = 0.0f;
        constexpr bool wait_for_products = BIASES_STAY && WARPS == 8;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Scores s, dp;
            if (!fast) one_by_one();
            const Lane here = fast && part > 0 ? lane.after(before) : lane;
            queries.multiply(s, dp, keys, part, here);
            if (wait_for_products) before = score(s, 0, 0);
            if (fast) {
                const i64 first = BY_ELEMENT ? opaque(notes.first_key() + key + part * PART_KEYS) : 0;
                biases.take<true>(s, BY_ELEMENT ? read_again(params).inputs : in, first, part, queries.lse, queries.lse);
            } else {
                const Position at = notes.term(row);
                general_logits(s, dp, queries, biases, read_again(params).inputs, at, lane, notes.first_query(), notes.first_key(), key + part * PART_KEYS, part, plain, all);
            }
            // Biases of the next part, while this one is computed; after the last, those of the next term.
            if (part + 1 < PARTS) {
                biases.fetch((part + 1) * PART_KEYS, fast ? TILE_K : last_run(key));
            } else {
                biases.next_row(in, more);
                biases.fetch(0, fast ? TILE_K : last_run(key));
            }
            weigh(dp, s);
            if (!wait_for_products) before = score(dp, LANE_QUERIES - 1, LANE_KEYS - 1);
            for_scores([&](int i, int j) { score(dbias[part], i, j) += score(dp, i, j); });
            if (WANT_DQ) add_keys(dq, dp, keys, part, here, part == 0);
        }
    };

    i64 left_terms = end_term - first_term, from_query = first_query, from_key = first_key;
    while (left_terms > 0) {
        // Rows of one head, one after another.
        const int rows = SUMS_ROWS ? (int)least(in.rows - next.row, left_terms) : 1;
        left_terms -= rows;
        // Opaque: what follows from them is computed here, and takes no registers from one head to the next.
        const Position first = {opaque(next.batch), opaque(next.row), opaque(next.head)};
        QueriesWalk queries_walk;
        KeysWalk keys_walk;
        const BackwardParams& of_rows = read_again(params);
        queries_walk.start(of_rows, first, from_query, queries_there);
        keys_walk.start(of_rows.inputs, first, key_head, from_key);
        // Rows are fetched one ahead, looked at two ahead, and their lengths read three ahead.
        auto left_of = [&](int row) {
            if (row >= rows) return 0;
            return KV_LENGTHS ? (int)least(keys_left(in, {first.batch, first.row + row, first.head}, first_key), TILE_K) : keys_there;
        };
        auto fetch = [&]() {
            const u32 to = memory + turn * STAGE_BYTES;
            queries_walk.fetch(to, queries_there, statistics_there);
            keys_walk.fetch(to + QUERY_BYTES);
            queries_walk.next_row(params);
            keys_walk.shift(in.k.strides[1], in.v.strides[1]);
        };
        auto look = [&](int left) {
            keys_walk.look(left);
            keys_walk.shift_mask(in.key_mask.strides[1]);
        };
        look(left_of(0));
        int left = left_of(1);
        block_barrier();
        notes.keep(block, from_query, from_key, first, key_head, left_terms);
        fetch();
        copies_started();
        look(left);
        left = left_of(2);
        const int key = Lane::key_of(thread_index());
        biases.start(of_rows.inputs, first, from_query + lane.query, from_key + key);
        const int last_of_lane = last_run(key);
#pragma unroll
        for (int part = 0; part < PARTS; part++) biases.fetch_once(part, part * PART_KEYS, last_of_lane);
        biases.fetch(0, last_of_lane);
        if (WANT_DQ) gradient.start_term(of_rows, first, from_query, opaque(from_key) / TILE_K, lane);

        // Waits for a term and fetches the next one; what is known of it.
        u32 keys;
        bool more, plain, all;
        auto fetch_next = [&](int row) {
            if (more) {
                fetch();
                look(left);
                left = left_of(row + 3);
            }
            copies_started();
        };
        auto arrive = [&](int row) {
            const u32 tile = memory + turn * STAGE_BYTES;
            keys = tile + QUERY_BYTES;
            more = row + 1 < rows;
            keys_walk.arrive(keys);
            queries_walk.arrive(queries, tile);
            block_barrier();
            if (STAGES == 2) turn ^= 1;
            if (LOADS_AHEAD) fetch_next(row);
            queries.load(lane, queries_there);
            plain = queries.allows_plain_of_lane(queries_there);
            all = keeps_all_of_lane(keys);
            // Addresses of single elements leave no registers for two ways.
            return MAY_BE_PLAIN && !SEGMENTS && !BIASES_BY_ELEMENT && uncut && warp_all(plain && all);
        };
        auto leave = [&](int row, const QuerySums& dq) {
            if (WANT_DQ) {
                gradient.store(dq, lane.query, queries_there, in.scale);
                gradient.next_row(params);
            }
            if (STAGES == 1) block_barrier();
            if (!LOADS_AHEAD) fetch_next(row);
        };

        // Fast terms are a loop of their own, which shares no registers with the code of others.
        for (int row = 0; row < rows; row++) {
            bool fast = arrive(row);
            while (fast) {
                QuerySums dq;
                compute(true, dq, keys, row, true, true, more);
                leave(row, dq);
                if (++row == rows) break;
                fast = arrive(row);
            }
            if (row == rows) break;
            QuerySums dq;
            if (sees) {
                compute(false, dq, keys, row, warp_all(plain), keys_there == TILE_K && warp_all(all), more);
            } else {
                clear(dq);
            }
            leave(row, dq);
        }
        // All terms are rows of one head: nothing is kept for more.
        if (!SUMS_HEADS && !SUMS_BATCH) break;
        from_query = notes.first_query();
        from_key = notes.first_key();
        key_head = notes.key_head();
        left_terms = notes.left_terms();
        next = notes.term(SUMS_ROWS ? rows : 0);
        if (SUMS_ROWS) {
            if (next.row < in.rows) continue;
            next.row = 0;
        }
        if (SUMS_HEADS) {
            if (++next.head == (key_head + 1) * in.group) key_head++;
            if (next.head < in.heads) continue;
            next.head = key_head = 0;
        }
        if (SUMS_BATCH) next.batch++;
    }

    // Found again, so that it takes no registers before.
    const BackwardParams& results = read_again(params);
    const Owner to(results, notes.block());
    const int first_of_run = Lane::key_of(thread_index_again());
    const i64 batches = SUMS_BATCH ? 1 : results.inputs.batch, rows = SUMS_ROWS ? 1 : results.inputs.rows, heads = SUMS_HEADS ? 1 : results.inputs.heads;
    const i64 partial = ((to.chunk * batches + to.batch) * rows + to.row) * heads + to.head;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int i = 0; i < LANE_QUERIES; i++) {
            const i64 query = to.first_query + lane.query + Lane::further_query(i);
            if (query >= results.inputs.seqlen_q) continue;
#pragma unroll
            for (int j = 0; j < LANE_KEYS; j++) {
                const i64 key = to.first_key + first_of_run + part * PART_KEYS + j;
                if (key >= results.inputs.seqlen_k) continue;
                const float value = score(dbias[part], i, j);
                if (DBIAS_PARTIALS) {
                    ((float*)results.dbias_partials)[(partial * results.inputs.seqlen_q + query) * results.inputs.seqlen_k + key] = value;
                } else {
#define STORE(index, T)                                                                                                            \
    ((T*)results.dbiases[index].data)[offset_of(results.dbiases[index], {to.batch, to.row, 0}, to.head, query) +          \
                                     key * results.dbiases[index].strides[4]] = from_f32<T>(value);
                    DBIAS_LIST(STORE)
#undef STORE
                }
            }
        }
    }
}
