//! All integration tests in one binary: a module for each behaviour, `support` beside them.

mod journey;
mod support;
