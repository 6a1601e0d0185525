//! Parses the value of each setting. Pure, except that [`certificates`] reads a file.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use rustls::pki_types::CertificateDer;
use tracing::Level;

use super::setting::{RawValue, SettingValue};
use crate::os::logging::Format;
use crate::os::tls;
use crate::proxy::guard::AllowedHost;
use crate::proxy::hosts::{BearerHost, Hosts};

/// What is wrong with a value and what is expected instead. Does not repeat the value, which may be a misplaced secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct InvalidValue(pub(super) Cow<'static, str>);

type Parsed<T> = Result<T, InvalidValue>;

/// Where the credential comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AuthSource {
    Oidc,
    AccessToken,
}

/// Who refreshes the OIDC token (docs/configuration.md section 4).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RefreshMode {
    /// The developer, after a warning.
    #[default]
    Off,
    /// The sidecar, by running the Vercel CLI before the token expires.
    Cli,
}

fn expected<T>(what: &str) -> Parsed<T> {
    Err(InvalidValue(format!("expected {what}").into()))
}

fn text(value: &SettingValue) -> Parsed<&str> {
    match &value.raw {
        RawValue::Text(text) => Ok(text),
        _ => expected("a string"),
    }
}

fn list(value: &SettingValue) -> Parsed<Vec<String>> {
    match &value.raw {
        RawValue::List(items) => Ok(items.clone()),
        // The flag is repeatable; the variable has commas.
        RawValue::Text(text) if value.is_from_variable => {
            Ok(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect())
        }
        _ => expected("a list of strings"),
    }
}

pub(super) fn port(value: &SettingValue) -> Parsed<u16> {
    let number = match &value.raw {
        RawValue::Integer(number) => u16::try_from(*number).ok(),
        RawValue::Text(text) if !value.is_from_file => text.parse().ok(),
        _ => None,
    };
    match (number, &value.raw) {
        (Some(number), _) => Ok(number),
        (None, RawValue::Text(text)) if text.contains([':', '.']) => expected(
            "a port number from 0 to 65535 alone: the address is loopback, any other needs --dangerously-listen-on-network",
        ),
        _ => expected("a port number from 0 to 65535"),
    }
}

/// An address of this machine that is not loopback.
pub(super) fn network_address(value: &SettingValue) -> Parsed<IpAddr> {
    match text(value)?.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Ok(address) if address.is_loopback() => Err(InvalidValue(
            "this is not needed for a loopback address: the sidecar listens on 127.0.0.1 and [::1] anyway".into(),
        )),
        Ok(address) => Ok(address),
        Err(_) => expected("an IP address of this machine, without a port, such as 192.0.2.1"),
    }
}

pub(super) fn count(value: &SettingValue) -> Parsed<NonZeroUsize> {
    match &value.raw {
        RawValue::Integer(number) if (1..=1_000_000).contains(number) => {
            usize::try_from(*number).ok().and_then(NonZeroUsize::new).map_or_else(|| expected("a number"), Ok)
        }
        _ => expected("a number from 1 to 1000000 (to turn the cache off, set cache.max_age = \"0s\")"),
    }
}

pub(super) fn boolean(value: &SettingValue) -> Parsed<bool> {
    match &value.raw {
        RawValue::Boolean(yes) => Ok(*yes),
        RawValue::Text(text) if !value.is_from_file => match text.as_str() {
            "1" | "true" => Ok(true),
            "0" | "false" | "" => Ok(false),
            _ => expected("true or false"),
        },
        _ => expected("true or false"),
    }
}

fn parse_duration(text: &str) -> Parsed<Duration> {
    let has_unit = text.bytes().any(|b| b.is_ascii_alphabetic());
    match humantime::parse_duration(text) {
        Ok(duration) if has_unit => Ok(duration),
        _ => expected("a duration with its unit, such as \"30s\", \"15m\" or \"1h\""),
    }
}

pub(super) fn duration(value: &SettingValue) -> Parsed<Duration> {
    match &value.raw {
        RawValue::Text(text) => parse_duration(text),
        _ => expected("a duration with its unit, such as \"30s\", \"15m\" or \"1h\""),
    }
}

pub(super) fn durations(value: &SettingValue) -> Parsed<Vec<Duration>> {
    let durations = list(value)
        .or_else(|_| expected("a list of durations, such as [\"60m\", \"15m\"]"))?
        .iter()
        .map(|item| parse_duration(item))
        .collect::<Parsed<Vec<_>>>()?;
    if durations.iter().any(Duration::is_zero) { expected("durations above zero") } else { Ok(durations) }
}

pub(super) fn level(value: &SettingValue) -> Parsed<Level> {
    match text(value)? {
        "error" => Ok(Level::ERROR),
        "warn" => Ok(Level::WARN),
        "info" => Ok(Level::INFO),
        "debug" => Ok(Level::DEBUG),
        "trace" => Ok(Level::TRACE),
        _ => expected("error, warn, info, debug or trace"),
    }
}

pub(super) fn log_format(value: &SettingValue) -> Parsed<Format> {
    match text(value)? {
        "text" => Ok(Format::Text),
        "json" => Ok(Format::Json),
        _ => expected("text or json"),
    }
}

