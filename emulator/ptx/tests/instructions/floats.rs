//! Float instructions: rounding, NaN, subnormals, approximations, 16-bit types.

use crate::harness::{check, f, warp};

const F2: &str = "mov.b32 %f0, %r0; mov.b32 %f1, %r1;";
const F3: &str = "mov.b32 %f0, %r0; mov.b32 %f1, %r1; mov.b32 %f2, %r2;";
const OUT: &str = "mov.b32 %r20, %f20; mov.b32 %r21, %f21; mov.b32 %r22, %f22; mov.b32 %r23, %f23;";
const NAN: u32 = 0x7FFF_FFFF;
const ULP: f32 = f32::EPSILON;

#[test]
fn directions_of_rounding() {
    // 1 + a quarter, a half, three quarters of a unit.
    check(
        &format!(
            "{F2} add.rn.f32 %f20, %f0, %f1; add.rz.f32 %f21, %f0, %f1; add.rm.f32 %f22, %f0, %f1; add.rp.f32 %f23, %f0, %f1; {OUT}"
        ),
        &[
            ([f(1.0), f(ULP / 4.0)], [f(1.0), f(1.0), f(1.0), f(1.0 + ULP)]),
            ([f(1.0), f(ULP * 0.75)], [f(1.0 + ULP), f(1.0), f(1.0), f(1.0 + ULP)]),
            ([f(-1.0), f(-ULP / 2.0)], [f(-1.0), f(-1.0), f(-1.0 - ULP), f(-1.0)]),
            ([f(1.0), f(1e-30)], [f(1.0), f(1.0), f(1.0), f(1.0 + ULP)]),
        ],
    );
    check(
        &format!(
            "{F2} mul.rn.f32 %f20, %f0, %f1; mul.rz.f32 %f21, %f0, %f1; mul.rm.f32 %f22, %f0, %f1; mul.rp.f32 %f23, %f0, %f1; {OUT}"
        ),
        &[
            // (1 + u)^2 = 1 + 2u + u^2
            (
                [f(1.0 + ULP), f(1.0 + ULP)],
                [f(1.0 + 2.0 * ULP), f(1.0 + 2.0 * ULP), f(1.0 + 2.0 * ULP), f(1.0 + 3.0 * ULP)],
            ),
        ],
    );
    check(
        &format!(
            "{F2} div.rn.f32 %f20, %f0, %f1; div.rz.f32 %f21, %f0, %f1; div.rm.f32 %f22, %f0, %f1; div.rp.f32 %f23, %f0, %f1; {OUT}"
        ),
        &[
            // 1/3 = 0x3EAAAAAA.AAA..., so that nearest is up.
            ([f(1.0), f(3.0)], [0x3EAA_AAAB, 0x3EAA_AAAA, 0x3EAA_AAAA, 0x3EAA_AAAB]),
            ([f(-1.0), f(3.0)], [0xBEAA_AAAB, 0xBEAA_AAAA, 0xBEAA_AAAB, 0xBEAA_AAAA]),
            ([f(6.0), f(3.0)], [f(2.0), f(2.0), f(2.0), f(2.0)]),
        ],
    );
    check(
        &format!(
            "{F2} sqrt.rn.f32 %f20, %f0; sqrt.rz.f32 %f21, %f0; sqrt.rp.f32 %f22, %f0; rcp.rz.f32 %f23, %f1; {OUT}"
        ),
        &[
            // sqrt(2) = 0x3FB504F3.33...
            ([f(2.0), f(3.0)], [0x3FB5_04F3, 0x3FB5_04F3, 0x3FB5_04F4, 0x3EAA_AAAA]),
        ],
    );
}

#[test]
fn fused_products_round_once() {
    // (1 + u)^2 - (1 + 2u) = u^2, which a product rounded first would lose.
    check(
        &format!(
            "{F3} fma.rn.f32 %f20, %f0, %f1, %f2; fma.rz.f32 %f21, %f0, %f1, %f2; fma.rm.f32 %f22, %f0, %f1, %f2; fma.rp.f32 %f23, %f0, %f1, %f2; {OUT}"
        ),
        &[
            ([f(1.0 + ULP), f(1.0 + ULP), f(-1.0 - 2.0 * ULP)], [f(ULP * ULP); 4]),
            // A tie of the sum that the product's tail breaks: double rounding would go to even.
            ([f(1.0 + ULP), f(2f32.powi(-24) * (1.0 + ULP)), f(1.0)], [f(1.0 + ULP), f(1.0), f(1.0), f(1.0 + ULP)]),
            ([f(1.0), f(2f32.powi(-24)), f(1.0)], [f(1.0), f(1.0), f(1.0), f(1.0 + ULP)]),
        ],
    );
}

