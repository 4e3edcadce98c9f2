//! From a schedule and operands to launches: compile-time constants, arguments, blocks.

use tilefold_core::{AttentionProblem, AttentionSpec, DType};

use super::schedule::{KeyPass, QueryPass, Reduction, Schedule, owners, padded_queries, tiles};
use super::tiles::{Channels, padded};
use super::{BackwardLaunch, BackwardOperands};
use crate::constants::{AttentionConstants, BiasKind, element};
use crate::kernel::{Kernel, KernelError, Launch};
use crate::params::{BackwardParams, Operand, SumParams};
use crate::source::Constant;
use crate::vendor::Vendor;

/// Threads of the kernels that are not passes.
const SIMPLE_THREADS: u32 = 128;

/// Results below which a warp shares each sum.
const FEW_SUMS: u64 = 4096;

/// The launches of one backward pass, under way.
pub(super) struct Launches<'a> {
    vendor: Vendor,
    problem: &'a AttentionProblem,
    operands: &'a BackwardOperands,
    schedule: Schedule,
    params: BackwardParams,
    channels: Channels,
}

/// Compile-time constants.
#[derive(Default)]
struct Constants(Vec<Constant>);

impl Constants {
    fn value(mut self, name: &str, value: impl ToString) -> Self {
        self.0.push((name.to_owned(), value.to_string()));
        self
    }
}

fn attention(kernel: Kernel, blocks: u64, params: BackwardParams) -> BackwardLaunch {
    BackwardLaunch::Attention(Box::new(Launch { kernel, blocks, params }))
}

/// The names of what is wanted.
fn list_of<const N: usize>(names: [(bool, &str); N]) -> String {
    names.into_iter().filter_map(|(wanted, name)| wanted.then_some(name)).collect()
}

fn signed(size: u64) -> Result<i64, KernelError> {
    let limit = i64::MAX.unsigned_abs();
    i64::try_from(size).map_err(|_| KernelError::Limit { what: "size", limit, got: size })
}

/// Strides of dense sizes.
fn dense<const N: usize>(sizes: [u64; N]) -> Result<[i64; N], KernelError> {
    let (mut strides, mut next) = ([0; N], 1_u64);
    for (stride, size) in strides.iter_mut().zip(sizes).rev() {
        *stride = signed(next)?;
        next = next.saturating_mul(size);
    }
    Ok(strides)
}

impl<'a> Launches<'a> {
    pub(super) fn new(
        vendor: Vendor,
        problem: &'a AttentionProblem,
        operands: &'a BackwardOperands,
        workspace: u64,
    ) -> Result<Self, KernelError> {
        let (spec, schedule) = (problem.spec(), Schedule::new(vendor, problem));
        let channels = Channels::of(spec);
        let offsets = schedule.workspace;
        let at = |offset: u64| workspace.saturating_add(offset);
        let d_o = if spec.gate {
            let sizes = [spec.batch, spec.rows, spec.heads, spec.seqlen_q, 0].map(|size| size as u64);
            let [batch, row, head, query, channel] =
                dense([sizes[0], sizes[1], sizes[2], sizes[3], u64::from(padded(channels.head_dim_v))])?;
            Operand { data: at(offsets.d_o), strides: [batch, row, query, head, channel] }
        } else {
            operands.d_out
        };
        let mut dbiases = [Operand::default(); 4];
        for (to, from) in dbiases.iter_mut().zip(&operands.dbiases) {
            *to = from.map(|(operand, _)| operand).unwrap_or_default();
        }
        let params = BackwardParams {
            inputs: operands.inputs.inputs(problem)?,
            out: operands.out,
            lse: operands.lse,
            lse_low: operands.lse_low,
            d_out: operands.d_out,
            d_o,
            dq: operands.dq.unwrap_or_default(),
            dk: operands.dk.unwrap_or_default(),
            dv: operands.dv.unwrap_or_default(),
            dbiases,
            d_gate: operands.d_gate.unwrap_or_default(),
            statistics: at(offsets.statistics),
            uniform_sums: at(offsets.uniform_sums),
            key_sums: at(offsets.key_sums),
            query_sums: at(offsets.query_sums),
            dq_partials: at(offsets.dq_partials),
            dk_partials: at(offsets.dk_partials),
            dv_partials: at(offsets.dv_partials),
            dbias_partials: at(offsets.dbias_partials),
            padded_queries: signed(padded_queries(spec.seqlen_q))?,
            row_statistics: signed(padded_queries(spec.seqlen_q).saturating_mul(spec.heads as u64))?,
            row_queries: signed((spec.seqlen_q as u64).saturating_mul(spec.heads as u64))?,
            query_chunk: signed(schedule.query_chunks.chunk)?,
            term_chunk: 1,
            first_block: 0,
        };
        Ok(Self { vendor, problem, operands, schedule, params, channels })
    }

