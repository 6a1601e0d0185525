//! The tests that wait for real time. In a run of the whole suite they start together, so that all of them take as long
//! as the longest; with a filter, only the selected ones run.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Timeout of a test.
const TIMEOUT: Duration = Duration::from_secs(150);

type Running = HashMap<&'static str, JoinHandle<()>>;

/// All of them, each in its own thread.
static RUNNING: LazyLock<Mutex<Running>> = LazyLock::new(|| Mutex::new(start_all()));

/// Declares tests for these functions. Those for Linux look at the process through `/proc`.
macro_rules! slow_tests {
    ($($(#[cfg($cfg:meta)])? $group:ident::$name:ident,)+) => {
        $(
            #[test]
            $(#[cfg_attr(not($cfg), ignore = "looks at the process through /proc")])?
            fn $name() {
                finish(stringify!($name), || run(super::$group::$name()));
            }
        )+

        fn start_all() -> Running {
            HashMap::from([
                $($(#[cfg($cfg)])? (stringify!($name), std::thread::spawn(|| run(super::$group::$name()))),)+
            ])
        }
    };
}

slow_tests! {
    cache::tK16_bounds_its_entries,
    env_file::tE04_never_uses_a_partially_written_token,
    env_file::tE05_no_request_fails_during_a_rename_or_a_recreate,
    env_file::tE16_drops_a_token_missing_for_10_s_and_its_cache,
    #[cfg(target_os = "linux")]
    env_file::tE18_survives_any_other_kind_of_file,
    framing::tR23_closes_a_connection_whose_head_takes_20_s,
    framing::tR24_refuses_a_body_that_takes_10_s,
    shutdown::tS01_answers_a_request_in_flight_before_exiting,
    #[cfg(target_os = "linux")]
    shutdown::tS08_drops_clients_that_vanish,
    shutdown::tS11_limits_upstream_to_16_concurrent_requests,
    #[cfg(target_os = "linux")]
    shutdown::tS13_a_minute_of_load_and_rotations_leaks_nothing,
    token_life::tT01_warns_once_in_the_last_hour,
    token_life::tT03_does_not_send_an_expired_token,
    token_life::tT05_retries_once_with_a_fresh_token,
    upstream::tU07_gives_up_a_silent_upstream_after_20_s,
    upstream::tU14_answers_from_a_cached_429_until_retry_after,
    upstream::tU17_reconnects_when_upstream_has_closed_an_idle_connection,
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(TIMEOUT, test).await.expect("in time") });
}

/// Waits for a test that was started with the others, or runs it alone if tests are filtered.
fn finish(name: &'static str, run_alone: impl FnOnce()) {
    // The value of an option counts as a filter, too. The tests then run one after another, which is only slower.
    let is_filtered = std::env::args().skip(1).any(|arg| !arg.starts_with('-'));
    if is_filtered {
        return run_alone();
    }
    let running = RUNNING.lock().expect("no panic while starting").remove(name).expect("started once");
    if let Err(panic) = running.join() {
        panic!("{}", message(&*panic));
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}
