//! The cache key of a token request, derived from its body. Pure.
//!
//! A wrong key would give one subject's token to another. Two bodies share a key only if they are the same JSON value,
//! except for what docs/http.md section 1 lists: the order of object keys, order and repetition in `scopes`, `audience`
//! and `resources`, and `validityBufferMs`. Ambiguous bodies (with duplicate keys) are refused. Numbers are compared by
//! their text, so nothing is lost to rounding. Bodies are secrets: no part of one is kept or shown.

use std::fmt;
use std::time::Duration;

use aws_lc_rs::digest;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::credential::Principal;

/// Maximum nesting depth.
const MAX_DEPTH: usize = 32;

/// The top-level members that are sets: order and repetition do not matter.
const SETS: [&str; 3] = ["scopes", "audience", "resources"];

/// The cache key of a token request: principal, connector and canonical body.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// A parsed token request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRequest {
    /// The canonical key.
    pub key: Key,
    /// The request's `validityBufferMs`; zero without one.
    pub validity_buffer: Duration,
    /// The kind of subject.
    pub subject: Subject,
}

/// The kinds of subject that Connect knows (docs/vercel.md section 1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// No subject.
    Unnamed,
    /// `app`
    App,
    /// `user`
    User,
    /// `jwt-bearer`
    JwtBearer,
    /// `token`: the body contains a third party's token. Never stored.
    Token,
    /// Any other kind.
    Other,
}

impl Subject {
    /// The kind for status and logs, never an id.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unnamed => "default",
            Self::App => "app",
            Self::User => "user",
            Self::JwtBearer => "jwt-bearer",
            Self::Token => "token",
            Self::Other => "other",
        }
    }
}

/// Why a body is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadJson {
    /// Not JSON, or not UTF-8.
    #[error("The body is not valid JSON.")]
    Syntax,
    /// JSON, but not an object.
    #[error("The body must be empty or one JSON object.")]
    NotAnObject,
    /// An object has a key twice.
    #[error("The body has the same key twice in one object.")]
    DuplicateKey,
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("The body is nested more than 32 deep.")]
    TooDeep,
}

/// Parses the body of a token request.
pub fn parse(principal: &Principal, connector: &str, body: &[u8]) -> Result<TokenRequest, BadJson> {
    let object = object(body)?;
    let mut validity_buffer = Duration::ZERO;
    let mut subject = Subject::Unnamed;
    let mut canonical = CanonicalWriter::with_capacity(32 + 8 + connector.len() + body.len() + 64);
    canonical.0.extend_from_slice(principal.as_bytes());
    canonical.0.extend_from_slice(&(connector.len() as u64).to_be_bytes());
    canonical.0.extend_from_slice(connector.as_bytes());
    canonical.members(object, 1, |canonical, name, value| {
        match name {
            "validityBufferMs" => {
                if let Ok(ms) = serde_json::from_str::<f64>(value.get()) {
                    validity_buffer = Duration::from_millis(ms as u64);
                    return Ok(false);
                }
            }
            "subject" => subject = subject_of(value),
            _ if SETS.contains(&name) && is_array(value) => {
                canonical.set(name, value)?;
                return Ok(false);
            }
            _ => {}
        }
        Ok(true)
    })?;
    Ok(TokenRequest { key: canonical.key(), validity_buffer, subject })
}

/// Checks the body of another request: empty, or one unambiguous JSON object.
pub fn check(body: &[u8]) -> Result<(), BadJson> {
    let object = object(body)?;
    CanonicalWriter::default().members(object, 1, |_, _, _| Ok(true))
}

/// The members of the body's object; none for an empty body.
fn object(body: &[u8]) -> Result<Object<'_>, BadJson> {
    if body.is_empty() {
        return Ok(Object(Vec::new()));
    }
    let text = std::str::from_utf8(body).map_err(|_| BadJson::Syntax)?;
    let value: &RawValue = serde_json::from_str(text).map_err(|_| BadJson::Syntax)?;
    if !value.get().starts_with('{') {
        return Err(BadJson::NotAnObject);
    }
    serde_json::from_str(value.get()).map_err(|_| BadJson::Syntax)
}

fn is_array(value: &RawValue) -> bool {
    value.get().starts_with('[')
}

