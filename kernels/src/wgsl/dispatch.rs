//! One dispatch, as plain data: shader, bindings, argument, workgroups. And how a call is cut so that bindings fit.

use tilefold_core::DType;

use crate::wgsl::moves::copy_view;
use crate::wgsl::shader::{Constant, Elements, File, OperandKey, Shader, Sharing, Use, slices};

/// What a device allows, as WebGPU names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest binding in bytes.
    pub binding_bytes: u64,
    /// Storage buffers of one shader.
    pub storage_buffers: u32,
    /// Bindings begin at multiples of this many bytes.
    pub offset_alignment: u64,
    /// Workgroups of one dispatch along an axis.
    pub workgroups: u32,
    /// Threads that surely run together and can read each other's registers, a power of two; 1 where the device says
    /// nothing.
    pub subgroup: u32,
    /// Memory of a workgroup that rows wanted by all its threads may take; 0 where they are not kept there.
    pub workgroup_bytes: u64,
    /// Rounds that the loops of one thread may make, all of them together. llvmpipe ends loops after 65 535, whatever is left
    /// to do (`LP_MAX_TGSI_LOOP_ITERATIONS`), and says nothing; others have no such limit.
    pub loop_rounds: u64,
    /// Whether the device is a processor, which has memory for many registers and a slow exponential.
    pub software: bool,
}

impl Limits {
    /// Whether the device's own exponential is used: a processor's is neither fast nor right.
    pub(crate) fn native_exp(&self) -> bool {
        !self.software
    }
}

/// A piece of memory that a shader sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// First byte.
    pub address: u64,
    /// Bytes, a multiple of 4.
    pub bytes: u64,
    /// Whether the shader writes it.
    pub writes: bool,
}

impl Binding {
    /// Both of them, and what lies between.
    fn and(self, other: Self) -> Self {
        let address = self.address.min(other.address);
        let end = (self.address + self.bytes).max(other.address + other.bytes);
        Self { address, bytes: end - address, writes: self.writes || other.writes }
    }
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// What runs.
    pub shader: Shader,
    /// Bindings 1, 2, ...
    pub bindings: Vec<Binding>,
    /// The uniform buffer of binding 0.
    pub params: Vec<u32>,
    /// Workgroups along x and y.
    pub groups: [u32; 2],
}

/// Why there is no dispatch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DispatchError {
    /// One index of the axes that a call can be cut along still reaches further than a binding may.
    #[error(
        "{operand}: {bytes} bytes however the call is cut, and this device binds at most {limit} \
(max_storage_buffer_binding_size); use a layout in which a head's elements lie closer together, or fewer masks and biases"
    )]
    Binding {
        /// The operand.
        operand: &'static str,
        /// Bytes from its first element to its last.
        bytes: u64,
        /// The most that can be bound.
        limit: u64,
    },
    /// A number that kernels have no room for.
    #[error("{what} is {got}, and kernels take at most {limit}")]
    Limit {
        /// What has a limit.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// The number.
        got: u64,
    },
}

/// An operand in canonical order: batch, row, head, position, last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) name: &'static str,
    pub(crate) elements: Elements,
    pub(crate) address: u64,
    /// Elements from one index to the next; 0 where it has one.
    pub(crate) strides: [i64; 5],
    pub(crate) sizes: [i64; 5],
    /// Elements from one copy of it to the next, and copies: partial sums.
    pub(crate) copies: [i64; 2],
    /// Whether the kernel writes it.
    pub(crate) writes: bool,
    /// Whether the last axis are channels, taken four at a time.
    pub(crate) quads: bool,
    /// Whether all threads of a workgroup are at the same row of it.
    pub(crate) shared: bool,
    /// Whether it lies in one array with others, and shares their binding.
    pub(crate) gathered: bool,
    /// How its head axis follows the call's.
    pub(crate) heads: Heads,
}

/// How an operand's head axis follows the call's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heads {
    /// It has query heads.
    Query,
    /// It has key heads.
    Key,
}

