//! `interrupt`: an exception rises in every thread of the interpreter.

use super::super::attach::Token;
use crate::ffi::offsets::ThreadIds;
use crate::ffi::py;

/// Raises `SystemExit` in the given threads, each at its next check of the eval loop.
pub(super) fn raise_in(_: Token<'_>, threads: &[ThreadIds]) {
    for thread in threads {
        // SAFETY: attached. An ident that is no thread of this interpreter (any more) is not found.
        unsafe { py::PyThreadState_SetAsyncExc(thread.ident.cast_signed(), py::PyExc_SystemExit) };
    }
}
