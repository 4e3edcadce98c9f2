// Numbers: half precision in words, exponential, logarithm, sigmoid.
//
// What WGSL leaves open is computed here: its conversions may round either way, its exp may be off by many units, and an
// implementation may assume that infinities do not occur. So bits are tested as integers.

const LOWEST: f32 = -3.40282346e38;
const MINUS_INFINITY: u32 = 0xff800000u;
const LARGEST_BIAS: f32 = 8e37;

fn is_minus_infinity(x: f32) -> bool {
    return bitcast<u32>(x) == MINUS_INFINITY;
}

// Neither infinite nor NaN.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// A value that no compiler knows anything about: sums around it are taken as they are written.
fn opaque(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ params.zero);
}

// The f16 in the low half of a word.
fn from_f16(word: u32) -> f32 {
    return unpack2x16float(word).x;
}

fn from_bf16(word: u32) -> f32 {
    return bitcast<f32>(word << 16u);
}

// Nearest f16, ties to even. Without branches, as all that is written out many times: compilers take long over those.
fn to_f16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let magnitude = bits & 0x7fffffffu;
    // From 2^-14 on: a carry goes into the exponent, up to infinity.
    let normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u;
    // Below, the spacing is 2^-24.
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let shift = u32(clamp(126 - i32(magnitude >> 23u), 1, 25));
    let kept = mantissa >> shift;
    let lost = mantissa & ((1u << shift) - 1u);
    let half = 1u << (shift - 1u);
    let up = lost > half || (lost == half && (kept & 1u) == 1u);
    let small = kept + select(0u, 1u, up);
    // 2^16 and beyond, or NaN.
    let special = select(0x7c00u, 0x7e00u, magnitude > 0x7f800000u);
    let finite = select(normal, small, magnitude < 0x38800000u);
    return ((bits >> 16u) & 0x8000u) | select(finite, special, magnitude >= 0x47800000u);
}

// Nearest bfloat16, ties to even.
fn to_bf16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

// e^x for x <= 80: within 2 units in the last place down to 2^-126, 0 below. NaN stays.
fn exp_of(x: f32) -> f32 {
    if (NATIVE_EXP) {
        return select(exp(x), 0.0, x < -87.3);
    }
    // x = n ln 2 + f. The high part of ln 2 has 9 bits, so that its product with n is exact.
    let n = floor(fma(x, 1.44269504, 0.5));
    let f = fma(n, 2.12194440e-4, fma(n, -0.693359375, x));
    var p = fma(f, 1.9875691500e-4, 1.3981999507e-3);
    p = fma(p, f, 8.3334519073e-3);
    p = fma(p, f, 4.1665795894e-2);
    p = fma(p, f, 1.6666665459e-1);
    p = fma(p, f, 5.0000001201e-1);
    let power = bitcast<f32>(u32(i32(n) + 127) << 23u);
    return select(fma(p * f, f, f + 1.0) * power, 0.0, x < -87.3);
}

// ln x of a normal number.
fn log_of(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    // x = 2^n m with m between sqrt(1/2) and sqrt(2).
    let shifted = bits - 0x3f3504f3u;
    let n = f32(bitcast<i32>(shifted) >> 23u);
    let f = bitcast<f32>((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0;
    let square = f * f;
    var p = fma(f, 7.0376836292e-2, -1.1514610310e-1);
    p = fma(p, f, 1.1676998740e-1);
    p = fma(p, f, -1.2420140846e-1);
    p = fma(p, f, 1.4249322787e-1);
    p = fma(p, f, -1.6668057665e-1);
    p = fma(p, f, 2.0000714765e-1);
    p = fma(p, f, -2.4999993993e-1);
    p = fma(p, f, 3.3333331174e-1);
    let tail = fma(n, -2.12194440e-4, fma(p * f, square, -0.5 * square));
    return fma(n, 0.693359375, f + tail);
}

fn sigmoid(x: f32) -> f32 {
    let small = exp_of(-abs(x));
    return select(small, 1.0, x >= 0.0) / (1.0 + small);
}

fn sum4(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}
