//! What Python may ask of the supervisor.

use std::os::fd::IntoRawFd;
use std::sync::Arc;

use serde_json::{Value as Json, json};

use crate::diag::dump::Dump;
use crate::diag::hang;
use crate::diag::resources::Snapshot;
use crate::diag::{outlet, stacks};
use crate::error::{Error, Result};
use crate::events::{Event, log, ring, trace};
use crate::ffi::module::{Call, Function, Table};
use crate::ffi::offsets::Offsets;
use crate::ffi::value::{Arg, Value};
use crate::interp::attach::{Token, with_current};
use crate::interp::{call, rungs};
use crate::spawn::parcel::{self, Content, Parcel};
use crate::spawn::request::{Backend, GilPolicy, Request, seconds};
use crate::spawn::zygote::serve;
use crate::spawn::{apart, context, held, terminal};
use crate::supervise::guard::{self, ctrl_c, gil};
use crate::supervise::worker::Worker;
use crate::supervise::{Rung, Supervisor};
use crate::sys::memfile::Seals;
use crate::sys::{clock, fd, memfile, process, ready, thread};
use crate::wire::message::{FromWorker, PreloadFailure};

/// Declares a function of the module: its Rust type, its Python signature, its docstring.
macro_rules! native {
    ($type:ident, $name:literal, ($($argument:literal),*), waits: $waits:literal, $doc:literal, $body:expr) => {
        struct $type;
        impl Function for $type {
            const NAME: &'static std::ffi::CStr = match std::ffi::CStr::from_bytes_with_nul(concat!($name, "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a NUL in a name"),
            };
            const DOC: &'static std::ffi::CStr = match std::ffi::CStr::from_bytes_with_nul(
                concat!($name, "($module", $(", ", $argument,)* native!(@slash $($argument)*), ")\n--\n\n", $doc, "\0").as_bytes(),
            ) {
                Ok(doc) => doc,
                Err(_) => panic!("a NUL in a docstring"),
            };
            const ARITY: usize = <[&str]>::len(&[$($argument),*]);
            const WAITS: bool = $waits;
            fn call(call: &Call, args: &[Arg<'_>]) -> Result<Value> {
                let body: fn(&Call, &[Arg<'_>]) -> Result<Value> = $body;
                body(call, args)
            }
        }
    };
    (@slash) => { ", /" };
    (@slash $($argument:literal)+) => { ", /" };
}

native!(Spawn, "spawn", ("request", "payload", "memory", "passed"), waits: true,
"Make a worker and set it to work; returns what `info` does. What it is to run is in `payload`, or in the file in \
 memory with the descriptor `memory`, if that is not None; it refers to the descriptors `passed` by their place. \
 They are copied.",
|call, args| {
    let request: Request = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("a malformed request: {error}")))?;
    let memory = serde_json::from_value(json(args, 2)?.clone())
        .map_err(|error| Error::invalid(format!("no descriptor: {error}")))?;
    let passed: Vec<i32> = serde_json::from_value(json(args, 3)?.clone())
        .map_err(|error| Error::invalid(format!("no descriptors: {error}")))?;
    let parcel = Parcel::of_numbers(bytes(args, 1)?, memory, &passed)?;
    let worker = Supervisor::get()?.spawn(call.interpreter, request, parcel)?;
    enter(call, "spawn", &worker, false);
    Ok(worker.info().into())
});
native!(Info, "info", ("id"), waits: false,
    "What is known of a worker. LookupError when it is forgotten.",
    |_, args| Ok(supervisor()?.worker(id(args)?)?.info().into()));
