//! All integration tests in one binary: a module for each behaviour, `support` beside them.

#![allow(unreachable_pub, reason = "nothing here has a caller outside this binary")]
#![allow(clippy::print_stderr, reason = "a test says what it could not do")]

mod admission;
mod billing;
mod cache;
mod cli;
mod clients;
mod command;
mod commands;
mod connecting;
mod demo;
mod doctor;
mod emulator;
mod env_file;
mod events;
mod expiry;
mod faults;
mod gates;
mod intercept;
mod joining;
mod journey;
mod json_log;
mod layout;
mod limits;
mod listening;
mod metrics;
mod next;
mod page;
mod policy;
mod preload;
mod providers;
mod proxies;
mod python;
mod readme;
mod refresh;
mod relay;
mod run;
mod run_child;
mod runs;
mod sdk;
mod sdk_credential;
mod service;
mod soak;
mod status;
mod support;
mod time;
mod vercel_cli;
mod waiting;
mod warnings;
mod wire;
