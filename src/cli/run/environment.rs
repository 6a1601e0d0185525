//! Computes the environment variables of the command that `run` starts. Pure.
//!
//! The user's own values are kept next to the added ones, except those that would bypass the sidecar. A `run` inside a
//! `run` changes nothing. The real token is included only on request.

use std::ffi::OsString;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use crate::config::EnvLookup;
use crate::os::env_proxy::{self, EXCEPTIONS, Exception, FOR_THE_REST};
use crate::proxy::hosts::{BearerHost, HTTPS_PORT, Hosts};

/// The preload's file name, which identifies its option in `NODE_OPTIONS`.
pub const PRELOAD_FILE: &str = "connect-sidecar-preload.cjs";
/// Variables that name a file with certificates to use instead of the system's. Each is set to the bundle.
pub const BUNDLE_VARIABLES: [&str; 5] =
    ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "DENO_CERT"];
/// The options that load the preload; a path or URL and a quote follow.
const REQUIRE: &[u8] = b"--require \"";
const IMPORT: &[u8] = b"--import \"";
/// Names a file with certificates that Node.js trusts in addition to its own.
pub const NODE_EXTRA_CERTIFICATES: &str = "NODE_EXTRA_CA_CERTS";
/// Hosts that are never reached through a proxy.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// A variable and its value; `None` if it is removed.
pub type Variable = (&'static str, Option<OsString>);

/// The values that a run passes to its command.
pub struct RunVariables<'a> {
    /// The sidecar's URL.
    pub url: &'a str,
    /// The key for requests, if they need one.
    pub key: Option<&'a str>,
    /// The placeholder for the OIDC token, or on request the token itself.
    pub oidc_token: &'a str,
    /// The hosts for which the sidecar replaces the placeholder with the real token.
    pub bearer_hosts: &'a [String],
    /// The path of the preload.
    pub preload: &'a Path,
    /// How the command's requests are intercepted, if they are.
    pub interception: Option<Interception<'a>>,
    /// Whether to remove `VERCEL_TOKEN`, because it is the sidecar's credential.
    pub remove_access_token: bool,
}

/// How requests of programs other than Node.js are intercepted.
pub struct Interception<'a> {
    /// The proxy's URL, with the run's secret.
    pub proxy: &'a str,
    /// A file with the system's, the user's and the local CA's certificates.
    pub bundle: &'a Path,
    /// A file with the local CA's certificate and those of the user's `NODE_EXTRA_CA_CERTS`.
    pub node_certificates: &'a Path,
}

/// The variables of the command that differ from this process's environment.
pub fn variables(environment: EnvLookup<'_>, run: &RunVariables<'_>) -> Vec<Variable> {
    let set = |name, value: &str| (name, Some(OsString::from(value)));
    let mut variables = vec![
        set("CONNECT_SIDECAR_URL", run.url),
        set("CONNECT_SIDECAR_BEARER_HOSTS", &run.bearer_hosts.join(",")),
        set("VERCEL_OIDC_TOKEN", run.oidc_token),
        ("CONNECT_SIDECAR_KEY", run.key.map(OsString::from)),
        ("NODE_OPTIONS", Some(node_options(environment("NODE_OPTIONS"), run.preload))),
    ];
    let removed = match run.interception {
        Some(_) => removed_exceptions(environment, run.bearer_hosts),
        None => Vec::new(),
    };
    // Loopback is always excepted: a request to the sidecar, which may carry a key, must not go through the user's
    // proxy.
    let no_proxy = no_proxy(&env_proxy::exceptions(environment), &removed);
    variables.extend(EXCEPTIONS.map(|name| set(name, &no_proxy)));
    if removed.iter().any(|entry| Exception::parse(entry) == Some(Exception::All)) {
        // With `*`, the user's proxy variables had no effect. They must not get one now.
        let without_effect = FOR_THE_REST.into_iter().filter(|name| environment(name).is_some());
        variables.extend(without_effect.map(|name| (name, None)));
    }
    if run.remove_access_token {
        variables.push(("VERCEL_TOKEN", None));
    }
    if let Some(Interception { proxy, bundle, node_certificates }) = &run.interception {
        variables.extend(["HTTPS_PROXY", "https_proxy"].map(|name| set(name, proxy)));
        variables.extend(BUNDLE_VARIABLES.map(|name| (name, Some(bundle.as_os_str().to_owned()))));
        variables.push((NODE_EXTRA_CERTIFICATES, Some(node_certificates.as_os_str().to_owned())));
    }
    variables
}