native!(Wait, "wait", ("id", "timeout"), waits: true,
"Wait for a worker's end for at most `timeout` seconds (None: no bound); whether it has ended.",
|call, args| {
    let deadline = match json(args, 1)? {
        Json::Null => None,
        timeout => {
            let timeout = timeout.as_f64().ok_or_else(|| Error::invalid("timeout must be a number of seconds"))?;
            Some(call.started + seconds("timeout", timeout)?)
        }
    };
    let worker = supervisor()?.worker(id(args)?)?;
    let waited = worker.wait(deadline, call.interpreter != 0);
    enter(call, "wait", &worker, waited.is_err());
    Ok(waited?.into())
});
native!(Exit, "exit", ("id"), waits: false,
"How a worker ended, or None while it has not.",
|_, args| {
    let exit = supervisor()?.worker(id(args)?)?.exit();
    Ok(serde_json::to_value(exit).map_err(|error| Error::state(error.to_string()))?.into())
});
native!(Outcome, "outcome", ("id"), waits: false,
"The pickled value or exception that a worker ended with, or None; or the descriptor, which is the caller's, of the \
 file in memory that it is in.",
|call, args| match supervisor()?.worker(id(args)?)?.outcome() {
    Some(content) => content_value(call, content),
    None => Ok(Value::NONE),
});
native!(Output, "output", ("id", "stderr"), waits: false,
"What a worker has written to stdout (or stderr) so far, where that is collected.",
|_, args| {
    let stderr = json(args, 1)?.as_bool().ok_or_else(|| Error::invalid("stderr must be a bool"))?;
    Ok(Value::Bytes(Arc::new(supervisor()?.worker(id(args)?)?.output(stderr)?)))
});
native!(Fileno, "fileno", ("id"), waits: false,
    "An fd that is readable once a worker has ended; it belongs to the worker.",
    |_, args| Ok(json!(supervisor()?.worker(id(args)?)?.fileno()?).into()));
native!(Cancel, "cancel", ("id"), waits: false,
"Ask a worker to stop.",
|_, args| {
    let supervisor = supervisor()?;
    supervisor.cancel(&*supervisor.worker(id(args)?)?);
    Ok(Value::NONE)
});
native!(Pause, "pause", ("id", "paused"), waits: true,
"Have a worker stand still, or go on; returns once it was told to. Does nothing to one that ends or has ended.",
|_, args| {
    let paused = json(args, 1)?.as_bool().ok_or_else(|| Error::invalid("paused must be a bool"))?;
    let supervisor = supervisor()?;
    supervisor.pause(&*supervisor.worker(id(args)?)?, paused)?;
    Ok(Value::NONE)
});
native!(Kill, "kill", ("id"), waits: false,
"Begin to end a worker; `wait` tells when that is done.",
|_, args| {
    let supervisor = supervisor()?;
    supervisor.kill(&*supervisor.worker(id(args)?)?);
    Ok(Value::NONE)
});
native!(KillDeaf, "kill_deaf", ("id"), waits: false,
"Begin to end a worker that was asked to stop, and has not: it is not asked again.",
|_, args| {
    let supervisor = supervisor()?;
    supervisor.kill_deaf(&*supervisor.worker(id(args)?)?);
    Ok(Value::NONE)
});
native!(Limit, "limit", ("id", "seconds"), waits: false,
"Give a worker so many seconds (None: all that it wants), from now on and whatever it was given before: then it is \
 ended, as by `kill`. Returns whether that has begun, for what it was given before.",
|_, args| {
    let supervisor = supervisor()?;
    let bound = match json(args, 1)? {
        Json::Null => None,
        given => {
            let given = given.as_f64().ok_or_else(|| Error::invalid("a limit must be a number of seconds"))?;
            Some((seconds("a limit", given)?, given))
        }
    };
    Ok(json!(supervisor.limit(&*supervisor.worker(id(args)?)?, bound)).into())
});
native!(Hold, "hold", ("id"), waits: false,
"Count one more handle of a worker; returns what `info` does.",
|_, args| {
    let worker = supervisor()?.worker(id(args)?)?;
    worker.hold();
    Ok(worker.info().into())
});
native!(Release, "release", ("id"), waits: false,
"Count one handle of a worker less.",
|_, args| {
    // In a process forked behind our back, and at exit, there is nothing to give back to.
    if let Ok(Some(supervisor)) = Supervisor::existing() {
        supervisor.release(id(args)?);
    }
    Ok(Value::NONE)
});
native!(Workers, "workers", (), waits: false,
"What is known of the workers that have not ended, oldest first.",
|_, _| Ok(match Supervisor::existing()? {
    Some(supervisor) => Json::Array(supervisor.live().iter().map(|worker| worker.info()).collect()).into(),
    None => json!([]).into(),
}));
native!(Statistics, "statistics", (), waits: false,
    "Counts of workers since the process started.",
    |_, _| Ok(Supervisor::get()?.statistics().into()));
