//! Integer instructions against values worked out from the PTX manual.

use crate::harness::check;

const MIN: u32 = 0x8000_0000;
const NEG: fn(i32) -> u32 = i32::cast_unsigned;

#[test]
fn sums_and_products() {
    check(
        "add.s32 %r20, %r0, %r1; sub.u32 %r21, %r0, %r1;",
        &[([5, 7], [12, NEG(-2)]), ([u32::MAX, 2], [1, u32::MAX - 2])],
    );
    check(
        "add.sat.s32 %r20, %r0, %r1; sub.sat.s32 %r21, %r0, %r1;",
        &[([0x7FFF_FFFF, 1], [0x7FFF_FFFF, 0x7FFF_FFFE]), ([MIN, 1], [MIN + 1, MIN])],
    );
    check(
        "mul.lo.s32 %r20, %r0, %r1; mul.hi.s32 %r21, %r0, %r1; mul.hi.u32 %r22, %r0, %r1;",
        &[([NEG(-3), 5], [NEG(-15), u32::MAX, 4]), ([0x1_0000, 0x3_0000], [0, 3, 3])],
    );
    check(
        "mad.lo.s32 %r20, %r0, %r1, %r2; mad.hi.u32 %r21, %r0, %r1, %r2;",
        &[([7, 6, 8], [50, 8]), ([0x8000_0000, 4, 5], [5, 7])],
    );
    check("sad.s32 %r20, %r0, %r1, %r2; sad.u32 %r21, %r0, %r1, %r2;", &[([NEG(-1), 3, 10], [14, 6])]);
}

#[test]
fn wide_products_and_64_bits() {
    let out = "mov.b64 {%r20, %r21}, %d3;";
    check(&format!("mul.wide.s32 %d3, %r0, %r1; {out}"), &[([NEG(-2), 3], [NEG(-6), u32::MAX])]);
    check(&format!("mul.wide.u32 %d3, %r0, %r1; {out}"), &[([NEG(-2), 3], [0xFFFF_FFFA, 2])]);
    check(
        &format!("mul.wide.u32 %d1, %r0, 1; mad.wide.s32 %d3, %r0, %r1, %d1; {out}"),
        &[([4, NEG(-5)], [NEG(-16), u32::MAX])],
    );
    let pair = "mov.b64 %d1, {%r0, %r1}; mov.b64 %d2, {%r2, %r3};";
    check(&format!("{pair} add.s64 %d3, %d1, %d2; {out}"), &[([u32::MAX, 1, 1, 2], [0, 4])]);
    check(&format!("{pair} mul.lo.s64 %d3, %d1, %d2; {out}"), &[([0, 1, 7, 0], [0, 7]), ([3, 0, 5, 0], [15, 0])]);
    check(&format!("{pair} mul.hi.u64 %d3, %d1, %d2; {out}"), &[([0, 4, 0, 6], [24, 0])]);
    check(&format!("{pair} mul.hi.s64 %d3, %d1, %d2; {out}"), &[([NEG(-1), NEG(-1), 2, 0], [u32::MAX, u32::MAX])]);
    check(&format!("{pair} div.s64 %d3, %d1, %d2; {out}"), &[([NEG(-7), NEG(-1), 2, 0], [NEG(-3), u32::MAX])]);
    check(&format!("{pair} rem.u64 %d3, %d1, %d2; {out}"), &[([5, 1, 0, 1], [5, 0])]);
    check(&format!("{pair} min.s64 %d3, %d1, %d2; {out}"), &[([1, 0, 0, MIN], [0, MIN])]);
    check(&format!("{pair} shl.b64 %d3, %d1, %r2; {out}"), &[([1, 0, 33, 0], [0, 2]), ([1, 0, 64, 0], [0, 0])]);
    check(
        &format!("{pair} shr.s64 %d3, %d1, %r2; {out}"),
        &[([0, MIN, 36, 0], [NEG(-1) << 27, u32::MAX]), ([0, MIN, 99, 0], [u32::MAX, u32::MAX])],
    );
    check(
        &format!("{pair} and.b64 %d4, %d1, %d2; xor.b64 %d5, %d1, %d2; or.b64 %d3, %d4, %d5; {out}"),
        &[([12, 1, 10, 2], [14, 3])],
    );
}

