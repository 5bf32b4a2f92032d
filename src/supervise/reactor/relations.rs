//! Workers that more than one process has to do with: those that a worker process asks for, those that it runs by
//! itself and tells of, and those that live in a process with others. For each there is an entry in every
//! supervisor concerned; one of them runs the worker, and the others are told of it and pass on what is wanted.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::Signal;

use super::super::clerk::Surroundings;
use super::super::exit::{Exit, Kind, Seen};
use super::super::ladder::{Reason, Rung};
use super::super::supervisor::Answer;
use super::super::worker::{Owner, State, Told};
use super::{ANSWERING, Alarm, Entry, Introduction, Link, Reactor, tell_of};
use crate::error::Error;
use crate::events::fault;
use crate::spawn::context::{self, Letter};
use crate::spawn::parcel::{self, Content};
use crate::spawn::terminal;
use crate::sys::event::Slot;
use crate::sys::ledger;
use crate::wire::message::{FromWorker, News, Outcome, Parent, Report, ToWorker, Wish};

impl Reactor {
    /// There is a worker that a worker process has asked for.
    pub(super) fn hand_over(&mut self, id: u64, asker: u64, theirs: u64, pid: Option<i32>) {
        if let Some(pid) = pid {
            self.tell_asker(asker, theirs, News::Spawned { pid }, None);
        }
        let withdrawn = self.asked.remove(&(asker, theirs)).flatten();
        let gone = self.entries.get(&asker).is_none_or(|entry| entry.over || entry.abandoned);
        if let Some(reason) = if gone { Some(Reason::OwnerDied) } else { withdrawn } {
            self.kill(id, reason);
        }
    }

    /// A worker process wants something of a worker that is, or is to be, its own.
    pub(super) fn wished(
        &mut self,
        id: u64,
        theirs: u64,
        wish: Wish,
        along: Vec<OwnedFd>,
        payload: Arc<Vec<u8>>,
    ) {
        let found = self.owned_by(id).find(|entry| entry.worker.owner == Owner::Worker { id, theirs });
        let found = found.map(|entry| entry.worker.id);
        let Some(Entry { link: Link::Process(process), .. }) = self.entries.get(&id) else { return };
        match (wish, found) {
            (Wish::Spawn { request, standing, roles, parent }, _) => {
                let parent = self.parent_in(id, parent);
                self.asked.insert((id, theirs), None);
                let order = move || {
                    let request = serde_json::from_value(request)
                        .map_err(|error| Error::protocol(format!("a malformed request: {error}")))?;
                    let (parcel, rest) = parcel::sort(&roles, along, payload)?;
                    Ok((request, Surroundings::of_another(standing, rest)?, parcel))
                };
                self.supervisor.have_spawned((id, theirs), process.pid(), parent, order);
            }
            (Wish::Cancel, Some(found)) => self.cancel(found),
            (Wish::Pause, Some(found)) => self.pause(found, true),
            (Wish::Resume, Some(found)) => self.pause(found, false),
            (Wish::Kill { why }, Some(found)) => self.kill(found, why.into()),
            // It has ended meanwhile, or is still being made.
            (Wish::Cancel | Wish::Pause | Wish::Resume, None) => {}
            (Wish::Kill { why }, None) => {
                if let Some(withdrawn) = self.asked.get_mut(&(id, theirs)) {
                    *withdrawn = Some(why.into());
                }
            }
        }
    }

    /// A worker process tells of a worker that it runs by itself.
    pub(super) fn reported(&mut self, keeper: u64, theirs: u64, report: Report) {
        let owner = Owner::Keeper { id: keeper, theirs };
        match (report, self.kept_by(keeper, theirs)) {
            (Report::Made { info, parent }, None) => {
                let told = serde_json::from_value::<Told>(info)
                    .map_err(|error| Error::protocol(format!("a malformed report: {error}")));
                let made =
                    told.and_then(|told| self.supervisor.enter(owner, self.parent_in(keeper, parent), told));
                match made {
                    Ok(worker) => self.watch(worker, Link::Kept),
                    Err(error) => fault!("worker {keeper} told of another: {error}"),
                }
            }
            (Report::Started, Some(id)) => self.said(id, FromWorker::Started, Content::none(), Vec::new()),
            (Report::Ended { exit }, Some(id)) => {
                let exit = serde_json::from_value(exit).unwrap_or_else(Exit::unreadable);
                if let Some(entry) = self.entries.remove(&id) {
                    entry.worker.pid().inspect(|pid| ledger::strike_gone(*pid));
                    self.settle(&entry.worker, exit, false);
                }
            }
            (Report::Made { .. }, Some(_)) | (Report::Started | Report::Ended { .. }, None) => {}
        }
    }