native!(Shutdown, "shutdown", (), waits: true,
"End all workers and the supervisor's threads; returns how many workers were left behind.",
|call, _| Ok(match Supervisor::existing() {
    Ok(Some(supervisor)) => json!(supervisor.shut_down(call.interpreter != 0)?).into(),
    // Not ours to shut down in a process forked behind our back.
    Ok(None) | Err(_) => json!(0).into(),
}));
native!(
    Quarantine,
    "quarantine",
    (),
    waits: false,
    "The subinterpreter workers that could not be ended, and what each of their threads is stuck in.",
    |_, _| {
        let Some(supervisor) = Supervisor::existing()? else { return Ok(json!([]).into()) };
        let list = supervisor.quarantined().into_iter().map(|(worker, door)| {
            let threads = door.behind().map_or_else(Vec::new, stacks::of);
            json!({ "worker": worker.info(), "threads": threads })
        });
        Ok(Json::Array(list.collect()).into())
    }
);
native!(
    LeaveBehind,
    "leave_behind",
    (),
    waits: false,
    "At the end of the program, after `shutdown`: keep what could not be ended from disturbing that.",
    |_, _| {
        if let Ok(Some(supervisor)) = Supervisor::existing() {
            with_current(|token| supervisor.leave_behind(token)).transpose()?;
        }
        Ok(Value::NONE)
    }
);
native!(GuardCtrlC, "guard_ctrl_c", ("bounds", "signals"), waits: false,
"Guard Ctrl-C within these bounds in seconds (to react, to end), and these other signals; None: leave it to Python.",
|_, args| {
    let bounds: Option<(f64, f64)> = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("malformed bounds: {error}")))?;
    let signals: Vec<String> = serde_json::from_value(json(args, 1)?.clone())
        .map_err(|error| Error::invalid(format!("malformed names of signals: {error}")))?;
    let bounds = bounds.map(|(react, end)| -> Result<_> {
        Ok(ctrl_c::Bounds { react: seconds("react_timeout", react)?, end: seconds("end_timeout", end)? })
    });
    let bounds = bounds.transpose()?;
    with_current(|token| guard::guard_ctrl_c(token, bounds)).transpose()?;
    signals.iter().try_for_each(|name| guard::listen(name))?;
    Ok(Value::NONE)
});
native!(WatchGil, "watch_gil", ("bounds", "policy"), waits: false,
"Watch all GILs: how long one may be kept in seconds (before it is said, before something is done), and what is \
 done then; None: leave them alone.",
|_, args| {
    let bounds: Option<(f64, f64)> = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("malformed bounds: {error}")))?;
    let watch = bounds.map(|(warn, act)| -> Result<_> {
        let policy = serde_json::from_value(json(args, 1)?.clone())
            .map_err(|error| Error::invalid(format!("no policy: {error}")))?;
        Ok(gil::Watch { warn: seconds("warn", warn)?, act: seconds("limit", act)?, policy, all: true })
    });
    let watch = watch.transpose()?;
    with_current(|token| guard::watch_gil(token, watch)).transpose()?;
    Ok(Value::NONE)
});
native!(Resources, "resources", (), waits: false,
    "What this process owns just now: fds, threads, children, resident bytes.",
    |_, _| Ok(serde_json::to_value(Snapshot::take()?).map_err(|error| Error::state(error.to_string()))?.into()));