#[test]
fn sixteen_bits() {
    let give = "mov.b32 {%h0, %h1}, %r0; mov.b32 {%h2, %h3}, %r1;";
    check(
        &format!("{give} add.s16 %h4, %h0, %h2; mul.lo.s16 %h5, %h1, %h3; mov.b32 %r20, {{%h4, %h5}};"),
        &[([0x0003_FFFF, 0x0005_0002], [0x000F_0001])],
    );
    check(
        &format!(
            "{give} mul.wide.s16 %r20, %h0, %h2; mul.wide.u16 %r21, %h0, %h2; max.s16 %h4, %h0, %h2; cvt.u32.u16 %r22, %h4;"
        ),
        &[([0xFFFE, 3], [NEG(-6), 0xFFFE * 3, 3])],
    );
    check(
        &format!("{give} shr.s16 %h4, %h0, 4; shr.u16 %h5, %h0, 4; mov.b32 %r20, {{%h4, %h5}};"),
        &[([0x8000, 0], [0x0800_F800])],
    );
}

#[test]
fn division() {
    check(
        "div.s32 %r20, %r0, %r1; rem.s32 %r21, %r0, %r1; div.u32 %r22, %r0, %r1; rem.u32 %r23, %r0, %r1;",
        &[
            ([7, 2], [3, 1, 3, 1]),
            ([NEG(-7), 2], [NEG(-3), NEG(-1), 0x7FFF_FFFC, 1]),
            ([MIN, u32::MAX], [MIN, 0, 0, MIN]),
        ],
    );
}

#[test]
fn order_and_sign() {
    check(
        "min.s32 %r20, %r0, %r1; max.s32 %r21, %r0, %r1; min.u32 %r22, %r0, %r1; max.u32 %r23, %r0, %r1;",
        &[([NEG(-1), 1], [NEG(-1), 1, 1, NEG(-1)])],
    );
    check(
        "abs.s32 %r20, %r0; neg.s32 %r21, %r0; not.b32 %r22, %r0; cnot.b32 %r23, %r0;",
        &[([NEG(-9)], [9, 9, 8, 0]), ([0], [0, 0, u32::MAX, 1]), ([MIN], [MIN, MIN, 0x7FFF_FFFF, 0])],
    );
}

#[test]
fn shifts() {
    check(
        "shl.b32 %r20, %r0, %r1; shr.u32 %r21, %r0, %r1; shr.s32 %r22, %r0, %r1;",
        &[
            ([0x8000_0001, 4], [0x10, 0x0800_0000, 0xF800_0000]),
            ([0x8000_0001, 32], [0, 0, u32::MAX]),
            ([0x8000_0001, 200], [0, 0, u32::MAX]),
        ],
    );
    check(
        "shf.l.wrap.b32 %r20, %r0, %r1, %r2; shf.r.wrap.b32 %r21, %r0, %r1, %r2; shf.l.clamp.b32 %r22, %r0, %r1, %r2; shf.r.clamp.b32 %r23, %r0, %r1, %r2;",
        &[
            ([0x1111_2222, 0x3333_4444, 8], [0x3344_4411, 0x4411_1122, 0x3344_4411, 0x4411_1122]),
            ([0x1111_2222, 0x3333_4444, 40], [0x3344_4411, 0x4411_1122, 0x1111_2222, 0x3333_4444]),
        ],
    );
}

#[test]
fn bits() {
    check(
        "popc.b32 %r20, %r0; clz.b32 %r21, %r0; brev.b32 %r22, %r0;",
        &[([0], [0, 32, 0]), ([0x0001_0003], [3, 15, 0xC000_8000])],
    );
    check(
        "bfind.u32 %r20, %r0; bfind.s32 %r21, %r0; bfind.shiftamt.u32 %r22, %r0;",
        &[
            ([0], [u32::MAX, u32::MAX, u32::MAX]),
            ([0x0000_8000], [15, 15, 16]),
            ([NEG(-2)], [31, 0, 0]),
            ([u32::MAX], [31, u32::MAX, 0]),
        ],
    );
    check(
        "mov.b64 %d1, {%r0, %r1}; popc.b64 %r20, %d1; clz.b64 %r21, %d1; bfind.u64 %r22, %d1; brev.b64 %d2, %d1; mov.b64 {%r23, %r24}, %d2;",
        &[([1, 0x10], [2, 27, 36, 0x0800_0000, MIN])],
    );
}

