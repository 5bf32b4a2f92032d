//! Processes that several workers live in, each in a subinterpreter of its own. Such a process is a worker
//! that nobody sees: its supervisor runs those that live there, and it ends when the last of them has.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::worker::Worker;
use crate::error::Result;
use crate::sys::lock::lock;

/// Whose it is (the number of a worker process, or 0), and the name that they share.
pub(super) type Key = (u64, String);

/// All of them.
#[derive(Default)]
pub(super) struct Houses {
    /// Held while one is made, so that two who ask for the same get one. Never by the reactor.
    building: Mutex<()>,
    open: Mutex<HashMap<Key, House>>,
    /// Those that have not ended, also when nobody can move in any more.
    standing: Mutex<Vec<Arc<Worker>>>,
}

struct House {
    landlord: Arc<Worker>,
    lodgers: usize,
}

impl Houses {
    /// Counts one more who lives in the process of that name, which `build` makes if there is none.
    ///
    /// # Errors
    /// Those of `build`.
    pub(super) fn move_in(
        &self,
        key: Key,
        build: impl FnOnce(&str) -> Result<Arc<Worker>>,
    ) -> Result<Arc<Worker>> {
        let _building = lock(&self.building);
        if let Some(house) = lock(&self.open).get_mut(&key) {
            house.lodgers += 1;
            return Ok(Arc::clone(&house.landlord));
        }
        let landlord = build(&key.1)?;
        lock(&self.standing).push(Arc::clone(&landlord));
        lock(&self.open).insert(key, House { landlord: Arc::clone(&landlord), lodgers: 1 });
        Ok(landlord)
    }

    /// Counts one less. Whether nobody is left; then nobody moves in any more.
    pub(super) fn move_out(&self, landlord: u64) -> bool {
        let mut open = lock(&self.open);
        let Some(house) = open.values_mut().find(|house| house.landlord.id == landlord) else { return true };
        house.lodgers -= 1;
        let empty = house.lodgers == 0;
        open.retain(|_, house| house.lodgers > 0);
        empty
    }

    /// It has ended.
    pub(super) fn fallen(&self, landlord: u64) {
        lock(&self.open).retain(|_, house| house.landlord.id != landlord);
        lock(&self.standing).retain(|house| house.id != landlord);
    }

    /// Those that have not ended.
    pub(super) fn standing(&self) -> Vec<Arc<Worker>> {
        lock(&self.standing).clone()
    }
}
