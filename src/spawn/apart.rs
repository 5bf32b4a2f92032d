//! A worker process whose code runs in a second interpreter: its main one stays as it was started.

use std::sync::Arc;

use super::context::{SecondLife, leave_process};
use super::parcel::Content;
use super::request::{GilPolicy, path_of};
use crate::error::Result;
use crate::events::fault;
use crate::interp::attach::{Attached, Token};
use crate::interp::call;
use crate::interp::rungs;
use crate::interp::runtime::{self, Audience};
use crate::interp::subinterp::{Gil, SubInterpreter};
use crate::interp::template;
use crate::sys::process;
use crate::wire::message::FromWorker;

/// Does the work of this process, a worker, in an interpreter that it has adopted or else makes, and leaves.
/// The calling thread is attached to the main interpreter.
///
/// # Errors
/// When there is no such interpreter to be had.
pub fn run(token: Token<'_>, gil: GilPolicy) -> Result<()> {
    if let Some(door) = super::context::current(0)?.door() {
        runtime::watch_interrupts(Arc::clone(door), Audience::Worker)?;
    }
    let (first, fall_back) = gil.plan();
    token.detached(|| live(first, fall_back))
}

/// In a process that has no task yet: has the interpreter that it has adopted do what it can without one.
///
/// # Errors
/// What that raised.
pub fn rehearse(token: Token<'_>) -> Result<()> {
    template::visit(token, |token| {
        call::function(token, c"tractor_host._zygote", c"after_fork")?;
        call::function(token, c"tractor_host._child", c"_prepare_blank")
    })
}

/// It returns with an error only.
fn live(gil: Gil, fall_back: Option<Gil>) -> Result<()> {
    let home = Home::of(gil)?;
    let token = home.token();
    rungs::report_missing(token);
    let life = SecondLife::live(token, fall_back.is_some(), |context| {
        // One that was adopted has rehearsed by now.
        if let Home::Made(_) = home {
            call::set_sys_path(token, &path_of(&context.spec())?)?;
        }
        call::function(token, c"tractor_host._child", c"main")
    })?;
    if life.refused
        && let Some(gil) = fall_back
    {
        super::context::current(0)?.send(&FromWorker::Refused, &Content::Bytes(Arc::default()))?;
        // The refused one is left as it is: nothing of the target has run in it.
        return token.detached(|| live(gil, None));
    }
    if let (Err(error), false) = (&life.outcome, life.pressed) {
        fault!("worker {} failed: {error}", process::id());
    }
    leave_process(life.code.unwrap_or(1))
}

/// The interpreter that the code runs in; it ends with the process.
enum Home {
    Adopted(Attached),
    Made(SubInterpreter),
}

impl Home {
    fn of(gil: Gil) -> Result<Self> {
        match template::take(gil) {
            Some(attached) => Ok(Self::Adopted(attached)),
            None => SubInterpreter::create(gil).map(Self::Made),
        }
    }

    fn token(&self) -> Token<'_> {
        match self {
            Self::Adopted(attached) => attached.token(),
            Self::Made(made) => made.token(),
        }
    }
}
