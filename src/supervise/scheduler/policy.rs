//! Who may run: pure. What the workers have used since the last tick goes in, and who is to be held comes out.
//!
//! Workers that want more of a GIL than their fair share compete: one of them at a time runs, the one that has had
//! least for its weight, and further ones as long as the GIL is found free. The others are not held. A worker
//! that is just starting has all of those held for a while. One with a quota is held while it has used that up.

use std::collections::BTreeMap;
use std::time::Duration;

/// How often there is a tick while workers take turns.
pub(super) const TICK: Duration = Duration::from_millis(5);
/// How long a turn is.
const SLICE: Duration = Duration::from_millis(10);
/// After so many turns in which the GIL was never found free, one less runs at a time.
const NARROWS: u32 = 4;
/// Over how long it is averaged how much of a processor a worker wants, in seconds.
const WINDOW: f64 = 0.1;
/// Who wants less than this part of its fair share does not compete.
const LIGHT: f64 = 0.5;
/// Who wants less than this part of a processor does not either.
const NOTHING: f64 = 0.01;
/// Those that are starting have the others held for the first part of this, again and again.
const START: Duration = Duration::from_millis(50);
const STARTS: Duration = Duration::from_millis(60);
/// How long one counts as starting, and how much it may use of that.
const STARTING: Duration = Duration::from_secs(1);
const STARTING_USE: Duration = Duration::from_millis(200);
/// How much of its quota a worker can save up, in seconds of that.
const SAVED: f64 = 0.1;

/// What a worker may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::supervise) struct Terms {
    /// Its share, among those that compete.
    pub(in crate::supervise) weight: f64,
    /// At most this part of a processor.
    pub(in crate::supervise) quota: Option<f64>,
    /// Its GIL is that of the main interpreter.
    pub(in crate::supervise) shares_gil: bool,
    /// Only what the others leave.
    pub(in crate::supervise) leftovers: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self { weight: 1.0, quota: None, shares_gil: false, leftovers: false }
    }
}

/// What was seen of a worker since the last tick.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) id: u64,
    pub(super) terms: Terms,
    /// What its threads have used.
    pub(super) used: Duration,
    /// One of them waits at its gate.
    pub(super) waits: bool,
    /// Somebody wants it to stand still.
    pub(super) paused: bool,
    /// Its target has not begun.
    pub(super) starting: bool,
}

/// What is to be.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Verdict {
    /// Each worker, and whether it is to be held. Those that may run come first.
    pub(super) held: Vec<(u64, bool)>,
    /// Workers take turns.
    pub(super) turns: bool,
    /// Somebody with a quota has used something of it.
    pub(super) metered: bool,
}

#[derive(Debug)]
struct Member {
    /// What it has had for its weight, in seconds.
    virtual_time: f64,
    /// What part of a processor it wants, as far as can be told.
    demand: f64,
    samples: f64,
    held: bool,
    competes: bool,
    /// For how many ticks it has been held without coming to its gate.
    absent: usize,
    /// What is left of its quota, in seconds.
    allowance: f64,
    age: Duration,
    total: Duration,
}

/// The memory of all that.
#[derive(Debug, Default)]
pub(super) struct Policy {
    members: BTreeMap<u64, Member>,
    /// How many run at a time.
    width: usize,
    /// For how many slices the GIL was never found free.
    never_free: u32,
    /// How much of the slice is left.
    slice: Duration,
    running: Vec<u64>,
    starts: Duration,
}

impl Policy {
    /// Who is to be held from now on, `elapsed` after the last tick. `free`: nobody has the GIL just now.
    pub(super) fn tick(&mut self, elapsed: Duration, seen: &[Seen], free: bool) -> Verdict {
        self.members.retain(|id, _| seen.iter().any(|seen| seen.id == *id));
        let latest = self.least_virtual_time();
        for seen in seen {
            let member = self.members.entry(seen.id).or_insert_with(|| Member::new(latest));
            member.account(elapsed, seen);
        }
        let rivals = self.rivals(seen);
        let starting = seen.iter().any(|seen| self.members[&seen.id].is_starting(seen));
        let turns = rivals.len() > 1 || starting && !rivals.is_empty();
        self.choose(elapsed, &rivals, turns, starting, free);
        let mut held = Vec::with_capacity(seen.len());
        for seen in seen {
            let member = &self.members[&seen.id];
            let waits_its_turn = turns
                && rivals.contains(&seen.id)
                && !self.running.contains(&seen.id)
                && !member.is_away(rivals.len());
            held.push((seen.id, member.is_spent(seen) || waits_its_turn));
        }
        for (id, holds) in &held {
            if let Some(member) = self.members.get_mut(id) {
                if member.is_away(rivals.len()) && !holds {
                    // If it comes back, that is seen.
                    (member.demand, member.samples) = (0.0, 1.0);
                }
                member.held = *holds;
            }
        }
        held.sort_by_key(|(_, held)| *held);
        let metered = seen.iter().any(|seen| {
            seen.terms.quota.is_some() && (seen.used > Duration::ZERO || self.members[&seen.id].held)
        });
        Verdict { held, turns, metered }
    }

    /// Whose turn it is.
    pub(super) fn running(&self) -> &[u64] {
        &self.running
    }

    /// The least that any of those who compete has had.
    fn least_virtual_time(&self) -> f64 {
        let times = self.members.values().filter(|member| member.competes).map(|member| member.virtual_time);
        times.reduce(f64::min).unwrap_or(0.0)
    }

