//! Ladders as data: what can be asked for, and what becomes of it.

use std::time::Duration;

use _native::spawn::request::Backend;
use _native::supervise::Rung;
use _native::supervise::ladder::{Climb, Ladder, Reason};

const SECOND: Duration = Duration::from_secs(1);

fn rungs(ladder: &Ladder) -> Vec<Rung> {
    ladder.rungs().iter().map(|(rung, _)| *rung).collect()
}

fn asked(rungs: &[(&str, f64)]) -> Vec<(String, f64)> {
    rungs.iter().map(|(name, budget)| ((*name).to_owned(), *budget)).collect()
}

#[test]
fn default_ladders_have_every_rung_and_keep_their_bounds() {
    for backend in [Backend::Subint, Backend::SubintForkserver, Backend::Fork, Backend::Exec] {
        for rest in [3, 30] {
            let ladder = Ladder::new(backend, 2 * SECOND, rest * SECOND);
            assert_eq!(rungs(&ladder), Rung::of(backend));
            assert_eq!(ladder.bound(), (2 + rest) * SECOND);
        }
    }
}

#[test]
fn a_process_gets_a_second_for_sigkill_whatever_was_asked() {
    let ladder = Ladder::new(Backend::Fork, Duration::ZERO, Duration::ZERO);
    assert_eq!(ladder.rungs().last(), Some(&(Rung::Sigkill, SECOND)));
}

#[test]
fn a_ladder_moves_behind_another_wall_with_its_bounds() {
    let asked = asked(&[("cancel", 1.5), ("unblock", 4.0), ("destroy", 5.0)]);
    let ladder = Ladder::custom(Backend::Subint, &asked).expect("a good one").moved_to(Backend::Fork);
    assert_eq!(rungs(&ladder), Rung::of(Backend::Fork));
    assert_eq!(ladder.rungs().first(), Some(&(Rung::Cancel, Duration::from_millis(1500))));
    assert_eq!(ladder.bound(), Duration::from_millis(10_500));
}

#[test]
fn rungs_without_a_budget_are_stepped_over() {
    let asked = asked(&[("cancel", 0.0), ("interrupt", 1.0), ("unwind", 0.0), ("destroy", 1.0)]);
    let ladder = Ladder::custom(Backend::Subint, &asked).expect("a good one");
    let now = std::time::Instant::now();
    let climb = Climb::begin(&ladder, Reason::Killed, true, now).expect("a rung");
    assert_eq!((climb.rung(), climb.until), (Rung::Interrupt, now + SECOND));
    let climb = climb.next(&ladder, now).expect("another rung");
    assert_eq!(climb.rung(), Rung::Destroy);
    assert!(climb.next(&ladder, now).is_none());
}

#[test]
fn who_cannot_be_asked_is_not() {
    let ladder = Ladder::new(Backend::Subint, SECOND, SECOND);
    let now = std::time::Instant::now();
    for (reason, started, first) in [
        (Reason::Killed, true, Rung::Cancel),
        (Reason::Killed, false, Rung::Interrupt),
        (Reason::Silent, true, Rung::Interrupt),
        (Reason::Protocol, true, Rung::Interrupt),
    ] {
        assert_eq!(Climb::begin(&ladder, reason, started, now).map(Climb::rung), Some(first));
    }
}
