//! How a worker comes to be: one file a way in, and the first steps on the other side. It knows
//! nothing of ladders or registries; what a worker says goes to whoever implements [`Reports`].

pub mod apart;
pub mod clean;
pub mod context;
pub mod exec;
pub mod fork;
pub mod held;
pub mod parcel;
pub mod request;
pub mod stdio;
pub mod subint;
pub mod terminal;
pub mod zygote;

use self::parcel::Content;
use crate::wire::message::FromWorker;

/// Where a subinterpreter's runner thread sends what happens.
pub trait Reports: Send + Sync {
    /// The worker said something, and this goes with it.
    fn message(&self, message: FromWorker, content: Content);
    /// An extension module refused the worker's own GIL; it starts again with the shared one.
    fn refused_own_gil(&self);
    /// All code of the worker is over; its interpreter is about to be ended.
    fn over(&self);
    /// The target is over, but `threads` threads that it left will not end. The runner stays with
    /// them and goes on trying.
    fn stuck(&self, threads: usize);
    /// The interpreter is gone, and the thread is about to be. `interpreters` are the ids that it
    /// had; `error` says why it could not be made or entered.
    fn ended(&self, interpreters: &[i64], error: Option<String>);
}
