//! A block of words that many threads write and read at once, none of them under a lock.

use std::sync::atomic::AtomicU64;

/// So many words, all zero. They take no memory until they are written to.
pub fn zeroed(count: usize) -> Box<[AtomicU64]> {
    // The allocator has zeroed pages of the kernel's for this; to write zeros would take memory for all.
    let words = Box::into_raw(vec![0u64; count].into_boxed_slice());
    // SAFETY: the box is ours alone, and an AtomicU64 has the size, the alignment and the valid values of a u64.
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}
