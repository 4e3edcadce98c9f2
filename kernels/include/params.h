// Arguments of the kernels: one struct each, passed by value; `src/params.rs` holds the same structs.
//
// Sizes and strides are 64-bit. An operand is an address and strides in elements; an axis that is broadcast, or has one
// entry only, has stride 0. Axes are those of the contract:
//   q, k, v, gate, out and their gradients   batch, row, position, head, channel
//   bias and its gradient                    batch, row, head, query, key
//   key_mask, q_segments, k_segments         batch, row, position
//   lse, lse_low                             batch, row, head, query
//   kv_lengths (i64)                         batch, row
#pragma once

#include "gpu.h"

constexpr int MAX_BIASES = 4;

struct Operand {
    u64 data;
    i64 strides[5];
};

// What both passes read.
struct AttentionInputs {
    Operand q;
    Operand k;
    Operand v;
    Operand biases[MAX_BIASES];
    Operand key_mask;      // u8, 0 excludes
    Operand q_segments;    // i32
    Operand k_segments;    // i32
    Operand kv_lengths;    // i64
    Operand gate;
    u64 alibi_slopes;      // f32 [heads]
    i64 batch;
    i64 rows;
    i64 seqlen_q;
    i64 seqlen_k;
    i64 heads;
    i64 group;             // query heads that share a key head
    i64 first_distance;    // position of key 0 minus position of query 0
    i64 lowest_distance;   // key minus query position that is visible, both ends included
    i64 highest_distance;
    float scale;           // softmax scale
    float scale_base2;     // softmax scale * log2(e)
};

struct ForwardParams {
    AttentionInputs inputs;
    Operand out;
    Operand lse;
    Operand lse_low;
    i64 first_block;       // blocks launched before this launch
};

// What the kernels of the backward pass share; `attention/README.md` says what each reads and writes.
struct BackwardParams {
    AttentionInputs inputs;
    Operand out;
    Operand lse;
    Operand lse_low;
    Operand d_out;
    Operand d_o;           // gradient of the output before the gate: d_out, or in the workspace
    Operand dq;
    Operand dk;
    Operand dv;
    Operand dbiases[MAX_BIASES];
    Operand d_gate;
    u64 statistics;        // f32 [3, batch, rows, heads, padded_queries]: lse, low part in base 2, -delta
    u64 uniform_sums;      // f32 [batch, rows, key heads, head_dim_v]: what empty rows give every dV
    u64 key_sums;          // f32 [query chunks, batch, rows, heads, seqlen_k]: sums of dS over queries
    u64 query_sums;        // f32 [batch, rows, heads, seqlen_q]: sums of dS over keys
    u64 dq_partials;       // f32 [key parts, batch, rows, heads, seqlen_q, head_dim]
    u64 dk_partials;       // f32 [query chunks, batch, rows, key heads, seqlen_k, head_dim]
    u64 dv_partials;       // f32 [query chunks, batch, rows, key heads, seqlen_k, head_dim_v]
    u64 dbias_partials;    // f32 [term chunks, batch, rows, heads, seqlen_q, seqlen_k], reduced axes with one entry
    i64 padded_queries;    // seqlen_q rounded up to 64
    i64 row_statistics;    // heads * padded_queries
    i64 row_queries;       // heads * seqlen_q
    i64 query_chunk;       // tiles of a part of the walk over queries
    i64 term_chunk;        // entries of a part of the walk over what shares a bias
    i64 first_block;
};

// Sums of partials, `attention/sums.cu`: to[i] = factor * sum over r of from[i, r].
struct SumParams {
    Operand to;
    u64 from;              // f32
    i64 sizes[5];          // of the result
    i64 from_strides[5];
    i64 summed[4];         // sizes of the axes that are summed, the last one fastest
    i64 summed_strides[4];
    float factor;
    float padding;
    i64 first_block;
};

struct MergeParams {
    Operand out;
    Operand lse;
    Operand lse_low;
    Operand acc_out;
    Operand acc_lse;
    Operand acc_lse_low;
    i64 batch;
    i64 rows;
    i64 seqlen_q;
    i64 heads;
    i64 head_dim_v;
    i64 first_block;
};

constexpr int MAX_ROPE_PAIRS = 128;

// The angle of a pair of channels at the first position, and from one to the next: 2^64 is one turn.
struct RopeAngle {
    u64 first;
    u64 step;
};

// Axes of source and destination: batch, row, position, head, channel.
struct RopeParams {
    Operand source;
    Operand destination;
    i64 batch;
    i64 rows;
    i64 seqlen;
    i64 heads;
    i64 head_dim;
    i64 pairs;
    RopeAngle angles[MAX_ROPE_PAIRS];
    i64 first_block;
};

constexpr int MAX_LAYOUT_AXES = 8;

// Axes from the outermost to the innermost; the kernels' constant AXES says how many there are.
struct RelayoutParams {
    u64 source;
    u64 destination;
    i64 sizes[MAX_LAYOUT_AXES];
    i64 source_strides[MAX_LAYOUT_AXES];
    i64 destination_strides[MAX_LAYOUT_AXES];
    i64 count;             // elements
    i64 first_block;
};

struct FillParams {
    u64 data;
    u64 value;             // the element's bits
    i64 sizes[MAX_LAYOUT_AXES];
    i64 strides[MAX_LAYOUT_AXES];
    i64 count;             // elements
    i64 first_block;
};

static_assert(sizeof(Operand) == 48, "Operand");
static_assert(sizeof(AttentionInputs) == 12 * 48 + 88, "AttentionInputs");
static_assert(sizeof(ForwardParams) == sizeof(AttentionInputs) + 3 * 48 + 8, "ForwardParams");
static_assert(sizeof(BackwardParams) == sizeof(AttentionInputs) + 13 * 48 + 112, "BackwardParams");
static_assert(sizeof(SumParams) == 48 + 8 + 10 * 8 + 8 * 8 + 16, "SumParams");
static_assert(sizeof(MergeParams) == 6 * 48 + 48, "MergeParams");
static_assert(sizeof(RopeParams) == 2 * 48 + 48 + 16 * 128 + 8, "RopeParams");
static_assert(sizeof(RelayoutParams) == 16 + 3 * 64 + 16, "RelayoutParams");
static_assert(sizeof(FillParams) == 16 + 2 * 64 + 16, "FillParams");
// NVRTC 12 has no offsetof; all members are 8 bytes or pairs of floats, so that sizes leave no room for padding.
#if !defined(__CUDACC_VER_MAJOR__) || __CUDACC_VER_MAJOR__ >= 13
static_assert(__builtin_offsetof(AttentionInputs, alibi_slopes) == 12 * 48, "AttentionInputs::alibi_slopes");
static_assert(__builtin_offsetof(AttentionInputs, scale) == 12 * 48 + 80, "AttentionInputs::scale");
static_assert(__builtin_offsetof(BackwardParams, statistics) == sizeof(AttentionInputs) + 13 * 48, "BackwardParams::statistics");
#endif