    /// Those that compete for the shared GIL.
    fn rivals(&mut self, seen: &[Seen]) -> Vec<u64> {
        let latest = self.least_virtual_time();
        let takes_part: Vec<&Seen> = seen
            .iter()
            .filter(|seen| {
                let member = &self.members[&seen.id];
                seen.terms.shares_gil && !seen.paused && !member.is_starting(seen) && !member.is_spent(seen)
            })
            .collect();
        let wants: Vec<(f64, f64)> =
            takes_part.iter().map(|seen| (self.members[&seen.id].demand, seen.terms.weight)).collect();
        let compete = compete(&wants);
        for seen in seen {
            let place = takes_part.iter().position(|other| other.id == seen.id);
            let competes = place.is_some_and(|place| compete[place]);
            // One that has used up its quota keeps its claim.
            if let Some(member) = self.members.get_mut(&seen.id).filter(|member| !member.is_spent(seen)) {
                if !(competes && member.competes) {
                    // Who did not want its share has no claim to it afterwards.
                    member.virtual_time = member.virtual_time.max(latest);
                }
                member.competes = competes;
            }
        }
        let mut rivals: Vec<&Seen> = takes_part
            .iter()
            .zip(&compete)
            .filter(|(_, competes)| **competes)
            .map(|(seen, _)| *seen)
            .collect();
        rivals.sort_by(|one, other| {
            let key = |seen: &Seen| (seen.terms.leftovers, self.members[&seen.id].virtual_time);
            let ((first, had), (second, has)) = (key(one), key(other));
            first.cmp(&second).then(had.total_cmp(&has))
        });
        rivals.iter().map(|seen| seen.id).collect()
    }

    /// Chooses whose turn it is.
    fn choose(&mut self, elapsed: Duration, rivals: &[u64], turns: bool, starting: bool, free: bool) {
        if !turns {
            (self.width, self.never_free, self.slice, self.starts) = (1, 0, Duration::ZERO, Duration::ZERO);
            self.running.clear();
            return;
        }
        self.starts = if starting { self.starts + elapsed } else { Duration::ZERO };
        if starting && self.starts.as_nanos() % STARTS.as_nanos() < START.as_nanos() {
            self.running.clear();
            self.slice = Duration::ZERO;
            return;
        }
        self.running.retain(|id| rivals.contains(id));
        self.slice = self.slice.saturating_sub(elapsed);
        if free {
            self.width = (self.width + 1).min(rivals.len());
            self.never_free = 0;
        }
        if self.slice.is_zero() || self.running.is_empty() {
            self.never_free += 1;
            if self.never_free > NARROWS {
                (self.width, self.never_free) = (self.width.saturating_sub(1).max(1), 0);
            }
            self.slice = SLICE;
            self.running.clear();
        }
        for id in rivals {
            if self.running.len() >= self.width {
                break;
            }
            if !self.running.contains(id) {
                self.running.push(*id);
            }
        }
    }
}

impl Member {
    fn new(virtual_time: f64) -> Self {
        Self {
            virtual_time,
            demand: 0.0,
            samples: 0.0,
            held: false,
            competes: false,
            absent: 0,
            allowance: 0.0,
            age: Duration::ZERO,
            total: Duration::ZERO,
        }
    }

    fn account(&mut self, elapsed: Duration, seen: &Seen) {
        let (used, elapsed_seconds) = (seen.used.as_secs_f64(), elapsed.as_secs_f64());
        self.virtual_time += used / seen.terms.weight;
        self.age += elapsed;
        self.total += seen.used;
        if let Some(quota) = seen.terms.quota {
            self.allowance = (self.allowance + quota * elapsed_seconds).min(quota * SAVED) - used;
        }
        self.absent = if self.held && !seen.waits { self.absent + 1 } else { 0 };
        // What one that waits would use can't be seen.
        if elapsed_seconds > 0.0 && !seen.paused && !(self.held && seen.waits) {
            self.samples += 1.0;
            let part = (elapsed_seconds / (WINDOW + elapsed_seconds)).max(1.0 / self.samples);
            self.demand += part * (used / elapsed_seconds - self.demand);
        }
    }

    /// It was held and has not come to its gate, although there was time: it waits for something else.
    fn is_away(&self, rivals: usize) -> bool {
        self.absent > 2 + rivals
    }

    fn is_starting(&self, seen: &Seen) -> bool {
        seen.starting && seen.terms.shares_gil && self.age < STARTING && self.total < STARTING_USE
    }

    /// It has used up its quota.
    fn is_spent(&self, seen: &Seen) -> bool {
        seen.terms.quota.is_some() && self.allowance < 0.0
    }
}

/// Which of these, by what part of a processor they want and their weight, want enough of it to stand in
/// each other's way.
pub(super) fn compete(wants: &[(f64, f64)]) -> Vec<bool> {
    let mut order: Vec<usize> = (0..wants.len()).collect();
    order.sort_by(|&one, &other| {
        let key = |(demand, weight): (f64, f64)| demand / weight;
        key(wants[one]).total_cmp(&key(wants[other]))
    });
    let (mut left, mut weights) = (1.0, wants.iter().map(|(_, weight)| weight).sum::<f64>());
    let mut compete = vec![true; wants.len()];
    for place in order {
        let (demand, weight) = wants[place];
        if demand > NOTHING && demand > LIGHT * left * weight / weights {
            break;
        }
        compete[place] = false;
        left = f64::max(left - demand, 0.0);
        weights -= weight;
    }
    compete
}

#[cfg(test)]
#[path = "policy/tests.rs"]
mod tests;
