//! What the command finds in its environment. Pure: from ours and from what the sidecar answered, to the variables that
//! differ.
//!
//! Whatever the user has set is kept beside ours, but for what would lead past the sidecar, and to do it again, as in a
//! `run` within a `run`, changes nothing. The real token is among the variables only where that was asked for.

use std::ffi::OsString;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use crate::os::env_proxy::{self, EXCEPTIONS, Exception, FOR_THE_REST};
use crate::proxy::hosts::{BearerHost, HTTPS_PORT, Hosts};

/// The preload's file name, by which it is found again among other options.
pub const PRELOAD_FILE: &str = "connect-sidecar-preload.cjs";
/// Variables that name a file of certificates which takes the place of the system's: each gets the bundle.
pub const BUNDLE_VARIABLES: [&str; 5] =
    ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "DENO_CERT"];
/// How the preload is loaded: a path or a URL follows, and a quote.
const REQUIRE: &[u8] = b"--require \"";
const IMPORT: &[u8] = b"--import \"";
/// Names a file of certificates that Node.js trusts besides its own.
pub const NODE_EXTRA_CERTIFICATES: &str = "NODE_EXTRA_CA_CERTS";
/// Hosts that are never asked through a proxy.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Looks a variable up in our own environment.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;
/// A variable and its value; `None`: it is taken away.
pub type Variable = (&'static str, Option<OsString>);

/// What the command is to be given.
pub struct Given<'a> {
    /// The sidecar.
    pub url: &'a str,
    /// The key of runs, where every request needs one.
    pub key: Option<&'a str>,
    /// The stand-in for the OIDC token; the token itself only where that was asked for.
    pub oidc_token: &'a str,
    /// Hosts that take the token as a bearer.
    pub bearer_hosts: &'a [String],
    /// The preload's file.
    pub preload: &'a Path,
    /// The way to intercept, if it is to be intercepted.
    pub interception: Option<Interception<'a>>,
    /// Whether the credential is `VERCEL_TOKEN`, which is then to stay with us.
    pub hides_access_token: bool,
}

/// How requests of programs other than Node.js are intercepted.
pub struct Interception<'a> {
    /// The proxy, with the run's secret.
    pub proxy: &'a str,
    /// The system's certificates and ours.
    pub bundle: &'a Path,
    /// Ours, and what the user has Node.js trust.
    pub node_certificates: &'a Path,
}

/// The variables of the command that differ from ours.
pub fn variables(environment: Lookup<'_>, given: &Given<'_>) -> Vec<Variable> {
    let set = |name, value: &str| (name, Some(OsString::from(value)));
    let mut variables = vec![
        set("CONNECT_SIDECAR_URL", given.url),
        set("CONNECT_SIDECAR_BEARER_HOSTS", &given.bearer_hosts.join(",")),
        set("VERCEL_OIDC_TOKEN", given.oidc_token),
        ("CONNECT_SIDECAR_KEY", given.key.map(OsString::from)),
        ("NODE_OPTIONS", Some(node_options(environment("NODE_OPTIONS"), given.preload))),
    ];
    let taken_out = if given.interception.is_some() { taken_out(environment, given.bearer_hosts) } else { Vec::new() };
    // A proxy of the user's, too, is nowhere to send what is for this machine, least of all with a key.
    let no_proxy = no_proxy(&env_proxy::exceptions(environment), &taken_out);
    variables.extend(EXCEPTIONS.map(|name| set(name, &no_proxy)));
    if taken_out.iter().any(|entry| Exception::parse(entry) == Some(Exception::All)) {
        // They were without effect, and stay so.
        let without_effect = FOR_THE_REST.into_iter().filter(|name| environment(name).is_some());
        variables.extend(without_effect.map(|name| (name, None)));
    }
    if given.hides_access_token {
        variables.push(("VERCEL_TOKEN", None));
    }
    if let Some(Interception { proxy, bundle, node_certificates }) = &given.interception {
        variables.extend(["HTTPS_PROXY", "https_proxy"].map(|name| set(name, proxy)));
        variables.extend(BUNDLE_VARIABLES.map(|name| (name, Some(bundle.as_os_str().to_owned()))));
        variables.push((NODE_EXTRA_CERTIFICATES, Some(node_certificates.as_os_str().to_owned())));
    }
    variables
}

