//! How precisely the factors of matrix products are taken, and the names of that on command lines and in records.

use std::fmt;
use std::str::FromStr;

use crate::DType;

/// What a device may do to the factors of matrix products: q kᵀ and P v, and backward dO vᵀ, Pᵀ dO, dS k and dSᵀ q.
///
/// Sums are f32 and everything else is as precise either way: lse, biases, masks, the softmax, δ, dS as a bias's gradient
/// sums it, and the types of operands and results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Products {
    /// Products of f32 numbers are as good as f32 arithmetic makes them; those of half types are exact.
    #[default]
    Exact,
    /// For f32 alone: factors may be rounded to tf32, 11 significant bits, for a third of the work on tensor cores.
    ///
    /// A permission: what has no tf32 computes as with [`Products::Exact`]. CUDA devices make use of it; the CPU does not.
    /// Results are then about as far off as those of f16 (2⁻¹¹ for each factor, at random), with the range of f32.
    Tf32,
}

/// A dtype of q and how its products are taken, under one name: `f32`, `tf32`, `f16`, `bf16`.
///
/// ```
/// use tilefold_core::{DType, Precision, Products};
/// assert_eq!("tf32".parse(), Ok(Precision { dtype: DType::F32, products: Products::Tf32 }));
/// assert_eq!(Precision::from(DType::BF16).to_string(), "bf16");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Precision {
    /// Type of q.
    pub dtype: DType,
    /// How products are taken.
    pub products: Products,
}

impl Precision {
    /// f32 with products of tf32.
    pub const TF32: Self = Self { dtype: DType::F32, products: Products::Tf32 };

    /// Those that a problem may have.
    pub const ALL: [Self; 4] = [Self::exact(DType::F32), Self::TF32, Self::exact(DType::F16), Self::exact(DType::BF16)];

    /// A dtype with exact products.
    #[must_use]
    pub const fn exact(dtype: DType) -> Self {
        Self { dtype, products: Products::Exact }
    }
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Self {
        Self::exact(dtype)
    }
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Tf32 => "tf32",
        })
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.dtype, self.products) {
            (dtype, Products::Exact) => dtype.fmt(f),
            (DType::F32, products) => products.fmt(f),
            // No problem has it.
            (dtype, products) => write!(f, "{dtype} {products}"),
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|precision| precision.to_string() == name);
        found.ok_or_else(|| {
            format!("expected {}, got `{name}`", Self::ALL.map(|precision| precision.to_string()).join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse(), Ok(precision));
        }
        assert_eq!(Precision::ALL.map(|precision| precision.to_string()), ["f32", "tf32", "f16", "bf16"]);
        assert_eq!(Precision::from_str("TF32"), Err("expected f32, tf32, f16, bf16, got `TF32`".to_owned()));
    }
}
