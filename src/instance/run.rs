//! The request and response bodies of `POST /_sidecar/v1/runs`, by which a command goes through a sidecar.

use std::ffi::OsStr;

use serde::{Deserialize, Serialize};

use crate::os::env_proxy::{self, Environment};

/// Asks for a run.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Whether the run needs a proxy that intercepts Vercel's hosts.
    #[serde(default = "default_intercept")]
    pub intercept: bool,
    /// The environment of the run, if it intercepts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<RunEnvironment>,
}

/// The proxy for the run's requests that are not intercepted. Secret: it may contain a password.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunEnvironment {
    /// The value of the variable with the highest precedence for the scheme `https`.
    pub https_proxy: Option<String>,
    /// The values of all `NO_PROXY` variables as one list.
    pub no_proxy: Option<String>,
}

impl RunRequest {
    /// A request for a run in this environment.
    pub fn new(intercept: bool, environment: Environment<'_>) -> Self {
        let environment = intercept.then(|| {
            let (https_proxy, no_proxy) = env_proxy::for_https(environment);
            let https_proxy = https_proxy.as_deref().and_then(OsStr::to_str).map(str::to_owned);
            RunEnvironment { https_proxy, no_proxy: Some(no_proxy) }
        });
        Self { intercept, environment }
    }
}

fn default_intercept() -> bool {
    true
}

/// What a command needs to go through the sidecar.
#[derive(Serialize, Deserialize)]
pub struct Run {
    /// The run's name.
    #[serde(default)]
    pub run: String,
    /// The placeholder for the OIDC token, which is no credential.
    pub placeholder: String,
    /// The intercepting proxy, with the run's secret in its URL; absent without interception.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// The CA certificate of that proxy, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The hosts for which the sidecar replaces the placeholder with the real token.
    #[serde(default)]
    pub bearer_hosts: Vec<String>,
    /// Whether requests need `key`.
    #[serde(default)]
    pub key_required: bool,
    /// The key for requests of the run's programs, if they need one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}
