//! API keys: there is no exchange, the connector's key is the token. Its `expiresAt` is always `token_life` ahead, so
//! that callers ask again although the key itself does not expire.

use super::settings::Settings;
use super::{ProviderRefusal, ProviderToken};
use crate::emulator::allowlist::Allowlist;
use crate::emulator::flow::Narrowing;

/// The token of a connector without a key.
const EXAMPLE: &str = "key_example_of_the_emulator";

/// The connector's key. It cannot be narrowed: requests for other scopes than the connector's are refused.
pub(super) fn attach(
    settings: &Settings,
    narrowing: &Narrowing,
    allowlist: &Allowlist,
) -> Result<ProviderToken, ProviderRefusal> {
    let is_known = |scope: &&str| settings.scopes.is_empty() || settings.scopes.iter().any(|known| known == scope);
    if !narrowing.has_only_scopes() || !narrowing.named_scopes().iter().all(is_known) {
        return Err(ProviderRefusal::new("invalid_scope"));
    }
    let token = settings.api_key(allowlist)?.unwrap_or_else(|| EXAMPLE.to_owned());
    Ok(ProviderToken { token, ..ProviderToken::default() })
}