native!(TakeDump, "dump", ("reason", "form", "tree"), waits: false,
"A dump of this process (and of those below it, if `tree`) as a str, in the form \"text\" or \"json\". It is taken \
 while the caller keeps its GIL: whoever else wants that may never give it back.",
|_, args| {
    let reason = json(args, 0)?.as_str().ok_or_else(|| Error::invalid("a reason is a str"))?;
    let tree = json(args, 2)?.as_bool().ok_or_else(|| Error::invalid("tree must be a bool"))?;
    let form = json(args, 1)?.as_str().unwrap_or_default();
    if !matches!(form, "text" | "json") {
        return Err(Error::invalid("format must be \"text\" or \"json\""));
    }
    let dump = Dump::own(reason, tree);
    let told = if form == "text" { dump.to_text() } else { serde_json::to_string(&dump).map_err(|error| Error::state(error.to_string()))? };
    Ok(Json::from(told).into())
});
native!(WriteDump, "write_dump", ("text"), waits: false,
"Write where dumps go. The path, or None: to stderr.",
|_, args| {
    let text = json(args, 0)?.as_str().ok_or_else(|| Error::invalid("a dump is a str"))?;
    let path = outlet::write(text.as_bytes()).map_err(|error| Error::os("write a dump", error))?;
    Ok(json!(path.map(|path| path.to_string_lossy().into_owned())).into())
});
native!(Rungs, "rungs", ("backend"), waits: false,
"The rungs of a backend's ladder in order, each with the reason why it is missing here, or None.",
|_, args| {
    let backend: Backend = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("no backend: {error}")))?;
    let found = with_current(|token| {
        let reason = |rung: &Rung| rung.force().filter(|_| backend.is_subinterpreter()).and_then(|force| rungs::missing(token, force));
        Rung::of(backend).iter().map(|rung| json!([rung, reason(rung)])).collect()
    });
    Ok(Json::Array(found.unwrap_or_default()).into())
});
native!(Layout, "layout", (), waits: false,
    "Why the private structures of this Python are not known, or None.",
    |_, _| Ok(json!(Offsets::get().err().map(|error| error.to_string())).into()));
native!(HangArm, "hang_arm", ("path", "seconds", "told"), waits: false,
"Unless `hang_disarm` is called within this time, write a dump to a file, which is emptied now; its number. From then on,\
 leave the process with the byte that comes from the descriptor `told` (None: from nowhere) as its exit code.",
|_, args| {
    let after = json(args, 1)?.as_f64().ok_or_else(|| Error::invalid("seconds must be a number"))?;
    let told = match json(args, 2)? {
        Json::Null => None,
        _ => Some(fd::duplicate_number(number(args, 2)?)?),
    };
    Ok(json!(hang::arm(bytes(args, 0)?, seconds("seconds", after)?, told)?).into())
});
native!(HangDisarm, "hang_disarm", ("id"), waits: true,
    "End such a watch, and wait for a dump that has begun. Whether there is one.",
    |_, args| Ok(hang::disarm(id(args)?).into()));
native!(Events, "events", ("after"), waits: false,
"The last events that are kept, oldest first, after the one with this number.",
|_, args| events(ring::after(number_of(args, 0)?)));
native!(EventsWait, "events_wait", ("after", "timeout"), waits: true,
"The same; wait for them for at most `timeout` seconds. No gaps, but for what is not kept any more.",
|call, args| {
    let timeout = json(args, 1)?.as_f64().ok_or_else(|| Error::invalid("timeout must be a number of seconds"))?;
    events(ring::wait_after(number_of(args, 0)?, call.started + seconds("timeout", timeout)?)?)
});
native!(EventsLast, "events_last", (), waits: false,
    "The number of the last event; 0 before there was any.",
    |_, _| Ok(json!(ring::last()).into()));
native!(EventsTaken, "events_taken", ("taken"), waits: false,
"Leave to the caller, or no longer, what becomes a line on stderr unasked; and wake who waits for events.",
|_, args| {
    log::leave_to_another(json(args, 0)?.as_bool().ok_or_else(|| Error::invalid("taken must be a bool"))?);
    ring::nudge();
    Ok(Value::NONE)
});
native!(Preload, "preload", ("command", "modules", "spec", "blanks"), waits: true,
"Start the fork server anew, by `command`, wait until it is ready, and have it make so many blanks (None: a few).",
|_, args| {
    let strings = |index| -> Result<Vec<String>> {
        serde_json::from_value(json(args, index)?.clone())
            .map_err(|error| Error::invalid(format!("argument {} must be strings: {error}", index + 1)))
    };
    let blanks = serde_json::from_value(json(args, 3)?.clone())
        .map_err(|error| Error::invalid(format!("no number of blanks: {error}")))?;
    Supervisor::get()?.preload(strings(0)?, json(args, 2)?, &strings(1)?, blanks)?;
    Ok(Value::NONE)
});
native!(PreloadFailures, "preload_failures", (), waits: false,
"What the fork server that was started last could not import: module and traceback; told once.",
|_, _| {
    let failures = Supervisor::existing()?.map(|supervisor| supervisor.zygote().take_failures());
    let told = failures.unwrap_or_default().into_iter().map(|failure| json!([failure.module, failure.traceback]));
    Ok(Json::Array(told.collect()).into())
});
native!(ForkServer, "fork_server", (), waits: true,
    "The pid of the fork server, or None. Waits for a spawn that it is busy with.",
    |_, _| Ok(json!(Supervisor::existing()?.and_then(|supervisor| supervisor.zygote().pid())).into()));
