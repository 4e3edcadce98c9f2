//! The work of an attention kernel's hot loop, read from the constants in front of its source.

use tilefold_core::DType;

use crate::kernel::Kernel;
use crate::vendor::Vendor;

/// What a kernel's hot loop does, as the source says and compiled code does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scores {
    /// The part of attention.
    pub pass: Pass,
    /// What a block walks over.
    pub walk: Walk,
    /// Queries whose scores a block handles in one step.
    pub tile_q: usize,
    /// Keys of a step.
    pub tile_k: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Matrix products of each score; f32 takes three for one on NVIDIA, or one of tf32 where that is allowed.
    pub products: usize,
    /// Channels of q and k by the problem.
    pub head_dim: usize,
    /// Channels that a product goes over, padding included: the mean of q's and v's.
    pub depth: usize,
    /// Type of the operands.
    pub dtype: DType,
    /// Whether all tiles come by asynchronous copies.
    pub async_copies: bool,
}

/// A part of attention with a kernel of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pass {
    /// out and lse.
    Forward,
    /// Gradients of k and v.
    BackwardKeys,
    /// Gradients of q, of biases, or of both.
    BackwardQueries,
}

/// What a block walks over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Walk {
    /// It owns queries.
    Keys,
    /// It owns keys.
    Queries,
    /// It owns a tile of a bias.
    Rows,
}

impl Scores {
    /// Those of a kernel; `None` for kernels without matrix products.
    pub(super) fn of(kernel: &Kernel, vendor: Vendor) -> Option<Self> {
        let constants = Constants(&kernel.source);
        let number = |name| constants.number(name);
        let dtype = match constants.text("ELEMENT")? {
            "float" => DType::F32,
            "f16" => DType::F16,
            _ => DType::BF16,
        };
        let head_dim = number("HEAD_DIM")?;
        let (head_dim_v, padded) = (number("HEAD_DIM_V")?, |channels: usize| channels.next_multiple_of(8));
        // Of a product whose sums are channels.
        let padded_sums = |channels: usize| match vendor {
            Vendor::Nvidia => padded(channels),
            Vendor::Amd => channels.next_multiple_of(vendor.product_rows()),
        };
        let wants = |name| constants.is(name);
        let splits = dtype == DType::F32 && vendor == Vendor::Nvidia && !wants("TF32");
        let (pass, walk, [tile_q, tile_k], warps, products, copied) = match kernel.entry {
            "attention_forward" => {
                let warps = number("WARPS")?;
                let tile = [vendor.product_rows() * number("QUERY_TILES")? * warps, number("TILE_K")?];
                (Pass::Forward, Walk::Keys, tile, warps, 2, ["K_PIECES", "V_PIECES"])
            }
            "backward_keys" => {
                let warps = number("WARPS")?;
                let tile = [number("TILE_Q")?, vendor.product_rows() * number("ROW_TILES")? * warps];
                let (dk, dv) = (wants("WANT_DK") || wants("WANT_KEY_SUMS"), wants("WANT_DV"));
                // S; dP where dS is wanted; dK and dV.
                let products = 1 + usize::from(dk) + usize::from(wants("WANT_DK")) + usize::from(dv);
                (Pass::BackwardKeys, Walk::Queries, tile, warps, products, ["Q_PIECES", "DO_PIECES"])
            }
            "backward_bias" | "backward_queries" => {
                let warps = number("WARPS")?;
                let tile =
                    [vendor.product_rows() * number("ROW_TILES")? * warps, 8 * number("COLUMNS")? * number("PARTS")?];
                let walk = if kernel.entry == "backward_bias" { Walk::Rows } else { Walk::Keys };
                let products = 2 + usize::from(wants("WANT_DQ"));
                let copied = ["K_PIECES", "V_PIECES"];
                (Pass::BackwardQueries, walk, tile, warps, products, copied)
            }
            _ => return None,
        };
        Some(Self {
            pass,
            walk,
            tile_q,
            tile_k,
            warps,
            products: if splits { 3 * products } else { products },
            head_dim,
            depth: match pass {
                Pass::Forward => usize::midpoint(padded(head_dim), padded_sums(head_dim_v)),
                Pass::BackwardQueries if wants("WANT_DQ") => {
                    (padded(head_dim) + padded(head_dim_v) + padded_sums(head_dim)) / 3
                }
                Pass::BackwardQueries => usize::midpoint(padded(head_dim), padded(head_dim_v)),
                Pass::BackwardKeys => {
                    (padded(head_dim) + padded(head_dim_v) + padded_sums(head_dim) + padded_sums(head_dim_v)) / 4
                }
            },
            dtype,
            async_copies: copied.into_iter().all(wants),
        })
    }
}

/// `#define NAME value` lines in front of a source.
struct Constants<'a>(&'a str);

impl<'a> Constants<'a> {
    fn text(&self, name: &str) -> Option<&'a str> {
        let mut lines = self.0.lines().map_while(|line| line.strip_prefix("#define "));
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.text(name)?.parse().ok()
    }

    /// Switches are 0 and 1, or false and true.
    fn is(&self, name: &str) -> bool {
        self.text(name).is_some_and(|value| matches!(value, "1" | "true"))
    }
}
