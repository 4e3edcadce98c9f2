//! `destination += source`, in f32.

use half::{bf16, f16};
use tilefold_core::{AccumulateArgs, DType};

use crate::arch::{Arch, Halves};
use crate::attention::{Float, update_dense};
use crate::walk::{Origin, Run, Walk};

/// Adds source to destination element by element.
pub(crate) fn accumulate(arch: Arch, args: AccumulateArgs<'_>) {
    let (source, mut destination) = args.into_parts();
    let sum = Sum {
        arch,
        walk: Walk::of([source.layout(), destination.as_view().layout()]),
        source: Origin::read(&source),
        destination: Origin::write(&mut destination),
    };
    match destination.as_view().dtype() {
        DType::F32 => sum.add_to::<f32>(source.dtype()),
        DType::F16 => sum.add_to::<f16>(source.dtype()),
        _ => sum.add_to::<bf16>(source.dtype()),
    }
}

struct Sum {
    arch: Arch,
    walk: Walk<2>,
    source: Origin,
    destination: Origin,
}

impl Sum {
    fn add_to<B: Float>(&self, source: DType) {
        match source {
            DType::F32 => self.add::<f32, B>(),
            DType::F16 => self.add::<f16, B>(),
            _ => self.add::<bf16, B>(),
        }
    }

    fn add<A: Float, B: Float>(&self) {
        self.walk.for_each_task(|task| {
            self.arch.vectorize(
                #[inline(always)]
                |halves| {
                    self.walk.for_each_run(
                        task,
                        #[inline(always)]
                        // SAFETY: elements of both tensors, as core checked; the destination's belong to this worker.
                        |run| unsafe { self.add_run::<A, B>(halves, run) },
                    );
                },
            );
        });
    }

    /// # Safety
    /// The run is inside both tensors, which hold A and B; no other thread touches its elements of the destination.
    #[inline(always)]
    unsafe fn add_run<A: Float, B: Float>(&self, halves: Halves, ([from, to], length): Run<2>) {
        let (from, to) = (self.source.element::<A>(from), self.destination.element::<B>(to));
        let strides = self.walk.strides();
        // SAFETY: the caller's; core checked that source and destination share no element.
        unsafe {
            if strides == [1, 1] {
                let from = std::slice::from_raw_parts(from, length);
                update_dense(halves, from, std::slice::from_raw_parts_mut(to, length), |to, from| to + from);
                return;
            }
            for i in 0..length.cast_signed() {
                let to = to.offset(i * strides[1]);
                *to = B::from_f32((*to).to_f32() + (*from.offset(i * strides[0])).to_f32());
            }
        }
    }
}
