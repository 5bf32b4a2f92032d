//! This process's own memory, looked at with care.

use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Copies what is at `address`, through the kernel, which refuses what is not there. Whether all of it was.
pub fn read(address: u64, into: &mut [u8]) -> bool {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: into.len() };
    // SAFETY: the kernel writes to `into`, at most as much as it holds, and checks the other address.
    let count = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    usize::try_from(count) == Ok(into.len())
}

/// From the first to the last address of the program or library that `address` lies in.
pub fn image_of(address: u64) -> Option<Range<u64>> {
    let mut search = Search { address, found: None };
    // SAFETY: `look` is called with this very pointer, before the call returns.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found
}

struct Search {
    address: u64,
    found: Option<Range<u64>>,
}

unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _: usize, search: *mut c_void) -> c_int {
    // SAFETY: the loader passes one image, with as many headers as it says, and what it was given.
    let (search, base, headers) = unsafe {
        let info = &*info;
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum));
        (&mut *search.cast::<Search>(), info.dlpi_addr, headers)
    };
    let loaded = headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
    let ranges = loaded.map(|header| {
        let start = base.wrapping_add(header.p_vaddr);
        start..start.wrapping_add(header.p_memsz)
    });
    let whole = ranges.reduce(|one, other| one.start.min(other.start)..one.end.max(other.end));
    search.found = whole.filter(|range| range.contains(&search.address));
    c_int::from(search.found.is_some())
}
