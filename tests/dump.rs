//! What is read from outside may be anything: the reader neither crashes nor runs on for ever.

use std::time::{Duration, Instant};

use _native::diag::dump::Dump;
use _native::diag::lines::line_at;
use _native::diag::python::{Obstacle, Runtime};
use _native::diag::reader::Reader;
use _native::diag::tasks;
use _native::ffi::offsets::{AsyncioOffsets, Layout, TABLE_SIZE, own_runtime};
use _native::sys::lock::lock_within;
use _native::sys::memory::Memory;

/// A sequence of numbers that is the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }
}

fn table() -> [u8; TABLE_SIZE] {
    let mut table = [0; TABLE_SIZE];
    assert!(Memory::own().read(own_runtime(), &mut table), "this process has a runtime");
    table
}

/// Has every way of reading go from an address.
fn read_all(reader: &Reader, address: u64) {
    let frames = reader.frames(Some(address), 64);
    assert!(frames.shown.len() <= 64, "no more than was asked for");
    reader.text(address);
    reader.type_name(address);
    reader.list_items(address);
    reader.set_items(address);
    reader.attribute(address, "_name");
    reader.local(address, "runner");
    reader.awaiting(address, 32);
    reader.walk().threads(address);
    reader.walk().holder_of(address);
    reader.walk().interpreters(address);
    let asyncio = AsyncioOffsets {
        task_name: 0x88,
        task_awaited_by: 0x60,
        task_awaited_by_is_set: 0x6d,
        task_coro: 0x80,
        task_node: 0x98,
        thread_tasks_head: 0x370,
    };
    tasks::of_thread(reader, &frames, address, Some(&asyncio));
}

#[test]
fn bad_addresses_are_no_crash() {
    let (at, _) = Layout::parse(&table()).expect("built for this Python");
    let reader = Reader::new(Memory::own(), at);
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    let here = &raw const numbers as u64;
    let start = Instant::now();
    for round in 0..20_000_u64 {
        let near = [here, own_runtime(), main as *const () as u64][numbers.below(3)];
        let address = match round % 4 {
            0 => numbers.next(),
            1 => numbers.next() >> 16,
            2 => u64::MAX - numbers.next() % 512,
            _ => near.wrapping_add(numbers.next() % (1 << 16)).wrapping_sub(1 << 15),
        };
        read_all(&reader, address);
    }
    assert!(start.elapsed() < Duration::from_secs(60), "it took {:?}", start.elapsed());
}

fn main() {}

/// Memory in which everything points to something: rings, long chains, sizes that are addresses.
#[test]
fn memory_that_refers_to_itself_is_no_endless_walk() {
    let (at, _) = Layout::parse(&table()).expect("built for this Python");
    let mut numbers = Numbers(88_172_645_463_325_252);
    let mut memory = vec![0_u64; 1 << 13];
    let base = memory.as_ptr() as u64;
    let start = Instant::now();
    for _ in 0..40 {
        let size = memory.len();
        for word in &mut memory {
            *word = match numbers.below(8) {
                0 => numbers.next() % 8,
                1 => numbers.next(),
                _ => base + 8 * numbers.below(size) as u64,
            };
        }
        // What was cached is of another memory.
        let reader = Reader::new(Memory::own(), at);
        for _ in 0..20 {
            read_all(&reader, base + 8 * numbers.below(size) as u64);
        }
    }
    assert!(start.elapsed() < Duration::from_secs(60), "it took {:?}", start.elapsed());
}

#[test]
fn a_table_of_nonsense_is_refused_or_harmless() {
    let good = table();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut refused = 0;
    for round in 0..200 {
        let mut bad = good;
        for byte in &mut bad[24..] {
            // Small offsets, mostly: large ones are refused.
            *byte = if numbers.below(8) < 6 { 0 } else { numbers.next() as u8 };
        }
        if round % 2 == 0 {
            bad[24..].as_chunks_mut::<8>().0.iter_mut().for_each(|word| word[3..].fill(0));
        }
        match Layout::parse(&bad) {
            Ok((at, _)) => read_all(&Reader::new(Memory::own(), at), own_runtime()),
            Err(_) => refused += 1,
        }
    }
    assert!(refused >= 100, "offsets beyond any structure are refused: {refused}");
}

#[test]
fn a_table_of_lines_may_be_anything() {
    let mut numbers = Numbers(42);
    for _ in 0..20_000 {
        let table: Vec<u8> = (0..numbers.below(64)).map(|_| numbers.next() as u8).collect();
        line_at(&table, numbers.next().cast_signed(), numbers.next() % 100);
    }
}

#[test]
fn what_cannot_be_read_is_told_apart() {
    assert_eq!(Runtime::find(i32::MAX).err(), Some(Obstacle::Gone));
    let mut sleeper = std::process::Command::new("sleep").arg("1000").spawn().expect("there is a sleep");
    let pid = i32::try_from(sleeper.id()).expect("a pid");
    let found = Dump::of(pid, "", true).err();
    sleeper.kill().expect("it is ours");
    // It has ended, and nobody has waited for it.
    let deadline = Instant::now() + Duration::from_secs(30);
    while Runtime::find(pid).err() != Some(Obstacle::Gone) {
        assert!(Instant::now() < deadline, "a zombie is gone");
        std::thread::yield_now();
    }
    sleeper.wait().expect("it is ours");
    assert_eq!(found, Some(Obstacle::NoPython));
}

/// Python has not been started here: its runtime is empty, and the threads are seen all the same.
#[test]
fn a_runtime_without_interpreters_has_threads() {
    let dump = Dump::own("a test", false);
    assert_eq!(dump.processes.len(), 1);
    let own = &dump.processes[0];
    assert!(own.python.as_deref().is_some_and(|version| version.starts_with("3.14.")), "{:?}", own.obstacle);
    assert!(own.interpreters.is_empty());
    assert!(own.threads.iter().any(|thread| thread.id == own.pid));
    assert!(dump.to_text().ends_with(&format!("==== end of the dump of process {}\n", own.pid)));
}

#[test]
fn a_lock_that_is_held_is_waited_for_within_a_bound() {
    let lock = std::sync::Mutex::new(7);
    let held = lock.lock().expect("nobody has it");
    let start = Instant::now();
    assert!(lock_within(&lock, Duration::from_millis(20)).is_none());
    assert!(start.elapsed() >= Duration::from_millis(20));
    drop(held);
    assert_eq!(lock_within(&lock, Duration::ZERO).as_deref(), Some(&7));
}
