//! Every kernel that a launch of this crate can choose, for checks of all of them.

use crate::kernel::{Kernel, KernelError};
use crate::{backward, fill, merge, relayout};

/// All kernels: those of copies, fills and merges in every dtype, those of attention.
///
/// # Errors
/// [`KernelError::MissingSource`].
pub fn catalogue() -> Result<Vec<Kernel>, KernelError> {
    fill::kernels().chain(relayout::kernels()).chain(merge::kernels()).chain(backward::kernels()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_names_and_sources_of_their_own() {
        let kernels = catalogue().unwrap();
        for field in [|kernel: &Kernel| kernel.name.clone(), |kernel: &Kernel| kernel.hash.clone()] {
            let mut found: Vec<_> = kernels.iter().map(field).collect();
            found.sort_unstable();
            found.dedup();
            assert_eq!(found.len(), kernels.len());
        }
    }
}
