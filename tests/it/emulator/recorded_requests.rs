//! Sends captured requests of the real SDKs and the CLI, from `shared/wire` beside the checkout, to the emulator and
//! checks the shape of the responses.
//!
//! A capture contains the client's result, not the response. Where the client returns the response unchanged
//! (`getTokenResponse`, `startAuthorization`, the CLI's `--json`), the emulator's response must have the same keys and
//! types; this then applies to all captures of the route. Revocations are sent last, since they remove grants.

use std::collections::BTreeMap;
use std::path::Path;

use connect_sidecar::emulator::world::DEVELOPMENT_LIFE;
use connect_sidecar::emulator::{Emulator, Options, seed};
use serde_json::{Value, json};

use super::request;

/// The directory of the captures.
const CAPTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/wire");

/// Everything that the captures refer to, by its name there.
const SEED: &str = r#"
[team]
id = "team_x"
slug = "acme"
[[members]]
id = "user_1"
[[projects]]
id = "prj_x"
name = "demo"
[[sessions]]
token = "tok_cli"
user = "user_1"
"#;

/// The connectors in the captures, with the users who have consented.
const CONNECTORS: [(&str, &str, &str); 8] = [
    ("scl_1", "slack/acme", "user_1"),
    ("scl_2", "slack/acme-slack", ""),
    ("scl_3", "github/acme", ""),
    ("scl_4", "github/acme-github", ""),
    ("scl_5", "oauth/linear", "user_123"),
    ("scl_6", "snowflake/dw", ""),
    ("scl_7", "mcp.linear.app/a b%2F?é", ""),
    ("scl_8", "needs-auth", ""),
];
/// Their installations.
const INSTALLATIONS: [&str; 6] = ["inst_1", "inst_abc", "other", "r1", "r2", "r3"];

/// Requests without a connector, which the server of the captures accepted and the emulator refuses.
const NAMELESS: &str = "/v1/connect/token/";

/// A captured request and the expected response.
#[derive(Debug)]
struct Capture {
    file: String,
    bearer: &'static str,
    method: String,
    target: String,
    body: String,
    refused: bool,
}

impl Capture {
    fn read(file: &str, request: &Value) -> Self {
        let text = |key: &str| request[key].as_str().unwrap_or_default().to_owned();
        let url = text("url");
        let target = match url.split_once("://") {
            // A region can contain a path, which moves `/v1/` to the right.
            Some((_, rest)) => rest[rest.find("/v1/").expect("a path")..].to_owned(),
            None => url,
        };
        let refused = target == NAMELESS;
        Self { file: file.into(), bearer: "", method: text("method"), target, body: text("body"), refused }
    }

    /// Method and path, without names.
    fn route(&self) -> String {
        let path = self.target.split('?').next().unwrap_or_default();
        let segments = path.split('/').enumerate().map(|(n, segment)| if n == 4 { "*" } else { segment });
        format!("{} {}", self.method, segments.collect::<Vec<_>>().join("/"))
    }
}

/// The captures, and the results of the clients by route.
#[derive(Debug, Default)]
struct Captures {
    all: Vec<Capture>,
    shapes: BTreeMap<String, Vec<Value>>,
}

