//! Every instruction set of this machine against plain arithmetic.

use super::*;

fn values(count: usize) -> Vec<f32> {
    (0..u16::try_from(count).unwrap()).map(|i| (f32::from(i) * 0.37).sin() * 30.0).collect()
}

fn apply<S: Simd>(s: S, input: &[f32], f: impl Fn(S::V) -> S::V) -> Vec<f32> {
    let mut output = vec![0.0; input.len()];
    for (from, to) in input.chunks_exact(S::LANES).zip(output.chunks_exact_mut(S::LANES)) {
        // SAFETY: both chunks have LANES elements.
        s.vectorize(|| unsafe { s.store(to.as_mut_ptr(), f(s.load(from.as_ptr()))) });
    }
    output
}

fn check<S: Simd>(s: S) {
    let x = values(64);
    let one = |f: &dyn Fn(S::V) -> S::V| apply(s, &x, f);
    let two = s.splat(2.0);
    assert_eq!(one(&|v| s.add(v, two)), x.iter().map(|v| v + 2.0).collect::<Vec<_>>());
    assert_eq!(one(&|v| s.sub(v, two)), x.iter().map(|v| v - 2.0).collect::<Vec<_>>());
    assert_eq!(one(&|v| s.mul(v, two)), x.iter().map(|v| v * 2.0).collect::<Vec<_>>());
    assert_eq!(one(&|v| s.div(v, two)), x.iter().map(|v| v / 2.0).collect::<Vec<_>>());
    assert_eq!(one(&|v| s.fma(v, two, two)), x.iter().map(|v| v * 2.0 + 2.0).collect::<Vec<_>>());
    assert_eq!(one(&|v| s.max(two, v)), x.iter().map(|v| v.max(2.0)).collect::<Vec<_>>());
    let floor = |v| s.max(two, v);
    let picked = one(&|v| s.select_eq(floor(v), two, s.splat(7.0), v));
    assert_eq!(picked, x.iter().map(|&v| if v <= 2.0 { 7.0 } else { v }).collect::<Vec<_>>());
    let lane = |lane: usize| std::array::from_fn::<f32, 16, _>(|i| f32::from(u8::from(i == lane)));
    for i in 0..S::LANES {
        // SAFETY: 16 elements are at least LANES.
        assert!(s.any_gt(unsafe { s.load(lane(i).as_ptr()) }, s.splat(0.0)), "lane {i}");
    }
    assert!(!s.any_gt(two, two));
}

fn check_exp2<S: Simd>(s: S) {
    let steps = (0..64_000_u16).map(|i| f32::from(i) / 64_000.0 * -126.0);
    let x: Vec<f32> = steps.collect();
    for (&x, got) in x.iter().zip(apply(s, &x, |v| s.exp2(v))) {
        let expected = f64::from(x).exp2();
        assert!((f64::from(got) / expected - 1.0).abs() < 2e-7, "exp2({x}) = {got}, expected {expected}");
    }
    for (x, got) in [-126.9_f32, -126.6, -126.4, -126.1].map(|x| (x, apply(s, &[x], |v| s.exp2(v))[0])) {
        assert!((f64::from(got) - f64::from(x).exp2()).abs() <= f64::from(f32::MIN_POSITIVE), "exp2({x}) = {got}");
    }
    let edges = [
        0.0,
        -127.0,
        -128.5,
        -1e9,
        -3e38,
        f32::MIN,
        f32::NEG_INFINITY,
        f32::NAN,
        1.0,
        3.0,
        -0.0,
        -1.0,
        0.5,
        -126.0,
        2.0,
        -2.0,
    ];
    let got = apply(s, &edges, |v| s.exp2(v));
    assert_eq!(got[0], 1.0);
    assert!(got[1..7].iter().all(|&p| p.to_bits() == 0), "{got:?}");
    assert!(got[7].is_nan());
    assert_eq!((got[8], got[9], got[11]), (2.0, 8.0, 0.5));
}

fn check_twos<S: Simd>(s: S) {
    let n = S::LANES;
    let x = values(n);
    let (mut splat, mut sums) = ([0.0; 16], [1.0; 8]);
    // SAFETY: `x` and `splat` have at least LANES elements, `sums` has half as many.
    s.vectorize(|| unsafe {
        s.store(splat.as_mut_ptr(), s.splat_two(x.as_ptr()));
        s.add_twos(sums.as_mut_ptr(), s.load(x.as_ptr()));
    });
    for i in 0..n {
        assert_eq!(splat[i], x[i % 2], "{i}");
    }
    for i in 0..n / 2 {
        assert_eq!(sums[i], 1.0 + (x[2 * i] + x[2 * i + 1]), "{i}");
    }
}

fn check_transpose<S: Simd>(s: S) {
    let n = S::LANES;
    let (from_stride, to_stride) = (n + 3, n + 5);
    let from = values(n * from_stride);
    let mut to = vec![0.0; n * to_stride];
    // SAFETY: both have LANES rows of at least LANES elements.
    s.vectorize(|| unsafe { s.transpose(from.as_ptr(), from_stride, to.as_mut_ptr(), to_stride) });
    for i in 0..n {
        for j in 0..n {
            assert_eq!(to[j * to_stride + i], from[i * from_stride + j], "{i} {j}");
        }
    }
}

