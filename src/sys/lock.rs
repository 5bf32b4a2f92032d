//! Taking a `std` mutex without a poison check.
//!
//! Why `std` and not parking_lot: a fork copies every lock in the state it has at that moment.
//! `std`'s mutex is one futex word that belongs to its owner and can be left behind with it;
//! parking_lot's waiters share one process-wide table, and a bucket of it that was held by another
//! thread at the fork stays locked for ever in the child.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Locks `mutex`. A thread that panicked while it held it left its data consistent, because every
/// critical section in this crate assigns whole values; so poison is not an error here.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`lock`], but for at most so long: for whoever must not wait behind a thread that may be stuck. The
/// lock has no such wait of its own, so it is tried again and again.
pub fn lock_within<T>(mutex: &Mutex<T>, bound: Duration) -> Option<MutexGuard<'_, T>> {
    let deadline = Instant::now() + bound;
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}