impl Captures {
    /// `None` if there are no captures, with a note on stderr.
    fn read() -> Option<Self> {
        if !Path::new(CAPTURES).is_dir() {
            crate::support::skipped(format_args!("there is no {CAPTURES}"));
            return None;
        }
        let mut captures = Self::default();
        let entries = std::fs::read_dir(CAPTURES).expect("a directory").map(|entry| entry.expect("an entry").path());
        let mut paths: Vec<_> = entries.collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            let is_ours = name.starts_with("js-") || name.starts_with("py-") || name == "cli-requests.json";
            if is_ours && name.ends_with(".json") {
                let text = std::fs::read_to_string(&path).expect("a capture");
                captures.add(&name, &serde_json::from_str(&text).expect("JSON"));
            }
        }
        captures.all.sort_by_key(|capture| capture.method == "DELETE");
        Some(captures)
    }

    fn add(&mut self, file: &str, capture: &Value) {
        if let Some(captures) = capture.as_array() {
            // Skips CONNECT requests to a proxy, and results of errors.
            captures.iter().filter(|c| c["method"].is_string()).for_each(|c| self.all.push(Capture::read(file, c)));
            captures.iter().filter(|c| c["requests"].is_array()).for_each(|c| self.add(file, c));
            return;
        }
        let requests = capture["requests"].as_array().into_iter().flatten();
        let mut read: Vec<_> = requests.map(|request| Capture::read(file, request)).collect();
        let Some(last) = read.last_mut() else { return };
        // If a command failed, the last request caused it.
        last.refused |= capture["exit"].as_u64().is_some_and(|code| code != 0);
        let printed = capture["stdout"].as_str().and_then(|text| serde_json::from_str(text).ok());
        let mut made = printed.unwrap_or(capture["result"].clone());
        if let Some(made) = made.as_object_mut().filter(|_| !last.refused) {
            // The SDK's name for `data`, which is optional in a response.
            made.remove("vendor");
            self.shapes.entry(last.route()).or_default().push(json!(made));
        }
        if file.starts_with("cli") {
            read.iter_mut().for_each(|capture| capture.bearer = "tok_cli");
        }
        self.all.append(&mut read);
    }
}

async fn emulator() -> Emulator {
    let installations = INSTALLATIONS.map(|id| format!("{{ id = \"{id}\", tenant = \"acme\" }}")).join(", ");
    let connectors = CONNECTORS.map(|(id, uid, user)| {
        format!(
            "[[connectors]]\nid = \"{id}\"\nuid = \"{uid}\"\ngranted_to = [\"{user}\"]\ninstallations = [{installations}]\n\
             links = [{{ project = \"demo\", environments = [\"development\"] }}]\n"
        )
    });
    let world = seed::read(&format!("{SEED}{}", connectors.concat())).unwrap_or_else(|e| panic!("{e}"));
    Emulator::start(Options { world, ..Options::default() }).await.expect("an emulator")
}

/// Checks that a response has the expected keys, with values of the same types.
fn assert_has(answer: &Value, due: &Value, what: &str) {
    if let Value::Object(due) = due {
        for (key, due) in due {
            assert_has(answer.get(key).unwrap_or_else(|| panic!("{what}: no {key} in {answer}")), due, what);
        }
    }
    let is_same = std::mem::discriminant(answer) == std::mem::discriminant(due);
    assert!(is_same, "{what}: {answer}, where {due} was");
}

#[tokio::test]
async fn captured_requests_get_responses_of_the_captured_shape() {
    let Some(captures) = Captures::read() else { return };
    let emulator = emulator().await;
    let oidc = emulator.oidc_token(DEVELOPMENT_LIFE);
    let mut shaped = 0;
    for capture in &captures.all {
        let Capture { file, bearer, method, target, body, refused } = capture;
        let bearer = if bearer.is_empty() { &oidc } else { *bearer };
        let request = request(&emulator, bearer, method, target);
        let reply = if body.is_empty() { request } else { request.json(body) }.send().await;
        let what = format!("{file}: {method} {target} {body}: {} {}", reply.status, reply.text());
        if *refused {
            assert!((400..500).contains(&reply.status), "{what}");
            assert_has(&reply.json(), &json!({"error": {"code": "", "message": ""}}), &what);
            continue;
        }
        assert!((200..300).contains(&reply.status), "{what}");
        for due in captures.shapes.get(&capture.route()).into_iter().flatten() {
            assert_has(&reply.json(), due, &what);
            shaped += 1;
        }
    }
    assert!(captures.all.len() >= 50 && shaped >= 50, "{} captures, {shaped} shapes", captures.all.len());
}