fn subject_of(value: &RawValue) -> Subject {
    #[derive(Deserialize)]
    struct SubjectType {
        r#type: String,
    }
    match serde_json::from_str::<SubjectType>(value.get()).as_ref().map(|subject| subject.r#type.as_str()) {
        Ok("app") => Subject::App,
        Ok("user") => Subject::User,
        Ok("jwt-bearer") => Subject::JwtBearer,
        Ok("token") => Subject::Token,
        _ => Subject::Other,
    }
}

/// An object's members in their original order, including duplicates.
struct Object<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;
        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(ObjectVisitor)
    }
}

/// Writes canonical JSON: sorted keys, uniform escapes, no whitespace, numbers unchanged.
#[derive(Default)]
struct CanonicalWriter(Vec<u8>);

impl CanonicalWriter {
    fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    fn key(&self) -> Key {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, &self.0).as_ref());
        Key(bytes)
    }

    fn value(&mut self, value: &RawValue, depth: usize) -> Result<(), BadJson> {
        let text = value.get();
        match text.as_bytes().first() {
            Some(b'{') => {
                let object = serde_json::from_str(text).map_err(|_| BadJson::Syntax)?;
                self.members(object, depth + 1, |_, _, _| Ok(true))
            }
            Some(b'[') => {
                let elements = elements(value, depth + 1)?;
                self.0.push(b'[');
                for element in elements {
                    self.value(element, depth + 1)?;
                    self.0.push(b',');
                }
                self.0.push(b']');
                Ok(())
            }
            Some(b'"') => {
                let string: String = serde_json::from_str(text).map_err(|_| BadJson::Syntax)?;
                self.string(&string);
                Ok(())
            }
            _ => {
                self.0.extend_from_slice(text.as_bytes());
                Ok(())
            }
        }
    }

    fn string(&mut self, string: &str) {
        // Writing to a vector cannot fail.
        let _ = serde_json::to_writer(&mut self.0, string);
    }

    /// Writes an object at `depth`. `filter` is called for each member; if it returns `false`, the member is left out,
    /// or it has been written by `filter`.
    fn members<'a>(
        &mut self,
        object: Object<'a>,
        depth: usize,
        mut filter: impl FnMut(&mut Self, &str, &'a RawValue) -> Result<bool, BadJson>,
    ) -> Result<(), BadJson> {
        if depth > MAX_DEPTH {
            return Err(BadJson::TooDeep);
        }
        let mut members = object.0;
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        if members.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(BadJson::DuplicateKey);
        }
        self.0.push(b'{');
        for (name, value) in members {
            if filter(self, &name, value)? {
                self.string(&name);
                self.0.push(b':');
                self.value(value, depth)?;
                self.0.push(b',');
            }
        }
        self.0.push(b'}');
        Ok(())
    }

    /// Writes a top-level member that is a set.
    fn set(&mut self, name: &str, value: &RawValue) -> Result<(), BadJson> {
        let mut set = elements(value, 2)?
            .into_iter()
            .map(|element| {
                let mut canonical = Self::default();
                canonical.value(element, 2)?;
                Ok(canonical.0)
            })
            .collect::<Result<Vec<_>, _>>()?;
        set.sort_unstable();
        set.dedup();
        self.string(name);
        self.0.extend_from_slice(b":[");
        for element in set {
            self.0.extend_from_slice(&element);
            self.0.push(b',');
        }
        self.0.extend_from_slice(b"],");
        Ok(())
    }
}

