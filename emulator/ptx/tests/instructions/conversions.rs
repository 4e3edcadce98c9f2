//! Conversions between integers and floats.

use crate::harness::{check, f};

const NEG: fn(i32) -> u32 = i32::cast_unsigned;
const NAN: u32 = 0x7FFF_FFFF;

#[test]
fn widths() {
    check(
        "cvt.s32.s8 %r20, %r0; cvt.u32.u8 %r21, %r0; cvt.s32.s16 %r22, %r0; cvt.u32.u16 %r23, %r0;",
        &[([0x1234_80FF], [u32::MAX, 0xFF, 0xFFFF_80FF, 0x80FF])],
    );
    check(
        "cvt.u16.u32 %h0, %r0; cvt.s16.s8 %h1, %h0; mov.b32 %r20, {%h0, %h1}; cvt.s64.s32 %d0, %r0; mov.b64 {%r21, %r22}, %d0; cvt.u64.u32 %d1, %r0; mov.b64 {%r23, %r24}, %d1; cvt.u32.u64 %r25, %d0;",
        &[([0x8001_0080], [0xFF80_0080, 0x8001_0080, u32::MAX, 0x8001_0080, 0, 0x8001_0080])],
    );
    // Sign extension inside one register, as compilers write it.
    check(
        "mov.b64 %d0, {%r0, %r1}; cvt.s64.s8 %d1, %d0; mov.b64 {%r20, %r21}, %d1; cvt.s64.s32 %d2, %d0; mov.b64 {%r22, %r23}, %d2;",
        &[([0x8000_0080, 7], [0xFFFF_FF80, u32::MAX, 0x8000_0080, u32::MAX])],
    );
    check(
        "cvt.sat.s8.s32 %r20, %r0; cvt.sat.u8.s32 %r21, %r0; cvt.sat.u16.s32 %h0, %r0; cvt.u32.u16 %r22, %h0;",
        &[([300], [127, 255, 300]), ([NEG(-300)], [NEG(-128), 0, 0])],
    );
}

#[test]
fn floats_to_integers() {
    let give = "mov.b32 %f0, %r0;";
    check(
        &format!(
            "{give} cvt.rni.s32.f32 %r20, %f0; cvt.rzi.s32.f32 %r21, %f0; cvt.rmi.s32.f32 %r22, %f0; cvt.rpi.s32.f32 %r23, %f0; cvt.rzi.u32.f32 %r24, %f0;"
        ),
        &[
            ([f(2.5)], [2, 2, 2, 3, 2]),
            ([f(-2.5)], [NEG(-2), NEG(-2), NEG(-3), NEG(-2), 0]),
            ([f(3e10)], [i32::MAX as u32, i32::MAX as u32, i32::MAX as u32, i32::MAX as u32, u32::MAX]),
            ([NAN], [0, 0, 0, 0, 0]),
        ],
    );
    check(
        &format!(
            "{give} cvt.rzi.s64.f32 %d0, %f0; mov.b64 {{%r20, %r21}}, %d0; cvt.rzi.u16.f32 %h0, %f0; cvt.u32.u16 %r22, %h0;"
        ),
        &[
            ([f(-5e9)], [(-5_000_000_000i64) as u32, ((-5_000_000_000i64) >> 32) as u32, 0]),
            ([NAN], [0, 0x8000_0000, 0]),
            ([f(70000.0)], [70000, 0, 0xFFFF]),
        ],
    );
    check(
        &format!(
            "{give} cvt.rni.f32.f32 %f1, %f0; cvt.rmi.f32.f32 %f2, %f0; cvt.sat.f32.f32 %f3, %f0; mov.b32 %r20, %f1; mov.b32 %r21, %f2; mov.b32 %r22, %f3;"
        ),
        &[([f(1.5)], [f(2.0), f(1.0), f(1.0)]), ([f(-0.25)], [f(-0.0), f(-1.0), 0]), ([NAN], [NAN, NAN, 0])],
    );
}