/// The preload, before what the user has there. Next.js up to 15 writes these options anew, and of one that is there twice
/// makes a broken one: beside a `--require` of the user's, such as a debugger's, ours is an `--import`, unless the user has
/// one of those, too. It is only the second best: workers whose code is a string load no `--import`.
fn node_options(users: Option<OsString>, preload: &Path) -> OsString {
    let users = without_preload(users.unwrap_or_default().into_encoded_bytes());
    let names = |option: &[&str]| {
        let mut words = users.split(u8::is_ascii_whitespace);
        words.any(|word| {
            option.iter().any(|o| word.strip_prefix(o.as_bytes()).is_some_and(|v| v.is_empty() || v[0] == b'='))
        })
    };
    let file = preload.as_os_str().as_encoded_bytes();
    // The URL of a file with a backslash in its path is none to Node.js.
    let mut options = match names(&["--require", "-r"]) && !names(&["--import"]) && !file.contains(&b'\\') {
        true => [IMPORT, &file_url(file), b"\""].concat(),
        false => [REQUIRE, &escaped(file), b"\""].concat(),
    };
    if !users.is_empty() {
        options.push(b' ');
        options.extend(users);
    }
    os_string(options)
}

/// As Node.js reads an option in double quotes: a backslash stands before what is meant as it is.
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

/// The URL of a file.
fn file_url(path: &[u8]) -> Vec<u8> {
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    format!("file://{}", percent_encode(path, ENCODED)).into_bytes()
}

/// The options without the preload of another `run`.
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

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// The entries of the user's `NO_PROXY` that would lead requests past the sidecar, which opens Vercel's hosts.
pub fn taken_out(environment: Lookup<'_>, bearer_hosts: &[String]) -> Vec<String> {
    let hosts = Hosts::new(bearer_hosts.iter().filter_map(|host| BearerHost::parse(host)).collect());
    let leads_past = |entry: &&str| match Exception::parse(entry) {
        Some(Exception::All) => true,
        Some(Exception::Name(name, port)) => port.is_none_or(|port| port == HTTPS_PORT) && hosts.any_ends_in(&name),
        Some(Exception::Network(..)) | None => false,
    };
    let mut taken_out = Vec::new();
    for entry in env_proxy::entries(&env_proxy::exceptions(environment)).filter(leads_past) {
        if !taken_out.iter().any(|known| known == entry) {
            taken_out.push(entry.to_owned());
        }
    }
    taken_out
}

