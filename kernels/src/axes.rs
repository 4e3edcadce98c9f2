//! Axes of an elementwise kernel: as few as the strides allow, with the destination's neighbours innermost.

use tilefold_core::Layout;

use crate::kernel::KernelError;
use crate::params::MAX_LAYOUT_AXES;

/// Numbers of axes that kernels are compiled for.
pub(crate) const AXES: [usize; 4] = [1, 2, 4, MAX_LAYOUT_AXES];

/// One axis of two tensors of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    size: i64,
    source: i64,
    destination: i64,
}

/// Axes of a copy from a source to a destination, from the outermost to the innermost.
///
/// Elements are the same as those of the two layouts; their order is that of the destination's addresses, so that
/// neighbouring threads write neighbouring elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Axes {
    axes: Vec<Axis>,
    /// Elements from the layouts' first elements to those of the axes: axes that ran backwards were turned.
    pub(crate) source_start: i64,
    /// The same of the destination.
    pub(crate) destination_start: i64,
}

impl Axes {
    /// Axes of two layouts with one shape; the strides of an axis with one entry do not count.
    ///
    /// # Errors
    /// [`KernelError::Limit`] with more axes than kernels take, none of which can be joined.
    pub(crate) fn new(source: &Layout, destination: &Layout) -> Result<Self, KernelError> {
        let mut found = Self { axes: Vec::new(), source_start: 0, destination_start: 0 };
        let strides = source.strides().iter().zip(destination.strides());
        for (&size, (&source, &destination)) in destination.shape().iter().zip(strides) {
            let size = i64::try_from(size).unwrap_or(i64::MAX);
            if size > 1 {
                found.push(Axis { size, source, destination });
            }
        }
        found.axes.sort_by_key(|axis| std::cmp::Reverse(axis.destination));
        found.join();
        if found.axes.is_empty() {
            found.axes.push(Axis { size: 1, source: 0, destination: 0 });
        }
        let (limit, got) = (MAX_LAYOUT_AXES as u64, found.axes.len() as u64);
        if got > limit {
            return Err(KernelError::Limit { what: "the number of axes that cannot be joined", limit, got });
        }
        Ok(found)
    }

    /// Adds an axis so that its destination runs forwards; a layout that exists has positions that fit `i64`.
    fn push(&mut self, axis: Axis) {
        if axis.destination >= 0 {
            self.axes.push(axis);
            return;
        }
        let last = axis.size - 1;
        self.source_start += last.wrapping_mul(axis.source);
        self.destination_start += last.wrapping_mul(axis.destination);
        self.axes.push(Axis {
            source: axis.source.wrapping_neg(),
            destination: axis.destination.wrapping_neg(),
            ..axis
        });
    }

    /// Joins an axis with the next inner one where both tensors continue from the end of one row into the next.
    fn join(&mut self) {
        let mut joined: Vec<Axis> = Vec::new();
        for &inner in &self.axes {
            let continues = |outer: &&mut Axis| {
                outer.source == inner.size.wrapping_mul(inner.source)
                    && outer.destination == inner.size.wrapping_mul(inner.destination)
            };
            match joined.last_mut().filter(continues) {
                Some(outer) => *outer = Axis { size: outer.size * inner.size, ..inner },
                None => joined.push(inner),
            }
        }
        self.axes = joined;
    }

    /// Axes of the kernel that takes them: the next of [`AXES`].
    pub(crate) fn compiled(&self) -> usize {
        AXES.into_iter().find(|&axes| axes >= self.axes.len()).unwrap_or(MAX_LAYOUT_AXES)
    }

    /// Elements.
    pub(crate) fn elements(&self) -> i64 {
        self.axes.iter().map(|axis| axis.size).product()
    }

    /// Sizes.
    pub(crate) fn sizes(&self) -> [i64; MAX_LAYOUT_AXES] {
        self.padded(1, |axis| axis.size)
    }

    /// Strides of the source.
    pub(crate) fn source_strides(&self) -> [i64; MAX_LAYOUT_AXES] {
        self.padded(0, |axis| axis.source)
    }

    /// Strides of the destination.
    pub(crate) fn destination_strides(&self) -> [i64; MAX_LAYOUT_AXES] {
        self.padded(0, |axis| axis.destination)
    }

    /// Outer axes that are not there have one entry.
    fn padded(&self, fill: i64, field: impl Fn(&Axis) -> i64) -> [i64; MAX_LAYOUT_AXES] {
        let mut array = [fill; MAX_LAYOUT_AXES];
        let first = self.compiled() - self.axes.len();
        array[first..].iter_mut().zip(&self.axes).for_each(|(to, axis)| *to = field(axis));
        array
    }
}

/// An address so many elements further; addresses of elements that exist fit.
pub(crate) fn moved(address: u64, elements: i64, element_bytes: usize) -> u64 {
    address.wrapping_add_signed(elements.wrapping_mul(element_bytes as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes(shape: &[usize], source: &[i64], destination: &[i64]) -> Axes {
        let layout = |strides| Layout::new(shape, strides, 0).unwrap();
        Axes::new(&layout(source), &layout(destination)).unwrap()
    }

    #[test]
    fn dense_tensors_have_one_axis() {
        let dense = axes(&[2, 3, 4], &[12, 4, 1], &[12, 4, 1]);
        assert_eq!((dense.compiled(), dense.elements()), (1, 24));
        assert_eq!(axes(&[], &[], &[]).sizes(), [1; MAX_LAYOUT_AXES]);
        assert_eq!(axes(&[1, 1], &[7, 9], &[3, 5]).compiled(), 1);
    }

    #[test]
    fn the_destinations_neighbours_are_innermost() {
        let transposed = axes(&[5, 7], &[7, 1], &[1, 5]);
        assert_eq!(transposed.sizes()[..2], [7, 5]);
        assert_eq!(transposed.source_strides()[..2], [1, 7]);
        assert_eq!(transposed.destination_strides()[..2], [5, 1]);
    }

    #[test]
    fn axes_that_run_backwards_are_turned() {
        let both = axes(&[4, 6], &[6, 1], &[-6, -1]);
        assert_eq!((both.compiled(), both.source_start, both.destination_start), (1, 23, -23));
        assert_eq!((both.source_strides()[0], both.destination_strides()[0]), (-1, 1));
    }

    #[test]
    fn axes_that_are_not_there_are_outermost() {
        let three = axes(&[2, 3, 5], &[100, 20, 3], &[200, 40, 4]);
        assert_eq!((three.compiled(), three.sizes()), (4, [1, 2, 3, 5, 1, 1, 1, 1]));
        assert_eq!(three.source_strides(), [0, 100, 20, 3, 0, 0, 0, 0]);
    }

    #[test]
    fn a_broadcast_source_joins_too() {
        let number = axes(&[3, 4], &[0, 0], &[4, 1]);
        assert_eq!((number.compiled(), number.source_strides()[0]), (1, 0));
    }

    #[test]
    fn too_many_axes_are_refused() {
        let shape = [2; 9];
        let strides: Vec<i64> = (0..9).map(|axis| 3_i64.pow(axis)).collect();
        let layout = Layout::new(&shape, &strides, 0).unwrap();
        assert!(matches!(Axes::new(&layout, &layout), Err(KernelError::Limit { limit: 8, got: 9, .. })));
    }
}
