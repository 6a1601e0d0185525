//! The process that serves: [`app`] starts its parts and owns their state, [`server`] accepts connections and answers
//! them, [`intercept`] takes the TLS connections of a `run`, [`status`] is what people and tools look at.
//!
//! Here parts are wired and connections handled. What may be asked, where it goes and what is kept is decided in
//! [`proxy`](crate::proxy); which credential is used, in [`credential`](crate::credential). No command is here.

pub mod app;
pub mod intercept;
pub mod server;
pub mod status;
