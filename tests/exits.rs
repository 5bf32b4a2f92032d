//! Verdicts on ends that are hard to bring about.

use _native::supervise::Rung;
use _native::supervise::exit::{Exit, Kind, Seen};
use _native::supervise::ladder::Reason;
use _native::sys::oom::Evidence;
use _native::sys::process::Status;
use _native::wire::message::FromWorker;

fn sigkill(oom: Evidence) -> Seen {
    let status = Some(Status::Signalled { signal: 9, core: false });
    Seen { started: true, status, oom, ..Seen::default() }
}

#[test]
fn who_sent_a_sigkill_is_said_as_far_as_it_is_known() {
    let cause = |oom| {
        let Exit { kind, cause, .. } = sigkill(oom).judge();
        assert_eq!(kind, Kind::Signalled);
        let said = "its process was ended by SIGKILL (killed); the supervisor did not send it (";
        cause.strip_prefix(said).expect("the same for all").to_owned()
    };
    assert_eq!(cause(Evidence::None), "the kernel's out-of-memory killer, or somebody's kill -9)");
    assert!(cause(Evidence::Cgroup(2)).starts_with("probably the kernel's out-of-memory killer: "));
    assert!(cause(Evidence::Cgroup(2)).contains("cgroup has counted 2 more oom_kill since"));
    assert!(cause(Evidence::Machine(1)).starts_with("possibly the kernel's out-of-memory killer: "));
    assert!(cause(Evidence::Nobody).starts_with("not the kernel's out-of-memory killer"));
}

#[test]
fn the_kernel_is_named_also_where_another_end_was_on_its_way() {
    let rung = Some((Rung::Sigterm, Reason::Killed));
    let seen = Seen { rung, ..sigkill(Evidence::Cgroup(1)) };
    let probably = "(probably the kernel's out-of-memory killer: ";
    assert!(seen.judge().cause.starts_with(&format!("killed, ended at `sigterm` {probably}")));
    let seen = Seen { report: Some(FromWorker::Returned), ..sigkill(Evidence::Cgroup(1)) };
    let said = format!("returned, then its process was ended by SIGKILL (killed) {probably}");
    assert!(seen.judge().cause.starts_with(&said));
    let seen = Seen { report: Some(FromWorker::Returned), ..sigkill(Evidence::Nobody) };
    assert_eq!(seen.judge().cause, "returned, then its process was ended by SIGKILL (killed)");
}

#[test]
fn a_worker_that_could_not_be_watched_was_killed_by_the_supervisor() {
    let rung = Some((Rung::Sigkill, Reason::Unwatched));
    let seen = Seen { rung, failure: Some("no space".into()), ..sigkill(Evidence::None) };
    let exit = seen.judge();
    let said = "killed because the supervisor could not watch it, ended at `sigkill` (no space)";
    assert_eq!((exit.kind, exit.cause.as_str()), (Kind::Killed, said));
}