    pub(super) fn list(&self) -> Result<Vec<BackwardLaunch>, KernelError> {
        let spec = self.spec();
        let mut list = Vec::new();
        if !self.schedule.has_passes() && self.operands.d_gate.is_none() {
            return Ok(list);
        }
        list.push(self.prepare()?);
        if self.schedule.uniform {
            list.push(self.uniform()?);
        }
        for pass in &self.schedule.keys {
            list.push(self.by_keys(pass)?);
        }
        list.extend(self.key_partials()?);
        for pass in &self.schedule.queries {
            list.push(self.by_queries(pass)?);
            list.extend(self.query_partials(pass)?);
        }
        for (i, bias) in spec.biases.iter().enumerate().filter(|(i, _)| spec.gradients.biases[*i]) {
            match Reduction::of(bias, spec) {
                Reduction::Pairs(_) => {}
                Reduction::Queries => list.push(self.bias_from_sums(i, true)?),
                Reduction::Keys => list.push(self.bias_from_sums(i, false)?),
            }
        }
        Ok(list)
    }

    fn spec(&self) -> &'a AttentionSpec {
        self.problem.spec()
    }

    /// Constants that both passes have.
    fn shared(&self) -> Constants {
        let (spec, operands) = (self.spec(), &self.operands.inputs);
        let pieces = |operand: &Operand, channels: usize| self.in_pieces(operand, channels);
        // Rows of the workspace are padded with zeros.
        let d_o_pieces = spec.gate || pieces(&self.params.d_o, spec.head_dim_v);
        Constants(AttentionConstants::new(self.vendor, self.problem, operands).constants())
            .value("RUNS", self.biases_in_runs())
            .value("QUERY_EIGHTS", spec.seqlen_q.is_multiple_of(8))
            .value("Q_PIECES", pieces(&operands.q, spec.head_dim))
            .value("K_PIECES", pieces(&operands.k, spec.head_dim))
            .value("V_PIECES", pieces(&operands.v, spec.head_dim_v))
            .value("DO_PIECES", d_o_pieces)
    }

    /// Whether keys of biases whose rows move in pieces are read in runs.
    fn biases_in_runs(&self) -> bool {
        let spec = self.spec();
        // Rows of a bias lie apart what fits 32 bits, in bytes; on AMD a tile of them with all keys does, going up.
        let narrow = |bias: &Operand| match self.vendor {
            Vendor::Nvidia => i32::try_from(bias.strides[3].saturating_mul(4)).is_ok(),
            Vendor::Amd => {
                let tile = u64::try_from(bias.strides[3]).unwrap_or(u64::MAX).saturating_mul(32);
                u32::try_from(tile.saturating_add(spec.seqlen_k as u64).saturating_mul(4)).is_ok()
            }
        };
        spec.seqlen_k.is_multiple_of(8) && self.operands.inputs.biases.iter().all(narrow)
    }

    /// Whether some bias is read element by element.
    fn biases_by_element(&self) -> bool {
        let biases = self.spec().biases.iter().zip(&self.operands.inputs.biases);
        let mut kinds = biases.map(|(bias, operand)| BiasKind::of(operand, bias.dtype));
        kinds.any(|kind| kind == BiasKind::Strided || (kind == BiasKind::Pieces && !self.biases_in_runs()))
    }

    /// Whether rows of channels may be moved in pieces of 16 bytes, and hold whole ones.
    fn in_pieces(&self, operand: &Operand, channels: usize) -> bool {
        let dtype = self.spec().dtype;
        // On AMD rows of a tile lie apart what fits 32 bits, in bytes, going up.
        let narrow = self.vendor == Vendor::Nvidia || (0..1 << 24).contains(&operand.strides[2]);
        narrow && operand.in_pieces(5, dtype) && (channels * dtype.size_bytes()).is_multiple_of(16)
    }

    fn warp_threads(&self) -> u32 {
        u32::try_from(self.vendor.warp_threads()).unwrap_or(u32::MAX)
    }

    fn title(&self, what: &str) -> String {
        format!("{what} {}", AttentionConstants::new(self.vendor, self.problem, &self.operands.inputs).name())
    }

    fn prepare(&self) -> Result<BackwardLaunch, KernelError> {
        let spec = self.spec();
        let lanes = self.channels.head_dim_v.next_power_of_two().min(32);
        let constants = Constants::default()
            .value("ELEMENT", element(spec.dtype))
            .value("HEAD_DIM_V", spec.head_dim_v)
            .value("D_O_CHANNELS", padded(self.channels.head_dim_v))
            .value("LANES", lanes)
            .value("BLOCK_THREADS", SIMPLE_THREADS)
            .value("WANT_D_O", spec.gate && self.schedule.has_passes())
            .value("WANT_D_GATE", self.operands.d_gate.is_some());
        let kernel = Kernel::new(
            self.title("backward_prepare"),
            "attention/backward_prepare.cu",
            "backward_prepare",
            &constants.0,
            SIMPLE_THREADS,
        )?;
        let outer = [spec.batch, spec.rows, spec.heads];
        let queries =
            outer.iter().fold(padded_queries(spec.seqlen_q), |product, &size| product.saturating_mul(size as u64));
        let blocks = queries.div_ceil(u64::from(SIMPLE_THREADS / lanes));
        Ok(attention(kernel, blocks, self.params))
    }

    fn uniform(&self) -> Result<BackwardLaunch, KernelError> {
        let spec = self.spec();
        let threads = self.channels.head_dim_v.next_multiple_of(self.warp_threads()).min(SIMPLE_THREADS);
        let constants = Constants::default()
            .value("ELEMENT", element(spec.dtype))
            .value("HEAD_DIM_V", spec.head_dim_v)
            .value("BLOCK_THREADS", threads);
        let title = self.title("backward_uniform");
        let kernel = Kernel::new(title, "attention/backward_uniform.cu", "backward_uniform", &constants.0, threads)?;
        let blocks = [spec.batch, spec.rows, spec.kv_heads].iter().map(|&size| size as u64).product();
        Ok(attention(kernel, blocks, self.params))
    }

    fn by_keys(&self, pass: &KeyPass) -> Result<BackwardLaunch, KernelError> {
        let (spec, sizes, chunks) = (self.spec(), &pass.tiles, self.schedule.query_chunks.count);
        // Addresses of single elements take registers.
        let min_blocks = if self.vendor == Vendor::Nvidia && self.biases_by_element() { 1 } else { sizes.min_blocks };
        let constants = self
            .shared()
            .value("WARPS", sizes.warps)
            .value("ROW_TILES", sizes.row_tiles)
            .value("TILE_Q", sizes.tile_q)
            .value("STAGES", sizes.stages)
            .value("K_IN_REGISTERS", sizes.in_registers)
            .value("SHARED_BYTES", sizes.shared_bytes)
            .value("MIN_BLOCKS", min_blocks)
            .value("WANT_DK", pass.dk)
            .value("WANT_DV", pass.dv)
            .value("WANT_KEY_SUMS", pass.sums)
            .value("PARTIALS", chunks > 1);
        let wanted = [(pass.dk, " dk"), (pass.dv, " dv"), (pass.sums, " sums"), (chunks > 1, " partials")];
        let title = self.title("backward_keys") + &list_of(wanted);
        let kernel = Kernel::new(title, "attention/backward_keys.cu", "backward_keys", &constants.0, sizes.threads())?
            .with_dynamic_shared_bytes(sizes.shared_bytes);
        let outer: u64 = [spec.batch, spec.rows, spec.kv_heads].iter().map(|&size| size as u64).product();
        let blocks = outer * tiles(spec.seqlen_k, sizes.tile_k()) * chunks;
        Ok(attention(kernel, blocks, self.params))
    }

    fn by_queries(&self, pass: &QueryPass) -> Result<BackwardLaunch, KernelError> {
        let (spec, sizes) = (self.spec(), &pass.tiles);
        let gradients: Vec<String> =
            (pass.biases.iter()).map(|&i| format!("X({i}, {})", element(self.dbias_dtype(i)))).collect();
        let mut constants = self
            .shared()
            .value("WARPS", sizes.warps)
            .value("ROW_TILES", sizes.row_tiles)
            .value("COLUMNS", sizes.columns)
            .value("PARTS", sizes.parts)
            .value("STAGES", sizes.stages)
            .value("Q_IN_REGISTERS", sizes.in_registers)
            .value("SHARED_BYTES", sizes.shared_bytes)
            .value("MIN_BLOCKS", sizes.min_blocks)
            .value("WANT_DQ", pass.dq)
            .value("DQ_PIECES", self.operands.dq.is_some_and(|dq| self.in_pieces(&dq, spec.head_dim)));
        let (entry, source) = if pass.biases.is_empty() {
            constants = constants.value("WANT_QUERY_SUMS", pass.sums);
            ("backward_queries", "attention/backward_queries.cu")
        } else {
            let [batch, rows, heads] = pass.walked;
            constants = constants
                .value("DQ_PARTIALS", pass.dq_partials)
                .value("DBIAS_LIST(X)", gradients.join(" "))
                .value("DBIAS_PARTIALS", pass.terms.count > 1)
                .value("BIASES_STAY", self.biases_stay(pass))
                .value("SUMS_BATCH", batch)
                .value("SUMS_ROWS", rows)
                .value("SUMS_HEADS", heads);
            ("backward_bias", "attention/backward_bias.cu")
        };
        let wanted = [
            (pass.dq, " dq"),
            (pass.dq_partials, " dq_partials"),
            (pass.terms.count > 1, " dbias_partials"),
            (pass.sums, " sums"),
        ];
        let kernel = Kernel::new(self.title(entry) + &list_of(wanted), source, entry, &constants.0, sizes.threads())?
            .with_dynamic_shared_bytes(sizes.shared_bytes);
        // Terms are counted with 32 bits.
        let limit = i32::MAX.unsigned_abs().into();
        if pass.terms.chunk > limit {
            return Err(KernelError::Limit { what: "rows that share a bias", limit, got: pass.terms.chunk });
        }
        let params = BackwardParams { term_chunk: signed(pass.terms.chunk)?, ..self.params };
        Ok(attention(kernel, pass.blocks, params))
    }

    /// Whether a block may keep the biases of its tile from row to row: they are the same, and registers have room.
    fn biases_stay(&self, pass: &QueryPass) -> bool {
        let shared = |bias: &Operand| bias.strides[1] == 0 || bias.strides[3] == 0;
        let [_, rows, _] = pass.walked;
        let biases = &self.operands.inputs.biases;
        // Half steps of a product take registers too.
        let room = match self.channels.largest() {
            ..=16 => true,
            32 => biases.len() == 1 || (self.vendor == Vendor::Amd && biases.len() == 2 && !self.spec().key_mask),
            _ => false,
        };
        rows && room && biases.iter().all(shared)
    }

    fn dbias_dtype(&self, i: usize) -> DType {
        self.operands.dbiases.get(i).copied().flatten().map_or(DType::F32, |(_, dtype)| dtype)
    }

    /// dK and dV from their partials.
    fn key_partials(&self) -> Result<Vec<BackwardLaunch>, KernelError> {
        let (spec, chunks) = (self.spec(), self.schedule.query_chunks.count);
        let mut list = Vec::new();
        if chunks < 2 {
            return Ok(list);
        }
        let results = [
            (self.operands.dk, self.params.dk_partials, spec.head_dim),
            (self.operands.dv, self.params.dv_partials, spec.head_dim_v),
        ];
        for (to, from, channels) in results {
            if let Some(to) = to {
                let sizes = [spec.batch, spec.rows, spec.seqlen_k, spec.kv_heads, channels].map(|size| size as u64);
                let [b, n, k, h, d] = sizes;
                let [chunk, batch, row, head, key, channel] = dense([chunks, b, n, h, k, d])?;
                let strides = [batch, row, key, head, channel];
                list.push(self.sum(
                    (to, spec.dtype),
                    sizes,
                    (from, strides),
                    [(1, 0), (1, 0), (1, 0), (chunks, chunk)],
                )?);
            }
        }
        Ok(list)
    }

    /// dQ and bias gradients from their partials.
    fn query_partials(&self, pass: &QueryPass) -> Result<Vec<BackwardLaunch>, KernelError> {
        let spec = self.spec();
        let one = (1, 0);
        let mut list = Vec::new();
        if let Some(to) = self.operands.dq.filter(|_| pass.dq_partials) {
            let sizes = [spec.batch, spec.rows, spec.seqlen_q, spec.heads, spec.head_dim].map(|size| size as u64);
            let [b, n, q, h, d] = sizes;
            let [part, batch, row, head, query, channel] = dense([pass.key_parts, b, n, h, q, d])?;
            let from = (self.params.dq_partials, [batch, row, query, head, channel]);
            list.push(self.sum((to, spec.dtype), sizes, from, [one, one, one, (pass.key_parts, part)])?);
        }
        if pass.terms.count > 1 {
            let owned = |axis: usize, size: usize| if pass.walked[axis] { 1 } else { size as u64 };
            let sizes = [
                owned(0, spec.batch),
                owned(1, spec.rows),
                owned(2, spec.heads),
                spec.seqlen_q as u64,
                spec.seqlen_k as u64,
            ];
            debug_assert_eq!(sizes[..3].iter().product::<u64>(), owners(spec, pass));
            let [b, n, h, q, k] = sizes;
            let [chunk, strides @ ..] = dense([pass.terms.count, b, n, h, q, k])?;
            for &i in &pass.biases {
                let to = (self.params.dbiases[i], self.dbias_dtype(i));
                let from = (self.params.dbias_partials, strides);
                list.push(self.sum(to, sizes, from, [one, one, one, (pass.terms.count, chunk)])?);
            }
        }
        Ok(list)
    }

    /// The gradient of a bias without a query axis (from sums over queries) or without a key axis.
    fn bias_from_sums(&self, i: usize, over_queries: bool) -> Result<BackwardLaunch, KernelError> {
        let spec = self.spec();
        let bias = &spec.biases[i];
        let (chunks, length) = if over_queries {
            (self.schedule.query_chunks.count, spec.seqlen_k as u64)
        } else {
            (1, spec.seqlen_q as u64)
        };
        let from = if over_queries { self.params.key_sums } else { self.params.query_sums };
        let full = [spec.batch, spec.rows, spec.heads].map(|size| size as u64);
        let [chunk, batch, row, head, position] = dense([chunks, full[0], full[1], full[2], length])?;
        let outer = [batch, row, head];
        let mut sizes = bias.shape.map(|size| size as u64);
        let mut strides = [batch, row, head, 0, 0];
        let kept = if over_queries { 4 } else { 3 };
        strides[kept] = position;
        // What the bias has no axis for is summed, positions innermost.
        let mut summed = [(chunks, chunk), (1, 0), (1, 0), (1, 0)];
        let mut walks: Vec<(u64, i64)> = Vec::new();
        for axis in 0..3 {
            if sizes[axis] == 1 {
                walks.push((full[axis], outer[axis]));
                strides[axis] = 0;
            }
        }
        if sizes[kept] == 1 {
            walks.push((length, position));
            strides[kept] = 0;
        }
        sizes[if over_queries { 3 } else { 4 }] = 1;
        // Axes that follow one another in memory are walked as one; at most four remain, chunks among them.
        let mut joined: Vec<(u64, i64)> = Vec::new();
        for walk in walks {
            match joined.last_mut() {
                Some(last) if last.1 == walk.1.saturating_mul(signed(walk.0)?) => *last = (last.0 * walk.0, walk.1),
                _ => joined.push(walk),
            }
        }
        let start = summed.len() - joined.len().min(3);
        summed[start..].copy_from_slice(&joined[..joined.len().min(3)]);
        self.sum((self.params.dbiases[i], self.dbias_dtype(i)), sizes, (from, strides), summed)
    }

    fn sum(
        &self,
        (to, dtype): (Operand, DType),
        sizes: [u64; 5],
        (from, from_strides): (u64, [i64; 5]),
        summed: [(u64, i64); 4],
    ) -> Result<BackwardLaunch, KernelError> {
        let results = sizes.iter().fold(1_u64, |product, &size| product.saturating_mul(size));
        let lanes = if results < FEW_SUMS && summed[3].0 >= 32 { 32 } else { 1 };
        let constants = Constants::default()
            .value("ELEMENT", element(dtype))
            .value("LANES", lanes)
            .value("BLOCK_THREADS", SIMPLE_THREADS);
        let title = format!("sums {dtype} by {lanes}");
        let kernel = Kernel::new(title, "attention/sums.cu", "sums", &constants.0, SIMPLE_THREADS)?;
        let mut params = SumParams { to, from, from_strides, factor: 1.0, ..SumParams::default() };
        for (to, size) in params.sizes.iter_mut().zip(sizes) {
            *to = signed(size)?;
        }
        for ((size, stride), (from_size, from_stride)) in
            params.summed.iter_mut().zip(&mut params.summed_strides).zip(summed)
        {
            (*size, *stride) = (signed(from_size)?, from_stride);
        }
        let blocks = results.div_ceil(u64::from(SIMPLE_THREADS / lanes));
        Ok(BackwardLaunch::Sums(Box::new(Launch { kernel, blocks, params })))
    }
}
