//! Turns for the subinterpreters that share the main interpreter's GIL, and quotas for all of them.
//!
//! Nothing runs here while at most one of them is busy: the reactor looks now and then whether more are. Then
//! `th-scheduler` does what [`policy`] says, until there is nothing to do any more. It never waits for a GIL.

pub(super) mod policy;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use policy::{Policy, Seen, TICK, Terms, Verdict};

use crate::events::fault;
use crate::interp::attach::Interpreter;
use crate::interp::door::Door;
use crate::interp::gate::{self, Closed};
use crate::sys::lock::lock;
use crate::sys::{cpu, kick, thread};

/// How often it is looked whether more than one is busy, while there is more than one.
const LOOK: Duration = Duration::from_millis(100);
/// How little of a processor this process must use for nobody to be looked at.
const IDLE: f64 = 0.05;
/// How long there is nothing to do before the thread ends.
const CALM: Duration = Duration::from_millis(200);
/// How often a worker with a quota is looked at that does nothing.
const SELDOM: Duration = Duration::from_millis(50);
/// Looking takes at most this part of a processor, one over it.
const EFFORT: u32 = 25;
const LOOKING_EFFORT: u32 = 2000;
/// `0` in this variable: all run at will. Quotas are kept.
const SWITCH: &str = "TRACTOR_HOST_SCHEDULER";

/// All workers that may be held, and the thread that does so.
pub(super) struct Scheduler {
    inner: Mutex<Inner>,
    changed: Condvar,
    takes_turns: bool,
}

#[derive(Default)]
struct Inner {
    members: BTreeMap<u64, Member>,
    thread: Option<JoinHandle<()>>,
    /// The thread works.
    works: bool,
    /// No thread is to work any more.
    over: bool,
    look_at: Option<Instant>,
    looked: Option<(Instant, Duration)>,
    meters: HashMap<u64, Meter>,
}

#[derive(Clone)]
struct Member {
    door: Arc<Door>,
    terms: Terms,
    starting: bool,
}

/// What the threads of one worker had used when they were last looked at.
#[derive(Default)]
struct Meter(Option<HashMap<i32, Duration>>);

impl Meter {
    /// What they have used since then.
    fn read(&mut self, door: &Door) -> Duration {
        let threads = door.behind().map_or_else(Vec::new, Interpreter::threads);
        let now: HashMap<_, _> =
            threads.into_iter().filter_map(|thread| Some((thread, cpu::used_by(thread)?))).collect();
        let used = self.0.as_ref().map_or(Duration::ZERO, |before| {
            let since = |(thread, used): (&i32, &Duration)| {
                used.saturating_sub(before.get(thread).copied().unwrap_or_default())
            };
            now.iter().map(since).sum()
        });
        self.0 = Some(now);
        used
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        let takes_turns = std::env::var_os(SWITCH).is_none_or(|value| value != "0");
        Self { inner: Mutex::default(), changed: Condvar::new(), takes_turns }
    }
}

impl Scheduler {
    /// There is a worker, which is just starting, or of which nothing is to be left to the others.
    pub(super) fn enter(self: &Arc<Self>, id: u64, door: &Arc<Door>, terms: Terms) {
        let starting = !terms.leftovers;
        let mut inner = lock(&self.inner);
        inner.members.insert(id, Member { door: Arc::clone(door), terms, starting });
        let company = inner.members.values().filter(|member| member.terms.shares_gil).count() > 1;
        if terms.quota.is_some() || self.takes_turns && terms.shares_gil && company {
            self.work(inner);
        }
    }

    /// Its target runs.
    pub(super) fn started(&self, id: u64) {
        if let Some(member) = lock(&self.inner).members.get_mut(&id) {
            member.starting = false;
        }
    }

    /// It has been started again, with the main interpreter's GIL.
    pub(super) fn shares_gil(&self, id: u64) {
        if let Some(member) = lock(&self.inner).members.get_mut(&id) {
            member.terms.shares_gil = true;
        }
    }

    /// It is not held any more.
    pub(super) fn leave(&self, id: u64) {
        let mut inner = lock(&self.inner);
        if let Some(member) = inner.members.remove(&id) {
            // Under the lock, so that the thread does not hold it afterwards.
            member.door.hold(Closed::NotItsTurn, false);
            self.changed.notify_all();
        }
    }

    /// Ends the thread, for good.
    pub(super) fn stop(&self) {
        let thread = {
            let mut inner = lock(&self.inner);
            inner.over = true;
            inner.thread.take()
        };
        self.changed.notify_all();
        if let Some(thread) = thread {
            // Its panic has been printed; nothing is left to do about it.
            let _ = thread.join();
        }
    }

