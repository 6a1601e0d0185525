//! Routes that Connect does not have: the emulator's own, below `/_emulator/`. They need no credential and change nothing.

use std::time::Duration;

use http::Method;

/// What the emulator itself is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// `GET /_emulator/env.local?life=4m`: an env file with a fresh token of that life, as `vercel env pull` would
    /// write it; 12 hours where none is asked for.
    EnvFile(Duration),
}

/// Reads a request's target; `None` if it is not for the emulator itself.
pub(super) fn read(method: &Method, target: &str) -> Option<Request> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if *method != Method::GET || path != "/_emulator/env.local" {
        return None;
    }
    let life = match query.strip_prefix("life=") {
        Some(life) => humantime::parse_duration(life).ok()?,
        None => super::oidc::DEVELOPMENT_LIFE,
    };
    Some(Request::EnvFile(life))
}

/// An env file that holds `token`, in the CLI's form (connect-contract.md section 6.1).
pub(super) fn env_file(token: &str) -> String {
    format!("# Created by Vercel CLI\nVERCEL_OIDC_TOKEN=\"{token}\"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_env_file_can_be_asked_for_with_a_life() {
        let of = |target| read(&Method::GET, target);
        assert_eq!(of("/_emulator/env.local"), Some(Request::EnvFile(Duration::from_secs(12 * 3600))));
        assert_eq!(of("/_emulator/env.local?life=4m"), Some(Request::EnvFile(Duration::from_secs(240))));
        assert_eq!(of("/_emulator/env.local?life=4"), None);
        assert_eq!(of("/_emulator/other"), None);
        assert_eq!(read(&Method::POST, "/_emulator/env.local"), None);
    }
}
