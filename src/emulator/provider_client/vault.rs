//! The entries of a connector's vault: refresh token and cached tokens of one subject.

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::{IssuedToken, ProviderRequest, ProviderToken, Subject};
use crate::emulator::flow::Narrowing;
use crate::emulator::state::Store;
use crate::emulator::world::user_key;

/// What the vault has for one subject.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct VaultEntry {
    /// The provider's URL. An entry of another provider, such as an earlier run's mock, is worthless.
    pub(super) provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refresh_token: Option<String>,
    /// Whether the provider has revoked the grant, so that only a new consent helps.
    #[serde(default, rename = "is_over")]
    pub(super) is_revoked: bool,
    pub(super) tokens: Vec<CachedToken>,
}

/// A token that may be returned again.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct CachedToken {
    pub(super) narrowing: Narrowing,
    /// The environment that it was issued for; any if absent.
    pub(super) environment: Option<String>,
    pub(super) token: IssuedToken,
}

impl VaultEntry {
    /// Reads an entry; an empty one if there is none.
    pub(super) fn load(store: &Store, connector: &str, key: &str) -> Self {
        let value = store.read(|contents| contents.world.connector(connector)?.vault.get(key).cloned());
        value.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default()
    }

    /// Writes the entry.
    pub(super) fn save(&self, store: &Store, connector: &str, key: &str) {
        store.change(|contents| {
            if let (Some(connector), Ok(value)) = (contents.world.connector_mut(connector), serde_json::to_value(self))
            {
                connector.vault.insert(key.to_owned(), value);
            }
        });
    }

    /// Moves a new refresh token into the entry.
    pub(super) fn take_refresh_token(&mut self, token: &mut ProviderToken) {
        if let Some(token) = token.refresh_token.take() {
            self.refresh_token = Some(token);
        }
    }
}

/// The key of a request's entry.
pub(super) fn vault_key(request: &ProviderRequest) -> String {
    match (&request.subject, &request.installation) {
        (Subject::User { id, .. }, _) => user_key(id),
        // Hashed, so that neither token nor claims are stored.
        (subject @ (Subject::JwtBearer(_) | Subject::Exchange(_)), _) => {
            let hash = digest(&SHA256, format!("{subject:?}").as_bytes());
            format!("other:{}", BASE64_URL_SAFE_NO_PAD.encode(hash))
        }
        (Subject::App, Some(installation)) => format!("app:{}", installation.id),
        (Subject::App, None) => "app".into(),
    }
}
