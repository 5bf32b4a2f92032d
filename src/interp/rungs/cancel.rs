//! `cancel`: the worker is asked to stop, and can clean up.

use super::super::call;
use super::super::door::Door;
use crate::error::Result;

impl Door {
    /// Asks the worker behind the door to stop, in the way that it has prepared for that.
    ///
    /// # Errors
    /// What its Python side raised.
    pub fn cancel(&self) -> Result<()> {
        let asked = self.visit(|token| call::function_if_imported(token, c"tractor_host._child", c"cancel"));
        // One that comes so late that the interpreter is being pressed is pressed too.
        asked.filter(|_| self.pressed().is_none()).unwrap_or(Ok(()))
    }
}
