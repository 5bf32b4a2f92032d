//! The Python in a process, this one or another, found from outside.
//!
//! The runtime of another process is found by the ELF files that it has mapped: one of them has the symbol
//! `_PyRuntime` (libpython, or the executable where Python is linked into that). A process that was forked
//! from one that we know has it at the same place.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, ReadCache};

use super::reader::Reader;
use crate::ffi::offsets::{AsyncioOffsets, Layout, Mismatch, TABLE_SIZE, own_runtime};
use crate::sys::memory::Memory;
use crate::sys::{look, process};

/// A Python that can be read.
pub struct Runtime {
    /// The process.
    pub pid: i32,
    /// Its version, as in `3.14.8`.
    pub version: String,
    /// The way in.
    pub reader: Reader,
    address: u64,
}

/// Why there is nothing of Python's to be read in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// There is no such process, or no longer.
    Gone,
    /// We may not look into it.
    Forbidden,
    /// It has no Python, or none whose runtime can be found.
    NoPython,
    /// Its Python is not CPython 3.14 with a GIL.
    OtherPython(String),
    /// The operating system's.
    Os(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("there is no such process"),
            Self::Forbidden => f.write_str(
                "its memory may not be read: do this as the same user or as root, and where \
                 /proc/sys/kernel/yama/ptrace_scope is not 0, as root (in a container with the capability SYS_PTRACE)",
            ),
            Self::NoPython => f.write_str("there is no Python in it"),
            Self::OtherPython(which) => {
                write!(f, "its Python is {which}, and only that of CPython 3.14 with a GIL can be read")
            }
            Self::Os(error) => f.write_str(error),
        }
    }
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Gone,
            io::ErrorKind::PermissionDenied => Self::Forbidden,
            // The kernel says that of a process that is ending.
            _ if error.raw_os_error() == Some(libc::ESRCH) => Self::Gone,
            _ => Self::Os(error.to_string()),
        }
    }
}

/// Where the runtime of another process was found last: those that are forked from one have it there too.
static LAST: AtomicU64 = AtomicU64::new(0);

impl Runtime {
    /// The Python of a process, which may be this one.
    ///
    /// # Errors
    /// There is none that can be read.
    pub fn find(pid: i32) -> Result<Self, Obstacle> {
        let memory = Memory::of(pid)?;
        if pid == process::id() {
            return Self::at(pid, memory, own_runtime());
        }
        for guess in [own_runtime(), LAST.load(Ordering::Relaxed)] {
            if guess != 0 && table(&memory, guess).is_some_and(|table| Layout::parse(&table).is_ok()) {
                return Self::at(pid, memory, guess);
            }
        }
        let mut obstacle = Obstacle::NoPython;
        for image in images(pid)? {
            let Some(address) = image.runtime(pid) else { continue };
            match Self::at(pid, Memory::of(pid)?, address) {
                Ok(found) => {
                    LAST.store(address, Ordering::Relaxed);
                    return Ok(found);
                }
                Err(why) => obstacle = why,
            }
        }
        if look::process(pid).is_none_or(|found| matches!(found.state, 'Z' | 'X')) {
            return Err(Obstacle::Gone);
        }
        Err(obstacle)
    }

    fn at(pid: i32, memory: Memory, address: u64) -> Result<Self, Obstacle> {
        let table = table(&memory, address).ok_or(Obstacle::NoPython)?;
        let (at, version) = Layout::parse(&table).map_err(|mismatch| {
            Obstacle::OtherPython(match mismatch {
                Mismatch::Version(major, minor) => format!("{major}.{minor}"),
                Mismatch::FreeThreaded => "3.14 without a GIL".into(),
                Mismatch::NoTable(_) => "older than 3.13, or not yet started".into(),
                Mismatch::Nonsense(what) => format!("laid out in a way that cannot be ({what})"),
            })
        })?;
        Ok(Self { pid, version, reader: Reader::new(memory, at), address })
    }

    /// Where its interpreters are, the oldest first.
    pub fn interpreters(&self) -> Vec<u64> {
        self.reader.walk().interpreters(self.address)
    }