impl View {
    /// A row-major f32 array of the kernels' own.
    pub(crate) fn dense(name: &'static str, address: u64, sizes: [i64; 5]) -> Self {
        let mut strides = [1; 5];
        for axis in (0..4).rev() {
            strides[axis] = strides[axis + 1] * sizes[axis + 1];
        }
        for axis in 0..4 {
            if sizes[axis] == 1 {
                strides[axis] = 0;
            }
        }
        Self {
            name,
            elements: Elements::Numbers(DType::F32),
            address,
            strides,
            sizes,
            copies: [0, 1],
            writes: false,
            quads: false,
            shared: false,
            gathered: false,
            heads: Heads::Query,
        }
    }

    /// The same, written by the kernel.
    pub(crate) fn written(self) -> Self {
        Self { writes: true, ..self }
    }

    pub(crate) fn size_bytes(&self) -> i64 {
        match self.elements {
            Elements::Words => 4,
            Elements::Bits(bytes) => i64::from(bytes),
            Elements::Numbers(dtype) => dtype.size_bytes() as i64,
        }
    }

    /// Bytes of all its elements.
    ///
    /// # Errors
    /// [`DispatchError::Limit`] for more than can be counted.
    pub(crate) fn dense_bytes(&self) -> Result<u64, DispatchError> {
        let bytes = self.sizes.iter().try_fold(self.size_bytes(), |bytes, &size| bytes.checked_mul(size));
        let limit = i64::MAX.unsigned_abs();
        let too_many = DispatchError::Limit { what: "the size of the workspace in bytes", limit, got: u64::MAX };
        Ok(bytes.ok_or(too_many)?.unsigned_abs())
    }

    /// First byte and the byte behind the last.
    fn reach(&self) -> (u64, u64) {
        let (mut low, mut high) = (0_i64, 0_i64);
        let axes = self.strides.iter().zip(&self.sizes).chain([(&self.copies[0], &self.copies[1])]);
        for (&stride, &size) in axes {
            let step = stride.saturating_mul(size - 1);
            if step < 0 { low = low.saturating_add(step) } else { high = high.saturating_add(step) }
        }
        let bytes = self.size_bytes();
        let at = |elements: i64| self.address.wrapping_add_signed(elements.wrapping_mul(bytes));
        (at(low), at(high).wrapping_add(bytes.unsigned_abs()))
    }

    /// The window of memory that a binding has to show.
    pub(crate) fn binding(&self, limits: &Limits) -> Binding {
        let (first, end) = self.reach();
        let address = first - first % limits.offset_alignment;
        Binding { address, bytes: (end - address).next_multiple_of(4), writes: self.writes }
    }

    /// Whether four channels can be read, or written, at once.
    fn in_quads(&self) -> Option<DType> {
        let Elements::Numbers(dtype) = self.elements else { return None };
        let whole = self.sizes[4] % 4 == 0 && self.strides[4] == 1;
        let apart = self.strides[..4].iter().all(|stride| stride % 4 == 0);
        let aligned = self.address.is_multiple_of(4 * dtype.size_bytes() as u64);
        (self.quads && !self.gathered && dtype.is_float() && whole && apart && aligned).then_some(dtype)
    }

    /// The part of it that a part of the call reaches; `group` query heads share a key head.
    pub(crate) fn part(&self, part: &Part, group: i64) -> Self {
        let heads = match self.heads {
            Heads::Key => part.heads,
            Heads::Query => part.heads.map(|heads| heads * group),
        };
        let mut view = *self;
        for (axis, [first, count]) in [part.batch, part.rows, heads].into_iter().enumerate() {
            let offset = first.wrapping_mul(self.strides[axis]).wrapping_mul(self.size_bytes());
            view.address = view.address.wrapping_add_signed(offset);
            view.sizes[axis] = if self.sizes[axis] == 1 { 1 } else { count };
        }
        view
    }
}

/// A part of a call: first and count of its batches, rows and key heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) batch: [i64; 2],
    pub(crate) rows: [i64; 2],
    pub(crate) heads: [i64; 2],
}

/// Parts of a call of `sizes` batches, rows and key heads, in order, in which every operand fits a binding.
///
/// # Errors
/// [`DispatchError::Binding`].
pub(crate) fn parts(sizes: [i64; 3], group: i64, views: &[View], limits: &Limits) -> Result<Vec<Part>, DispatchError> {
    parts_with(sizes, group, views, limits, |_| false)
}