native!(ForkServerOwns, "fork_server_owns", (), waits: true,
"The pids of the fork server and its idle children, and the fds of this process that it takes to keep them. Waits \
 for what the fork server is busy with.",
|_, _| {
    let (processes, fds) = Supervisor::existing()?.map_or_else(Default::default, |supervisor| supervisor.zygote().belongings());
    Ok(json!({ "processes": processes, "fds": fds }).into())
});
native!(ZygoteOrder, "zygote_order", (), waits: false,
    "What this process, a fork server, was told to import.",
    |_, _| Ok(serve::order().into()));
native!(ZygotePrepared, "zygote_prepared", ("failures"), waits: false,
"Tell that this interpreter of a fork server has imported what it was told to, but for these.",
|_, args| {
    let failures: Vec<PreloadFailure> = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("malformed failures: {error}")))?;
    serve::prepared(failures);
    Ok(Value::NONE)
});
native!(ZygoteServe, "zygote_serve", (), waits: false,
"In a fork server: fork on order. Returns in the forked ones.",
|_, _| {
    with_current(serve::serve).transpose()?;
    Ok(Value::NONE)
});
native!(ChildEnter, "child_enter", (), waits: true,
    "In a fresh process whose fd 0 is a supervisor's channel: become its worker, or its fork server. Whether it \
     is that.",
    |_, _| Ok(context::enter_fresh()?.into()));
native!(ChildRehearse, "child_rehearse", ("spec"), waits: false,
    "In an idle child of a fork server: take in a task like this one. Returns what `child_spec` would.",
    |_, args| Ok(context::rehearse(json(args, 0)?.clone())?.into()));
native!(ChildRehearseApart, "child_rehearse_apart", (), waits: false,
"In an idle child of a fork server: have the second interpreter do the same, if there is one.",
|_, _| {
    with_current(apart::rehearse).transpose()?;
    Ok(Value::NONE)
});
native!(ChildSpec, "child_spec", (), waits: false,
    "What this interpreter, a worker, was asked to do.",
    |call, _| Ok(context::current(call.interpreter)?.spec().into()));
native!(ChildPayload, "child_payload", (), waits: false,
    "The pickled target and arguments of this interpreter, a worker; or the descriptor, which is the caller's, of \
     the file in memory that they are in. Once.",
    |call, _| content_value(call, context::current(call.interpreter)?.take_content()?));
