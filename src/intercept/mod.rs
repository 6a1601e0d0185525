//! Interception.

pub mod ca;
mod leaf;
