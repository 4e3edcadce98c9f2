//! Tensors of one shape walked together: axes joined where all lie alike, work cut by the sizes alone.

use rayon::prelude::*;
use tilefold_core::{Layout, TensorView, TensorViewMut};

/// Elements of a task, about: several of them fit the caches of a core.
const TASK: usize = 1 << 14;
/// Runs that follow each other in the order of the first tensor, at most: the heads of a query, as a rule.
const BLOCK: usize = 32;

/// Elements of N tensors, met in the order in which the last one lies, but for blocks of runs.
#[derive(Debug)]
pub(crate) struct Walk<const N: usize> {
    /// Outer axes from the outermost: entries, and elements from one to the next in each tensor.
    outer: Vec<Axis<N>>,
    /// The innermost axis.
    inner: Axis<N>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Axis<const N: usize> {
    size: usize,
    strides: [isize; N],
}

/// Neighbours along the innermost axis: elements from each tensor's origin to the first one, and how many.
pub(crate) type Run<const N: usize> = ([isize; N], usize);

impl<const N: usize> Walk<N> {
    /// The walk over layouts of one shape.
    pub(crate) fn of(layouts: [&Layout; N]) -> Self {
        let shape = layouts[0].shape();
        let axis = |dim: usize| Axis {
            size: shape[dim],
            strides: layouts.map(|layout| isize::try_from(layout.strides()[dim]).unwrap_or(0)),
        };
        let mut axes: Vec<Axis<N>> = (0..shape.len()).map(axis).filter(|axis| axis.size > 1).collect();
        // From the largest steps to the smallest, first those of the last tensor.
        axes.sort_by_key(|axis| {
            let mut steps = axis.strides.map(isize::unsigned_abs);
            steps.reverse();
            std::cmp::Reverse(steps)
        });
        let mut joined: Vec<Axis<N>> = Vec::new();
        for axis in axes {
            match joined.last_mut() {
                Some(outer)
                    if outer.strides == axis.strides.map(|stride| stride.wrapping_mul(axis.size.cast_signed())) =>
                {
                    *outer = Axis { size: outer.size * axis.size, ..axis };
                }
                _ => joined.push(axis),
            }
        }
        let inner = joined.pop().unwrap_or(Axis { size: 1, strides: [1; N] });
        Self { outer: in_blocks(joined, inner), inner }
    }

    /// Elements from one neighbour of a run to the next, in each tensor.
    pub(crate) fn strides(&self) -> [isize; N] {
        self.inner.strides
    }

    /// Neighbours of a run, at most.
    pub(crate) fn run_length(&self) -> usize {
        self.inner.size
    }

    /// Calls `work` with the number of every task, on all workers.
    pub(crate) fn for_each_task(&self, work: impl Fn(usize) + Send + Sync) {
        (0..self.tasks()).into_par_iter().for_each(work);
    }

    /// Tasks there are.
    pub(crate) fn tasks(&self) -> usize {
        self.rows().div_ceil(self.rows_of_task()) * self.pieces()
    }

    /// Calls `work` with every run of a task.
    #[inline(always)]
    pub(crate) fn for_each_run(&self, task: usize, mut work: impl FnMut(Run<N>)) {
        let (group, piece) = (task / self.pieces(), task % self.pieces());
        let first = piece * TASK;
        let length = TASK.min(self.inner.size - first);
        let (mut row, rows) = (group * self.rows_of_task(), self.rows());
        let end = rows.min(row + self.rows_of_task());
        let mut cursor = Cursor::at(self, row, first);
        while row < end {
            work((cursor.position, length));
            cursor.step(self);
            row += 1;
        }
    }

    fn rows(&self) -> usize {
        self.outer.iter().map(|axis| axis.size).product()
    }

    /// Runs that a row is cut into.
    fn pieces(&self) -> usize {
        self.inner.size.div_ceil(TASK)
    }

    fn rows_of_task(&self) -> usize {
        (TASK / self.inner.size).max(1)
    }
}

/// Outer axes such that dense runs that are neighbours in the first tensor follow each other, some at a time: it is read in longer
/// pieces, which for heads of 128 channels is twice as fast as a run here and there. An axis that no number up to [`BLOCK`] divides
/// stays as it is.
fn in_blocks<const N: usize>(mut outer: Vec<Axis<N>>, inner: Axis<N>) -> Vec<Axis<N>> {
    let first = |axis: &Axis<N>| axis.strides[0].unsigned_abs();
    let neighbours = outer.iter().position(|axis| first(axis) == inner.size);
    let is_moved = |&at: &usize| at + 1 < outer.len() && inner.strides == [1; N];
    let Some(at) = neighbours.filter(is_moved) else { return outer };
    let axis = outer[at];
    let block = (1..=BLOCK.min(axis.size)).rev().find(|size| axis.size.is_multiple_of(*size)).unwrap_or(1);
    if block > 1 {
        let strides = axis.strides.map(|stride| stride.wrapping_mul(block.cast_signed()));
        outer[at] = Axis { size: axis.size / block, strides };
        outer.push(Axis { size: block, ..axis });
    }
    outer
}

/// Where a walk is: the index along each outer axis, and the elements from each tensor's origin.
struct Cursor<const N: usize> {
    index: Vec<usize>,
    position: [isize; N],
}

impl<const N: usize> Cursor<N> {
    fn at(walk: &Walk<N>, mut row: usize, first: usize) -> Self {
        let mut cursor = Self { index: vec![0; walk.outer.len()], position: [0; N] };
        cursor.advance(walk.inner, first);
        for (dim, axis) in walk.outer.iter().enumerate().rev() {
            cursor.index[dim] = row % axis.size;
            cursor.advance(*axis, row % axis.size);
            row /= axis.size;
        }
        cursor
    }

