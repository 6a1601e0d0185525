//! The OIDC token: whatever stands in the one line.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use connect_sidecar::credential::{Credential, MAX_TOKEN_BYTES, OidcToken};
use serde_json::value::RawValue;

/// The bytes are a token's text; and, parted by the first line end, a header and a payload to make one of.
pub(crate) fn check(bytes: &[u8]) {
    let end = bytes.iter().position(|b| *b == b'\n').unwrap_or(bytes.len());
    let payload = bytes.get(end + 1..).unwrap_or_default();
    let made = |signature: &str| {
        format!("{}.{}.{signature}", URL_SAFE_NO_PAD.encode(&bytes[..end]), URL_SAFE_NO_PAD.encode(payload))
    };
    let taken = take(&made("c2ln"));
    if let Some(token) = &taken {
        for (part, what) in [(&bytes[..end], "header"), (payload, "payload")] {
            let object: BTreeMap<String, &RawValue> =
                serde_json::from_slice(part).unwrap_or_else(|e| panic!("the {what} is no JSON object: {e}"));
            assert!(object.contains_key(if what == "header" { "alg" } else { "exp" }));
        }
        // Another signature is another token of the same principal.
        let other = take(&made("b3RoZXI")).expect("a signature is not looked at");
        assert_eq!(token.principal(), other.principal());
        assert_ne!(token.fingerprint(), other.fingerprint());
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        take(text);
    }
}

fn take(text: &str) -> Option<Credential> {
    let token = match OidcToken::decode(text.to_owned().into()) {
        Ok(token) => token,
        Err(rejection) => {
            let words = rejection.to_string();
            assert!(words.len() < 80 && !words.contains(char::is_control), "{words}");
            return None;
        }
    };
    assert!(text.len() <= MAX_TOKEN_BYTES);
    let parts: Vec<&str> = text.split('.').collect();
    assert_eq!(parts.len(), 3);
    assert!(parts.iter().all(|part| !part.is_empty()));
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    assert!(text.bytes().all(plain), "it could end a header");
    assert!(
        matches!(token.claims.iss.strip_prefix("https://oidc.vercel.com"), Some(rest) if rest.is_empty() || rest.starts_with('/'))
    );
    assert!(!format!("{token:?}").contains(parts[1]), "told by Debug");
    assert!(token.is_same_text(&token) && !token.is_older_than(&token));
    let _ = (token.expires_at.to_string(), token.claims.description());

    let credential = Credential::Oidc(token);
    let bearer = credential.bearer().expect("it can stand in a header");
    assert!(bearer.is_sensitive() && bearer == format!("Bearer {text}"));
    Some(credential)
}