#[test]
fn integers_to_floats() {
    check(
        "cvt.rn.f32.s32 %f0, %r0; cvt.rz.f32.u32 %f1, %r0; cvt.rp.f32.s32 %f2, %r0; cvt.rm.f32.s32 %f3, %r0; mov.b32 %r20, %f0; mov.b32 %r21, %f1; mov.b32 %r22, %f2; mov.b32 %r23, %f3;",
        &[
            // 2^24 + 1 is a tie; 2^24 + 3 too.
            ([0x0100_0001], [f(16_777_216.0), f(16_777_216.0), f(16_777_218.0), f(16_777_216.0)]),
            ([0x0100_0003], [f(16_777_220.0), f(16_777_218.0), f(16_777_220.0), f(16_777_218.0)]),
            ([NEG(-7)], [f(-7.0), f(4_294_967_040.0), f(-7.0), f(-7.0)]),
        ],
    );
    check(
        "mov.b64 %d0, {%r0, %r1}; cvt.rn.f32.u64 %f0, %d0; cvt.rn.f32.s64 %f1, %d0; cvt.rn.f64.s64 %e0, %d0; mov.b64 {%r22, %r23}, %e0; mov.b32 %r20, %f0; mov.b32 %r21, %f1;",
        &[
            // Above a tie by one unit: f64 in between would round twice.
            (
                [1, 0x8000_0080],
                [f(9_223_373_136_366_403_584.0), f(-9_223_371_487_098_961_920.0), 0xE000_0000, 0xC3DF_FFFF],
            ),
        ],
    );
    check(
        "mov.b32 {%h0, %h1}, %r0; cvt.rn.f32.s16 %f0, %h0; cvt.rn.f16.u16 %h2, %h1; mov.b32 %r20, %f0; cvt.u32.u16 %r21, %h2;",
        &[
            // 2049 is a tie in f16.
            ([0x0801_FFFE], [f(-2.0), 0x6800]),
        ],
    );
}

#[test]
fn halves() {
    let give = "mov.b32 %f0, %r0;";
    check(
        &format!(
            "{give} cvt.rn.f16.f32 %h0, %f0; cvt.rz.f16.f32 %h1, %f0; mov.b32 %r20, {{%h0, %h1}}; cvt.rn.bf16.f32 %h2, %f0; cvt.f32.f16 %f1, %h0; mov.b32 %r21, %f1; cvt.u32.u16 %r22, %h2;"
        ),
        &[
            ([f(1.0 + 0.75 / 1024.0)], [0x3C00_3C01, f(1.0 + 1.0 / 1024.0), 0x3F80]),
            ([f(1.0 + 1.0 / 256.0)], [0x3C04_3C04, f(1.0 + 1.0 / 256.0), 0x3F80]),
            ([f(1.0 + 3.0 / 256.0)], [0x3C0C_3C0C, f(1.0 + 3.0 / 256.0), 0x3F82]),
            ([f(70000.0)], [0x7BFF_7C00, f(f32::INFINITY), 0x4789]),
            ([NAN], [0x7FFF_7FFF, NAN, 0x7FFF]),
            ([f(-6e-8)], [0x8001_8001, f(-1.0 / 16_777_216.0), 0xB381]),
        ],
    );
    check(
        "mov.b32 %f0, %r0; mov.b32 %f1, %r1; cvt.rn.bf16x2.f32 %r20, %f0, %f1; cvt.rn.f16x2.f32 %r21, %f0, %f1; cvt.rz.bf16x2.f32 %r22, %f0, %f1; cvt.rn.relu.bf16x2.f32 %r23, %f0, %f1;",
        &[
            // The first source goes above.
            ([f(1.0), f(-2.0)], [0x3F80_C000, 0x3C00_C000, 0x3F80_C000, 0x3F80_0000]),
            ([0x3F80_FFFF, NAN], [0x3F81_7FFF, 0x3C08_7FFF, 0x3F80_7FFF, 0x3F81_7FFF]),
            ([f(f32::INFINITY), f(f32::MAX)], [0x7F80_7F80, 0x7C00_7C00, 0x7F80_7F7F, 0x7F80_7F80]),
        ],
    );
}

#[test]
fn tf32() {
    // Half a unit of the 10-bit fraction goes away from zero.
    check(
        "mov.b32 %f0, %r0; cvt.rna.tf32.f32 %r20, %f0;",
        &[
            ([0x3F80_1000], [0x3F80_2000]),
            ([0x3F80_0FFF], [0x3F80_0000]),
            ([0xBF80_3000], [0xBF80_4000]),
            ([0x7F80_0000], [0x7F80_0000]),
        ],
    );
}
