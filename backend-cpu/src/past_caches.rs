//! Writing what is larger than the caches past them: lines are not read before they are written, a third of what a copy moves.

/// A tensor of more bytes than this is written past the caches.
pub(crate) const CACHES: usize = 32 << 20;

/// Shorter runs, in bytes, are mostly the ends of lines.
pub(crate) const LEAST_RUN: usize = 256;

/// Copies bytes.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`]; and no thread, nor this one, touches the destination before this one calls [`finish`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    const LINE: usize = 64;
    let head = to.align_offset(LINE).min(bytes);
    let (lines, tail) = ((bytes - head) / LINE, (bytes - head) % LINE);
    // SAFETY: the caller's; head, lines and tail are all the bytes. Every x86-64 has the instructions, and lines are aligned.
    unsafe {
        from.copy_to_nonoverlapping(to, head);
        for line in 0..lines {
            let at = head + line * LINE;
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            let parts: [_; LINE / size_of::<__m128i>()] = std::array::from_fn(|part| _mm_loadu_si128(from.add(part)));
            for (part, value) in parts.into_iter().enumerate() {
                _mm_stream_si128(to.add(part), value);
            }
        }
        from.add(bytes - tail).copy_to_nonoverlapping(to.add(bytes - tail), tail);
    }
}

/// Copies bytes: there is no such way on this processor.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's.
    unsafe { from.copy_to_nonoverlapping(to, bytes) };
}

/// Ends what this thread has copied, before others are told of it.
pub(crate) fn finish() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_are_copied_wherever_lines_begin() {
        let from: Vec<u8> = (0..=255).cycle().take(600).collect();
        for start in [0, 1, 7, 16, 63, 64] {
            for bytes in [0, 1, 63, 64, 65, 128, 200, 511] {
                let mut to = vec![7; 600];
                // SAFETY: both have as many bytes.
                unsafe { super::copy(from[5..].as_ptr(), to[start..].as_mut_ptr(), bytes) };
                super::finish();
                assert_eq!(to[start..start + bytes], from[5..5 + bytes], "{bytes} bytes at {start}");
                assert!(to[..start].iter().chain(&to[start + bytes..]).all(|&byte| byte == 7), "{bytes} at {start}");
            }
        }
    }
}