/// The user's list without these, and loopback.
fn no_proxy(users: &str, taken_out: &[String]) -> String {
    let mut hosts: Vec<&str> = Vec::new();
    let stays = |entry: &&str| !taken_out.iter().any(|taken| taken == entry);
    for host in env_proxy::entries(users).filter(stays).chain(LOOPBACK) {
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

    fn given<'a>(hosts: &'a [String], preload: &'a Path) -> Given<'a> {
        Given {
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
            hides_access_token: false,
        }
    }

    /// The command's environment, from ours.
    fn environment_of(
        ours: &[(&str, &str)],
        preload: &str,
        change: impl FnOnce(&mut Given<'_>),
    ) -> BTreeMap<String, String> {
        let hosts = HOSTS.map(String::from);
        let mut given = given(&hosts, Path::new(preload));
        change(&mut given);
        let mut all: BTreeMap<String, String> = ours.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        let before = all.clone();
        for (name, value) in variables(&|name| before.get(name).map(OsString::from), &given) {
            match value {
                Some(value) => all.insert(name.into(), value.into_string().expect("UTF-8")),
                None => all.remove(name),
            };
        }
        all
    }

    #[test]
    fn the_command_finds_the_sidecar_and_no_credential() {
        let ours = [("PATH", "/bin"), ("VERCEL_OIDC_TOKEN", "the real one"), ("CONNECT_SIDECAR_KEY", "another's")];
        let theirs = environment_of(&ours, "/run/connect-sidecar-preload.cjs", |_| {});
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
            assert_eq!(theirs.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!theirs.contains_key("CONNECT_SIDECAR_KEY") && !theirs.contains_key("NODE_USE_ENV_PROXY"));
        assert_eq!(theirs.len(), 15, "{theirs:#?}");
    }

    #[test]
    fn without_interception_proxies_and_certificates_are_the_users_own() {
        let ours = [("HTTPS_PROXY", "http://corp:3128"), ("NO_PROXY", "a"), ("SSL_CERT_FILE", "/corp.pem")];
        let theirs = environment_of(&ours, "/p.cjs", |given| given.interception = None);
        assert_eq!((&*theirs["HTTPS_PROXY"], &*theirs["SSL_CERT_FILE"]), ("http://corp:3128", "/corp.pem"));
        // But the sidecar is not asked through a proxy.
        assert_eq!(
            (&*theirs["NO_PROXY"], &*theirs["no_proxy"]),
            ("a,localhost,127.0.0.1,::1", "a,localhost,127.0.0.1,::1")
        );
        assert_eq!(theirs.len(), ours.len() + 5, "{theirs:#?}");
    }

    #[test]
    fn the_key_is_there_only_where_it_is_needed_and_the_access_token_only_where_it_is_no_secret_of_ours() {
        let ours = [("VERCEL_TOKEN", "vcp_x")];
        let theirs = environment_of(&ours, "/p.cjs", |given| given.key = Some("k"));
        assert_eq!((&*theirs["CONNECT_SIDECAR_KEY"], &*theirs["VERCEL_TOKEN"]), ("k", "vcp_x"));
        let theirs = environment_of(&ours, "/p.cjs", |given| given.hides_access_token = true);
        assert!(!theirs.contains_key("VERCEL_TOKEN"));
    }

    #[test]
    fn the_preload_comes_before_what_the_user_has_and_only_once() {
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
            // Not ours: another file's name, however alike.
            (format!("--require \"/my-{PRELOAD_FILE}\""), &import, " --require \"/my-connect-sidecar-preload.cjs\""),
        ] {
            let options = node_options(Some(users.clone().into()), Path::new(&path("/my \"run\" dé")));
            assert_eq!(options, OsStr::new(&format!("{ours}{rest}")), "{users}");
        }
        let backslash = node_options(Some("-r /a".into()), Path::new(&path("/a\\b")));
        assert_eq!(backslash, OsStr::new(&format!("--require \"/a\\\\b/{PRELOAD_FILE}\" -r /a")));
    }

    #[test]
    fn a_run_in_a_run_changes_nothing() {
        for options in ["--inspect", "--require /a"] {
            let ours = [("NODE_OPTIONS", options), ("no_proxy", "corp.example, 127.0.0.1"), ("NO_PROXY", ".intern")];
            let preload = format!("/run/{PRELOAD_FILE}");
            let once = environment_of(&ours, &preload, |_| {});
            assert_eq!(once["no_proxy"], ".intern,corp.example,127.0.0.1,localhost,::1");
            assert_eq!(once["NO_PROXY"], once["no_proxy"]);
            let again: Vec<_> = once.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            assert_eq!(environment_of(&again, &preload, |_| {}), once);
        }
    }

    #[test]
    fn what_would_lead_past_the_sidecar_is_taken_out_and_the_rest_stays() {
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
            // requests compares ends, and not labels.
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
                let theirs = environment_of(&[(variable, users)], "/p", |_| {});
                for name in EXCEPTIONS {
                    assert_eq!(theirs[name], format!("{rest}localhost,127.0.0.1,::1"), "{variable}={users}");
                }
                let theirs = environment_of(&[(variable, users)], "/p", |given| given.interception = None);
                let kept = users.split([',', ' ', '\t']).all(|entry| theirs["NO_PROXY"].contains(entry));
                assert!(kept, "without interception {users} stays: {}", theirs["NO_PROXY"]);
            }
        }
        let listed = ["*.vercel-queue.com".to_owned(), "vercel.com/api/blob".to_owned()];
        for (users, is_taken) in [
            ("vercel-queue.com", true),
            ("iad1.vercel-queue.com", true),
            ("a.b.vercel-queue.com", false),
            ("ai-gateway.vercel.sh", false),
        ] {
            let taken = taken_out(&|name| (name == "no_proxy").then(|| users.into()), &listed);
            assert_eq!(!taken.is_empty(), is_taken, "{users}");
        }
    }

    #[test]
    fn what_had_no_effect_for_all_hosts_gets_none() {
        let ours = [("HTTP_PROXY", "http://corp:1"), ("all_proxy", "socks5://corp:2"), ("ALL_PROXY", "")];
        for (users, stay) in [("*", false), ("corp.test,*", false), ("vercel.com", true), ("corp.test", true)] {
            let theirs = environment_of(&[&ours[..], &[("NO_PROXY", users)]].concat(), "/p", |_| {});
            for (name, _) in ours {
                assert_eq!(theirs.contains_key(name), stay, "{users} {name}");
            }
        }
    }

    #[test]
    fn options_that_are_not_utf_8_stay_as_they_are() {
        let users = os_string(b"--title=\xff".to_vec());
        let options = node_options(Some(users), Path::new("/p"));
        assert_eq!(options, os_string(b"--require \"/p\" --title=\xff".to_vec()));
    }
}
