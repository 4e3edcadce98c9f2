//! Instruction sets: which exist, which this machine has, and the vector operations each gives the kernels.

mod portable;
mod simd;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::fmt;

use half::f16;
use tilefold_core::OpenError;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::Neon;
pub(crate) use portable::Portable;
pub(crate) use simd::Simd;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{Avx2, Avx512};

use crate::attention::Float;

/// Numbers that are converted at a time.
pub(crate) const BLOCK: usize = 16;

/// An instruction set the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Arch {
    /// Plain Rust, any processor.
    Portable,
    /// Plain Rust that multiplies bf16 in pairs as [`Arch::Avx512Bf16`] does: slow, to test that on any processor.
    PortableBf16,
    /// x86-64 with AVX2 and FMA: 8 lanes.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL: 16 lanes.
    Avx512,
    /// x86-64 with AVX-512 and BF16: 16 lanes, bf16 products in pairs with f32 sums.
    Avx512Bf16,
    /// AArch64 with NEON: 4 lanes.
    Neon,
}

/// The environment variable that chooses the instruction set.
const VARIABLE: &str = "TILEFOLD_CPU_ARCH";

impl Arch {
    /// Every instruction set, slowest first.
    pub const ALL: [Self; 6] =
        [Self::PortableBf16, Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The name `TILEFOLD_CPU_ARCH` knows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::PortableBf16 => "portable-bf16",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Neon => "neon",
        }
    }

    /// f32 lanes of a vector.
    #[must_use]
    pub fn lanes(self) -> usize {
        match self {
            Self::Portable | Self::PortableBf16 | Self::Avx2 => 8,
            Self::Avx512 | Self::Avx512Bf16 => 16,
            Self::Neon => 4,
        }
    }

    /// Whether this machine can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable | Self::PortableBf16 => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::<false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::<false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Avx512::<true>::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => Neon::detect().is_some(),
            #[allow(unreachable_patterns, reason = "which sets are left depends on the target")]
            _ => false,
        }
    }

    /// Every instruction set this machine can run, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|arch| arch.is_available()).collect()
    }

    /// The fastest set of this machine, or the one `TILEFOLD_CPU_ARCH` names.
    ///
    /// # Errors
    /// [`OpenError::BadSetting`] when the variable names no set, or one this machine lacks.
    pub fn from_environment() -> Result<Self, OpenError> {
        let available = Self::available();
        let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
            return Ok(available.last().copied().unwrap_or(Self::Portable));
        };
        let named = available.iter().find(|arch| value == arch.name()).copied();
        named.ok_or_else(|| unavailable(VARIABLE, value.to_string_lossy().into_owned()))
    }

    /// Runs `work` compiled for this instruction set, as [`Simd::vectorize`] does: for loops that the compiler vectorises,
    /// but for what it is given to convert f16 with.
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, work: impl FnOnce(Halves) -> R) -> R {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 if let Some(s) = Avx512::<false>::detect() => s.vectorize(
                #[inline(always)]
                || work(Halves::Avx512(s)),
            ),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if let Some(s) = Avx2::<false>::detect() => s.vectorize(
                #[inline(always)]
                || work(Halves::Avx2(s)),
            ),
            #[cfg(target_arch = "aarch64")]
            Self::Neon if let Some(s) = Neon::detect() => s.vectorize(
                #[inline(always)]
                || work(Halves::Plain),
            ),
            _ => work(Halves::Plain),
        }
    }

    /// That this machine has the instruction set.
    ///
    /// # Errors
    /// [`OpenError::BadSetting`] with the sets it has.
    pub fn check_available(self) -> Result<(), OpenError> {
        if Self::available().contains(&self) {
            Ok(())
        } else {
            Err(unavailable("instruction set", self.name().to_owned()))
        }
    }
}

/// What converts f16 inside [`Arch::vectorize`]: one instruction for some of the sets, where compilers make a dozen.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Halves {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
}

impl Halves {
    #[inline(always)]
    pub(crate) fn widen(self, from: &[f16; BLOCK]) -> [f32; BLOCK] {
        match self {
            Self::Plain => from.map(Float::to_f32),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => s.widen(from),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => s.widen(from),
        }
    }

    /// Rounds to the nearest, ties to even.
    #[inline(always)]
    pub(crate) fn narrow(self, from: [f32; BLOCK]) -> [f16; BLOCK] {
        match self {
            Self::Plain => from.map(Float::from_f32),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => s.narrow(from),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => s.narrow(from),
        }
    }
}

fn unavailable(variable: &'static str, value: String) -> OpenError {
    let expected = Arch::available().iter().map(|arch| arch.name()).collect::<Vec<_>>().join(", ");
    OpenError::BadSetting { variable, value, expected }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
