//! Strided copies, casts and fills.

use half::{bf16, f16};
use tilefold_core::{DType, Element, RelayoutArgs, TensorViewMut};

use crate::arch::{Arch, Halves};
use crate::attention::{Float, update_dense};
use crate::past_caches;
use crate::walk::{Origin, Run, Walk};

/// Copies source to destination element by element, rounding where the dtypes differ.
pub(crate) fn relayout(arch: Arch, args: RelayoutArgs<'_>) {
    let (from, to) = args.dtypes();
    let (source, mut destination) = args.into_parts();
    let walk = Walk::of([source.layout(), destination.as_view().layout()]);
    let copy = Transfer {
        arch,
        past_caches: from == to && is_past_caches(&walk, destination.as_view().layout().len(), to.size_bytes()),
        walk,
        source: Origin::read(&source),
        destination: Origin::write(&mut destination),
    };
    match (from, to) {
        // Bits are kept, NaN payloads included.
        _ if from == to => match from.size_bytes() {
            1 => copy.keep::<u8>(),
            2 => copy.keep::<u16>(),
            _ => copy.keep::<u32>(),
        },
        (DType::F32, DType::F16) => copy.cast::<f32, f16>(),
        (DType::F32, _) => copy.cast::<f32, bf16>(),
        (DType::F16, DType::F32) => copy.cast::<f16, f32>(),
        (DType::F16, _) => copy.cast::<f16, bf16>(),
        (_, DType::F32) => copy.cast::<bf16, f32>(),
        _ => copy.cast::<bf16, f16>(),
    }
}

/// Whether so many elements are more than caches keep, in runs of several lines.
fn is_past_caches(walk: &Walk<2>, count: usize, element_bytes: usize) -> bool {
    let is_dense = walk.strides() == [1, 1] && walk.run_length() * element_bytes >= past_caches::LEAST_RUN;
    is_dense && count * element_bytes > past_caches::CACHES
}

struct Transfer {
    arch: Arch,
    walk: Walk<2>,
    source: Origin,
    destination: Origin,
    past_caches: bool,
}

impl Transfer {
    fn keep<T: Copy>(&self) {
        let strides = self.walk.strides();
        self.each_run(
            #[inline(always)]
            |_, ([from, to], length)| {
                let (from, to) = (self.source.element::<T>(from), self.destination.element::<T>(to));
                // SAFETY: elements of both tensors, as core checked, which share none; the destination's belong to this worker.
                unsafe {
                    if strides == [1, 1] {
                        if self.past_caches {
                            past_caches::copy(from.cast(), to.cast(), length * size_of::<T>());
                        } else {
                            from.copy_to_nonoverlapping(to, length);
                        }
                        return;
                    }
                    for i in 0..length.cast_signed() {
                        *to.offset(i * strides[1]) = *from.offset(i * strides[0]);
                    }
                }
            },
        );
    }

    fn cast<A: Float, B: Float>(&self) {
        let strides = self.walk.strides();
        self.each_run(
            #[inline(always)]
            |halves, ([from, to], length)| {
                let (from, to) = (self.source.element::<A>(from), self.destination.element::<B>(to));
                // SAFETY: as above.
                unsafe {
                    if strides == [1, 1] {
                        let from = std::slice::from_raw_parts(from, length);
                        update_dense(halves, from, std::slice::from_raw_parts_mut(to, length), |_, from| from);
                        return;
                    }
                    for i in 0..length.cast_signed() {
                        *to.offset(i * strides[1]) = B::from_f32((*from.offset(i * strides[0])).to_f32());
                    }
                }
            },
        );
    }

    #[inline(always)]
    fn each_run(&self, work: impl Fn(Halves, Run<2>) + Send + Sync) {
        self.walk.for_each_task(|task| {
            self.arch.vectorize(
                #[inline(always)]
                |halves| {
                    self.walk.for_each_run(
                        task,
                        #[inline(always)]
                        |run| work(halves, run),
                    );
                },
            );
            if self.past_caches {
                past_caches::finish();
            }
        });
    }
}

/// Sets every element to `value`.
pub(crate) fn fill(destination: TensorViewMut<'_>, value: f64) {
    match destination.as_view().dtype() {
        DType::I32 => fill_with(destination, i32::from_f64(value)),
        DType::Bool => fill_with(destination, u8::from(value != 0.0)),
        DType::F16 => fill_with(destination, <f16 as Element>::from_f64(value)),
        DType::BF16 => fill_with(destination, <bf16 as Element>::from_f64(value)),
        _ => fill_with(destination, f32::from_f64(value)),
    }
}

fn fill_with<T: Element>(mut destination: TensorViewMut<'_>, value: T) {
    let walk = Walk::of([destination.as_view().layout()]);
    let overlaps = destination.as_view().layout().overlaps_itself();
    let (origin, [stride]) = (Origin::write(&mut destination), walk.strides());
    let set = |([first], length): Run<1>| {
        let first = origin.element::<T>(first);
        for i in 0..length.cast_signed() {
            // SAFETY: an element of the tensor, as core checked, that belongs to this worker.
            unsafe { *first.offset(i * stride) = value };
        }
    };
    // Elements of a view that overlaps itself belong to one worker.
    if overlaps {
        (0..walk.tasks()).for_each(|task| walk.for_each_run(task, set));
    } else {
        walk.for_each_task(|task| walk.for_each_run(task, set));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a panic is a failed test")]
mod tests {
    use tilefold_core::Tensor;

    use super::*;

    #[test]
    fn what_is_larger_than_the_caches_is_copied_past_them() {
        // Heads in blocks, and runs that begin anywhere in a line.
        for (shape, expected) in [([300, 40, 801], true), ([300, 40, 90], false), ([9000, 40, 31], false)] {
            let count: usize = shape.iter().product();
            let source = Tensor::from_vec((0..i32::try_from(count).unwrap()).collect(), &shape).unwrap();
            let turned = source.view().permute(&[1, 0, 2]).unwrap();
            let mut copy = Tensor::zeros(DType::I32, turned.shape()).unwrap();
            let walk = Walk::of([turned.layout(), copy.view().layout()]);
            assert_eq!(is_past_caches(&walk, count, 4), expected, "{shape:?}");
            relayout(Arch::Portable, RelayoutArgs::new(turned.clone(), copy.view_mut()).unwrap());
            let positions = turned.layout().positions().map(|position| i32::try_from(position).unwrap());
            assert!(copy.as_slice::<i32>().unwrap().iter().copied().eq(positions), "{shape:?}");
        }
    }
}
