//! The registers of one warp, lanes side by side, and the loops over them.

use half::{bf16, f16};

pub(crate) const LANES: usize = 32;
pub(crate) type Vector<T> = [T; LANES];

/// Register files: predicates are masks of lanes; 16- and 32-bit registers share `words`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registers {
    pub(crate) predicates: Vec<u32>,
    pub(crate) words: Vec<Vector<u32>>,
    pub(crate) doubles: Vec<Vector<u64>>,
    /// Lanes that hold a defined value: predicates first, then words, then doubles.
    pub(crate) defined: Vec<u32>,
}

/// A type whose values stand in register lanes.
pub(crate) trait Lane: Copy + Default {
    fn get(registers: &Registers, index: u32) -> Vector<Self>;
    fn put(registers: &mut Registers, index: u32, values: Vector<Self>, mask: u32);
}

#[inline(always)]
fn blend<T: Copy>(into: &mut Vector<T>, values: &Vector<T>, mask: u32) {
    if mask == u32::MAX {
        *into = *values;
    } else {
        for lane in 0..LANES {
            if mask >> lane & 1 == 1 {
                into[lane] = values[lane];
            }
        }
    }
}

macro_rules! lane {
    ($file:ident, $type:ty, $from:expr, $to:expr) => {
        impl Lane for $type {
            #[inline(always)]
            fn get(registers: &Registers, index: u32) -> Vector<Self> {
                let stored = &registers.$file[index as usize];
                std::array::from_fn(|lane| $from(stored[lane]))
            }
            #[inline(always)]
            fn put(registers: &mut Registers, index: u32, values: Vector<Self>, mask: u32) {
                let stored = std::array::from_fn(|lane| $to(values[lane]));
                blend(&mut registers.$file[index as usize], &stored, mask);
            }
        }
    };
}

lane!(words, u32, |bits: u32| bits, |value: u32| value);
lane!(words, i32, |bits: u32| bits.cast_signed(), |value: i32| value.cast_unsigned());
lane!(words, u16, |bits: u32| bits as u16, u32::from);
lane!(words, i16, |bits: u32| bits as i16, |value: i16| u32::from(value.cast_unsigned()));
lane!(words, f32, f32::from_bits, f32::to_bits);
lane!(words, f16, |bits: u32| f16::from_bits(bits as u16), |value: f16| u32::from(value.to_bits()));
lane!(words, bf16, |bits: u32| bf16::from_bits(bits as u16), |value: bf16| u32::from(value.to_bits()));
lane!(doubles, u64, |bits: u64| bits, |value: u64| value);
lane!(doubles, i64, |bits: u64| bits.cast_signed(), |value: i64| value.cast_unsigned());
lane!(doubles, f64, f64::from_bits, f64::to_bits);

impl Registers {
    #[inline(always)]
    pub(crate) fn map1<A: Lane, R: Lane>(&mut self, d: u32, a: u32, mask: u32, f: impl Fn(A) -> R) {
        let a = A::get(self, a);
        R::put(self, d, std::array::from_fn(|lane| f(a[lane])), mask);
    }

    #[inline(always)]
    pub(crate) fn map2<A: Lane, B: Lane, R: Lane>(&mut self, d: u32, s: [u32; 2], mask: u32, f: impl Fn(A, B) -> R) {
        let (a, b) = (A::get(self, s[0]), B::get(self, s[1]));
        R::put(self, d, std::array::from_fn(|lane| f(a[lane], b[lane])), mask);
    }

    #[inline(always)]
    pub(crate) fn map3<A: Lane, B: Lane, C: Lane, R: Lane>(
        &mut self,
        d: u32,
        s: [u32; 3],
        mask: u32,
        f: impl Fn(A, B, C) -> R,
    ) {
        let (a, b, c) = (A::get(self, s[0]), B::get(self, s[1]), C::get(self, s[2]));
        R::put(self, d, std::array::from_fn(|lane| f(a[lane], b[lane], c[lane])), mask);
    }

    /// Lanes for which `f` holds, over all lanes.
    #[inline(always)]
    pub(crate) fn test2<A: Lane>(&self, a: u32, b: u32, f: impl Fn(A, A) -> bool) -> u32 {
        let (a, b) = (A::get(self, a), A::get(self, b));
        let mut mask = 0;
        for lane in 0..LANES {
            mask |= u32::from(f(a[lane], b[lane])) << lane;
        }
        mask
    }

    #[inline(always)]
    pub(crate) fn set_predicate(&mut self, d: u32, value: u32, mask: u32) {
        let stored = &mut self.predicates[d as usize];
        *stored = (*stored & !mask) | (value & mask);
    }
}
