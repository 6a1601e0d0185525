//! The body of a token request and its cache key. A wrong key gives one subject another's token.

use connect_sidecar::credential::{Credential, Principal};
use connect_sidecar::proxy::key::{self, BadJson, Subject, TokenRequest};
use serde_json::Value;

fn principal(name: &str) -> Principal {
    Credential::access_token(name.to_owned().into(), None).principal().clone()
}

fn parse(body: &[u8]) -> Result<TokenRequest, BadJson> {
    key::parse(&principal("p"), "slack/acme", body)
}

pub(crate) fn check(body: &[u8]) {
    let parsed = parse(body);
    assert_eq!(parsed.map(|_| ()), key::check(body), "parse and check disagree");
    let Ok(request) = parsed else { return };
    let Ok(text) = std::str::from_utf8(body) else { panic!("accepted, but not UTF-8") };
    let text = if text.is_empty() { "{}" } else { text };
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        // Keys use the text of numbers; this parser cannot represent every number.
        Err(e) if e.to_string().starts_with("number out of range") => return,
        Err(e) => panic!("accepted, but not JSON: {e}"),
    };
    let members = value.as_object().expect("an object");

    // A body with a third party's token is recognised, since it must not be stored.
    let is_token = members.get("subject").and_then(|s| s.get("type")).is_some_and(|kind| kind == "token");
    assert_eq!(request.subject == Subject::Token, is_token, "{text}");

    let key_of = |body: &str| parse(body.as_bytes()).map(|request| request.key);
    assert_eq!(key_of(&spaced(text)), Ok(request.key), "whitespace changes the key");
    if has_only_integers(&value) {
        assert_eq!(key_of(&value.to_string()), Ok(request.key), "order or escapes change the key");
    }
    // `validityBufferMs` does not change the key, everything else does.
    let with = |member: &str| match members.is_empty() {
        true => format!("{{{member}}}"),
        false => text.replacen('{', &format!("{{{member},"), 1),
    };
    if !members.contains_key("validityBufferMs") {
        let buffered = parse(with(r#""validityBufferMs":7"#).as_bytes()).expect("an object");
        assert_eq!((buffered.key, buffered.validity_buffer.as_millis()), (request.key, 7));
    }
    if !members.contains_key("another") {
        assert_ne!(key_of(&with(r#""another":null"#)), Ok(request.key), "a member is ignored");
    }
    for name in members.keys() {
        let twice = with(&format!("{}:0", Value::from(name.as_str())));
        assert_eq!(key_of(&twice), Err(BadJson::DuplicateKey), "ambiguous: {twice}");
    }
    let elsewhere = [key::parse(&principal("q"), "slack/acme", body), key::parse(&principal("p"), "slack/acm", body)];
    assert!(elsewhere.iter().all(|other| other.is_ok_and(|other| other.key != request.key)));
}

/// The same JSON with whitespace everywhere.
fn spaced(json: &str) -> String {
    let (mut spaced, mut in_string, mut escaped) = (String::new(), false, false);
    for c in json.chars() {
        let is_structural = !in_string && "{}[]:,".contains(c);
        if is_structural {
            spaced.push_str(" \n");
        }
        spaced.push(c);
        if is_structural {
            spaced.push_str("\t ");
        }
        in_string ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
    }
    spaced
}

/// [`Value`] may change the text of other numbers.
fn has_only_integers(value: &Value) -> bool {
    match value {
        Value::Number(number) => !number.is_f64(),
        Value::Array(elements) => elements.iter().all(has_only_integers),
        Value::Object(members) => members.values().all(has_only_integers),
        _ => true,
    }
}