    /// One that a worker process runs by itself, by its number there.
    pub(super) fn kept_by(&self, keeper: u64, theirs: u64) -> Option<u64> {
        let owner = Owner::Keeper { id: keeper, theirs };
        self.entries.values().find(|entry| entry.worker.owner == owner).map(|entry| entry.worker.id)
    }

    /// Who in a worker process wants another one, as far as that is known here; or else that itself.
    pub(super) fn parent_in(&self, process: u64, parent: Option<Parent>) -> u64 {
        let found = match parent {
            Some(Parent::Own(id)) => self.kept_by(process, id),
            Some(Parent::Lodger(id)) => Some(id).filter(|id| self.lives_in(*id, process)),
            None => None,
        };
        found.unwrap_or(process)
    }

    /// What a worker process ran by itself has ended with it.
    pub(super) fn forget_kept_by(&mut self, keeper: u64) {
        let kept = |entry: &&Entry| matches!(entry.worker.owner, Owner::Keeper { id, .. } if id == keeper);
        let kept: Vec<u64> = self.entries.values().filter(kept).map(|entry| entry.worker.id).collect();
        for id in kept {
            if let Some(entry) = self.entries.remove(&id) {
                entry.worker.pid().inspect(|pid| ledger::strike_gone(*pid));
                let exit = Exit::unknown("the process that ran it has ended".into());
                self.settle(&entry.worker, exit, false);
            }
        }
    }

    /// What was started for a worker process.
    pub(super) fn owned_by(&self, id: u64) -> impl Iterator<Item = &Entry> {
        self.entries
            .values()
            .filter(move |entry| matches!(entry.worker.owner, Owner::Worker { id: owner, .. } if owner == id))
    }

    /// Ends what was started for a worker process that is gone. Whether there is any.
    pub(super) fn end_those_of(&mut self, id: u64) -> bool {
        self.forget_kept_by(id);
        let orphans: Vec<u64> = self.owned_by(id).map(|entry| entry.worker.id).collect();
        for orphan in &orphans {
            self.kill(*orphan, Reason::OwnerDied);
        }
        self.owned_by(id).any(|entry| !entry.abandoned)
    }

    pub(super) fn tell_asker(&mut self, asker: u64, theirs: u64, news: News, content: Option<Content>) {
        self.tell(asker, &ToWorker::About { id: theirs, news }, content);
    }

    /// Tells whoever has asked for a worker, where that is another process.
    pub(super) fn tell_owner(&mut self, owner: Owner, news: News, content: Option<Content>) {
        match owner {
            Owner::Interpreter(_) | Owner::Lodgers | Owner::Keeper { .. } => {}
            Owner::Worker { id, theirs } => self.tell_asker(id, theirs, news, content),
            Owner::Patron(id) => self.supervisor.tell_patron(FromWorker::Lodger { id, news }, content),
        }
    }

    /// Has a worker process do something about a worker that it runs by itself.
    pub(super) fn tell_keeper(&mut self, owner: Owner, wish: Wish) {
        if let Owner::Keeper { id, theirs } = owner {
            self.tell(id, &ToWorker::Own { id: theirs, wish }, None);
        }
    }