#[test]
fn software_fma_agrees_with_the_library() {
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Exponents close together, so that the addend meets the product's tail.
        (state >> 32) as u32 & 0x83FF_FFFF | 0x3C00_0000
    };
    for _ in 0..200 {
        let inputs: [[u32; 32]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| next()));
        let found = warp(&format!("{F3} fma.rn.f32 %f20, %f0, %f1, %f2; mov.b32 %r20, %f20;"), &inputs, 1);
        for lane in 0..32 {
            let [a, b, c] = inputs.map(|values| f32::from_bits(values[lane]));
            assert_eq!(f32::from_bits(found[0][lane]), a.mul_add(b, c), "{a} * {b} + {c}");
        }
    }
}

#[test]
fn subnormals_and_ftz() {
    let small = 0x0000_1000;
    check(
        &format!(
            "{F2} add.f32 %f20, %f0, %f1; add.ftz.f32 %f21, %f0, %f1; mul.ftz.f32 %f22, %f0, %f1; abs.ftz.f32 %f23, %f0; {OUT}"
        ),
        &[([small, small], [0x2000, 0, 0, 0]), ([0x8000_0000 | small, 0], [0x8000_1000, 0, 0x8000_0000, 0])],
    );
    check(
        &format!(
            "{F3} fma.rn.ftz.f32 %f20, %f0, %f1, %f2; fma.rn.f32 %f21, %f0, %f1, %f2; mov.b32 %r20, %f20; mov.b32 %r21, %f21;"
        ),
        &[([f(1e-20), f(1e-20), small], [0, 0x1000 + f(1e-40)])],
    );
    check(
        &format!(
            "{F2} setp.gt.ftz.f32 %p1, %f0, 0f00000000; setp.gt.f32 %p2, %f0, 0f00000000; selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 1, 0, %p2;"
        ),
        &[([small, 0], [0, 1])],
    );
}

#[test]
fn smaller_and_larger() {
    check(
        &format!(
            "{F2} min.f32 %f20, %f0, %f1; max.f32 %f21, %f0, %f1; min.NaN.f32 %f22, %f0, %f1; max.NaN.f32 %f23, %f0, %f1; {OUT}"
        ),
        &[
            ([f(1.0), f(-2.0)], [f(-2.0), f(1.0), f(-2.0), f(1.0)]),
            ([f(0.0), f(-0.0)], [f(-0.0), f(0.0), f(-0.0), f(0.0)]),
            ([f(-0.0), f(0.0)], [f(-0.0), f(0.0), f(-0.0), f(0.0)]),
            ([NAN, f(3.0)], [f(3.0), f(3.0), NAN, NAN]),
            ([f(3.0), 0xFFC0_0001], [f(3.0), f(3.0), NAN, NAN]),
            ([NAN, NAN], [NAN; 4]),
            ([f(f32::NEG_INFINITY), f(1.0)], [f(f32::NEG_INFINITY), f(1.0), f(f32::NEG_INFINITY), f(1.0)]),
        ],
    );
}

#[test]
fn signs_and_saturation() {
    check(
        &format!(
            "{F2} neg.f32 %f20, %f0; abs.f32 %f21, %f0; copysign.f32 %f22, %f0, %f1; add.sat.f32 %f23, %f0, %f1; {OUT}"
        ),
        &[
            ([f(-0.25), f(0.5)], [f(0.25), f(0.25), f(-0.5), f(0.25)]),
            ([f(3.0), f(-9.0)], [f(-3.0), f(3.0), f(9.0), 0]),
            ([NAN, f(1.0)], [0xFFFF_FFFF, NAN, f(1.0), 0]),
        ],
    );
    check(
        &format!("{F2} sub.f32 %f20, %f0, %f1; mov.b32 %r20, %f20;"),
        &[([f(f32::INFINITY), f(f32::INFINITY)], [NAN])],
    );
}

