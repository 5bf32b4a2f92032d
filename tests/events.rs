//! Events from many threads at once, as the ring keeps them, and what a filter for the log means.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use _native::events::{self, log, ring};
use tracing::Level;

/// The ring is the process's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn begin() -> std::sync::MutexGuard<'static, ()> {
    let guard = ALONE.lock().unwrap();
    events::listen();
    guard
}

fn tell(thread: u64, count: u64) {
    tracing::debug!(target: events::WORKER, kind = "test", worker = thread, name = "w", count, twice = count * 2, text = "ä".repeat(40).as_str());
}

#[test]
fn fields_come_out_as_they_were_told() {
    let _alone = begin();
    let before = ring::last();
    tracing::info!(
        target: events::LADDER, kind = "rung", worker = 7u64, name = "it", backend = "fork", pid = Some(12), rung = %"unwind",
        nothing = None::<u64>, minus = -3i64, share = 0.5, yes = true
    );
    let told = ring::after(before).pop().unwrap();
    assert_eq!((told.kind.as_str(), told.logger.as_str(), told.level), ("rung", events::LADDER, Level::INFO));
    assert_eq!(
        (told.worker, told.name.as_deref(), told.backend.as_deref(), told.pid),
        (Some(7), Some("it"), Some("fork"), Some(12))
    );
    assert_eq!(told.text, "rung: worker `it` (fork, pid 12) rung=\"unwind\" minus=-3 share=0.5 yes=true");
    assert!(told.field("nothing").is_none());
    assert_eq!(told.number, before + 1);
}

#[test]
fn what_is_too_long_is_cut_off_at_a_character() {
    let _alone = begin();
    let before = ring::last();
    let long = "ä".repeat(10_000);
    tracing::warn!(target: events::SUPERVISOR, kind = "fault", long = long.as_str(), next = 1, "{long}");
    let told = ring::after(before).pop().unwrap();
    assert!(told.text.starts_with("ää") && told.text.ends_with("ä…"), "{}", told.text);
    assert!(told.text.len() <= 200);
    assert_eq!((told.kind.as_str(), told.field("next").and_then(|next| next.as_i64())), ("fault", Some(1)));
}

#[test]
fn the_newest_stay_and_none_is_torn() {
    const THREADS: u64 = 4;
    const EACH: u64 = 20_000;
    let _alone = begin();
    let before = ring::last();
    thread::scope(|scope| {
        for number in 0..THREADS {
            scope.spawn(move || (0..EACH).for_each(|count| tell(number, count)));
        }
        while ring::last() < before + THREADS * EACH {
            let seen = ring::recent();
            assert!(seen.len() as u64 <= ring::KEPT);
            assert!(seen.windows(2).all(|pair| pair[0].number < pair[1].number));
            for event in seen.iter().filter(|event| event.number > before) {
                let number = |field| event.field(field).and_then(|value: &serde_json::Value| value.as_u64());
                assert_eq!(number("count").map(|count| count * 2), number("twice"), "{event:?}");
                assert_eq!(event.field("text").and_then(|text| text.as_str()), Some(&*"ä".repeat(40)));
            }
        }
    });
    let kept = ring::recent();
    assert_eq!(kept.last().map(|event| event.number), Some(before + THREADS * EACH));
    // A thread that was stopped in the middle of one for a whole round has lost that, and at most that.
    assert!(kept.len() as u64 >= ring::KEPT - THREADS, "{}", kept.len());
}

#[test]
fn a_wait_ends_with_the_next_event_or_in_time() {
    let _alone = begin();
    let before = ring::last();
    let soon = Instant::now() + Duration::from_millis(20);
    assert_eq!(ring::wait_after(before, soon).unwrap(), []);
    assert!(Instant::now() >= soon);
    thread::scope(|scope| {
        let waiting =
            scope.spawn(|| ring::wait_after(before, Instant::now() + Duration::from_secs(60)).unwrap());
        tell(1, 1);
        assert_eq!(waiting.join().unwrap().len(), 1);
    });
}

#[test]
fn what_was_told_before_the_wait_is_there_at_once() {
    let _alone = begin();
    let before = ring::last();
    tell(1, 1);
    tell(2, 2);
    assert_eq!(ring::wait_after(before, Instant::now()).unwrap().len(), 2);
}

#[test]
fn filters() {
    let enables =
        |text: &str, target: &str, level| log::parse(text).unwrap().unwrap().would_enable(target, &level);
    assert!(log::parse("").unwrap().is_none() && log::parse(" ").unwrap().is_none());
    assert!(enables("debug", events::WORKER, Level::DEBUG));
    assert!(!enables("info", events::WORKER, Level::DEBUG));
    assert!(enables("tractor_host=debug", events::LADDER, Level::DEBUG));
    assert!(!enables("off", events::LADDER, Level::ERROR));
    for (target, level, is) in [
        (events::LADDER, Level::DEBUG, true),
        (events::LADDER, Level::TRACE, false),
        (events::WORKER, Level::WARN, true),
        (events::WORKER, Level::INFO, false),
    ] {
        assert_eq!(enables("warn, tractor_host.ladder=debug", target, level), is, "{target} {level}");
    }
    for wrong in ["loud", "tractor_host=loud", "tractor_hots=info", "tractor_host.x", "info,=", "a=b=c"] {
        let said = log::parse(wrong).unwrap_err();
        assert!(said.contains(wrong) && said.contains("error, warn, info, debug, trace"), "{said}");
    }
}
