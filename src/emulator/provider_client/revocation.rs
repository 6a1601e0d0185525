//! Revocation: ends what is in a connector's vault at its provider, and removes it whatever the provider answers.

use super::settings::Settings;
use super::vault::VaultEntry;
use super::{ProviderClient, ProviderRefusal, Subject, github};
use crate::emulator::provider_kind::ProviderKind;
use crate::emulator::state::Store;
use crate::emulator::world::Connector;

/// How many vault entries were revoked at the provider.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::emulator) struct RevocationCounts {
    /// Revoked.
    pub(in crate::emulator) revoked: usize,
    /// Not revocable at the provider.
    pub(in crate::emulator) skipped: usize,
    /// Refused by the provider.
    pub(in crate::emulator) failed: usize,
}

/// Whether a revocation for `subject` applies to what belongs to `user`, or to the app if that is `None`. Without a
/// subject, it applies to everything.
pub(in crate::emulator) fn applies_to(subject: Option<&Subject>, user: Option<&str>) -> bool {
    match subject {
        None => true,
        Some(Subject::User { id, .. }) => user == Some(id),
        Some(Subject::App | Subject::JwtBearer(_) | Subject::Exchange(_)) => user.is_none(),
    }
}

/// Revokes the connector's vault entries for a subject, or all of them, and removes them.
pub(in crate::emulator) async fn revoke(
    store: &Store,
    providers: &ProviderClient,
    connector: &Connector,
    subject: Option<&Subject>,
) -> RevocationCounts {
    let mut counts = RevocationCounts::default();
    for key in connector.vault.keys().filter(|key| applies_to(subject, key.strip_prefix("user:"))) {
        let lock = providers.exchange_lock(connector, key);
        let _guard = lock.lock().await;
        let entry = VaultEntry::load(store, &connector.id, key);
        match revoke_entry(providers, connector, key, &entry).await {
            None => counts.skipped += 1,
            Some(Ok(())) => counts.revoked += 1,
            Some(Err(_)) => counts.failed += 1,
        }
        store.change(|contents| contents.world.connector_mut(&connector.id).and_then(|c| c.vault.remove(key)));
    }
    counts
}

/// Revokes an entry. `None` if there is nothing that the provider can revoke.
async fn revoke_entry(
    providers: &ProviderClient,
    connector: &Connector,
    key: &str,
    entry: &VaultEntry,
) -> Option<Result<(), ProviderRefusal>> {
    let settings = Settings::from_connector(connector).ok()?;
    if entry.is_revoked || entry.provider != providers.provider_url(connector, &settings) {
        return None;
    }
    let kind = connector.provider();
    let access_token = entry.tokens.last().map(|cached| cached.token.token.as_str());
    let base = providers.mocks.base(kind);
    if kind == ProviderKind::GitHub && !key.starts_with("user:") {
        let mut result = Ok(());
        for cached in &entry.tokens {
            let token = &cached.token.token;
            result = result.and(github::revoke_installation_token(&providers.http, &base, token).await);
        }
        return Some(result);
    }
    if matches!(kind, ProviderKind::ApiKey | ProviderKind::Snowflake) {
        return None;
    }
    let client = match providers.oauth_client(connector, &settings).await {
        Ok(client) => client,
        Err(refusal) => return Some(Err(refusal)),
    };
    match kind {
        ProviderKind::ApiKey | ProviderKind::Snowflake => None,
        ProviderKind::GitHub => Some(github::revoke_user(&client, &base, access_token?).await),
        ProviderKind::Slack => client.revoke(access_token?).await,
        ProviderKind::Salesforce | ProviderKind::OAuth => {
            client.revoke(entry.refresh_token.as_deref().or(access_token)?).await
        }
    }
}