    /// Takes in what the supervisor of this process has to say of other workers.
    pub(super) fn read(&mut self, letter: Letter) {
        let Letter { message, payload, fds } = letter;
        match message {
            ToWorker::About { id, news } => self.hear(id, news, payload, fds),
            ToWorker::Lodge { id, request, roles } => {
                if let Err(error) = self.supervisor.lodge(id, request, &roles, fds, payload) {
                    let news = News::Refused { error: error.into(), confined: false };
                    self.supervisor.tell_patron(FromWorker::Lodger { id, news }, None);
                }
            }
            ToWorker::Own { id, wish } => match wish {
                Wish::Cancel => self.cancel(id),
                Wish::Pause => self.pause(id, true),
                Wish::Resume => self.pause(id, false),
                Wish::Kill { why } => self.kill(id, why.into()),
                Wish::Spawn { .. } => {}
            },
            ToWorker::Lodger { id: theirs, wish } => {
                let found = self.entries.values().find(|entry| entry.worker.owner == Owner::Patron(theirs));
                // It has ended meanwhile, which is told already.
                let Some(id) = found.map(|entry| entry.worker.id) else { return };
                match wish {
                    Wish::Cancel => self.cancel(id),
                    Wish::Pause => self.pause(id, true),
                    Wish::Resume => self.pause(id, false),
                    Wish::Kill { why } => self.kill(id, why.into()),
                    Wish::Spawn { .. } => {}
                }
            }
            ToWorker::Hold { on } => self.heard_of_hold(on),
            ToWorker::Terminal { ticket, refused } => {
                self.relay_answer(ticket, terminal::answered(refused, fds));
            }
            ToWorker::Spec { .. } | ToWorker::Template { .. } | ToWorker::Cancel | ToWorker::Press { .. } => {
            }
        }
    }

    /// There is news of a worker that the supervisor of this process has started.
    pub(super) fn hear(&mut self, id: u64, news: News, payload: Arc<Vec<u8>>, mut fds: Vec<OwnedFd>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Link::Elsewhere(waiting) = &mut entry.link else { return };
        let worker = Arc::clone(&entry.worker);
        match news {
            News::Spawned { pid } => {
                worker.set_pid(pid);
                tell_of(&worker, None);
                spawned(waiting);
                if entry.seen.cancelled {
                    // It was asked before it could be told apart.
                    ask_for(id, Wish::Cancel);
                }
                self.tell_owner(worker.owner, News::Spawned { pid }, None);
            }
            News::Refused { error, confined } => {
                if let Some(slot) = waiting.take() {
                    // Whoever has gone has no use for it.
                    let _ = slot.fill(Answer::Refused { error: error.into(), confined });
                }
            }
            News::Started => self.said(id, FromWorker::Started, Content::none(), Vec::new()),
            News::Ended { exit, outcome } => {
                let exit = serde_json::from_value(exit).unwrap_or_else(Exit::unreadable);
                match Content::of_outcome(outcome, payload, fds.pop()) {
                    Ok(Some(content)) => worker.keep_outcome(content),
                    Ok(None) => {}
                    Err(error) => fault!("the result of worker `{}`: {error}", worker.name),
                }
                spawned(waiting);
                self.entries.remove(&id);
                self.settle(&worker, exit, false);
            }
        }
    }

    /// Has a worker's process told of it, where it is not alone there. False when that has ended.
    pub(super) fn move_in(&mut self, id: u64) -> bool {
        let Some(Entry { link: Link::Lodger { landlord, introduction }, .. }) = self.entries.get_mut(&id)
        else {
            return true;
        };
        let (landlord, introduction) = (*landlord, introduction.take());
        let open = self.entries.get(&landlord).is_some_and(|entry| !entry.over);
        if open
            && let Some(Entry { link: Link::Process(process), .. }) = self.entries.get_mut(&landlord)
            && let Some(introduction) = introduction
        {
            let Introduction { head, along, payload } = *introduction;
            process.post_with_fds(head, along);
            process.post(payload);
            self.flush(landlord);
            return true;
        }
        if let Some(mut entry) = self.entries.remove(&id) {
            entry.seen.failure = Some("the process that it was to share had ended".into());
            self.publish(&entry.worker, &entry.seen, entry.asked);
        }
        false
    }

    /// Whether a worker lives in the process of another one.
    pub(super) fn lives_in(&self, id: u64, landlord: u64) -> bool {
        let link = self.entries.get(&id).map(|entry| &entry.link);
        matches!(link, Some(Link::Lodger { landlord: home, .. }) if *home == landlord)
    }

