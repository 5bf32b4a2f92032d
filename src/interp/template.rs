//! Interpreters that are made, and import what they need, before a fork, and are worked in after it.
//!
//! CPython keeps only the main interpreter in a forked child, and would crash on taking the others down. So
//! all of them are taken out of the runtime's list in the child before it looks, and the one that is wanted
//! is put back afterwards. It must have been idle, with no thread state in it, in a process of one thread.

use std::sync::Mutex;

use super::attach::{Attached, Interpreter, Token};
use super::subinterp::{Gil, SubInterpreter};
use crate::error::Result;
use crate::ffi::offsets::Offsets;
use crate::sys::lock::lock;

/// One that is ready to be adopted by children.
#[derive(Debug, Clone, Copy)]
pub struct Template {
    gil: Gil,
    interpreter: Interpreter,
    offsets: &'static Offsets,
}

impl Template {
    /// Makes an interpreter and has `prepare` run in it. The calling thread is attached to the main
    /// interpreter, as it is again afterwards, and is the only one of the process.
    ///
    /// # Errors
    /// What CPython says; that of `prepare`, after which the interpreter is left as it is; when this Python's
    /// layout is not known.
    pub fn make(token: Token<'_>, gil: Gil, prepare: impl FnOnce(Token<'_>) -> Result<()>) -> Result<Self> {
        let offsets = Offsets::get()?;
        token.detached(|| {
            let made = SubInterpreter::create(gil)?;
            let prepared = prepare(made.token());
            let template = Self { gil, interpreter: made.leave(), offsets };
            prepared.map(|()| template)
        })
    }

    /// Its GIL.
    pub fn gil(&self) -> Gil {
        self.gil
    }

    /// In the child of a fork, whose only thread is attached to the main interpreter and in which every other
    /// interpreter is gone: makes this one known to the runtime again.
    pub(super) fn adopt(self) {
        // SAFETY: the memory of the interpreter is the child's own copy; it was idle when it was copied.
        unsafe { self.offsets.link(self.interpreter.as_ptr()) };
        *lock(&ADOPTED) = Some(self);
    }
}

/// The one that this process has adopted, until somebody attaches to it.
static ADOPTED: Mutex<Option<Template>> = Mutex::new(None);

/// Runs `body` in the interpreter that this process has adopted, if it has, and leaves it idle again. The
/// calling thread is attached to the main interpreter.
///
/// # Errors
/// Those of `body`.
pub fn visit(token: Token<'_>, body: impl FnOnce(Token<'_>) -> Result<()>) -> Result<()> {
    let Some(template) = *lock(&ADOPTED) else { return Ok(()) };
    token.detached(|| {
        // SAFETY: nobody ends it, and this thread is detached.
        let attached = unsafe { Attached::new(template.interpreter) };
        body(attached.token())
    })
}

/// Attaches the calling thread, which must not be attached to any, to the interpreter that this process has
/// adopted with this kind of GIL, if it has. It stays for as long as the process.
pub fn take(gil: Gil) -> Option<Attached> {
    let template = lock(&ADOPTED).take_if(|template| template.gil == gil)?;
    // SAFETY: nobody ends it, and the caller is not attached.
    Some(unsafe { Attached::new(template.interpreter) })
}
