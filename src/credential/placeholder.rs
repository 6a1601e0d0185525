//! The placeholder that apps get in place of the OIDC token: an unsigned JWT with the same claims. Pure.
//!
//! It is recognized by its form alone, so that it stays valid when the sidecar restarts and nothing has to be stored.
//! It contains nothing of a real signature and is never accepted as a credential.

use std::time::Duration;

use base64::Engine;
use http::HeaderValue;
use serde::Serialize;
use serde_json::Value;

use super::Claims;
use super::oidc_token::BASE64URL;
use crate::os::clock::Timestamp;

/// The lifetime of a placeholder, longer than any app runs. The SDKs do not send an expired token, and the Python SDK
/// none with less than 15 minutes left (docs/vercel.md section 5).
pub const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// `{"alg":"none","typ":"JWT","kid":"connect-sidecar"}`
const HEADER: &str = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIiwia2lkIjoiY29ubmVjdC1zaWRlY2FyIn0";
/// In place of the signature.
const SIGNATURE: &str = "connect-sidecar-placeholder";

/// A placeholder with the claims of the real token, if there is one. It expires at `expires_at`, and its `iat` is
/// [`LIFETIME`] before that.
pub fn make(claims: Option<&Claims>, expires_at: Timestamp) -> String {
    #[derive(Serialize)]
    struct Payload<'a> {
        iat: u64,
        exp: u64,
        #[serde(flatten)]
        known: Known<'a>,
    }
    #[derive(Serialize)]
    struct Known<'a> {
        #[serde(skip_serializing_if = "str::is_empty")]
        iss: &'a str,
        #[serde(skip_serializing_if = "Value::is_null")]
        aud: &'a Value,
        #[serde(skip_serializing_if = "Option::is_none")]
        sub: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        owner: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        owner_id: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        project: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        project_id: Option<&'a str>,
        environment: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        user_id: Option<&'a str>,
    }
    let unknown = Claims::default();
    let claims = claims.unwrap_or(&unknown);
    let payload = Payload {
        iat: expires_at.minus(LIFETIME).as_seconds(),
        exp: expires_at.as_seconds(),
        known: Known {
            iss: &claims.iss,
            aud: &claims.aud,
            sub: claims.sub.as_deref(),
            owner: claims.owner.as_deref(),
            owner_id: claims.owner_id.as_deref(),
            project: claims.project.as_deref(),
            project_id: claims.project_id.as_deref(),
            environment: claims.environment.as_deref().unwrap_or("development"),
            user_id: claims.user_id.as_deref(),
        },
    };
    // Cannot fail: there are only strings and numbers.
    let payload = serde_json::to_vec(&payload).unwrap_or_default();
    format!("{HEADER}.{}.{SIGNATURE}", BASE64URL.encode(payload))
}

/// Whether the value of an `Authorization` header is a placeholder.
pub fn is_bearer(authorization: &HeaderValue) -> bool {
    let Some((scheme, token)) = authorization.as_bytes().split_at_checked("Bearer ".len()) else { return false };
    scheme.eq_ignore_ascii_case(b"Bearer ") && is_placeholder(token)
}

