//! Workers that stand still for a while: a process is stopped with all that is below it, the threads of a
//! subinterpreter wait at its gate, and what either has asked for stands still with it.

use super::super::worker::State;
use super::{Link, Reactor, ask_for};
use crate::interp::gate::Closed;
use crate::wire::message::{ToWorker, Wish};

impl Reactor {
    /// Has a worker stand still, or go on. One that is being ended does not stand still.
    pub(super) fn pause(&mut self, id: u64, paused: bool) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let ends = entry.climb.is_some() || entry.abandoned || entry.over;
        if paused && (ends || matches!(entry.worker.state(), State::Killing | State::Ended)) {
            return;
        }
        entry.worker.set_paused(paused);
        entry.freed &= !paused;
        let owner = entry.worker.owner;
        if let Link::Kept = entry.link {
            self.tell_keeper(owner, wish(paused));
        }
        self.still(id);
    }

    /// A worker is to end: it does not stand still any more.
    pub(super) fn set_free(&mut self, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.freed = true;
        entry.worker.set_paused(false);
        self.still(id);
    }

    /// Stops a worker, or lets it go on, with those that it has asked for, where they are not yet as they should be.
    pub(super) fn still(&mut self, id: u64) {
        let Some(entry) = self.entries.get(&id) else { return };
        let above = entry.worker.parent.and_then(|parent| self.entries.get(&parent));
        let still = !entry.freed && (entry.worker.is_paused() || above.is_some_and(|above| above.still));
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.still != still) else { return };
        entry.still = still;
        match &entry.link {
            Link::Process(_) if entry.over => {}
            Link::Process(process) => process.hold_still(still),
            Link::Subint(door) => {
                if still {
                    door.free(false);
                }
                door.hold(Closed::Paused, still);
            }
            // The other supervisor ends it by itself, and knows what is to be then.
            _ if entry.freed => {}
            Link::Elsewhere(_) => ask_for(id, wish(still)),
            Link::Lodger { landlord, .. } => {
                let landlord = *landlord;
                self.tell(landlord, &ToWorker::Lodger { id, wish: wish(still) }, None);
            }
            // It stands still with its process, or was told to.
            Link::Kept => {}
        }
        let below: Vec<u64> = self
            .entries
            .values()
            .filter(|entry| entry.worker.parent == Some(id))
            .map(|entry| entry.worker.id)
            .collect();
        for id in below {
            self.still(id);
        }
    }
}

fn wish(paused: bool) -> Wish {
    if paused { Wish::Pause } else { Wish::Resume }
}