    /// Sees whether there is something to do. When to look again: never, until another worker enters.
    pub(super) fn look(self: &Arc<Self>, now: Instant) -> Option<Instant> {
        let mut inner = lock(&self.inner);
        let shared = inner.members.values().filter(|member| member.terms.shares_gil).count();
        if shared < 2 || !self.takes_turns || inner.works || inner.over {
            (inner.look_at, inner.looked) = (None, None);
            inner.meters.clear();
            return (inner.works && shared > 1).then(|| now + LOOK);
        }
        if let Some(at) = inner.look_at.filter(|at| *at > now) {
            return Some(at);
        }
        let process = cpu::used_by_process();
        let before = inner.looked.replace((now, process));
        let idle = before.is_some_and(|(then, used)| {
            process.saturating_sub(used).as_secs_f64() < IDLE * now.duration_since(then).as_secs_f64()
        });
        if idle {
            // What they have used since is little, and counts with the next look.
            inner.look_at = Some(now + LOOK);
            return inner.look_at;
        }
        let elapsed = before.map_or(LOOK, |(then, _)| now.duration_since(then)).as_secs_f64();
        let Inner { members, meters, .. } = &mut *inner;
        meters.retain(|id, _| members.contains_key(id));
        let wants: Vec<(f64, f64)> = members
            .iter()
            .filter(|(_, member)| member.terms.shares_gil && !member.door.gate.is(Closed::Paused))
            .map(|(id, member)| {
                let used = meters.entry(*id).or_default().read(&member.door);
                (used.as_secs_f64() / elapsed, member.terms.weight)
            })
            .collect();
        let rivals = policy::compete(&wants).into_iter().filter(|competes| *competes).count();
        let took = now.elapsed();
        inner.look_at = Some(now + LOOK.max(took * LOOKING_EFFORT));
        let at = inner.look_at;
        if rivals > 1 {
            self.work(inner);
        }
        at
    }

    fn work(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        self.changed.notify_all();
        if inner.works || inner.over {
            return;
        }
        let scheduler = Arc::clone(self);
        match thread::spawn_deaf("th-scheduler", move || scheduler.run()) {
            Ok(thread) => {
                inner.works = true;
                // The last one has ended: it says so last.
                inner.thread = Some(thread);
            }
            Err(error) => fault!("no thread to give workers their turns: {error}"),
        }
    }

    fn run(&self) {
        let mut policy = Policy::default();
        let mut meters = HashMap::<u64, Meter>::new();
        let (mut last, mut calm, mut shortened) = (Instant::now(), Duration::ZERO, false);
        let (mut period, mut idle) = (FIRST, 0);
        loop {
            let begun = Instant::now();
            let elapsed = begun.duration_since(last);
            last = begun;
            let inner = lock(&self.inner);
            if inner.over {
                break;
            }
            meters.retain(|id, _| inner.members.contains_key(id));
            let seen: Vec<Seen> = inner
                .members
                .iter()
                .map(|(id, member)| self.see(*id, member, meters.entry(*id).or_default()))
                .collect();
            let (taken, wanted) = demand(&inner, policy.running());
            idle = if taken { 0 } else { idle + 1 };
            let free = !taken && (!wanted || idle > CERTAIN);
            let Verdict { held, turns, metered } = policy.tick(elapsed, &seen, free);
            for (id, held) in held {
                let member = &inner.members[&id];
                if member.door.gate.is(Closed::NotItsTurn) != held {
                    member.door.hold(Closed::NotItsTurn, held);
                }
            }
            if turns != shortened {
                gate::shorten_interval(turns);
                shortened = turns;
            }
            let quotas = seen.iter().any(|seen| seen.terms.quota.is_some());
            calm = if turns || quotas { Duration::ZERO } else { calm + elapsed };
            if calm > CALM {
                drop(inner);
                break;
            }
            period = match period {
                _ if !turns && quotas && !metered && calm.is_zero() => SELDOM,
                FIRST => FIRST * 2,
                _ => TICK,
            }
            .max(begun.elapsed() * EFFORT);
            let waited = self.changed.wait_timeout(inner, period);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        gate::shorten_interval(false);
        let mut inner = lock(&self.inner);
        for member in inner.members.values() {
            member.door.hold(Closed::NotItsTurn, false);
        }
        inner.works = false;
    }

    fn see(&self, id: u64, member: &Member, meter: &mut Meter) -> Seen {
        let mut terms = member.terms;
        terms.shares_gil &= self.takes_turns;
        Seen {
            id,
            terms,
            used: meter.read(&member.door),
            waits: member.door.gate.is_waited_at(),
            paused: member.door.gate.is(Closed::Paused),
            starting: member.starting,
        }
    }
}

/// Whether the shared GIL is taken just now; and if not, whether one of those whose turn it is wants it: on a busy
/// machine it is free for a while whenever it changes hands.
fn demand(inner: &Inner, running: &[u64]) -> (bool, bool) {
    let Some(gil) = gate::main_gil().filter(|gil| !gil.is_taken()) else { return (true, true) };
    let wants = |thread: i32| match kick::look(thread) {
        // It runs, or would if there were a processor for it; perhaps C code that needs no GIL.
        None => true,
        Some(blocked) => gil.is_waited_for_at(blocked.address()),
    };
    let doors =
        running.iter().filter_map(|id| inner.members.get(id)).filter_map(|member| member.door.behind());
    (false, doors.flat_map(Interpreter::threads).any(wants))
}

/// So many times in a row the GIL is found free before it counts as that, although somebody seems to want it.
const CERTAIN: u32 = 2;

/// How long the first tick is: somebody who starts waits for it.
const FIRST: Duration = Duration::from_millis(2);
