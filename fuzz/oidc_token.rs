//! The text of the OIDC token.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use connect_sidecar::credential::{Credential, MAX_TOKEN_BYTES, OidcToken};
use serde_json::value::RawValue;

/// Uses the bytes as a token's text, and as a header and a payload, separated by the first line feed.
pub(crate) fn check(bytes: &[u8]) {
    let end = bytes.iter().position(|b| *b == b'\n').unwrap_or(bytes.len());
    let payload = bytes.get(end + 1..).unwrap_or_default();
    let token_with = |signature: &str| {
        format!("{}.{}.{signature}", URL_SAFE_NO_PAD.encode(&bytes[..end]), URL_SAFE_NO_PAD.encode(payload))
    };
    let accepted = decode(&token_with("c2ln"));
    if let Some(token) = &accepted {
        for (part, what) in [(&bytes[..end], "header"), (payload, "payload")] {
            let object: BTreeMap<String, &RawValue> =
                serde_json::from_slice(part).unwrap_or_else(|e| panic!("the {what} is not a JSON object: {e}"));
            assert!(object.contains_key(if what == "header" { "alg" } else { "exp" }));
        }
        // Another signature makes another token of the same principal.
        let other = decode(&token_with("b3RoZXI")).expect("the signature is not checked");
        assert_eq!(token.principal(), other.principal());
        assert_ne!(token.fingerprint(), other.fingerprint());
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        decode(text);
    }
}

fn decode(text: &str) -> Option<Credential> {
    let token = match OidcToken::decode(text.to_owned().into()) {
        Ok(token) => token,
        Err(rejection) => {
            let message = rejection.to_string();
            assert!(message.len() < 80 && !message.contains(char::is_control), "{message}");
            return None;
        }
    };
    assert!(text.len() <= MAX_TOKEN_BYTES);
    let parts: Vec<&str> = text.split('.').collect();
    assert_eq!(parts.len(), 3);
    assert!(parts.iter().all(|part| !part.is_empty()));
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    assert!(text.bytes().all(plain), "not allowed in a header");
    assert!(
        matches!(token.claims.iss.strip_prefix("https://oidc.vercel.com"), Some(rest) if rest.is_empty() || rest.starts_with('/'))
    );
    assert!(!format!("{token:?}").contains(parts[1]), "shown by Debug");
    assert!(token.is_same_text(&token) && !token.is_older_than(&token));
    let _ = (token.expires_at.to_string(), token.claims.description());

    let credential = Credential::Oidc(token);
    let bearer = credential.bearer().expect("a header value");
    assert!(bearer.is_sensitive() && bearer == format!("Bearer {text}"));
    Some(credential)
}
