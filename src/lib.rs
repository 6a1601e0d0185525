//! A local sidecar for Vercel Connect: apps on this machine ask it for provider tokens without holding a credential.
//!
//! # The parts
//!
//! - [`identity`]: who we are. Watches the env file, publishes the credential, warns before it ends.
//! - [`proxy`]: what happens to a request. Gates, route, cache key, cache with single flight, the way to upstream.
//! - [`events`]: what happens, for whoever listens. [`status`]: what people look at.
//! - [`intercept`]: programs that can only be led here by their proxy settings. CONNECT, a local CA, blind tunnels.
//! - [`server`] accepts connections; [`app`] wires everything; [`config`] reads flags, environment and files.
//! - [`commands`] ask a running sidecar, by its [`client`]; [`doctor`] checks the whole set-up; [`service`] lets it run
//!   from login on.
//! - [`run`]: unmodified apps. Runs a command whose requests go through the sidecar.
//! - [`emulator`] stands in for Connect; [`demo`] shows the main job against it, [`emulate`] runs it by itself.
//!
//! # One request
//!
//! [`server`] accepts and reads the head → [`proxy::guard`] decides whether the caller may ask → [`proxy::route`] finds
//! what is asked for → [`proxy::body`] reads it → [`proxy::key`] names it → [`proxy::cache`] answers, joins a request
//! under way, or starts one in a task of its own → [`proxy::upstream`] sends it with the credential of that moment →
//! [`proxy::reply`] goes back. One that [`intercept`] has decrypted takes the same way.
//!
//! # One change of `.env.local`
//!
//! [`identity::watch`] is nudged by the directory or its poll, reads the file ([`safe_read`]), finds the one line
//! ([`identity::env_file`]), and takes the token or not ([`identity::succession`]); so it does with one that
//! [`identity::refresh`] got from the Vercel CLI. What it publishes is what the next request uses, what
//! [`identity::expiry`] warns about, and what the cache keeps to.

pub mod app;
pub mod cli;
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod demo;
pub mod doctor;
pub mod emulate;
pub mod emulator;
pub mod event_line;
pub mod events;
pub mod executable;
pub mod hardening;
pub mod identity;
pub mod instance_key;
pub mod intercept;
pub mod logging;
pub mod port_owner;
pub mod private_dir;
pub mod process_group;
pub mod proxy;
pub mod remedy;
pub mod run;
pub mod safe_read;
pub mod server;
pub mod service;
pub mod shell_quoting;
pub mod status;
pub mod terminal;
pub mod tls;