native!(ChildTake, "child_take", ("index"), waits: false,
"A descriptor that the arguments of this interpreter, a worker, refer to; it is the caller's. Once.",
|call, args| {
    let index = json(args, 0)?.as_u64().and_then(|index| usize::try_from(index).ok());
    let index = index.ok_or_else(|| Error::invalid("a place is a positive integer"))?;
    let fd = context::current(call.interpreter)?.take_passed(index)?;
    Ok(json!(held::hold(call.interpreter, fd)?).into())
});
native!(MemoryCreate, "memory_create", ("name"), waits: false,
"A new file in memory; its descriptor is the caller's.",
|call, args| {
    let name = json(args, 0)?.as_str().ok_or_else(|| Error::invalid("a name is a str"))?;
    Ok(json!(held::hold(call.interpreter, memfile::sealable(name)?)?).into())
});
native!(MemorySeal, "memory_seal", ("fd", "is_lent"), waits: false,
"Make a file in memory immutable, by a descriptor that is the caller's; or only its size, if it is lent.",
|call, args| {
    let seals = seals(args, 1)?;
    let fd = held::take(call.interpreter, number(args, 0)?)?;
    let sealed = memfile::seal(&fd, seals);
    held::hold(call.interpreter, fd)?;
    sealed.map(|()| Value::NONE)
});
native!(MemoryCheck, "memory_check", ("fd", "is_lent"), waits: false,
"Refuse (ValueError) what is no sealed file in memory, by a descriptor that is the caller's.",
|call, args| {
    let seals = seals(args, 1)?;
    let fd = held::take(call.interpreter, number(args, 0)?)?;
    let checked = memfile::check_sealed(&fd, seals);
    held::hold(call.interpreter, fd)?;
    checked.map(|()| Value::NONE).map_err(|error| Error::invalid(error.to_string()))
});
native!(Readable, "readable", ("fd", "is_brisk", "seconds"), waits: true,
"Wait until there is something to read, by a descriptor that stays open meanwhile: for a moment without sleeping, if \
 `is_brisk`, and then asleep, for so many seconds at most. Whether there is, or may be.",
|_, args| {
    let is_brisk = json(args, 1)?.as_bool().ok_or_else(|| Error::invalid("is_brisk is a bool"))?;
    let asleep = seconds("seconds", json(args, 2)?.as_f64().unwrap_or(f64::NAN))?;
    Ok(ready::readable(number(args, 0)?, is_brisk, asleep).into())
});
native!(Forks, "forks", (), waits: false,
    "How often this process has forked, or a number that is larger; not counting what execs at once.",
    |_, _| Ok(json!(process::forks()).into()));
native!(FdAdopt, "fd_adopt", ("fd"), waits: false,
"Take a descriptor into hand that the caller has received, and that nobody else owns: it is closed with the interpreter \
 at the latest.",
|call, args| Ok(json!(held::hold(call.interpreter, fd::adopt(number(args, 0)?)?)?).into()));
native!(FdClose, "fd_close", ("fd"), waits: false,
"Close a descriptor that is the caller's, and has been got from here. Nothing happens if it is closed, or was a \
 parent's.",
|call, args| {
    held::close(call.interpreter, number(args, 0)?);
    Ok(Value::NONE)
});
native!(FdDetach, "fd_detach", ("fd"), waits: false,
"Give a descriptor that has been got from here out of hand: it is not closed with the interpreter any more.",
|call, args| Ok(json!(held::take(call.interpreter, number(args, 0)?)?.into_raw_fd()).into()));
native!(ChildStdio, "child_stdio", (), waits: false,
    "The fds of stdout and stderr of this interpreter, a worker; None for the process's. They are only lent.",
    |call, _| Ok(json!(context::current(call.interpreter)?.stdio()).into()));
native!(ChildSend, "child_send", ("message", "payload", "memory"), waits: true,
"Say something to the supervisor of this interpreter, a worker; with `payload`, or with the sealed file in memory \
 whose descriptor, the caller's until then, is `memory`, if that is not None.",
|call, args| {
    let message: FromWorker = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("a malformed message: {error}")))?;
    let content = match json(args, 2)? {
        Json::Null => Content::Bytes(Arc::new(bytes(args, 1)?.to_vec())),
        _ => Content::Memory(Arc::new(held::take(call.interpreter, number(args, 2)?)?)),
    };
    context::current(call.interpreter)?.send(&message, &content)?;
    Ok(Value::NONE)
});
native!(
    ChildRaiseCancelled,
    "child_raise_cancelled",
    ("thread"),
    waits: false,
    "Raise Cancelled in a thread of this interpreter, by its ident, at its next instruction.",
    |_, args| {
        let thread = json(args, 0)?.as_u64().ok_or_else(|| Error::invalid("a thread's ident is a positive integer"))?;
        let raise = |token: Token<'_>| call::raise_in(token, thread, c"tractor_host._errors", c"Cancelled");
        with_current(raise).transpose()?;
        Ok(Value::NONE)
    }
);
native!(ChildApart, "child_apart", ("gil"), waits: false,
"In a worker process: do its work in a second interpreter, and leave.",
|_, args| {
    let gil: GilPolicy = serde_json::from_value(json(args, 0)?.clone())
        .map_err(|error| Error::invalid(format!("no kind of GIL: {error}")))?;
    with_current(|token| apart::run(token, gil)).transpose()?;
    Ok(Value::NONE)
});
native!(ChildHouse, "child_house", (), waits: true,
    "In a worker process: be home to workers that its supervisor has live here. It does not return.",
    |_, _| Supervisor::get()?.be_home());
