// Tiles on their way from global to shared memory.
//
// A tile has rows of one operand: its channels are read in 16-byte pieces, asynchronously, where `pieces` says that the
// operand allows it, and one by one otherwise. Each thread copies the same pieces every time, and may touch them up, once
// they have arrived, before other threads see them.
#pragma once

#include "backward.cuh"
#include "fragment.cuh"
#include "rows.cuh"

// Rows in their own order.
struct InOrder {
    DEVICE int operator()(int row) const { return row; }
};

template <class T, int channels, int rows, int threads, bool pieces> struct Stage {
    using Layout = Tile<T, channels>;
    static constexpr int per_piece = 16 / (int)sizeof(T);
    static constexpr int count = rows * Layout::pieces;
    static constexpr int turns = (count + threads - 1) / threads;

    // A thread of several turns computes their addresses when it needs them: kept for all tiles, they would take registers.
    static constexpr bool many = turns > 1;

    // Calls f(turn, row, piece) for each piece of this thread.
    template <class F> static DEVICE void each(F f) {
        const int thread = many ? opaque(thread_index()) : thread_index();
#pragma unroll
        for (int turn = 0; turn < turns; turn++) {
            const int index = thread + turn * threads;
            if (count % threads == 0 || index < count) f(turn, index / Layout::pieces, index % Layout::pieces);
        }
    }

    static DEVICE Piece join(const float (&x)[4]) { return {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}}; }
    template <class U> static DEVICE Piece join(const U (&x)[8]) {
        Piece y;
#pragma unroll
        for (int i = 0; i < 4; i++) y.words[i] = x[2 * i].bits | (u32)x[2 * i + 1].bits << 16;
        return y;
    }

    // Writes zeros over the pieces of this thread whose row `excluded` names.
    template <class Excluded> static DEVICE void clear(u32 tile, Excluded excluded) {
        each([&](int turn, int row, int piece) {
            if (excluded(turn)) store_shared_piece(tile + row * Layout::pitch + piece * 16, Piece{{0, 0, 0, 0}});
        });
    }
};

// A walk over tiles of neighbouring rows. `Order()(i)` is the row of the operand, counted from the tile's first, that becomes
// row i of the tile. Orders are sums of what bits of a row give: where a turn takes whole rows, as many
// as a power of two, a thread keeps the address of its first piece alone, and otherwise computes each address anew.
template <class StageT, class T, int channels, int rows, int threads, bool pieces, class Order = InOrder> struct StageWalk {
    using Stage = StageT;
    static constexpr int turn_rows = threads / Stage::Layout::pieces;
    static constexpr bool even = pieces && threads % Stage::Layout::pieces == 0 && (turn_rows & (turn_rows - 1)) == 0;
    static constexpr bool exact = channels > (Stage::Layout::pieces - 1) * Stage::per_piece;
    Rows<T> from;
    const T* source;
    int row;  // of the operand, that of the thread's first piece
    u32 to;   // where it goes, in the tile

    // From row `first` on.
    DEVICE void start(const Rows<T>& at, i64 first) {
        from = at;
        from.data += first * from.row_stride;
        source = from.data;
        if constexpr (even) {
            const int first = thread_index() / Stage::Layout::pieces, piece = thread_index() % Stage::Layout::pieces;
            row = opaque(Order()(first));
            to = opaque(first * Stage::Layout::pitch + piece * 16);
            source += row * from.row_stride + piece * Stage::per_piece;
        }
    }
    // To other rows, elements further on.
    DEVICE void shift(i64 elements) {
        source += STEP_BY_STEP<T, channels> ? opaque(elements) : elements;
        if constexpr (pieces) source = (const T*)opaque((i64)source);
    }
    // Starts the copy of the tile, from whose first row on `left` are left; i64 or int.
    template <class Count> DEVICE void fetch(u32 tile, Count left) const {
        fetch_kept(tile, [&](int, int row) { return row < left; });
    }
    // Starts the copy of the tile; rows of the operand of which `kept(turn, row)` says no become zeros.
    template <class Kept> DEVICE void fetch_kept(u32 tile, Kept kept) const {
        if constexpr (even) {
            // From turn to turn, so that only one distance takes registers; where there are many, it is computed for each tile.
            const T* at = source;
            const i64 row_stride = Stage::turns > 2 ? opaque(from.row_stride) : from.row_stride;
            const int first = Stage::turns > 1 ? opaque(row) : row;
#pragma unroll
            for (int turn = 0; turn < Stage::turns; turn++) {
                if (turn > 0) at = (const T*)opaque((i64)(at + (Order()(turn * turn_rows) - Order()((turn - 1) * turn_rows)) * row_stride));
                if (Stage::count % threads != 0 && thread_index() + turn * threads >= Stage::count) continue;
                const bool read = kept(turn, first + Order()(turn * turn_rows)) && (exact || thread_index() % Stage::Layout::pieces * Stage::per_piece < channels);
                copy_async(tile + to + turn * turn_rows * Stage::Layout::pitch, at, read ? 16 : 0);
            }
        } else {
            const i64 row_stride = opaque(from.row_stride), channel_stride = pieces ? 1 : opaque(from.channel_stride);
            Stage::each([&](int turn, int row, int piece) {
                const T* at = source + Order()(row) * row_stride;
                const u32 to_piece = tile + row * Stage::Layout::pitch + piece * 16;
                if constexpr (pieces) {
                    const bool read = kept(turn, Order()(row)) && piece * Stage::per_piece < channels;
                    copy_async(to_piece, read ? at + piece * Stage::per_piece : at, read ? 16 : 0);
                } else {
                    T elements[Stage::per_piece];
#pragma unroll
                    for (int i = 0; i < Stage::per_piece; i++) {
                        const int channel = piece * Stage::per_piece + i;
                        elements[i] = kept(turn, Order()(row)) && channel < channels ? at[channel * channel_stride] : from_f32<T>(0.0f);
                    }
                    store_shared_piece(to_piece, Stage::join(elements));
                }
            });
        }
    }
    // The same, and on to the next tile.
    template <class Count> DEVICE void next(u32 tile, Count left) {
        fetch(tile, left);
        shift(rows * from.row_stride);
    }
};

// A walk over lse, its low part and -delta of the queries of a row, tile by tile; those beyond the padded end are 0.
template <int queries, int threads> struct StatisticsWalk {
    static_assert(3 * queries / 4 <= threads, "a piece for each thread at most");
    const float* source;

    DEVICE void start(const BackwardParams& params, const Position& at, i64 first) {
        const i64 plane = params.inputs.batch * params.inputs.rows * params.inputs.heads * params.padded_queries;
        const int kind = thread_index() / (queries / 4), piece = thread_index() % (queries / 4);
        source = (const float*)params.statistics + kind * plane + statistics_row(params, at) + first + 4 * piece;
    }
    DEVICE void shift(i64 elements) { source += elements; }
    // Starts the copy of the tile, before the padded end of which there are `left` queries; pieces of four go `pitch` bytes apart.
    DEVICE void fetch(u32 to, i64 left, int pitch = 16) {
        if (thread_index() >= 3 * queries / 4) return;
        copy_async(to + thread_index() * pitch, source, 4 * (thread_index() % (queries / 4)) < left ? 16 : 0);
    }
    // The same, and on to the next tile.
    DEVICE void next(u32 to, i64 left, int pitch = 16) {
        fetch(to, left, pitch);
        shift(queries);
    }
};