#[test]
fn unordered_comparisons() {
    let body = format!("{F2} setp.lt.f32 %p1, %f0, %f1; setp.ltu.f32 %p2, %f0, %f1; setp.ne.f32 %p3, %f0, %f1; setp.neu.f32 %p4, %f0, %f1; setp.num.f32 %p5, %f0, %f1; setp.nan.f32 %p6, %f0, %f1;
        selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 1, 0, %p2; selp.u32 %r22, 1, 0, %p3; selp.u32 %r23, 1, 0, %p4; selp.u32 %r24, 1, 0, %p5; selp.u32 %r25, 1, 0, %p6;");
    check(
        &body,
        &[
            ([f(1.0), f(2.0)], [1, 1, 1, 1, 1, 0]),
            ([f(1.0), NAN], [0, 1, 0, 1, 0, 1]),
            ([f(0.0), f(-0.0)], [0, 0, 0, 0, 1, 0]),
        ],
    );
}

#[test]
fn approximations_are_right_to_a_unit() {
    let body = format!("{F2} ex2.approx.ftz.f32 %f20, %f0; lg2.approx.f32 %f21, %f1; rcp.approx.ftz.f32 %f22, %f1; rsqrt.approx.f32 %f23, %f1; {OUT}
        sqrt.approx.f32 %f24, %f1; tanh.approx.f32 %f25, %f0; div.full.f32 %f26, %f0, %f1; mov.b32 %r24, %f24; mov.b32 %r25, %f25; mov.b32 %r26, %f26;");
    check(
        &body,
        &[
            ([f(3.0), f(16.0)], [f(8.0), f(4.0), f(0.0625), f(0.25), f(4.0), f(3f64.tanh() as f32), f(0.1875)]),
            (
                [f(-0.5), f(2.0)],
                [0x3F35_04F3, f(1.0), f(0.5), 0x3F35_04F3, 0x3FB5_04F3, f((-0.5f64).tanh() as f32), f(-0.25)],
            ),
            (
                [f(-200.0), f(0.0)],
                [0, f(f32::NEG_INFINITY), f(f32::INFINITY), f(f32::INFINITY), 0, f(-1.0), f(f32::NEG_INFINITY)],
            ),
            ([f(f32::NEG_INFINITY), f(f32::INFINITY)], [0, f(f32::INFINITY), 0, 0, f(f32::INFINITY), f(-1.0), NAN]),
        ],
    );
}

#[test]
fn doubles() {
    let body = "mov.b64 %e0, {%r0, %r1}; mov.f64 %e1, 0d4008000000000000; fma.rn.f64 %e2, %e0, %e1, %e1; div.rn.f64 %e3, %e2, %e1; min.f64 %e4, %e3, %e1; cvt.rn.f32.f64 %f0, %e4; cvt.rzi.s32.f64 %r21, %e2; mov.b32 %r20, %f0;";
    let bits = 1.5f64.to_bits();
    check(body, &[([bits as u32, (bits >> 32) as u32], [f(2.5), 7])]);
}

#[test]
fn halves() {
    // 1 + 2^-11 is a tie in f16 (to even: down), 3 * 2^-11 a tie (up).
    let give = "mov.b32 {%h0, %h1}, %r0; mov.b32 {%h2, %h3}, %r1; mov.b32 {%h4, %h5}, %r2;";
    check(
        &format!(
            "{give} add.f16 %h6, %h0, %h2; mul.rn.f16 %h7, %h0, %h2; mov.b32 %r20, {{%h6, %h7}}; fma.rn.f16 %h8, %h0, %h2, %h4; max.f16 %h9, %h0, %h2; mov.b32 %r21, {{%h8, %h9}};"
        ),
        &[
            ([0x3C00, 0x1000, 0], [0x1000_3C00, 0x3C00_1000]),
            ([0x3C00, 0x1600, 0x8000], [0x1600_3C02, 0x3C00_1600]),
            ([0x4000, 0x4200, 0x3C00], [0x4600_4500, 0x4200_4700]),
        ],
    );
    check(
        "fma.rn.f16x2 %r20, %r0, %r1, %r2; add.f16x2 %r21, %r0, %r1; neg.f16x2 %r22, %r0; min.f16x2 %r23, %r0, %r1;",
        &[([0x4000_3C00, 0x4200_4000, 0x3C00_3C00], [0x4700_4200, 0x4500_4200, 0xC000_BC00, 0x4000_3C00])],
    );
    check(
        "fma.rn.bf16x2 %r20, %r0, %r1, %r2; max.bf16x2 %r21, %r0, %r1; fma.rn.relu.bf16x2 %r22, %r0, %r1, %r2; abs.bf16x2 %r23, %r2;",
        &[
            // 1 * 2 - 3 = -1 below, 2 * 3 + 1 = 7 above.
            ([0x4000_3F80, 0x4040_4000, 0x3F80_C040], [0x40E0_BF80, 0x4040_4000, 0x40E0_0000, 0x3F80_4040]),
        ],
    );
    check(
        "tanh.approx.bf16x2 %r20, %r0; ex2.approx.ftz.bf16x2 %r21, %r0;",
        &[([0x0000_4040], [0x0000_3F7F, 0x3F80_4100])],
    );
}
