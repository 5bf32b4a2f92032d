//! The memory of this process and of others, looked at with care.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Copies what is at `address`, through the kernel, which refuses what is not there. Whether all of it was.
pub fn read(address: u64, into: &mut [u8]) -> bool {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: into.len() };
    // SAFETY: the kernel writes to `into`, at most as much as it holds, and checks the other address.
    let count = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    usize::try_from(count) == Ok(into.len())
}

/// The memory of a process, read through the kernel: a bad address is refused, and never a crash.
#[derive(Debug)]
pub struct Memory {
    /// Another process's. It is of that program for good: of what takes its place or number nothing is read.
    other: Option<File>,
}

impl Memory {
    /// This process's. It takes no descriptor.
    pub const fn own() -> Self {
        Self { other: None }
    }

    /// Another process's.
    ///
    /// # Errors
    /// The operating system's: there is none, or it may not be looked into.
    pub fn of(pid: i32) -> std::io::Result<Self> {
        if pid == super::process::id() {
            return Ok(Self::own());
        }
        File::open(format!("/proc/{pid}/mem")).map(|file| Self { other: Some(file) })
    }

    /// So many bytes from an address.
    pub fn bytes<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes).then_some(bytes)
    }

    /// A word of a structure.
    pub fn word(&self, base: u64, offset: usize) -> Option<u64> {
        self.bytes(base.checked_add(offset as u64)?).map(u64::from_ne_bytes)
    }

    /// A word that is no null pointer.
    pub fn pointer(&self, base: u64, offset: usize) -> Option<u64> {
        self.word(base, offset).filter(|address| *address != 0)
    }

    /// Copies what is at `address`. Whether all of it was there.
    pub fn read(&self, address: u64, into: &mut [u8]) -> bool {
        match &self.other {
            None => read(address, into),
            Some(file) => i64::try_from(address).is_ok() && file.read_exact_at(into, address).is_ok(),
        }
    }
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
