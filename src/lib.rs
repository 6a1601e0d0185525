//! A local sidecar for Vercel Connect: apps on this machine ask it for provider tokens without holding a credential.
//!
//! # The parts, from the top down
//!
//! - [`cli`]: what people type, a file or folder for each command.
//! - [`daemon`]: the process that serves: its connections, its status page and metrics, the interception of TLS.
//! - [`config`]: flags, environment and files, checked and put together.
//! - [`proxy`]: what happens to a request: policy, route, cache key, cache, upstream, reply.
//! - [`credential`]: the token that is injected: where it is read, when it ends, how it is refreshed.
//! - [`instance`]: which sidecar runs where, and how to ask it.
//! - [`emulator`]: a stand-in for Vercel Connect, for `demo`, `emulate` and the tests.
//! - [`events`]: what happens, for the log, the status page and notices; [`remedy`]: what to do about an error.
//! - [`os`]: adapters for the operating system, which know nothing of all this.
//!
//! A part uses only those below it; `tests/it/layout.rs` checks that, and docs/architecture.md gives the reasons.
//!
//! # One request
//!
//! [`daemon::server`] accepts the connection and reads the head → [`proxy::guard`] decides whether the caller may ask →
//! [`proxy::route`] finds what is asked for → [`proxy::body`] reads the body → [`proxy::key`] derives the cache key →
//! [`proxy::cache`] answers, joins a fetch in flight, or starts one in a task of its own → [`proxy::upstream`] sends it
//! with the current credential → [`proxy::reply`] goes back. A request that [`daemon::intercept`] has decrypted takes the
//! same path.
//!
//! # One change of `.env.local`
//!
//! [`credential::watch`] is woken by a change in the directory or by its poll, reads the file ([`os::safe_read`]), finds
//! the assignment ([`credential::env_file`]), and accepts the token or not ([`credential::rotation`]); a token that
//! [`credential::refresh`] got from the Vercel CLI takes the same path. What it publishes is what the next request uses,
//! what [`credential::expiry_warnings`] warns about, and what the cache checks its entries against.

pub mod cli;
pub mod config;
pub mod credential;
pub mod daemon;
pub mod emulator;
pub mod events;
pub mod instance;
pub mod os;
pub mod proxy;
pub mod remedy;