/// The user's options with the preload in front. Next.js up to 15 rewrites these options and breaks an option that
/// occurs twice. So next to a `--require` of the user's, such as a debugger's, the preload is an `--import`, unless the
/// user has one of those too. `--require` is preferred because workers whose code is a string ignore `--import`.
fn node_options(user_options: Option<OsString>, preload: &Path) -> OsString {
    let user_options = without_preload(user_options.unwrap_or_default().into_encoded_bytes());
    let has = |option: &[&str]| {
        let mut words = user_options.split(u8::is_ascii_whitespace);
        words.any(|word| {
            option.iter().any(|o| word.strip_prefix(o.as_bytes()).is_some_and(|v| v.is_empty() || v[0] == b'='))
        })
    };
    let file = preload.as_os_str().as_encoded_bytes();
    // Node.js does not accept the URL of a file with a backslash in its path.
    let mut options = match has(&["--require", "-r"]) && !has(&["--import"]) && !file.contains(&b'\\') {
        true => [IMPORT, &file_url(file), b"\""].concat(),
        false => [REQUIRE, &escaped(file), b"\""].concat(),
    };
    if !user_options.is_empty() {
        options.push(b' ');
        options.extend(user_options);
    }
    os_string(options)
}

/// Escapes a value for an option of Node.js in double quotes.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::new();
    for byte in bytes {
        if matches!(byte, b'"' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    escaped
}

/// The `file:` URL of a path.
fn file_url(path: &[u8]) -> Vec<u8> {
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    format!("file://{}", percent_encode(path, ENCODED)).into_bytes()
}

/// Removes the preload of an outer `run` from the options.
fn without_preload(mut options: Vec<u8>) -> Vec<u8> {
    let end = format!("/{PRELOAD_FILE}\"").into_bytes();
    while let Some(end_at) = find(&options, &end) {
        let begins =
            [REQUIRE, IMPORT].map(|begin| options[..end_at].windows(begin.len()).rposition(|window| window == begin));
        let Some(begin_at) = begins.into_iter().max().flatten() else { break };
        options.drain(begin_at..end_at + end.len());
    }
    options.trim_ascii().to_vec()
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

/// The entries of the user's `NO_PROXY` that match intercepted hosts. They would make requests bypass the sidecar.
pub fn removed_exceptions(environment: EnvLookup<'_>, bearer_hosts: &[String]) -> Vec<String> {
    let hosts = Hosts::new(bearer_hosts.iter().filter_map(|host| BearerHost::parse(host)).collect());
    let bypasses = |entry: &&str| match Exception::parse(entry) {
        Some(Exception::All) => true,
        Some(Exception::Name(name, port)) => port.is_none_or(|port| port == HTTPS_PORT) && hosts.any_ends_in(&name),
        Some(Exception::Network(..)) | None => false,
    };
    let mut removed = Vec::new();
    for entry in env_proxy::entries(&env_proxy::exceptions(environment)).filter(bypasses) {
        if !removed.iter().any(|known| known == entry) {
            removed.push(entry.to_owned());
        }
    }
    removed
}

/// The user's list without the removed entries, plus loopback.
fn no_proxy(user_list: &str, removed: &[String]) -> String {
    let mut hosts: Vec<&str> = Vec::new();
    let stays = |entry: &&str| !removed.iter().any(|removed| removed == entry);
    for host in env_proxy::entries(user_list).filter(stays).chain(LOOPBACK) {
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts.join(",")
}

fn os_string(bytes: Vec<u8>) -> OsString {
    use std::os::unix::ffi::OsStringExt;
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::ffi::OsStr;

    const HOSTS: [&str; 1] = ["ai-gateway.vercel.sh"];

    fn run_variables<'a>(hosts: &'a [String], preload: &'a Path) -> RunVariables<'a> {
        RunVariables {
            url: "http://127.0.0.1:2774",
            key: None,
            oidc_token: "e30.e30.placeholder",
            bearer_hosts: hosts,
            preload,
            interception: Some(Interception {
                proxy: "http://run:secret@127.0.0.1:9",
                bundle: Path::new("/run/bundle.pem"),
                node_certificates: Path::new("/run/node.pem"),
            }),
            remove_access_token: false,
        }
    }

    /// The command's environment, given the environment of `run`.
    fn environment_of(
        before: &[(&str, &str)],
        preload: &str,
        change: impl FnOnce(&mut RunVariables<'_>),
    ) -> BTreeMap<String, String> {
        let hosts = HOSTS.map(String::from);
        let mut run = run_variables(&hosts, Path::new(preload));
        change(&mut run);
        let mut all: BTreeMap<String, String> = before.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        let before = all.clone();
        for (name, value) in variables(&|name| before.get(name).map(OsString::from), &run) {
            match value {
                Some(value) => all.insert(name.into(), value.into_string().expect("UTF-8")),
                None => all.remove(name),
            };
        }
        all
    }

    #[test]
    fn the_command_gets_the_sidecars_variables_and_no_credential() {
        let outer = [("PATH", "/bin"), ("VERCEL_OIDC_TOKEN", "the real one"), ("CONNECT_SIDECAR_KEY", "another's")];
        let inner = environment_of(&outer, "/run/connect-sidecar-preload.cjs", |_| {});
        for (name, value) in [
            ("PATH", "/bin"),
            ("CONNECT_SIDECAR_URL", "http://127.0.0.1:2774"),
            ("CONNECT_SIDECAR_BEARER_HOSTS", "ai-gateway.vercel.sh"),
            ("VERCEL_OIDC_TOKEN", "e30.e30.placeholder"),
            ("NODE_OPTIONS", "--require \"/run/connect-sidecar-preload.cjs\""),
            ("HTTPS_PROXY", "http://run:secret@127.0.0.1:9"),
            ("https_proxy", "http://run:secret@127.0.0.1:9"),
            ("NO_PROXY", "localhost,127.0.0.1,::1"),
            ("no_proxy", "localhost,127.0.0.1,::1"),
            ("SSL_CERT_FILE", "/run/bundle.pem"),
            ("REQUESTS_CA_BUNDLE", "/run/bundle.pem"),
            ("CURL_CA_BUNDLE", "/run/bundle.pem"),
            ("GIT_SSL_CAINFO", "/run/bundle.pem"),
            ("DENO_CERT", "/run/bundle.pem"),
            ("NODE_EXTRA_CA_CERTS", "/run/node.pem"),
        ] {
            assert_eq!(inner.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!inner.contains_key("CONNECT_SIDECAR_KEY") && !inner.contains_key("NODE_USE_ENV_PROXY"));
        assert_eq!(inner.len(), 15, "{inner:#?}");
    }

    #[test]
    fn without_interception_proxies_and_certificates_stay_the_users() {
        let outer = [("HTTPS_PROXY", "http://corp:3128"), ("NO_PROXY", "a"), ("SSL_CERT_FILE", "/corp.pem")];
        let inner = environment_of(&outer, "/p.cjs", |run| run.interception = None);
        assert_eq!((&*inner["HTTPS_PROXY"], &*inner["SSL_CERT_FILE"]), ("http://corp:3128", "/corp.pem"));
        // Requests to the sidecar still do not go through a proxy.
        assert_eq!(
            (&*inner["NO_PROXY"], &*inner["no_proxy"]),
            ("a,localhost,127.0.0.1,::1", "a,localhost,127.0.0.1,::1")
        );
        assert_eq!(inner.len(), outer.len() + 5, "{inner:#?}");
    }

    #[test]
    fn the_key_is_set_only_if_needed_and_the_access_token_is_removed_if_it_is_the_credential() {
        let outer = [("VERCEL_TOKEN", "vcp_x")];
        let inner = environment_of(&outer, "/p.cjs", |run| run.key = Some("k"));
        assert_eq!((&*inner["CONNECT_SIDECAR_KEY"], &*inner["VERCEL_TOKEN"]), ("k", "vcp_x"));
        let inner = environment_of(&outer, "/p.cjs", |run| run.remove_access_token = true);
        assert!(!inner.contains_key("VERCEL_TOKEN"));
    }

    #[test]
    fn the_preload_comes_before_the_users_options_and_only_once() {
        let path = |dir: &str| format!("{dir}/{PRELOAD_FILE}");
        let outer = format!("--require \"{}\"", path("/outer run"));
        let outer_import = format!("--import \"file://{}\"", path("/outer%20run"));
        let require = format!("--require \"/my \\\"run\\\" dé/{PRELOAD_FILE}\"");
        let import = format!("--import \"file:///my%20%22run%22%20d%C3%A9/{PRELOAD_FILE}\"");
        for (users, ours, rest) in [
            (String::new(), &require, ""),
            ("--max-old-space-size=4096".into(), &require, " --max-old-space-size=4096"),
            (outer.clone(), &require, ""),
            (outer_import.clone(), &require, ""),
            (format!("{outer} --inspect --require \"/a b/my.cjs\""), &import, " --inspect --require \"/a b/my.cjs\""),
            (format!("--inspect --require \"/a/my.cjs\" {outer}"), &import, " --inspect --require \"/a/my.cjs\""),
            (format!("{outer_import} -r /a/my.cjs"), &import, " -r /a/my.cjs"),
            ("--require=/a/my.cjs".into(), &import, " --require=/a/my.cjs"),
            ("-r /a --import /b".into(), &require, " -r /a --import /b"),
            ("--import=/b -r /a".into(), &require, " --import=/b -r /a"),
            ("--import /b".into(), &require, " --import /b"),
            ("--require-module -rx".into(), &require, " --require-module -rx"),
            (format!("--require \"/a\" {outer} --x {outer}"), &import, " --require \"/a\"  --x"),
            // Another file with a similar name.
            (format!("--require \"/my-{PRELOAD_FILE}\""), &import, " --require \"/my-connect-sidecar-preload.cjs\""),
        ] {
            let options = node_options(Some(users.clone().into()), Path::new(&path("/my \"run\" dé")));
            assert_eq!(options, OsStr::new(&format!("{ours}{rest}")), "{users}");
        }
        let backslash = node_options(Some("-r /a".into()), Path::new(&path("/a\\b")));
        assert_eq!(backslash, OsStr::new(&format!("--require \"/a\\\\b/{PRELOAD_FILE}\" -r /a")));
    }

    #[test]
    fn a_run_inside_a_run_changes_nothing() {
        for options in ["--inspect", "--require /a"] {
            let outer = [("NODE_OPTIONS", options), ("no_proxy", "corp.example, 127.0.0.1"), ("NO_PROXY", ".intern")];
            let preload = format!("/run/{PRELOAD_FILE}");
            let once = environment_of(&outer, &preload, |_| {});
            assert_eq!(once["no_proxy"], ".intern,corp.example,127.0.0.1,localhost,::1");
            assert_eq!(once["NO_PROXY"], once["no_proxy"]);
            let again: Vec<_> = once.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            assert_eq!(environment_of(&again, &preload, |_| {}), once);
        }
    }

    #[test]
    fn no_proxy_entries_that_bypass_the_sidecar_are_removed() {
        for (users, rest) in [
            (".vercel.com", ""),
            ("vercel.com", ""),
            ("api.vercel.com", ""),
            ("API.Vercel.com.", ""),
            ("*.vercel.com", ""),
            ("*vercel.com", ""),
            ("api.vercel.com:443", ""),
            ("https://api.vercel.com", ""),
            ("api-iad1.vercel.com", ""),
            ("com,.com", ""),
            // Python's requests compares suffixes, not labels.
            ("el.com", ""),
            ("*", ""),
            ("corp.test, * ,10.0.0.0/8", "corp.test,10.0.0.0/8,"),
            ("corp.test .vercel.com\t10.0.0.1", "corp.test,10.0.0.1,"),
            ("ai-gateway.vercel.sh,vercel.sh,.sh", ""),
            // Not among this sidecar's bearer hosts.
            ("iad1.vercel-queue.com,vercel-queue.com", "iad1.vercel-queue.com,vercel-queue.com,"),
            ("api.vercel.com:8443", "api.vercel.com:8443,"),
            ("www.vercel.com,docs.vercel.sh", "www.vercel.com,docs.vercel.sh,"),
            ("x.api.vercel.com,myvercel.com,vercel.com.test", "x.api.vercel.com,myvercel.com,vercel.com.test,"),
            ("0.0.0.0/0,::/0,.,api.*.com", "0.0.0.0/0,::/0,.,api.*.com,"),
        ] {
            for variable in EXCEPTIONS {
                let inner = environment_of(&[(variable, users)], "/p", |_| {});
                for name in EXCEPTIONS {
                    assert_eq!(inner[name], format!("{rest}localhost,127.0.0.1,::1"), "{variable}={users}");
                }
                let inner = environment_of(&[(variable, users)], "/p", |run| run.interception = None);
                let kept = users.split([',', ' ', '\t']).all(|entry| inner["NO_PROXY"].contains(entry));
                assert!(kept, "without interception {users} stays: {}", inner["NO_PROXY"]);
            }
        }
        let listed = ["*.vercel-queue.com".to_owned(), "vercel.com/api/blob".to_owned()];
        for (users, is_removed) in [
            ("vercel-queue.com", true),
            ("iad1.vercel-queue.com", true),
            ("a.b.vercel-queue.com", false),
            ("ai-gateway.vercel.sh", false),
        ] {
            let removed = removed_exceptions(&|name| (name == "no_proxy").then(|| users.into()), &listed);
            assert_eq!(!removed.is_empty(), is_removed, "{users}");
        }
    }

    #[test]
    fn proxy_variables_without_effect_are_removed() {
        let outer = [("HTTP_PROXY", "http://corp:1"), ("all_proxy", "socks5://corp:2"), ("ALL_PROXY", "")];
        for (users, stay) in [("*", false), ("corp.test,*", false), ("vercel.com", true), ("corp.test", true)] {
            let inner = environment_of(&[&outer[..], &[("NO_PROXY", users)]].concat(), "/p", |_| {});
            for (name, _) in outer {
                assert_eq!(inner.contains_key(name), stay, "{users} {name}");
            }
        }
    }

    #[test]
    fn options_that_are_not_utf8_are_kept() {
        let users = os_string(b"--title=\xff".to_vec());
        let options = node_options(Some(users), Path::new("/p"));
        assert_eq!(options, os_string(b"--require \"/p\" --title=\xff".to_vec()));
    }
}
