//! What a connector's `data` says of its provider. A secret may stand in it, or the name of a variable that holds it:
//! of one that [`Outside`] has.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::Refused;
use crate::emulator::outside::Outside;
use crate::emulator::standin::Grants;
use crate::emulator::world::Connector;

/// The keys of `data` that mean something here; others are let be.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Settings {
    /// An OAuth 2.0 or OpenID Connect provider elsewhere, by its issuer's URL. The stand-in if there is none.
    #[serde(alias = "service_url")]
    pub(super) issuer: Option<String>,
    /// The app's id there.
    pub(super) client_id: Option<String>,
    client_secret: Option<String>,
    client_secret_env: Option<String>,
    /// The most that users can consent to; anything if it is empty.
    pub(super) scopes: Vec<String>,
    /// What resources and audiences there can be tokens for; any if it is empty.
    pub(super) resources: Vec<String>,
    /// A private key in PKCS#8 PEM, instead of the one that the stand-in gave: GitHub and Snowflake.
    private_key: Option<String>,
    private_key_env: Option<String>,
    /// GitHub: the permissions of installations with their levels; any if it is empty.
    permissions: BTreeMap<String, String>,
    /// GitHub: the repositories of installations; any if it is empty.
    repositories: Vec<String>,
    /// Snowflake: the account and the user in it.
    account: Option<String>,
    user: Option<String>,
    /// Snowflake: the user's roles; any if it is empty.
    pub(super) roles: Vec<String>,
    /// The static credential of an API key connector.
    #[serde(alias = "apiKey")]
    api_key: Option<String>,
    api_key_env: Option<String>,
}

impl Settings {
    pub(super) fn of(connector: &Connector) -> Result<Self, Refused> {
        let data = Value::Object(connector.data.clone().into_iter().collect());
        serde_json::from_value(data).map_err(|_| Refused::new("invalid_data"))
    }

    pub(super) fn client_secret(&self, outside: &Outside) -> Result<Option<String>, Refused> {
        secret(self.client_secret.as_ref(), self.client_secret_env.as_ref(), outside)
    }

    pub(super) fn private_key(&self, outside: &Outside) -> Result<Option<String>, Refused> {
        secret(self.private_key.as_ref(), self.private_key_env.as_ref(), outside)
    }

    pub(super) fn api_key(&self, outside: &Outside) -> Result<Option<String>, Refused> {
        secret(self.api_key.as_ref(), self.api_key_env.as_ref(), outside)
    }

    pub(super) fn github(&self, connector: &Connector) -> Grants {
        Grants {
            permissions: self.permissions.clone(),
            repositories: self.repositories.clone(),
            token_life: connector.token_life.as_secs(),
        }
    }

    /// `ACCOUNT.USER` in capitals, as Snowflake has it in JWTs: a locator's region left out.
    pub(super) fn snowflake_user(&self, connector: &Connector, named: Option<&str>) -> String {
        let tenant = connector.installations.first().map(|installation| installation.tenant_id.as_str());
        let account = self.account.as_deref().or(tenant).unwrap_or("ACME");
        let account = account.split('.').next().unwrap_or_default();
        format!("{account}.{}", named.or(self.user.as_deref()).unwrap_or("CONNECT")).to_uppercase()
    }
}

/// A secret that is written down, or that is in a variable which may be used.
fn secret(written: Option<&String>, variable: Option<&String>, outside: &Outside) -> Result<Option<String>, Refused> {
    match variable {
        Some(name) => {
            outside.secret(name).map(|secret| Some(secret.to_owned())).ok_or(Refused::new("missing_variable"))
        }
        None => Ok(written.cloned()),
    }
}