/// The same, of which none is too long either, as far as that can be had by cutting.
///
/// # Errors
/// As [`parts`].
pub(crate) fn parts_with(
    sizes: [i64; 3],
    group: i64,
    views: &[View],
    limits: &Limits,
    is_too_long: impl Fn(&Part) -> bool,
) -> Result<Vec<Part>, DispatchError> {
    let mut step = sizes;
    loop {
        let first = Part { batch: [0, step[0]], rows: [0, step[1]], heads: [0, step[2]] };
        let bytes = |view: &&View| view.part(&first, group).binding(limits).bytes;
        let Some(large) = views.iter().find(|view| bytes(view) > limits.binding_bytes) else {
            let Some(axis) = (0..3).find(|&axis| step[axis] > 1).filter(|_| is_too_long(&first)) else { break };
            step[axis] = (step[axis] + 1) / 2;
            continue;
        };
        // Halved along the outermost axis on which the operand has a say; else along any.
        let has_say = |axis: &usize| step[*axis] > 1 && large.strides[*axis] != 0;
        let Some(axis) = (0..3).find(has_say) else {
            let (operand, limit) = (large.name, limits.binding_bytes);
            return Err(DispatchError::Binding { operand, bytes: bytes(&large), limit });
        };
        step[axis] = (step[axis] + 1) / 2;
    }
    let ranges = |axis: usize| {
        let (size, step) = (sizes[axis], step[axis]);
        (0..(size + step - 1) / step).map(move |i| [i * step, step.min(size - i * step)])
    };
    let mut parts = Vec::new();
    for batch in ranges(0) {
        for rows in ranges(1) {
            parts.extend(ranges(2).map(|heads| Part { batch, rows, heads }));
        }
    }
    Ok(parts)
}

