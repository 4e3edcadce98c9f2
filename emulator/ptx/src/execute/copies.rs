//! Asynchronous copies under way, by thread and group.

#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub(crate) lane: u32,
    group: u32,
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    pub(crate) value: u128,
}

/// The copies of one warp; groups are counted for each thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct Copies {
    under_way: Vec<Copy>,
    /// The group that a thread's next copy belongs to: as many as it has committed.
    open: [u32; 32],
}

impl Copies {
    pub(crate) fn clear(&mut self) {
        self.under_way.clear();
        self.open = [0; 32];
    }

    pub(crate) fn start(&mut self, lane: u32, address: u64, bytes: u32, value: u128) {
        self.under_way.push(Copy { lane, group: self.open[lane as usize], address, bytes, value });
    }

    pub(crate) fn commit(&mut self, mask: u32) {
        for (lane, group) in self.open.iter_mut().enumerate() {
            *group += mask >> lane & 1;
        }
    }

    /// Takes out what has arrived when the lanes of `mask` wait until at most `pending` groups are left; `None` waits
    /// for the copies that no group holds yet, too.
    pub(crate) fn take(&mut self, pending: Option<u32>, mask: u32) -> Vec<Copy> {
        let open = self.open;
        let arrives = |copy: &mut Copy| {
            mask >> copy.lane & 1 == 1 && pending.is_none_or(|pending| copy.group + pending < open[copy.lane as usize])
        };
        self.under_way.extract_if(.., arrives).collect()
    }
}