    /// There is news of one that lives in a process with others.
    pub(super) fn hear_of_lodger(&mut self, landlord: u64, id: u64, news: News, content: Content) {
        if !self.lives_in(id, landlord) {
            return;
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        match news {
            News::Spawned { .. } => {}
            News::Started => self.said(id, FromWorker::Started, Content::none(), Vec::new()),
            News::Refused { error, .. } => {
                entry.seen.failure = Some(Error::from(error).to_string());
                let exit = entry.seen.judge();
                self.leave(id, landlord, exit);
            }
            News::Ended { exit, outcome } => {
                let mut exit: Exit = serde_json::from_value(exit).unwrap_or_else(Exit::unreadable);
                exit.elapsed = entry.asked.map(|asked| asked.elapsed().as_secs_f64());
                exit.lifetime = entry.worker.created.elapsed().as_secs_f64();
                if exit.kind == Kind::Abandoned {
                    exit.kind = Kind::Killed;
                    exit.rung = Some(Rung::Sigkill);
                    exit.cause.push_str(", so its process was ended");
                    entry.verdict = Some(exit);
                    self.kill(landlord, Reason::Shared(id));
                    return;
                }
                match outcome {
                    Outcome::None => {}
                    Outcome::Lost => entry.worker.keep_outcome(Content::Lost),
                    Outcome::Payload | Outcome::Memory => entry.worker.keep_outcome(content),
                }
                self.leave(id, landlord, exit);
            }
        }
    }

    /// One that lives in a process with others has ended. Who is the last one there is told to have when that
    /// has ended too.
    pub(super) fn leave(&mut self, id: u64, landlord: u64, exit: Exit) {
        if self.supervisor.houses.move_out(landlord) {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.verdict = Some(exit);
            }
            self.kill(landlord, Reason::OwnerDied);
        } else if let Some(entry) = self.entries.remove(&id) {
            self.settle(&entry.worker, exit, false);
        }
    }

    /// Has one that lives in a process with others ended there. When its ladder is over and it is not, so is
    /// its process.
    pub(super) fn kill_lodger(&mut self, id: u64, landlord: u64, reason: Reason) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let now = Instant::now();
        entry.asked.get_or_insert(now);
        if entry.seen.rung.is_none() || reason == Reason::OwnerDied {
            entry.seen.rung = Some((Rung::Sigkill, reason));
            entry.worker.advance(State::Killing);
            tell!(INFO, LADDER, "kill", entry.worker, reason = %reason);
            self.alarms.insert((now + entry.worker.ladder.bound() + ANSWERING, id, Alarm::Unanswered));
            self.tell(landlord, &ToWorker::Lodger { id, wish: Wish::Kill { why: reason.into() } }, None);
        }
        if let Some(Entry { link: Link::Process(process), .. }) = self.entries.get(&landlord) {
            // It may have been stopped.
            process.signal(Signal::CONT);
        }
    }

    /// A process that others live in has ended, and they with it.
    pub(super) fn house_fell(&mut self, landlord: u64, seen: &Seen) {
        self.supervisor.houses.fallen(landlord);
        let lodgers: Vec<u64> =
            self.entries.keys().copied().filter(|id| self.lives_in(*id, landlord)).collect();
        for id in lodgers {
            let Some(mut entry) = self.entries.remove(&id) else { continue };
            match entry.verdict {
                Some(exit) => self.settle(&entry.worker, exit, false),
                None => {
                    entry.seen.status = seen.status;
                    entry.seen.abandoned = seen.abandoned;
                    entry.seen.oom = seen.oom;
                    entry.seen.stderr.clone_from(&seen.stderr);
                    entry.seen.rung = match seen.rung {
                        // It was this one that would not end, or even say so.
                        Some((rung, Reason::Shared(guilty))) if guilty == id => {
                            Some((rung, entry.seen.rung.map_or(Reason::Killed, |(_, reason)| reason)))
                        }
                        other => other,
                    };
                    self.publish(&entry.worker, &entry.seen, entry.asked);
                }
            }
        }
    }
}

/// Tells whoever waits for it that a worker was made elsewhere.
fn spawned(waiting: &mut Option<Arc<Slot<Answer>>>) {
    if let Some(slot) = waiting.take() {
        // Who has stopped waiting has ordered its end.
        let _ = slot.fill(Answer::Spawned);
    }
}

/// Has the supervisor of this process do something about a worker that it has started for this one.
pub(super) fn ask_for(id: u64, wish: Wish) {
    let sent = match context::of_process() {
        Some(patron) => patron.wish(id, wish, &[], &[]),
        None => Err(Error::state("this process is no worker any more")),
    };
    if let Err(error) = sent {
        fault!("{error}");
    }
}
