//! Handles: numbers that stand for contexts, streams, events, modules, functions and pools.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::status::{Answer, Status};

/// A handle as the caller holds it; never an address.
pub(crate) type Handle = *mut c_void;

/// What handles of one kind stand for. A number is given out once.
#[derive(Debug)]
pub(crate) struct Table<T>(Mutex<Entries<T>>);

#[derive(Debug)]
struct Entries<T> {
    next: usize,
    live: HashMap<usize, T>,
}

/// Between two handles, and from one kind of handle to the next: a handle of another kind is in no table but its own.
const STEP: usize = 64;

impl<T: Clone> Table<T> {
    /// An empty table, for the `kind`-th kind of handle.
    pub(crate) fn new(kind: usize) -> Self {
        Self(Mutex::new(Entries { next: 0x1000_0000 + kind, live: HashMap::new() }))
    }

    fn entries(&self) -> MutexGuard<'_, Entries<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new handle.
    pub(crate) fn insert(&self, value: T) -> Handle {
        let mut entries = self.entries();
        let number = entries.next;
        entries.next += STEP;
        entries.live.insert(number, value);
        std::ptr::without_provenance_mut(number)
    }

    /// What a handle stands for.
    ///
    /// # Errors
    /// [`Status::InvalidHandle`] for one that was never given out, or has ended.
    pub(crate) fn get(&self, handle: Handle) -> Answer<T> {
        self.entries().live.get(&handle.addr()).cloned().ok_or(Status::InvalidHandle)
    }

    /// Ends a handle.
    ///
    /// # Errors
    /// As [`Table::get`].
    pub(crate) fn remove(&self, handle: Handle) -> Answer<T> {
        self.entries().live.remove(&handle.addr()).ok_or(Status::InvalidHandle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_and_foreign_handles_are_refused() {
        let (streams, events) = (Table::new(0), Table::new(1));
        let (a, b, event) = (streams.insert('a'), streams.insert('b'), events.insert('e'));
        assert_eq!((streams.get(a), streams.get(b)), (Ok('a'), Ok('b')));
        assert_eq!(streams.get(event), Err(Status::InvalidHandle));
        assert_eq!(streams.remove(a), Ok('a'));
        assert_eq!(streams.get(a), Err(Status::InvalidHandle));
        assert_eq!(streams.remove(a), Err(Status::InvalidHandle));
        assert_ne!(streams.insert('c'), a);
    }
}
