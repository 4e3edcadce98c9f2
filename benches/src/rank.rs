//! Tensors with fewer axes than the contract's: the axes that are left out have size 1.

use tilefold::{ProblemError, TensorView, TensorViewMut};

/// Which axis a tensor with one axis less than the contract's leaves out; with two less it is both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Omitted {
    /// `[rows, seqlen, ...]`
    #[default]
    Batch,
    /// `[batch, seqlen, ...]`
    Rows,
}

impl Omitted {
    /// The view with all its axes; of another rank than `rank`, `rank - 1` and `rank - 2` it stays as it is.
    ///
    /// # Errors
    /// As [`TensorView::unsqueeze`].
    pub fn lift<'a>(self, view: &TensorView<'a>, rank: usize) -> Result<TensorView<'a>, ProblemError> {
        self.axes(view.shape().len(), rank).iter().try_fold(view.clone(), |view, &axis| view.unsqueeze(axis))
    }

    /// As [`Omitted::lift`], for an output.
    ///
    /// # Errors
    /// As [`TensorViewMut::unsqueeze`].
    pub fn lift_mut(self, view: TensorViewMut<'_>, rank: usize) -> Result<TensorViewMut<'_>, ProblemError> {
        self.axes(view.as_view().shape().len(), rank).iter().try_fold(view, |view, &axis| view.unsqueeze(axis))
    }

    /// The contract's shape without the axes that `rank` leaves out.
    #[must_use]
    pub fn lower(self, full: &[usize], rank: usize) -> Vec<usize> {
        let mut shape = full.to_vec();
        for &axis in self.axes(rank, full.len()).iter().rev() {
            shape.remove(axis);
        }
        shape
    }

    /// Axes to insert, one after the other.
    fn axes(self, rank: usize, full: usize) -> &'static [usize] {
        match (full.checked_sub(rank), self) {
            (Some(1), Self::Batch) => &[0],
            (Some(1), Self::Rows) => &[1],
            (Some(2), _) => &[0, 0],
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifting_and_lowering_are_inverse() {
        let data = [0.0_f32; 24];
        for (shape, omitted, full) in [
            (vec![2, 3, 4], Omitted::Batch, [1, 2, 3, 4]),
            (vec![2, 3, 4], Omitted::Rows, [2, 1, 3, 4]),
            (vec![6, 4], Omitted::Rows, [1, 1, 6, 4]),
            (vec![1, 2, 3, 4], Omitted::Batch, [1, 2, 3, 4]),
        ] {
            let lifted = omitted.lift(&TensorView::from_slice(&data, &shape).unwrap(), 4).unwrap();
            assert_eq!(lifted.shape(), full);
            assert_eq!(omitted.lower(&full, shape.len()), shape);
        }
        let scalar = TensorView::from_slice(&data, &[24]).unwrap();
        assert_eq!(Omitted::Rows.lift(&scalar, 4).unwrap().shape(), [24]);
    }
}
