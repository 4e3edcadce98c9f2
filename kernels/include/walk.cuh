// The walk of a block over tiles of keys: which tile comes next, and which of its keys key mask and lengths keep.
#pragma once

#include "attention.cuh"

// A tile of keys that some query may see.
struct KeyTile {
    i64 key;     // its first key; the end of all keys behind the last tile
    u64 keeps;   // bit i: key + i exists, is counted by lengths and kept by the key mask
    int cover;   // of causality, window and segments: PARTIAL or FULL; PARTIAL where the sequence ends
};

// Visits the tiles of `tile_keys` keys that queries `query .. query + queries` may see, in ascending order; others are
// skipped. Every warp walks for itself, and all alike. What the key mask says is read one tile ahead:
//
//     for (KeyWalk walk(...); !walk.done(); walk.advance()) ... walk.tile ...
template <int tile_keys> struct KeyWalk {
    static_assert(tile_keys <= 64 && tile_keys <= 2 * WARP_THREADS, "a lane looks after two keys at most");
    static constexpr int looks = tile_keys > WARP_THREADS ? 2 : 1;

    const AttentionInputs& inputs;
    Position at;
    i64 query;
    int queries;
    i64 end;                              // keys that exist and are counted by lengths
    KeyTile tile;                         // where it is
    i64 next_key;                         // the tile after it, and
    const u8* next_mask;                  // what the key mask says of the lane's first key of that, and
    u32 next_keeps[looks];                // not 0 where its keys lane and lane + WARP_THREADS are kept
    i32 lowest_segment, highest_segment;  // of the queries

    DEVICE KeyWalk(const AttentionInputs& inputs, const Position& at, i64 query, int queries)
        : inputs(inputs), at(at), query(query), queries(queries), next_key(first_tile()) {
        const i64 length = kv_length(inputs, at);
        end = length < inputs.seqlen_k ? length : inputs.seqlen_k;
        if constexpr (SEGMENTS) segment_range(inputs.q_segments, query, queries, lowest_segment, highest_segment);
        if constexpr (KEY_MASK) {
            const Operand& mask = inputs.key_mask;
            next_mask = (const u8*)mask.data + at.batch * mask.strides[0] + at.row * mask.strides[1] +
                        (next_key + lane_index()) * mask.strides[2];
        }
        read_next();
        advance();
    }

    // The tile of the first key that the first query sees: below it no query sees anything.
    DEVICE i64 first_tile() const {
        if constexpr (POSITIONS) {
            // The least distance of all comes first: a window without an end would overflow.
            const i64 nearest = distance(inputs, query, 0);
            if (inputs.lowest_distance > nearest) return (inputs.lowest_distance - nearest) / tile_keys * tile_keys;
        }
        return 0;
    }

    DEVICE bool done() const { return tile.key >= end; }

    // Keys from `key` on that count, in a tile.
    DEVICE int keys_from(i64 key) const { return end - key < tile_keys ? (int)(end - key) : tile_keys; }

    // Starts reading what the mask says of the next tile.
    DEVICE void read_next() {
        if constexpr (KEY_MASK) {
            const int keys = next_key < end ? keys_from(next_key) : 0;
            const i64 stride = inputs.key_mask.strides[2];
#pragma unroll
            for (int i = 0; i < looks; i++) {
                const int key = lane_index() + i * WARP_THREADS;
                next_keeps[i] = load_byte_or_zero(next_mask + i * WARP_THREADS * stride, key < keys);
            }
            next_mask += tile_keys * stride;
        }
    }

    // Goes to the next tile that shows something, or behind all.
    DEVICE void advance() {
        for (;;) {
            tile = {next_key, 0, next_key + tile_keys <= inputs.seqlen_k ? FULL : PARTIAL};
            if (tile.key >= end) return;
            const int keys = keys_from(tile.key);
            if constexpr (KEY_MASK) {
                tile.keeps = warp_ballot(next_keeps[0] != 0);
                if constexpr (looks > 1) tile.keeps |= (u64)warp_ballot(next_keeps[1] != 0) << 32;
            } else {
                tile.keeps = ~0ull >> (64 - keys);
            }
            next_key += tile_keys;
            read_next();
            if (KEY_MASK && tile.keeps == 0) continue;
            if constexpr (POSITIONS) {
                const AttentionInputs& again = read_again(inputs);
                const int cover = position_cover(again, query, queries, tile.key, keys);
                tile.cover = cover < tile.cover ? cover : tile.cover;
                if (cover == EMPTY) {
                    if (distance(again, query + queries - 1, tile.key) > again.highest_distance) next_key = end;
                    continue;
                }
            }
            if constexpr (SEGMENTS) {
                const int cover = segment_cover(keys);
                if (cover == EMPTY) continue;
                tile.cover = cover < tile.cover ? cover : tile.cover;
            }
            return;
        }
    }

    DEVICE int segment_cover(int keys) const {
        i32 lowest, highest;
        segment_range(read_again(inputs).k_segments, tile.key, keys, lowest, highest);
        if (highest < lowest_segment || highest_segment < lowest) return EMPTY;
        return lowest == highest && lowest_segment == highest_segment ? FULL : PARTIAL;
    }

    // Lowest and highest id of a range, the same in every lane.
    DEVICE void segment_range(const Operand& ids, i64 first, int count, i32& lowest, i32& highest) const {
        lowest = 0x7fffffff;
        highest = -0x7fffffff - 1;
        for (int i = lane_index(); i < count; i += WARP_THREADS) {
            const i32 id = segment(ids, at, first + i);
            lowest = id < lowest ? id : lowest;
            highest = id > highest ? id : highest;
        }
#pragma unroll
        for (int mask = WARP_THREADS / 2; mask > 0; mask /= 2) {
            const i32 low = (i32)shuffle_xor((u32)lowest, mask), high = (i32)shuffle_xor((u32)highest, mask);
            lowest = low < lowest ? low : lowest;
            highest = high > highest ? high : highest;
        }
    }
};