native!(ChildLeave, "child_leave", ("code"), waits: false,
"End this process, a worker, and all that it started, at once with an exit code. In its second interpreter: say \
 with which one it is to end.",
|call, args| {
    let code = json(args, 0)?.as_i64().and_then(|code| i32::try_from(code).ok()).unwrap_or(1);
    context::leave(call.interpreter, code)?;
    Ok(Value::NONE)
});
native!(TerminalAsk, "terminal_ask", (), waits: true,
"Line up for the program's terminal, for a debugger; returns a ticket, which is to be given back.",
|call, _| {
    let ticket = terminal::line_up()?;
    tell_of_terminal(call.interpreter, ticket, true)?;
    Ok(json!(ticket).into())
});
native!(TerminalWait, "terminal_wait", ("ticket"), waits: true,
"Wait for one's turn; returns a descriptor of the terminal, which is the caller's. Nobody of the program is ended by it \
 until the ticket is given back.",
|call, args| Ok(json!(held::hold(call.interpreter, terminal::wait(ticket(args)?)?)?).into()));
native!(TerminalBack, "terminal_back", ("ticket"), waits: true,
"Step out of the line, or give the terminal back.",
|call, args| {
    let ticket = ticket(args)?;
    terminal::step_out(ticket);
    tell_of_terminal(call.interpreter, ticket, false)?;
    Ok(Value::NONE)
});
native!(Clock, "clock", (), waits: false,
    "Seconds of a clock that stands still while somebody debugs; differences count.",
    |_, _| Ok(json!(clock::now().as_secs_f64()).into()));
native!(OwnsProcess, "owns_process", (), waits: false,
    "Whether this process ends when this interpreter does: it is the main one, or a worker's second.",
    |call, _| Ok((call.interpreter == 0 || context::current(call.interpreter).is_ok_and(|context| context.is_process())).into()));
native!(IsMainInterpreter, "is_main_interpreter", (), waits: false,
    "Whether this is the process's main interpreter.",
    |call, _| Ok((call.interpreter == 0).into()));

pub(super) fn table() -> Table {
    Table::new()
        .with::<Spawn>()
        .with::<Info>()
        .with::<Wait>()
        .with::<Exit>()
        .with::<Outcome>()
        .with::<Output>()
        .with::<Fileno>()
        .with::<Cancel>()
        .with::<Pause>()
        .with::<Kill>()
        .with::<KillDeaf>()
        .with::<Limit>()
        .with::<Hold>()
        .with::<Release>()
        .with::<Workers>()
        .with::<Statistics>()
        .with::<Shutdown>()
        .with::<LeaveBehind>()
        .with::<Quarantine>()
        .with::<GuardCtrlC>()
        .with::<WatchGil>()
        .with::<Resources>()
        .with::<TakeDump>()
        .with::<WriteDump>()
        .with::<Rungs>()
        .with::<Layout>()
        .with::<HangArm>()
        .with::<HangDisarm>()
        .with::<Events>()
        .with::<EventsWait>()
        .with::<EventsLast>()
        .with::<EventsTaken>()
        .with::<Preload>()
        .with::<PreloadFailures>()
        .with::<ForkServer>()
        .with::<ForkServerOwns>()
        .with::<ZygoteOrder>()
        .with::<ZygotePrepared>()
        .with::<ZygoteServe>()
        .with::<ChildEnter>()
        .with::<ChildRehearse>()
        .with::<ChildRehearseApart>()
        .with::<ChildSpec>()
        .with::<ChildPayload>()
        .with::<ChildTake>()
        .with::<MemoryCreate>()
        .with::<MemorySeal>()
        .with::<MemoryCheck>()
        .with::<Readable>()
        .with::<Forks>()
        .with::<FdAdopt>()
        .with::<FdClose>()
        .with::<FdDetach>()
        .with::<ChildStdio>()
        .with::<ChildSend>()
        .with::<ChildRaiseCancelled>()
        .with::<ChildApart>()
        .with::<ChildHouse>()
        .with::<ChildLeave>()
        .with::<TerminalAsk>()
        .with::<TerminalWait>()
        .with::<TerminalBack>()
        .with::<Clock>()
        .with::<OwnsProcess>()
        .with::<IsMainInterpreter>()
}