    /// Where the parts of asyncio's tasks are, if asyncio's C module is loaded there.
    pub fn asyncio(&self) -> Option<AsyncioOffsets> {
        let images = images(self.pid).ok()?;
        let named = |image: &&Image| image.base_name().starts_with("_asyncio");
        // Linked into Python, where it has no file of its own.
        let within = images.iter().filter(|image| !named(image) && image.may_be_python());
        let sections = images.iter().filter(named).chain(within);
        sections
            .filter_map(|image| image.section(self.pid, ".AsyncioDebug"))
            .find_map(|it| AsyncioOffsets::parse(&it))
    }
}

fn table(memory: &Memory, address: u64) -> Option<[u8; TABLE_SIZE]> {
    let mut bytes = [0; TABLE_SIZE];
    memory.read(address, &mut bytes).then_some(bytes)
}

/// A file that a process has mapped from its beginning.
struct Image {
    path: String,
    /// Where its first page is.
    start: u64,
    end: u64,
    is_program: bool,
}

/// What of the files that a process has mapped may have Python in it: the program, and what is named so.
fn images(pid: i32) -> Result<Vec<Image>, Obstacle> {
    let maps = std::fs::read(format!("/proc/{pid}/maps"))?;
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let program = program.map(|path| path.to_string_lossy().into_owned());
    let mut found: Vec<Image> = Vec::new();
    for line in String::from_utf8_lossy(&maps).lines() {
        // Addresses, rights, offset, device, inode; then spaces, and the path as it is.
        let mut words = line.splitn(6, ' ');
        let (Some(range), Some(_), Some(offset), Some(_), Some(_), Some(path)) =
            (words.next(), words.next(), words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let path = path.trim_start();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let Some((Some(start), Some(end))) = range.split_once('-').map(|(start, end)| (hex(start), hex(end)))
        else {
            continue;
        };
        if hex(offset) == Some(0) && path.starts_with('/') && found.iter().all(|image| image.path != path) {
            let is_program = program.as_deref() == Some(path);
            found.push(Image { path: path.to_owned(), start, end, is_program });
        }
    }
    found.retain(|image| image.may_be_python() || image.base_name().starts_with("_asyncio"));
    Ok(found)
}

type Elf<'a> = ElfFile64<'a, Endianness, &'a ReadCache<File>>;

impl Image {
    fn base_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    fn may_be_python(&self) -> bool {
        self.is_program || self.base_name().contains("python")
    }

    /// The file, also where the process lives in another file system, or the file has been replaced.
    fn open(&self, pid: i32) -> Option<File> {
        let mut ways = vec![format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end)];
        if self.is_program {
            ways.push(format!("/proc/{pid}/exe"));
        }
        ways.push(format!("/proc/{pid}/root{}", self.path));
        ways.push(self.path.clone());
        // What is there by now may be anything: a pipe would keep us waiting.
        let open = |way: &String| File::options().read(true).custom_flags(libc::O_NONBLOCK).open(way).ok();
        ways.iter().find_map(open).filter(|file| file.metadata().is_ok_and(|found| found.is_file()))
    }

    /// Where the runtime is: in a section of its own, which is found sooner, or by its symbol.
    fn runtime(&self, pid: i32) -> Option<u64> {
        let data = ReadCache::new(self.open(pid)?);
        let elf = Elf::parse(&data).ok()?;
        let by_symbol = || {
            let mut symbols = elf.dynamic_symbols().filter(|symbol| symbol.is_definition());
            symbols.find(|symbol| symbol.name() == Ok("_PyRuntime")).map(|symbol| symbol.address())
        };
        let section = elf.section_by_name(".PyRuntime").map(|section| section.address());
        let linked_for = section.or_else(by_symbol)?;
        linked_for.checked_add(self.start.checked_sub(first_address(&elf)?)?)
    }

    fn section(&self, pid: i32, name: &str) -> Option<Vec<u8>> {
        const MOST: u64 = 4096;
        let data = ReadCache::new(self.open(pid)?);
        let elf = Elf::parse(&data).ok()?;
        let section = elf.section_by_name(name).filter(|section| section.size() <= MOST)?;
        Some(section.data().ok()?.to_vec())
    }
}

/// The address that the file's first page is linked for.
fn first_address(elf: &Elf<'_>) -> Option<u64> {
    const PAGE: u64 = 4096;
    let endian = elf.endian();
    let loaded =
        elf.elf_program_headers().iter().filter(|header| header.p_type(endian) == object::elf::PT_LOAD);
    let first = loaded.min_by_key(|header| header.p_offset(endian))?;
    Some((first.p_vaddr(endian).checked_sub(first.p_offset(endian))?) & !(PAGE - 1))
}