/// Rounding to bf16 and products of pairs, against arithmetic in f64.
fn check_pairs<S: Simd>(s: S) {
    use half::bf16;
    let n = S::LANES;
    let x = values(4 * n);
    let [a0, a1, b0, b1] = std::array::from_fn(|i| &x[i * n..(i + 1) * n]);
    // SAFETY: every slice has LANES elements, and so has every array.
    let load = |x: &[f32]| unsafe { s.load(x.as_ptr()) };
    let (mut slots, mut sums, mut rounded) = ([0.0; 16], [0.0; 16], [bf16::ZERO; 16]);
    let (narrow0, narrow1): (Vec<_>, Vec<_>) =
        a0.iter().zip(a1).map(|(&a0, &a1)| (bf16::from_f32(a0), bf16::from_f32(a1))).unzip();
    let (mut interleaved, mut widened) = ([0.0; 16], [0.0; 16]);
    s.vectorize(|| {
        let (a, b) = (s.pair(load(a0), load(a1)), s.pair(load(b0), load(b1)));
        // SAFETY: as above.
        unsafe {
            s.store(slots.as_mut_ptr(), a);
            s.store_bf16(rounded.as_mut_ptr(), load(a1));
            s.store(interleaved.as_mut_ptr(), s.interleave(narrow0.as_ptr(), narrow1.as_ptr()));
            s.store(widened.as_mut_ptr(), s.load_bf16(narrow0.as_ptr()));
            if S::PAIRS {
                s.store(sums.as_mut_ptr(), s.multiply(a, b, s.splat(3.0)));
            }
        }
    });
    let round = |x: f32| f64::from(bf16::from_f32(x));
    for i in 0..n {
        let [low, high] = [slots[i].to_bits() << 16, slots[i].to_bits() & 0xffff_0000].map(f32::from_bits);
        assert_eq!((f64::from(low), f64::from(high)), (round(a0[i]), round(a1[i])), "slot {i}");
        assert_eq!(f64::from(rounded[i]), round(a1[i]), "value {i}");
        assert_eq!(interleaved[i].to_bits(), slots[i].to_bits(), "interleaved {i}");
        assert_eq!(f64::from(widened[i]), round(a0[i]), "widened {i}");
        let terms = [3.0, round(a0[i]) * round(b0[i]), round(a1[i]) * round(b1[i])];
        // Two roundings to f32, of sums no larger than the sum of magnitudes.
        let bound = terms.iter().map(|term| term.abs()).sum::<f64>() * f64::from(f32::EPSILON);
        let error = (f64::from(sums[i]) - terms.iter().sum::<f64>()).abs();
        assert!(!S::PAIRS || error <= bound, "lane {i}: error {error:e}, bound {bound:e}");
    }
}

fn check_all<S: Simd>(s: S) {
    check_pairs(s);
    check_pairs(s.half());
    check(s);
    check_exp2(s);
    check_transpose(s);
    check_twos(s);
}

#[test]
fn every_set_of_this_machine_computes_the_same() {
    check_all(Portable::<false>);
    check_all(Portable::<true>);
    #[cfg(target_arch = "x86_64")]
    {
        Avx2::<false>::detect().map_or_else(|| eprintln!("avx2: not on this machine"), check_all);
        Avx512::<false>::detect().map_or_else(|| eprintln!("avx512: not on this machine"), check_all);
        Avx512::<true>::detect().map_or_else(|| eprintln!("avx512bf16: not on this machine"), check_all);
    }
    #[cfg(target_arch = "aarch64")]
    Neon::detect().map_or_else(|| eprintln!("neon: not on this machine"), check_all);
}

/// Every f16, and numbers at, beside and between neighbours of it.
#[test]
fn instructions_that_convert_f16_do_as_their_definition() {
    for arch in Arch::available() {
        for start in (0..=u16::MAX).step_by(BLOCK) {
            let numbers: [f16; BLOCK] = std::array::from_fn(|i| f16::from_bits(start + u16::try_from(i).unwrap()));
            let wide = arch.vectorize(|halves| halves.widen(&numbers));
            let expected = numbers.map(|number| <f16 as Float>::to_f32(number).to_bits());
            assert_eq!(wide.map(f32::to_bits), expected, "{arch}");
            for step in [0, 1, 0x0fff, 0x1000, 0x1001, 0x1fff] {
                let near = wide.map(|x| f32::from_bits(x.to_bits() + step));
                let narrow = arch.vectorize(|halves| halves.narrow(near));
                let expected = near.map(<f16 as Float>::from_f32);
                assert_eq!(narrow.map(f16::to_bits), expected.map(f16::to_bits), "{arch}: {near:?}");
            }
        }
        // Numbers of every size and sign: what becomes infinite, subnormal or nothing, and what is not a number.
        const STRIDE: u32 = 4099;
        for start in (0..u32::MAX / (16 * STRIDE)).map(|block| block * 16 * STRIDE) {
            let any: [f32; BLOCK] = std::array::from_fn(|i| f32::from_bits(start + u32::try_from(i).unwrap() * STRIDE));
            let narrow = arch.vectorize(|halves| halves.narrow(any));
            let expected = any.map(<f16 as Float>::from_f32);
            assert_eq!(narrow.map(f16::to_bits), expected.map(f16::to_bits), "{arch}: {any:?}");
        }
    }
}

#[test]
fn names_are_told_apart() {
    assert!(Arch::available().contains(&Arch::Portable));
    for arch in Arch::ALL {
        assert_eq!(Arch::ALL.iter().filter(|other| other.name() == arch.name()).count(), 1);
    }
}

#[test]
fn an_instruction_set_the_machine_lacks() {
    for arch in [Arch::Neon, Arch::Avx2, Arch::Avx512, Arch::Avx512Bf16] {
        let opened = crate::CpuBackend::with_arch(arch);
        assert_eq!(opened.is_ok(), Arch::available().contains(&arch), "{arch}");
        assert!(opened.err().is_none_or(|error| error.to_string().contains(arch.name())));
    }
}
