//! The providers that the emulator knows by protocol.

/// The protocol by which a connector gets its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProviderKind {
    /// Slack: OAuth v2 with bot and user tokens.
    Slack,
    /// GitHub: app installations and the web flow.
    GitHub,
    /// Salesforce: OAuth 2.0 with an instance URL.
    Salesforce,
    /// Snowflake: key-pair JWTs.
    Snowflake,
    /// A static API key, without a token exchange.
    ApiKey,
    /// OAuth 2.0 and OpenID Connect as specified; every other connector type.
    OAuth,
}

impl ProviderKind {
    /// The provider for a connector type.
    pub fn of_type(connector_type: &str) -> Self {
        match connector_type {
            "slack" => Self::Slack,
            "github" => Self::GitHub,
            "salesforce" => Self::Salesforce,
            "snowflake" => Self::Snowflake,
            "api-key" => Self::ApiKey,
            _ => Self::OAuth,
        }
    }

    /// The name, which is also the path of its mock below the mock providers' origin.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slack => "slack",
            Self::GitHub => "github",
            Self::Salesforce => "salesforce",
            Self::Snowflake => "snowflake",
            Self::ApiKey => "api-key",
            Self::OAuth => "oauth",
        }
    }
}