pub(super) fn refresh(value: &SettingValue) -> Parsed<RefreshMode> {
    match text(value)? {
        "off" => Ok(RefreshMode::Off),
        "cli" => Ok(RefreshMode::Cli),
        _ => expected("off or cli"),
    }
}

/// A request is answered within 60 s, of which upstream may take 20.
const MAX_WAIT: Duration = Duration::from_secs(40);

pub(super) fn wait(value: &SettingValue) -> Parsed<Duration> {
    match duration(value)? {
        wait if wait <= MAX_WAIT => Ok(wait),
        _ => expected("at most \"40s\": a request is answered within a minute"),
    }
}

pub(super) fn auth(value: &SettingValue) -> Parsed<AuthSource> {
    match text(value)? {
        "oidc" => Ok(AuthSource::Oidc),
        "access-token" => Ok(AuthSource::AccessToken),
        _ => expected("oidc or access-token"),
    }
}

pub(super) fn team_id(value: &SettingValue) -> Parsed<String> {
    let id = text(value)?;
    let is_valid = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if is_valid { Ok(id.to_owned()) } else { expected("a team id such as team_abc123") }
}

pub(super) fn upstream(value: &SettingValue) -> Parsed<Uri> {
    origin_url(text(value)?)
}

/// An origin. Plain HTTP is accepted only for a loopback address, not for a name that resolves to one.
fn origin_url(text: &str) -> Parsed<Uri> {
    let what = "an origin such as https://api.vercel.com";
    let uri: Uri = text.parse().or_else(|_| expected(what))?;
    let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else { return expected(what) };
    if uri.path() != "/" || uri.query().is_some() || authority.as_str().contains('@') {
        return expected("an origin without user, path or query, such as https://api.vercel.com");
    }
    let host = authority.host().trim_matches(['[', ']']);
    let is_loopback = host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if *scheme == Scheme::HTTPS || (*scheme == Scheme::HTTP && is_loopback) {
        Ok(uri)
    } else {
        expected("https (plain http is taken only for a loopback address such as http://127.0.0.1:8080)")
    }
}

pub(super) fn certificates(value: &SettingValue) -> Parsed<Vec<CertificateDer<'static>>> {
    tls::read_certificates(&path(value)?).or_else(|e| expected(&format!("a file with PEM certificates: {e}")))
}

pub(super) fn path(value: &SettingValue) -> Parsed<PathBuf> {
    let text = text(value)?;
    if text.is_empty() || text.contains('\0') { expected("a path") } else { Ok(value.base.join(text)) }
}

pub(super) fn hosts(value: &SettingValue) -> Parsed<Vec<AllowedHost>> {
    list(value)?.iter().map(|item| host(item)).collect()
}

fn host(text: &str) -> Parsed<AllowedHost> {
    let what = "a host such as dev.test or dev.test:2774, without wildcards";
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, port)) => (format!("[{v6}]"), port.strip_prefix(':').or((!port.is_empty()).then_some("-"))),
        None => match text.split_once(':') {
            Some((name, port)) => (name.to_owned(), Some(port)),
            None => (text.to_owned(), None),
        },
    };
    let is_valid = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    let port = match port.map(str::parse::<u16>) {
        Some(Err(_)) => return expected(what),
        Some(Ok(port)) => Some(port),
        None => None,
    };
    if name.is_empty() || name.ends_with('.') || !name.bytes().all(is_valid) {
        return expected(what);
    }
    Ok(AllowedHost { name: name.to_ascii_lowercase(), port })
}

pub(super) fn bearer_hosts(value: &SettingValue) -> Parsed<Hosts> {
    let bearer_host = |item: &String| {
        let (host, origin) = item.split_once('=').map_or((item.as_str(), None), |(host, origin)| (host, Some(origin)));
        let what = "a host such as ai-gateway.vercel.sh or *.vercel-queue.com, with a path where only that takes the \
                    token, as in vercel.com/api/blob, and =ORIGIN where the host is to be found elsewhere";
        let host = BearerHost::parse(host).map_or_else(|| expected(what), Ok)?;
        match origin {
            None => Ok(host),
            Some(origin) => origin_url(origin).map(|origin| host.at(origin)),
        }
    };
    list(value)?.iter().map(bearer_host).collect::<Parsed<_>>().map(Hosts::new)
}

pub(super) fn origins(value: &SettingValue) -> Parsed<Vec<String>> {
    list(value)?.into_iter().map(origin).collect()
}

/// An origin as browsers send it: lower case, no path, no default port.
fn origin(text: String) -> Parsed<String> {
    let what = "an origin such as https://app.example or http://localhost:3000";
    let Ok(uri) = text.parse::<Uri>() else { return expected(what) };
    let default_port = match uri.scheme_str() {
        Some("https") => ":443",
        Some("http") => ":80",
        _ => return expected(what),
    };
    let is_exact = uri.host().is_some_and(|host| !host.is_empty())
        && !text.ends_with('/')
        && !text.ends_with(default_port)
        && uri.path() == "/"
        && uri.query().is_none()
        && !text.contains(['@', '*'])
        && text == text.to_ascii_lowercase();
    if is_exact { Ok(text) } else { expected(what) }
}

pub(super) fn names(value: &SettingValue) -> Parsed<BTreeSet<String>> {
    Ok(list(value)?.into_iter().collect())
}
