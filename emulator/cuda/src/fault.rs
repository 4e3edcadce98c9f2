//! Guards around the calls: an unwinding never leaves the library, and words about a failure stay with the thread.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::status::{Answer, Status};

thread_local! {
    /// The status this thread was told last, and what stands behind it.
    static DETAIL: RefCell<Option<(Status, String)>> = const { RefCell::new(None) };
}

/// Runs a call's body.
pub(crate) fn guard(body: impl FnOnce() -> Answer) -> c_int {
    let answer = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        remember(Status::Unknown, "the virtual driver panicked".to_owned());
        Err(Status::Unknown)
    });
    answer.err().unwrap_or(Status::Success) as c_int
}

/// Keeps words for the status that the present call is about to return.
pub(crate) fn remember(status: Status, detail: String) {
    DETAIL.with_borrow_mut(|slot| *slot = Some((status, detail)));
}

/// The driver's words for a status, with this thread's detail where there is one.
///
/// The text lives for good, as that of a driver does: it is made for failures alone.
pub(crate) fn words(status: Status) -> &'static CStr {
    let detail = DETAIL.with_borrow(|slot| slot.as_ref().filter(|(of, _)| *of == status).map(|(_, text)| text.clone()));
    let text = detail.and_then(|detail| {
        CString::new(format!("{}: {detail}", status.words().to_string_lossy()).replace('\0', " ")).ok()
    });
    text.map_or(status.words(), |text| Box::leak(text.into_boxed_c_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unwinding_becomes_a_status_with_words() {
        assert_eq!(guard(|| Ok(())), 0);
        assert_eq!(guard(|| Err(Status::InvalidHandle)), 400);
        assert_eq!(words(Status::Unknown), c"unknown error");
        assert_eq!(guard(|| panic!("on purpose")), 999);
        assert_eq!(words(Status::Unknown), c"unknown error: the virtual driver panicked");
        assert_eq!(words(Status::InvalidValue), c"invalid argument");
    }
}