/// Whether a token is a placeholder, of whichever sidecar and version.
pub fn is_placeholder(token: &[u8]) -> bool {
    let payload = token
        .strip_prefix(HEADER.as_bytes())
        .and_then(|rest| rest.strip_prefix(b"."))
        .and_then(|rest| rest.strip_suffix(SIGNATURE.as_bytes()))
        .and_then(|rest| rest.strip_suffix(b"."));
    let is_base64url = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    payload.is_some_and(|payload| !payload.is_empty() && payload.iter().all(is_base64url))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::oidc_token::decode_object;
    use crate::credential::{OidcToken, TokenRejection, fixtures};
    use proptest::prelude::*;
    use secrecy::ExposeSecret;
    use serde_json::json;

    const NOW: Timestamp = Timestamp::from_millis(1_900_000_000_000);

    fn bearer(text: &str) -> HeaderValue {
        HeaderValue::from_str(text).expect("a header value")
    }

    fn claims_in(placeholder: &str) -> Value {
        decode_object(placeholder.split('.').nth(1).expect("three parts")).expect("an object")
    }

    #[test]
    fn it_has_the_claims_of_the_real_token_and_lasts_ten_years() {
        let expected = json!({
            "iss": "https://oidc.vercel.com/acme", "aud": ["https://vercel.com/acme"], "sub": "owner:acme",
            "owner": "acme", "owner_id": "team_1", "project": "web", "project_id": "prj_1",
            "environment": "preview", "user_id": "user_1",
        });
        let mut real = expected.clone();
        for (name, value) in [("exp", json!(9)), ("iat", json!(1)), ("nbf", json!(1)), ("other", json!("x"))] {
            real[name] = value;
        }
        let real = OidcToken::decode(fixtures::jwt(&real)).expect("a token");
        let mut made = claims_in(&make(Some(&real.claims), NOW.plus(LIFETIME)));
        let times = made.as_object_mut().expect("an object");
        assert_eq!(times.remove("iat"), Some(json!(1_900_000_000)));
        assert_eq!(times.remove("exp"), Some(json!(1_900_000_000_u64 + 315_360_000)));
        assert_eq!(made, expected);
    }

    #[test]
    fn without_a_real_token_it_has_only_the_environment() {
        let made = claims_in(&make(None, NOW.plus(LIFETIME)));
        assert_eq!(made, json!({"iat": 1_900_000_000, "exp": 2_215_360_000_u64, "environment": "development"}));
    }

    #[test]
    fn it_is_never_accepted_as_a_credential() {
        let real = fixtures::token("web", 1, 9);
        let made = make(Some(&real.claims), NOW);
        assert_eq!(OidcToken::decode(made.into()).expect_err("rejected"), TokenRejection::Unsigned);
        let header: Value = decode_object(HEADER).expect("an object");
        assert_eq!(header, json!({"alg": "none", "typ": "JWT", "kid": "connect-sidecar"}));
    }

    #[test]
    fn similar_tokens_are_not_recognized() {
        let made = make(None, NOW);
        let payload = made.split('.').nth(1).expect("three parts");
        let real = fixtures::jwt(&json!({"iss": "https://oidc.vercel.com", "exp": 9}));
        for text in [format!("Bearer {made}"), format!("bearer {made}"), format!("Bearer {HEADER}.e30.{SIGNATURE}")] {
            assert!(is_bearer(&bearer(&text)), "{text}");
        }
        for text in [
            made.clone(),
            format!("Basic {made}"),
            format!("Bearer  {made}"),
            format!("Bearer {made} "),
            format!("Bearer {made}x"),
            format!("Bearer x{made}"),
            format!("Bearer {made}.{SIGNATURE}"),
            format!("Bearer {HEADER}..{SIGNATURE}"),
            format!("Bearer {HEADER}.{SIGNATURE}"),
            format!("Bearer {HEADER}.{payload}."),
            format!("Bearer {HEADER}.{payload}.{payload}.{SIGNATURE}"),
            format!("Bearer {HEADER}.{payload}, {SIGNATURE}"),
            format!("Bearer {HEADER}.{payload}.{}", SIGNATURE.to_uppercase()),
            format!("Bearer eyJhbGciOiJub25lIn0.{payload}.{SIGNATURE}"),
            format!("Bearer {}", real.expose_secret()),
            "Bearer ".to_owned(),
            "Bearer".to_owned(),
            String::new(),
        ] {
            assert!(!is_bearer(&bearer(&text)), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_placeholder_is_recognized(owner in ".*", user in proptest::option::of(".*"), ends: u64) {
            let claims = Claims { owner: Some(owner), user_id: user, ..Claims::default() };
            let made = make(Some(&claims), Timestamp::from_millis(ends));
            let authorization = bearer(&format!("Bearer {made}"));
            prop_assert!(is_bearer(&authorization));
            prop_assert_eq!(&claims_in(&made)["owner"], &json!(claims.owner));
        }

        #[test]
        fn other_bearers_are_not_recognized(text in "(Bearer )?[!-~ ]{0,300}") {
            prop_assert!(!is_bearer(&bearer(&text)));
        }
    }
}