    /// To the next row; sums wrap on the way, positions of elements fit.
    #[inline(always)]
    fn step(&mut self, walk: &Walk<N>) {
        for (index, axis) in self.index.iter_mut().zip(&walk.outer).rev() {
            *index += 1;
            for (position, stride) in self.position.iter_mut().zip(axis.strides) {
                *position = position.wrapping_add(stride);
            }
            if *index < axis.size {
                return;
            }
            *index = 0;
            for (position, stride) in self.position.iter_mut().zip(axis.strides) {
                *position = position.wrapping_sub(stride.wrapping_mul(axis.size.cast_signed()));
            }
        }
    }

    fn advance(&mut self, axis: Axis<N>, steps: usize) {
        for (position, stride) in self.position.iter_mut().zip(axis.strides) {
            *position = position.wrapping_add(stride.wrapping_mul(steps.cast_signed()));
        }
    }
}

/// Address of a tensor's element (0, 0, ...). Workers share it, and each writes elements of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin(*mut u8);

// SAFETY: an address is data; who writes through it says which elements are a worker's own.
unsafe impl Send for Origin {}
// SAFETY: as above.
unsafe impl Sync for Origin {}

impl Origin {
    /// Of a tensor that is read.
    pub(crate) fn read(view: &TensorView<'_>) -> Self {
        Self(view.origin().cast_mut())
    }

    /// Of a tensor that is written.
    pub(crate) fn write(view: &mut TensorViewMut<'_>) -> Self {
        Self(view.origin())
    }

    /// The element so many elements of `T` further.
    #[inline(always)]
    pub(crate) fn element<T>(self, elements: isize) -> *mut T {
        self.0.cast::<T>().wrapping_offset(elements)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_pair_of_elements_is_met_once() {
        let long = Layout::contiguous(&[2, 3, TASK + 5]).unwrap();
        let turned = Layout::contiguous(&[5, 7, 3]).unwrap().permute(&[2, 0, 1]).unwrap();
        let dense = Layout::contiguous(&[3, 5, 7]).unwrap();
        let flipped = dense.slice(1, 0..5, -1).unwrap();
        let one = Layout::contiguous(&[1]).unwrap();
        let broadcast = Layout::contiguous(&[3, 1, 7]).unwrap().expand(&[3, 5, 7]).unwrap();
        let heads_first = Layout::contiguous(&[2, 40, 70, 3]).unwrap();
        let queries_first = Layout::contiguous(&[2, 70, 40, 3]).unwrap().permute(&[0, 2, 1, 3]).unwrap();
        let backwards = queries_first.slice(1, 0..40, -1).unwrap();
        let pairs = [
            (&long, &long),
            (&turned, &dense),
            (&dense, &turned),
            (&flipped, &dense),
            (&one, &one),
            (&broadcast, &turned),
            (&heads_first, &queries_first),
            (&queries_first, &heads_first),
            (&backwards, &heads_first),
            (&heads_first, &backwards),
        ];
        for (a, b) in pairs {
            let walk = Walk::of([a, b]);
            let met = Mutex::new(Vec::new());
            walk.for_each_task(|task| {
                walk.for_each_run(task, |(first, length)| {
                    let strides = walk.strides();
                    let at = |i: usize| {
                        [0, 1].map(|side: usize| i64::try_from(first[side] + i.cast_signed() * strides[side]).unwrap())
                    };
                    met.lock().unwrap().extend((0..length).map(at));
                });
            });
            let mut met = met.into_inner().unwrap();
            let mut expected: Vec<[i64; 2]> =
                a.positions().zip(b.positions()).map(|(i, j)| [i - a.offset(), j - b.offset()]).collect();
            met.sort_unstable();
            expected.sort_unstable();
            assert!(met == expected, "{a:?} with {b:?}: {} met, {} expected", met.len(), expected.len());
        }
    }

    #[test]
    fn neighbours_in_the_first_tensor_follow_each_other() {
        let heads_first = Layout::contiguous(&[40, 70, 3]).unwrap();
        let queries_first = Layout::contiguous(&[70, 40, 3]).unwrap().permute(&[1, 0, 2]).unwrap();
        let walk = Walk::of([&queries_first, &heads_first]);
        let first = Mutex::new(Vec::new());
        walk.for_each_run(0, |([from, _], _)| first.lock().unwrap().push(from));
        let first = first.into_inner().unwrap();
        let expected = [(0, 20), (120, 20)].map(|(start, runs)| (0..runs).map(move |run| start + 3 * run));
        assert_eq!(
            first[..40],
            expected.into_iter().flatten().collect::<Vec<_>>()[..],
            "20 of 40 heads of two queries"
        );
    }

    /// There a run is no piece of the first tensor.
    #[test]
    fn a_transpose_is_met_as_the_last_tensor_lies() {
        let dense = Layout::contiguous(&[32, 500, 520]).unwrap();
        let walk = Walk::of([&dense.permute(&[0, 2, 1]).unwrap(), &Layout::contiguous(&[32, 520, 500]).unwrap()]);
        assert_eq!(walk.outer.iter().map(|axis| axis.size).collect::<Vec<_>>(), [32, 520]);
    }

    #[test]
    fn tensors_that_lie_alike_are_one_axis() {
        let heads_first = Layout::contiguous(&[2, 3, 5, 4, 8]).unwrap().permute(&[0, 1, 3, 2, 4]).unwrap();
        let walk = Walk::of([&heads_first, &heads_first]);
        assert_eq!((walk.outer.len(), walk.inner), (0, Axis { size: 960, strides: [1, 1] }));
    }
}
