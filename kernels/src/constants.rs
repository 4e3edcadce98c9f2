//! Compile-time constants that the kernels of both attention passes share: those of `include/attention.cuh`.

use tilefold_core::{AttentionProblem, DType, EmptyRows, MAX_BIASES, Precision, Products};

use crate::operands::AttentionOperands;
use crate::params::Operand;
use crate::source::Constant;
use crate::vendor::Vendor;

/// How a bias is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BiasKind {
    /// There is none.
    #[default]
    Absent,
    /// Any strides: element by element.
    Strided,
    /// Neighbouring keys are neighbours in memory, and rows of keys start at multiples of 16 bytes.
    Pieces,
    /// As [`BiasKind::Pieces`], and the same for all queries.
    Keys,
}

impl BiasKind {
    pub(crate) fn of(bias: &Operand, dtype: DType) -> Self {
        if !bias.in_pieces(5, dtype) {
            Self::Strided
        } else if bias.strides[3] == 0 {
            Self::Keys
        } else {
            Self::Pieces
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Strided => "strided",
            Self::Pieces => "pieces",
            Self::Keys => "keys",
        }
    }
}

/// What a kernel is specialised for, whichever pass it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttentionConstants {
    /// Type of q, k, v, gate and out.
    pub dtype: DType,
    /// Whether factors of products in f32 are rounded to tf32.
    pub products: Products,
    /// Channels of q and k.
    pub head_dim: usize,
    /// Channels of v and out.
    pub head_dim_v: usize,
    /// Kind and type of each bias.
    pub biases: [(BiasKind, DType); MAX_BIASES],
    /// There is a key mask.
    pub key_mask: bool,
    /// There are key lengths.
    pub kv_lengths: bool,
    /// There are segments.
    pub segments: bool,
    /// Causality or a window.
    pub positions: bool,
    /// There are ALiBi slopes.
    pub alibi: bool,
    /// There is a gate.
    pub gate: bool,
    /// Rows without keys give the mean of v.
    pub uniform_rows: bool,
}

impl AttentionConstants {
    /// What a problem and the layout of its operands ask for.
    #[must_use]
    pub fn new(vendor: Vendor, problem: &AttentionProblem, operands: &AttentionOperands) -> Self {
        let spec = problem.spec();
        let mut biases = [(BiasKind::Absent, DType::F32); MAX_BIASES];
        for ((to, bias), operand) in biases.iter_mut().zip(&spec.biases).zip(&operands.biases) {
            *to = (BiasKind::of(operand, bias.dtype), bias.dtype);
        }
        Self {
            dtype: spec.dtype,
            products: vendor.products(spec.products),
            head_dim: spec.head_dim,
            head_dim_v: spec.head_dim_v,
            biases,
            key_mask: spec.key_mask,
            kv_lengths: spec.kv_lengths.is_some(),
            segments: spec.segments,
            positions: spec.mask.restricts(),
            alibi: spec.mask.alibi_slopes.is_some(),
            gate: spec.gate,
            uniform_rows: spec.empty_rows == EmptyRows::Uniform,
        }
    }

    fn switches(&self) -> [(&'static str, bool); 7] {
        [
            ("KEY_MASK", self.key_mask),
            ("KV_LENGTHS", self.kv_lengths),
            ("SEGMENTS", self.segments),
            ("POSITIONS", self.positions),
            ("ALIBI", self.alibi),
            ("GATE", self.gate),
            ("UNIFORM_ROWS", self.uniform_rows),
        ]
    }

    /// The constants as `include/attention.cuh` wants them.
    #[must_use]
    pub fn constants(&self) -> Vec<Constant> {
        let mut constants = vec![
            constant("ELEMENT", element(self.dtype)),
            constant("TF32", u8::from(self.products == Products::Tf32)),
            constant("HEAD_DIM", self.head_dim),
            constant("HEAD_DIM_V", self.head_dim_v),
        ];
        for (index, (kind, dtype)) in self.biases.into_iter().enumerate() {
            constants.push((format!("BIAS_{index}"), (kind as u8).to_string()));
            constants.push((format!("BIAS_{index}_ELEMENT"), element(dtype).to_owned()));
        }
        constants.extend(self.switches().map(|(name, on)| constant(name, u8::from(on))));
        constants
    }

    /// What it is specialised for, in words: `bf16 32x32 bias0=pieces,bf16 key_mask`.
    #[must_use]
    pub fn name(&self) -> String {
        let precision = Precision { dtype: self.dtype, products: self.products };
        let mut name = format!("{precision} {}x{}", self.head_dim, self.head_dim_v);
        for (index, (kind, dtype)) in self.biases.into_iter().enumerate() {
            if kind != BiasKind::Absent {
                name.push_str(&format!(" bias{index}={},{dtype}", kind.name()));
            }
        }
        for (switch, _) in self.switches().into_iter().filter(|(_, on)| *on) {
            name.push(' ');
            name.push_str(&switch.to_lowercase());
        }
        name
    }
}

/// One constant.
pub(crate) fn constant(name: &str, value: impl ToString) -> Constant {
    (name.to_owned(), value.to_string())
}

/// The name kernels have for an element type.
pub(crate) fn element(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::I32 => "i32",
        DType::Bool => "u8",
        // A new type has no kernels; the problem refuses it.
        _ => "float",
    }
}