fn elements(array: &RawValue, depth: usize) -> Result<Vec<&RawValue>, BadJson> {
    if depth > MAX_DEPTH {
        return Err(BadJson::TooDeep);
    }
    serde_json::from_str(array.get()).map_err(|_| BadJson::Syntax)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::Credential;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn principal(name: &str) -> Principal {
        Credential::access_token(name.to_owned().into(), None).principal().clone()
    }

    fn request(body: &str) -> Result<TokenRequest, BadJson> {
        parse(&principal("p"), "slack/acme", body.as_bytes())
    }

    fn key(body: &str) -> Key {
        request(body).unwrap_or_else(|e| panic!("{e}: {body}")).key
    }

    #[test]
    fn equivalent_bodies_share_a_key() {
        for (a, b) in [
            ("", "{}"),
            ("{}", " {\n} "),
            (r#"{"a":1,"b":{"c":2,"d":3}}"#, r#"{ "b": {"d":3,"c":2}, "a": 1 }"#),
            (r#"{"scopes":["a","b"]}"#, r#"{"scopes":["b","a","b"]}"#),
            (r#"{"audience":["a","b"]}"#, r#"{"audience":["b","a"]}"#),
            (r#"{"resources":["a","b"]}"#, r#"{"resources":["b","a"]}"#),
            (r#"{"subject":{"type":"app"}}"#, r#"{"subject":{"type":"\u0061pp"}}"#),
            (r#"{"a":1}"#, r#"{"a":1,"validityBufferMs":120000}"#),
        ] {
            assert_eq!(key(a), key(b), "{a} and {b}");
        }
    }

    #[test]
    fn requests_for_different_things_have_different_keys() {
        let bodies = [
            "{}",
            r#"{"scopes":[]}"#,
            r#"{"scopes":["*"]}"#,
            r#"{"scopes":"*"}"#,
            r#"{"scopes":["a","b"]}"#,
            r#"{"scopes":["a,b"]}"#,
            r#"{"scopes":["a\",\"b"]}"#,
            r#"{"audience":["a","b"]}"#,
            r#"{"subject":{"type":"app"}}"#,
            r#"{"subject":{"type":"user"}}"#,
            r#"{"subject":{"type":"user","id":"1"}}"#,
            r#"{"subject":{"type":"user","id":1}}"#,
            r#"{"subject":{"type":"user","id":"2"}}"#,
            r#"{"subject":{"scopes":["a","b"]}}"#,
            r#"{"subject":{"scopes":["b","a"]}}"#,
            r#"{"authorizationDetails":[{"a":[1,2]}]}"#,
            r#"{"authorizationDetails":[{"a":[2,1]}]}"#,
            r#"{"n":18446744073709551616}"#,
            r#"{"n":18446744073709551617}"#,
            r#"{"n":0.1}"#,
            r#"{"n":0.10000000000000000001}"#,
            r#"{"installationId":null}"#,
            r#"{"validityBufferMs":"x"}"#,
            r#"{"subject":{"validityBufferMs":1}}"#,
        ];
        for (i, a) in bodies.iter().enumerate() {
            for b in &bodies[..i] {
                assert_ne!(key(a), key(b), "{a} and {b}");
            }
        }
    }

    #[test]
    fn principal_and_connector_are_part_of_the_key() {
        let of = |p: &str, connector: &str| parse(&principal(p), connector, b"{}").expect("an object").key;
        assert_ne!(of("p", "a"), of("q", "a"));
        assert_ne!(of("p", "a"), of("p", "b"));
    }

    #[test]
    fn reads_buffer_and_subject() {
        let of = |body: &str| request(body).map(|a| (a.validity_buffer.as_millis(), a.subject.as_str()));
        assert_eq!(of(""), Ok((0, "default")));
        assert_eq!(of(r#"{"validityBufferMs":120000,"subject":{"type":"token","token":"x"}}"#), Ok((120_000, "token")));
        assert_eq!(of(r#"{"validityBufferMs":-1,"subject":{"type":"jwt-bearer"}}"#), Ok((0, "jwt-bearer")));
        assert_eq!(of(r#"{"validityBufferMs":1e30,"subject":7}"#), Ok((u128::from(u64::MAX), "other")));
        assert_eq!(of(r#"{"validityBufferMs":null,"subject":{"type":"new-kind"}}"#), Ok((0, "other")));
        for kind in ["app", "user"] {
            assert_eq!(of(&format!(r#"{{"subject":{{"type":"{kind}","id":"user_1"}}}}"#)), Ok((0, kind)));
        }
    }

    #[test]
    fn refuses_invalid_and_ambiguous_bodies() {
        for (body, expected) in [
            ("[]", BadJson::NotAnObject),
            ("\"x\"", BadJson::NotAnObject),
            ("null", BadJson::NotAnObject),
            ("1", BadJson::NotAnObject),
            ("{", BadJson::Syntax),
            ("{\"a\":1}x", BadJson::Syntax),
            ("{a:1}", BadJson::Syntax),
            ("{\"a\":01}", BadJson::Syntax),
            ("{\"a\":NaN}", BadJson::Syntax),
            ("{\"a\":1,}", BadJson::Syntax),
            ("{\"a\":\"\\ud800\"}", BadJson::Syntax),
            ("\u{feff}{}", BadJson::Syntax),
            (" ", BadJson::Syntax),
            (r#"{"a":1,"a":1}"#, BadJson::DuplicateKey),
            (r#"{"a":1,"\u0061":2}"#, BadJson::DuplicateKey),
            (r#"{"x":[{"a":1,"a":2}]}"#, BadJson::DuplicateKey),
            (r#"{"scopes":[{"a":1,"a":2}]}"#, BadJson::DuplicateKey),
            (r#"{"validityBufferMs":1,"validityBufferMs":2}"#, BadJson::DuplicateKey),
        ] {
            assert_eq!(request(body), Err(expected), "{body}");
            assert_eq!(check(body.as_bytes()), Err(expected), "{body}");
        }
        assert_eq!(parse(&principal("p"), "c", b"{\"a\":\"\xff\"}"), Err(BadJson::Syntax));
    }

    #[test]
    fn accepts_nesting_up_to_32() {
        let nested = |n: usize| format!("{}{}", r#"{"a":"#.repeat(n - 1) + "{}", "}".repeat(n - 1));
        let in_arrays = |n: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(n - 1), "]".repeat(n - 1));
        let in_a_set = |n: usize| format!(r#"{{"scopes":{}{}}}"#, "[".repeat(n - 1), "]".repeat(n - 1));
        for make in [&nested as &dyn Fn(usize) -> String, &in_arrays, &in_a_set] {
            assert!(request(&make(32)).is_ok());
            for n in [33, 200, 20_000] {
                assert!(request(&make(n)).is_err(), "{n}");
            }
        }
        assert_eq!(request(&nested(33)), Err(BadJson::TooDeep));
        assert_eq!(request(&in_a_set(33)), Err(BadJson::TooDeep));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-d]{1,2}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    fn any_body() -> impl Strategy<Value = Value> {
        proptest::collection::btree_map("[a-d]{1,2}|scopes|audience", any_json(), 0..5)
            .prop_map(|m| Value::Object(m.into_iter().collect()))
    }

    /// The same value written differently: reversed members, whitespace, every string escaped.
    fn rewritten(value: &Value) -> String {
        let escaped = |s: &str| {
            let units: String = s.encode_utf16().map(|u| format!("\\u{u:04x}")).collect();
            format!("\"{units}\"")
        };
        match value {
            Value::Object(members) => {
                let members: Vec<_> =
                    members.iter().rev().map(|(k, v)| format!("{}\t: {}", escaped(k), rewritten(v))).collect();
                format!("{{ {} }}", members.join(" ,\n"))
            }
            Value::Array(elements) => {
                let elements: Vec<_> = elements.iter().map(rewritten).collect();
                format!("[ {} ]", elements.join(" , "))
            }
            Value::String(s) => escaped(s),
            other => other.to_string(),
        }
    }

    /// The value with its sets sorted.
    fn with_sorted_sets(mut body: Value) -> Value {
        for name in SETS {
            if let Some(Value::Array(set)) = body.get_mut(name) {
                set.sort_by_key(Value::to_string);
                set.dedup();
            }
        }
        body
    }

    proptest! {
        #[test]
        fn equal_bodies_have_equal_keys_however_they_are_written(body in any_body()) {
            prop_assert_eq!(key(&body.to_string()), key(&rewritten(&body)));
        }

        #[test]
        fn different_bodies_have_different_keys(a in any_body(), b in any_body()) {
            let same = with_sorted_sets(a.clone()) == with_sorted_sets(b.clone());
            prop_assert_eq!(key(&a.to_string()) == key(&b.to_string()), same);
        }

        #[test]
        fn one_changed_member_changes_the_key(body in any_body(), name in "[a-d]{1,2}", value in any_json()) {
            let mut changed = body.clone();
            changed[&name] = value;
            prop_assert_eq!(changed == body, key(&changed.to_string()) == key(&body.to_string()));
        }

        #[test]
        fn never_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&principal("p"), "c", &body);
        }
    }

    #[test]
    fn debug_output_contains_nothing_of_a_body() {
        assert!(
            !format!("{:?}", request(&json!({"subject": {"type": "user", "id": "CANARY"}}).to_string()))
                .contains("CANARY")
        );
    }
}
