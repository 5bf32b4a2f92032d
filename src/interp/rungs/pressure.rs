//! Pressing an interpreter until it is gone, from a thread that can be spared.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::door::Door;
use super::{Force, PERIOD};
use crate::events::fault;
use crate::sys::event::Event;
use crate::sys::kick::Kicker;
use crate::sys::lock::lock;
use crate::sys::thread;

/// How hard an interpreter is pressed just now. Whoever decides raises it, one thread acts on it.
#[derive(Debug, Default)]
pub struct Pressure {
    force: Mutex<Option<Force>>,
    over: Event,
}

impl Pressure {
    /// Presses from now on with `force`, on a thread of its own: that has to wait for the interpreter's GIL.
    pub fn raise(self: &Arc<Self>, door: &Arc<Door>, force: Force) {
        // Here, because that thread may be queueing for the GIL since the last time.
        door.summon(force);
        let running = lock(&self.force).replace(force).is_some();
        if !running {
            let (door, pressure) = (Arc::clone(door), Arc::clone(self));
            if let Err(error) = thread::spawn_deaf("th-ladder", move || pressure.keep_up(&door)) {
                fault!("no thread for a rung of the ladder: {error}");
            }
        }
    }

    /// The interpreter is gone.
    pub fn end(&self) {
        self.over.set();
    }

    /// Until the interpreter is gone. Also once it has been given up: then with patience.
    fn keep_up(&self, door: &Arc<Door>) {
        let started = Instant::now();
        let mut kicker = None;
        loop {
            let begun = Instant::now();
            let force = lock(&self.force).unwrap_or(Force::Interrupt);
            if force >= Force::Unblock && kicker.is_none() {
                // Where it can't be had, that was said when the first interpreter was made.
                kicker = Kicker::new().ok();
            }
            door.summon(force);
            match door.press(force, kicker.as_mut()) {
                Ok(true) => {}
                // The runner is past its code: it is ending the interpreter.
                Ok(false) if force == Force::Destroy => door.doom(kicker.as_mut()),
                Ok(false) => {}
                Err(error) => {
                    fault!("cannot interrupt a subinterpreter: {error}");
                    return;
                }
            }
            let period = if started.elapsed() < IMPATIENT { PERIOD } else { PERIOD * 20 };
            // Where hundreds are pressed at once, those who press must not keep the pressed from their GIL.
            let period = period.max(begun.elapsed());
            if self.over.wait_through_signals(Some(Instant::now() + period)) {
                return;
            }
        }
    }
}

/// How long an interpreter is pressed at the full rate.
const IMPATIENT: Duration = Duration::from_secs(10);
