//! The provider's settings in a connector's `data`. A secret is given directly, or by the name of an environment
//! variable that the [`Allowlist`] permits.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::ProviderRefusal;
use crate::emulator::allowlist::Allowlist;
use crate::emulator::mock_providers::InstallationGrants;
use crate::emulator::world::Connector;

/// The keys of `data` that the emulator uses. Others are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Settings {
    /// The issuer URL of an OAuth 2.0 or OpenID Connect provider; the mock provider if absent.
    #[serde(alias = "service_url")]
    pub(super) issuer: Option<String>,
    /// The app's client id at the issuer.
    pub(super) client_id: Option<String>,
    client_secret: Option<String>,
    client_secret_env: Option<String>,
    /// The scopes that can be granted; any if empty.
    pub(super) scopes: Vec<String>,
    /// The resources and audiences that tokens can be for; any if empty.
    pub(super) resources: Vec<String>,
    /// GitHub and Snowflake: a private key in PKCS#8 PEM, instead of the one from the mock provider.
    private_key: Option<String>,
    private_key_env: Option<String>,
    /// GitHub: the permissions of installations with their levels; any if empty.
    permissions: BTreeMap<String, String>,
    /// GitHub: the repositories of installations; any if empty.
    repositories: Vec<String>,
    /// Snowflake: the account and the user in it.
    account: Option<String>,
    user: Option<String>,
    /// Snowflake: the user's roles; any if empty.
    pub(super) roles: Vec<String>,
    /// API key connectors: the key.
    #[serde(alias = "apiKey")]
    api_key: Option<String>,
    api_key_env: Option<String>,
}

impl Settings {
    pub(super) fn from_connector(connector: &Connector) -> Result<Self, ProviderRefusal> {
        let data = Value::Object(connector.data.clone().into_iter().collect());
        serde_json::from_value(data).map_err(|_| ProviderRefusal::new("invalid_data"))
    }

    pub(super) fn client_secret(&self, allowlist: &Allowlist) -> Result<Option<String>, ProviderRefusal> {
        secret(self.client_secret.as_ref(), self.client_secret_env.as_ref(), allowlist)
    }

    pub(super) fn private_key(&self, allowlist: &Allowlist) -> Result<Option<String>, ProviderRefusal> {
        secret(self.private_key.as_ref(), self.private_key_env.as_ref(), allowlist)
    }

    pub(super) fn api_key(&self, allowlist: &Allowlist) -> Result<Option<String>, ProviderRefusal> {
        secret(self.api_key.as_ref(), self.api_key_env.as_ref(), allowlist)
    }

    pub(super) fn github_grants(&self, connector: &Connector) -> InstallationGrants {
        InstallationGrants {
            permissions: self.permissions.clone(),
            repositories: self.repositories.clone(),
            token_life: connector.token_life.as_secs(),
        }
    }

    /// `ACCOUNT.USER` in capitals, as in Snowflake's JWTs: without the region of an account locator.
    pub(super) fn snowflake_user(&self, connector: &Connector, user: Option<&str>) -> String {
        let tenant = connector.installations.first().map(|installation| installation.tenant_id.as_str());
        let account = self.account.as_deref().or(tenant).unwrap_or("ACME");
        let account = account.split('.').next().unwrap_or_default();
        format!("{account}.{}", user.or(self.user.as_deref()).unwrap_or("CONNECT")).to_uppercase()
    }
}

/// The value of a secret that is given directly or by the name of a variable.
fn secret(
    value: Option<&String>,
    variable: Option<&String>,
    allowlist: &Allowlist,
) -> Result<Option<String>, ProviderRefusal> {
    match variable {
        Some(name) => {
            allowlist.secret(name).map(|secret| Some(secret.to_owned())).ok_or(ProviderRefusal::new("missing_variable"))
        }
        None => Ok(value.cloned()),
    }
}