#[test]
fn bit_fields() {
    check(
        "bfe.u32 %r20, %r0, %r1, %r2; bfe.s32 %r21, %r0, %r1, %r2;",
        &[
            ([0x0000_0F50, 4, 4], [5, 5]),
            ([0x0000_0F50, 8, 4], [0xF, u32::MAX]),
            ([0x8000_0000, 28, 8], [8, NEG(-8)]),
            ([0x8000_0000, 40, 8], [0, u32::MAX]),
            ([0x1234_5678, 4, 0], [0, 0]),
            ([0x8234_5678, 0, 32], [0x8234_5678, 0x8234_5678]),
            ([0x8234_5678, 4, 32], [0x0823_4567, 0xF823_4567]),
        ],
    );
    check(
        "bfi.b32 %r20, %r0, %r1, %r2, %r3;",
        &[
            ([0xFFFF_FFFF, 0, 4, 8], [0xFF0]),
            ([0x5, 0xFFFF_FFFF, 28, 8], [0x5FFF_FFFF]),
            ([0x5, 0xAAAA_AAAA, 32, 8], [0xAAAA_AAAA]),
            ([0x5, 0xAAAA_AAAA, 0, 0], [0xAAAA_AAAA]),
        ],
    );
    check(
        "mov.b64 %d1, {%r0, %r1}; bfe.u64 %d2, %d1, 30, 4; cvt.u32.u64 %r20, %d2; bfi.b64 %d3, %d1, 0, 62, 2; mov.b64 {%r21, %r22}, %d3;",
        &[([0x8000_0001, 3], [0b1110, 0, 0x4000_0000])],
    );
}

#[test]
fn tables_and_bytes() {
    // Tables of the manual: a & b & c = 0x80, a | b | c = 0xFE, a ^ b ^ c = 0x96, (a & b) | c = 0xEA, a & ~c = 0x50.
    check(
        "lop3.b32 %r20, %r0, %r1, %r2, 0x80; lop3.b32 %r21, %r0, %r1, %r2, 0xFE; lop3.b32 %r22, %r0, %r1, %r2, 0x96; lop3.b32 %r23, %r0, %r1, %r2, 0xEA; lop3.b32 %r24, %r0, %r1, %r2, 0x50;",
        &[([0xF0F0, 0xCCCC, 0xAAAA], [0x8080, 0xFEFE, 0x9696, 0xEAEA, 0x5050])],
    );
    check(
        "prmt.b32 %r20, %r0, %r1, %r2;",
        &[
            ([0x3322_1100, 0x7766_5544, 0x5140], [0x5511_4400]),
            ([0x3322_1100, 0x7766_5544, 0x0123], [0x0011_2233]),
            ([0x80FF_7F01, 0x0000_0080, 0xCBA9], [0xFFFF_FF00]),
        ],
    );
}

#[test]
fn predicates() {
    check(
        "setp.lt.s32 %p1|%p2, %r0, %r1; setp.lt.u32 %p3, %r0, %r1; selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 1, 0, %p2; selp.u32 %r22, 1, 0, %p3;",
        &[([NEG(-1), 1], [1, 0, 0]), ([3, 3], [0, 1, 0])],
    );
    check("setp.ne.s32 %p4, %r2, 0; setp.ge.and.s32 %p1|%p2, %r0, %r1, %p4; setp.eq.or.s32 %p3, %r0, %r1, !%p4; setp.eq.xor.b32 %p5, %r0, %r1, %p4;
        selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 1, 0, %p2; selp.u32 %r22, 1, 0, %p3; selp.u32 %r23, 1, 0, %p5;", &[
        ([4, 3, 1], [1, 0, 0, 1]),
        ([2, 3, 1], [0, 1, 0, 1]),
        ([3, 3, 0], [0, 0, 1, 1]),
        ([3, 3, 1], [1, 0, 1, 0]),
    ]);
    check("setp.ne.s32 %p1, %r0, 0; setp.ne.s32 %p2, %r1, 0; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2; xor.pred %p5, %p1, %p2; not.pred %p6, %p1; mov.pred %p7, %p2;
        selp.u32 %r20, 1, 0, %p3; selp.u32 %r21, 1, 0, %p4; selp.u32 %r22, 1, 0, %p5; selp.u32 %r23, 1, 0, %p6; selp.u32 %r24, 1, 0, %p7;", &[
        ([0, 0], [0, 0, 0, 1, 0]),
        ([1, 0], [0, 1, 1, 0, 0]),
        ([1, 1], [1, 1, 0, 0, 1]),
    ]);
    check(
        "slct.b32.s32 %r20, %r0, %r1, %r2; mov.b32 %f2, %r2; slct.u32.f32 %r21, %r0, %r1, %f2;",
        &[([7, 8, 0], [7, 7]), ([7, 8, NEG(-1)], [8, 8]), ([7, 8, 0x8000_0000], [8, 7])],
    );
    check(
        "mov.pred %p1, -1; mov.pred %p2, 0; setp.eq.and.u32 %p3, %r0, %r0, %p1; selp.u32 %r20, 1, 0, %p3; selp.u32 %r21, 1, 0, %p2;",
        &[([3], [1, 0])],
    );
    check(
        "mov.u32 %r20, 5; setp.gt.u32 %p1, %r0, 2; @%p1 mov.u32 %r20, 9; @!%p1 add.u32 %r20, %r20, 1;",
        &[([3], [9]), ([1], [6])],
    );
}