/// Where a kernel has more operands than a shader of the device may have storage buffers, lets those that `is_small` names
/// lie in one array of the workspace, which the dispatches given back fill.
///
/// # Errors
/// [`DispatchError::Limit`] where that is not enough, and what `workspace` reports.
pub(crate) fn gather<E: From<DispatchError>>(
    views: &mut [(&'static str, Option<View>)],
    others: usize,
    limits: &Limits,
    is_small: impl Fn(&str) -> bool,
    workspace: &mut impl FnMut(u64) -> Result<u64, E>,
) -> Result<Vec<Dispatch>, E> {
    let limit = limits.storage_buffers as usize;
    let present = views.iter().filter(|(_, view)| view.is_some()).count();
    if present + others <= limit {
        return Ok(Vec::new());
    }
    let mut small: Vec<&mut View> =
        views.iter_mut().filter(|(name, _)| is_small(name)).filter_map(|(_, view)| view.as_mut()).collect();
    let got = present + others - small.len() + 1;
    if got > limit {
        let what = "the number of storage buffers (max_storage_buffers_per_shader_stage)";
        return Err(DispatchError::Limit { what, limit: limit as u64, got: got as u64 }.into());
    }
    let bytes = |view: &View| view.sizes.iter().product::<i64>() * view.size_bytes();
    let mut offsets = vec![0_u64];
    for view in &small {
        let end = offsets[offsets.len() - 1] + bytes(view).unsigned_abs();
        offsets.push(end.next_multiple_of(16));
    }
    let address = workspace(offsets[offsets.len() - 1])?;
    let mut dispatches = Vec::new();
    for (view, offset) in small.iter_mut().zip(offsets) {
        let dense = View::dense(view.name, address + offset, view.sizes);
        // What is broadcast stays so.
        let strides = std::array::from_fn(|axis| if view.strides[axis] == 0 { 0 } else { dense.strides[axis] });
        let copy = View { strides, elements: view.elements, heads: view.heads, gathered: true, ..dense };
        dispatches.extend(copy_view(view, &copy, limits)?);
        **view = copy;
    }
    Ok(dispatches)
}

/// A number that 32 bits hold, or the largest one: what is too large is refused before, by a dispatch's limits.
pub(crate) fn number(value: impl TryInto<u32>) -> u32 {
    value.try_into().unwrap_or(u32::MAX)
}

/// A position or stride in elements: inside a binding of less than 2^32 bytes all of them are right modulo 2^32.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "modulo 2^32 is what is asked for")]
pub(crate) fn wrapped(elements: i64) -> u32 {
    elements as u32
}

/// Rows of each shared operand that the workgroup's memory holds at a time, a power of two and as many as a step has; 0
/// for none.
fn staged_rows(operands: &[(&'static str, Option<View>)], workgroup_bytes: u64, step: u32) -> u32 {
    let quads = |view: &View| slices(number(view.sizes[4])).into_iter().map(u64::from).product::<u64>();
    let shared = operands.iter().filter_map(|(_, view)| view.as_ref()).filter(|view| view.shared);
    let row_bytes = shared.map(|view| 16 * quads(view)).sum::<u64>();
    if row_bytes == 0 {
        return 0;
    }
    let fits = |rows: &u32| *rows >= step && u64::from(*rows) * row_bytes <= workgroup_bytes;
    [16, 8, 4, 2].into_iter().find(fits).unwrap_or(0)
}

/// What is put together for one dispatch.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    pub(crate) file: File,
    pub(crate) constants: Vec<(&'static str, Constant)>,
    pub(crate) scalars: &'static [(&'static str, &'static str)],
    pub(crate) values: Vec<u32>,
    pub(crate) limits: &'a Limits,
    /// Rounds that the loops of a thread make, at most.
    pub(crate) rounds: u64,
    /// Operands in the order of the argument, `None` for what the problem lacks.
    pub(crate) operands: Vec<(&'static str, Option<View>)>,
}

impl Builder<'_> {
    /// The dispatch. `groups` workgroups are folded; the scalars `groups` and `groups_x`, first of all, are set here.
    ///
    /// # Errors
    /// [`DispatchError::Limit`] with more workgroups than two axes have, or loops that the device does not run to their end.
    pub(crate) fn dispatch(self, groups: u64) -> Result<Dispatch, DispatchError> {
        let along_x = groups.min(u64::from(self.limits.workgroups));
        let along_y = groups.div_ceil(along_x.max(1));
        let limit = u64::from(self.limits.workgroups).pow(2).min(u64::from(u32::MAX));
        if groups > limit {
            return Err(DispatchError::Limit { what: "the number of workgroups", limit, got: groups });
        }
        if self.rounds > self.limits.loop_rounds {
            let what = "the number of rounds of one thread's loops, which grows with the length of the sequence and this driver \
                        cuts off (use a shorter sequence, narrower heads, or the CPU backend)";
            return Err(DispatchError::Limit { what, limit: self.limits.loop_rounds, got: self.rounds });
        }
        let mut params = vec![number(groups), number(along_x)];
        params.extend(self.values);
        // Places begin at multiples of 16 bytes.
        params.resize(params.len().next_multiple_of(4), 0);
        let step = self.constants.iter().find_map(|&(name, constant)| match constant {
            Constant::Number(step) if name == "STEP" => Some(step),
            _ => None,
        });
        let rows = staged_rows(&self.operands, self.limits.workgroup_bytes, step.unwrap_or(1));
        let mut constants = self.constants;
        constants.push(("STAGED", Constant::Switch(rows > 0)));
        constants.push(("TILE", Constant::Number(rows.max(1))));
        let (mut operands, mut bindings) = (Vec::new(), Vec::<Binding>::new());
        let gathered: Vec<View> = self.operands.iter().filter_map(|(_, view)| view.filter(|v| v.gathered)).collect();
        let together = gathered.iter().map(|view| view.binding(self.limits)).reduce(Binding::and);
        if let Some(binding) = together {
            if binding.bytes > self.limits.binding_bytes {
                let (operand, bytes) = ("masks and biases together", binding.bytes);
                return Err(DispatchError::Binding { operand, bytes, limit: self.limits.binding_bytes });
            }
            bindings.push(binding);
        }
        for (name, view) in self.operands {
            let Some(view) = view else {
                operands.push(OperandKey { name, usage: Use::Absent, slot: 0, channels: 0, sharing: Sharing::Nothing });
                params.extend([0; 8]);
                continue;
            };
            // Lanes beyond a row's channels have nothing to read.
            let lanes = self.limits.subgroup.min(number(view.sizes[4]).next_power_of_two());
            let sharing = match rows {
                _ if !view.shared => Sharing::Nothing,
                0 if lanes > 1 => Sharing::Subgroup(lanes),
                0 => Sharing::Nothing,
                rows => Sharing::Workgroup(rows),
            };
            let usage = match view.in_quads() {
                Some(dtype) if view.writes => Use::WriteQuads(dtype),
                Some(dtype) if !matches!(sharing, Sharing::Subgroup(_)) => Use::ReadQuads(dtype),
                _ if view.writes => Use::Write(view.elements),
                _ => Use::Read(view.elements),
            };
            let channels = if view.quads { number(view.sizes[4]) } else { 0 };
            let (slot, binding) = match together {
                Some(together) if view.gathered => (0, together),
                _ => {
                    bindings.push(view.binding(self.limits));
                    (bindings.len() - 1, view.binding(self.limits))
                }
            };
            operands.push(OperandKey { name, usage, slot: number(slot), channels, sharing });
            let base = (view.address - binding.address) / view.size_bytes().unsigned_abs();
            params.push(number(base));
            params.extend(view.strides.map(wrapped));
            params.extend([0; 2]);
        }
        let shader = Shader { file: self.file, constants, scalars: self.scalars, operands };
        Ok(Dispatch { shader, bindings, params, groups: [number(along_x), number(along_y)] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        binding_bytes: 1000,
        storage_buffers: 10,
        offset_alignment: 16,
        workgroups: 65_535,
        subgroup: 1,
        workgroup_bytes: 0,
        loop_rounds: u64::MAX,
        software: true,
    };

    #[test]
    fn a_call_is_cut_until_bindings_fit() {
        // 4 bytes by 2 batches, 6 rows, 3 heads, 10 positions: 1440 bytes.
        let view = View::dense("q", 4096, [2, 6, 3, 10, 1]);
        let cut = parts([2, 6, 3], 1, &[view], &LIMITS).unwrap();
        let part = |first| Part { batch: [first, 1], rows: [0, 6], heads: [0, 3] };
        assert_eq!(cut, [part(0), part(1)]);
        let second = view.part(&cut[1], 1);
        assert_eq!((second.address, second.binding(&LIMITS).bytes), (4096 + 720, 720));

        // Rows far apart: one at a time; what does not depend on rows stays where it is.
        let far = View { strides: [6000, 1000, 10, 1, 0], ..view };
        let cut = parts([2, 6, 3], 1, &[far], &LIMITS).unwrap();
        assert_eq!(cut.len(), 12);
        assert_eq!(cut[7], Part { batch: [1, 1], rows: [1, 1], heads: [0, 3] });
        let shared = View { strides: [0, 0, 10, 1, 0], sizes: [1, 1, 3, 10, 1], ..view };
        assert_eq!(shared.part(&cut[7], 1).address, shared.address);
    }

    #[test]
    fn one_head_that_does_not_fit_is_named() {
        let view = View::dense("bias0", 0, [1, 1, 2, 30, 10]);
        let error = parts([1, 1, 2], 1, &[view], &LIMITS).unwrap_err();
        assert_eq!(error, DispatchError::Binding { operand: "bias0", bytes: 1200, limit: 1000 });
    }

    #[test]
    fn reversed_rows_are_shown_from_their_lowest_address() {
        let view = View { strides: [0, 0, 0, -1, 0], sizes: [1, 1, 1, 10, 1], ..View::dense("q", 4096, [1; 5]) };
        let binding = view.binding(&LIMITS);
        // 9 elements below 4096 begin at 4060, and bindings at multiples of 16.
        assert_eq!((binding.address, binding.bytes), (4048, 52));
    }

    #[test]
    fn large_grids_are_folded() {
        let builder = || Builder {
            file: File::Fill,
            constants: Vec::new(),
            scalars: &[],
            values: Vec::new(),
            limits: &LIMITS,
            rounds: 1,
            operands: Vec::new(),
        };
        assert_eq!(builder().dispatch(65_535).unwrap().groups, [65_535, 1]);
        let folded = builder().dispatch(65_536).unwrap();
        assert_eq!((folded.groups, &folded.params[..2]), ([65_535, 2], [65_536, 65_535].as_slice()));
        assert!(matches!(builder().dispatch(1 << 40), Err(DispatchError::Limit { .. })));
        let limits = Limits { loop_rounds: 100, ..LIMITS };
        let of = |rounds| Builder { rounds, limits: &limits, ..builder() }.dispatch(1);
        assert!(of(100).is_ok() && matches!(of(101), Err(DispatchError::Limit { limit: 100, got: 101, .. })));
    }
}