/// The supervisor, which must be there: whoever has a worker's id got it from one.
fn supervisor() -> Result<&'static Arc<Supervisor>> {
    Supervisor::existing()?.ok_or_else(|| Error::state("no worker has been spawned in this process"))
}

fn json<'a>(args: &'a [Arg<'_>], index: usize) -> Result<&'a Json> {
    match args.get(index) {
        Some(Arg::Json(json)) => Ok(json),
        _ => Err(Error::invalid(format!("argument {} must not be bytes", index + 1))),
    }
}

fn bytes<'a>(args: &[Arg<'a>], index: usize) -> Result<&'a [u8]> {
    match args.get(index) {
        Some(Arg::Bytes(bytes)) => Ok(bytes),
        _ => Err(Error::invalid(format!("argument {} must be bytes", index + 1))),
    }
}

/// The number of an event.
fn number_of(args: &[Arg<'_>], index: usize) -> Result<u64> {
    json(args, index)?.as_u64().ok_or_else(|| Error::invalid("an event's number is a positive integer"))
}

fn events(found: Vec<Event>) -> Result<Value> {
    Ok(serde_json::to_value(found).map_err(|error| Error::state(error.to_string()))?.into())
}

/// Enters into the timeline what the calling thread has spent time on.
fn enter(call: &Call, what: &'static str, worker: &Worker, goes_on: bool) {
    if trace::is_on() {
        trace::enter(trace::Span {
            what,
            thread: thread::id(),
            since: call.started,
            of: worker.name.clone(),
            goes_on,
        });
    }
}

/// A descriptor by its number.
fn number(args: &[Arg<'_>], index: usize) -> Result<i32> {
    let number = json(args, index)?.as_i64().and_then(|number| i32::try_from(number).ok());
    number.ok_or_else(|| Error::invalid("a descriptor is a small integer"))
}

/// How a file in memory is sealed that is lent, or is not.
fn seals(args: &[Arg<'_>], index: usize) -> Result<Seals> {
    let is_lent = json(args, index)?.as_bool().ok_or_else(|| Error::invalid("is_lent is a bool"))?;
    Ok(if is_lent { Seals::Size } else { Seals::Everything })
}

/// A pickle, or a descriptor of the caller's to where it is.
fn content_value(call: &Call, content: Content) -> Result<Value> {
    match content {
        Content::Bytes(bytes) => Ok(Value::Bytes(bytes)),
        Content::Memory(memory) => Ok(json!(held::hold(call.interpreter, parcel::own(memory)?)?).into()),
        Content::Lost => {
            let errno = std::io::Error::from_raw_os_error(libc::EMFILE);
            Err(Error::os("receive the worker's result, which came as a descriptor", errno))
        }
    }
}

fn ticket(args: &[Arg<'_>]) -> Result<u64> {
    json(args, 0)?.as_u64().ok_or_else(|| Error::invalid("a ticket is a positive integer"))
}

/// Has whoever lends the terminal know that it is wanted, or not any more.
fn tell_of_terminal(interpreter: i64, ticket: u64, wanted: bool) -> Result<()> {
    match context::current(interpreter) {
        Ok(context) => context.send(&FromWorker::Terminal { ticket, wanted }, &Content::none()),
        Err(_) => Supervisor::get().map(|supervisor| supervisor.wants_terminal(ticket, wanted)),
    }
}

fn id(args: &[Arg<'_>]) -> Result<u64> {
    json(args, 0)?.as_u64().ok_or_else(|| Error::invalid("a worker's id is a positive integer"))
}
