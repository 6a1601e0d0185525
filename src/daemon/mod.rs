//! The serving process: [`app`] builds and owns its parts, [`server`] handles connections and requests, [`intercept`]
//! decrypts the TLS connections of a `run`, [`status`] reports what is going on.
//!
//! Which requests are allowed, where they go and what is cached is decided in [`proxy`](crate::proxy), the credential
//! in [`credential`](crate::credential). Commands are in [`cli`](crate::cli).

pub mod app;
pub mod intercept;
pub mod server;
pub mod status;
