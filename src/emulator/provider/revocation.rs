//! Taking back: what is in a connector's vault is ended at its provider, and forgotten whatever the provider says.

use super::settings::Settings;
use super::{Held, Providers, Refused, Subject, github, held, provider_of};
use crate::emulator::state::State;
use crate::emulator::world::Connector;

/// What came of taking tokens back at the provider.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::emulator) struct Revoked {
    /// Taken back.
    pub(in crate::emulator) revoked: usize,
    /// Those that the provider cannot take back.
    pub(in crate::emulator) skipped: usize,
    /// Those that it refused to take back.
    pub(in crate::emulator) failed: usize,
}

/// Whether what is for a user, or for the app if there is none, is for this subject; all is, if it is `None`.
pub(in crate::emulator) fn concerns(subject: Option<&Subject>, user: Option<&str>) -> bool {
    match subject {
        None => true,
        Some(Subject::User { id, .. }) => user == Some(id),
        Some(_) => user.is_none(),
    }
}

/// Takes back at the provider what is in the connector's vault for a subject, or for all. Empties the vault of it.
pub(in crate::emulator) async fn revoke(
    state: &State,
    providers: &Providers,
    connector: &Connector,
    subject: Option<&Subject>,
) -> Revoked {
    let mut revoked = Revoked::default();
    let keys: Vec<&String> =
        connector.vault.keys().filter(|key| concerns(subject, key.strip_prefix("user:"))).collect();
    for key in keys {
        let turn = providers.turn(connector, key);
        let _turn = turn.lock().await;
        let held = held(state, &connector.id, key);
        match revoke_held(providers, connector, key, &held).await {
            None => revoked.skipped += 1,
            Some(Ok(())) => revoked.revoked += 1,
            Some(Err(_)) => revoked.failed += 1,
        }
        state.change(|kept| kept.world.connector(&connector.id).and_then(|connector| connector.vault.remove(key)));
    }
    revoked
}

async fn revoke_held(
    providers: &Providers,
    connector: &Connector,
    key: &str,
    held: &Held,
) -> Option<Result<(), Refused>> {
    let settings = Settings::of(connector).ok()?;
    if held.is_over || held.provider != providers.name(connector, &settings) {
        return None;
    }
    let provider = provider_of(&connector.kind);
    let access_token = held.tokens.last().map(|stored| stored.token.token.as_str());
    let base = providers.standins.base(provider);
    match provider {
        "api-key" | "snowflake" => None,
        "github" if !key.starts_with("user:") => {
            let mut result = Ok(());
            for stored in &held.tokens {
                result =
                    result.and(github::revoke_installation_token(&providers.http, &base, &stored.token.token).await);
            }
            Some(result)
        }
        _ => {
            let party = match providers.party(connector, &settings).await {
                Ok(party) => party,
                Err(refused) => return Some(Err(refused)),
            };
            match provider {
                "github" => Some(github::revoke_user(&party, &base, access_token?).await),
                "slack" => party.revoke(access_token?).await,
                _ => party.revoke(held.refresh_token.as_deref().or(access_token)?).await,
            }
        }
    }
}
