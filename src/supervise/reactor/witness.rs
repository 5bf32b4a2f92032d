//! What a worker that does not listen is stuck in, noted at the moment when a late rung comes to it: there is
//! nothing left to look at afterwards.

use std::time::{Duration, Instant};

use super::Link;
use crate::diag::stacks::{self, Stack};

/// More threads than anybody reads of.
const MAX_THREADS: usize = 16;
/// How many bytes of names and paths are kept: a worker chooses its own, and its end must fit a message.
const MAX_TEXT: usize = 64 << 10;
/// How much of its time the loop may look at stacks: where hundreds are to be ended at once, most of them
/// go without.
const SHARE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Looks at the stacks of workers, as long as there is time for that.
#[derive(Default)]
pub(super) struct Witness {
    since: Option<Instant>,
    spent: Duration,
}

impl Witness {
    /// What the threads of a worker are in; empty where that can't be seen from here.
    pub(super) fn look(&mut self, link: &Link) -> Vec<Stack> {
        let begun = Instant::now();
        let (most, period) = SHARE;
        if self.since.is_none_or(|since| begun.duration_since(since) > period) {
            (self.since, self.spent) = (Some(begun), Duration::ZERO);
        }
        if self.spent > most {
            return Vec::new();
        }
        let mut found = match link {
            Link::Subint(door) => door.behind().map_or_else(Vec::new, stacks::of),
            Link::Process(process) => stacks::of_process(process.pid()),
            Link::Elsewhere(_) | Link::Lodger { .. } | Link::Kept => Vec::new(),
        };
        found.truncate(MAX_THREADS);
        let mut left = MAX_TEXT;
        for frames in found.iter_mut().map(|stack| &mut stack.frames) {
            let fits = frames.iter().take_while(|frame| {
                let size = frame.file.len() + frame.function.len();
                let fits = size <= left;
                left = left.saturating_sub(size);
                fits
            });
            frames.truncate(fits.count());
        }
        self.spent += begun.elapsed();
        found
    }
}
