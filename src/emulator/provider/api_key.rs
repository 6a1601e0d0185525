//! An API key: no exchange, the credential that was supplied is attached. Its `expiresAt` is a rolling window of the
//! connector's `token_life`: the key itself does not end, but whoever keeps it is to ask again.

use serde_json::Map;

use super::settings::Settings;
use super::{Fetched, Refused};
use crate::emulator::flow::Narrowing;
use crate::emulator::outside::Outside;

/// What is attached if the connector has no key: made-up, and recognisable.
const EXAMPLE: &str = "key_example_of_the_emulator";

/// The key. It cannot be narrowed, which is refused instead of pretended.
pub(super) fn attach(settings: &Settings, narrowing: &Narrowing, outside: &Outside) -> Result<Fetched, Refused> {
    let is_within = |scope: &&str| settings.scopes.is_empty() || settings.scopes.iter().any(|known| known == scope);
    if !narrowing.has_only_scopes() || !narrowing.named_scopes().iter().all(is_within) {
        return Err(Refused::new("invalid_scope"));
    }
    let token = settings.api_key(outside)?.unwrap_or_else(|| EXAMPLE.to_owned());
    Ok(Fetched { token, lasts: None, refresh_token: None, scopes: None, further: Map::new() })
}
