//! All error responses of the emulator in one table: their names in Vercel's documentation and their wire format
//! (docs/vercel.md section 2.2). Only [`access`](super::access) has others.

use std::fmt::Write;

use http::StatusCode;
use serde_json::{Value, json};

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The connector is not linked to the calling project.
    NotLinked,
    /// The link does not include the calling environment.
    NotEnabled,
    /// The connector is not installed.
    InstallationRequired,
    /// The user has not consented.
    UserAuthorizationRequired,
    /// The team has no such connector.
    ConnectorNotFound,
    /// The grant is revoked or not usable.
    NoToken,
    /// The connector does not support this subject.
    UnresolvedToken,
    /// There is no bearer token.
    MissingToken,
    /// The bearer token is unknown, or not signed by the emulator.
    InvalidToken,
    /// The OIDC token is expired or not yet valid.
    ExpiredToken,
    /// A member's credential was used to request another user's token.
    OtherUser,
    /// The member's role does not permit this.
    NotPermitted,
    /// The credential belongs to another team, or the required team name is missing.
    OtherTeam,
    /// An OIDC token was used where a member's credential is required.
    PersonRequired,
    /// An OIDC token was used to create a connector.
    ProvisioningNotAllowed,
    /// The uid belongs to a connector that is not an OAuth connector.
    NotOAuth,
    /// The uid is taken.
    Conflict,
    /// The body or query is malformed.
    BadRequest,
    /// There is no such resource.
    NotFound,
    /// The rate limit is exceeded.
    RateLimited,
    /// The device code was polled before the user decided.
    AuthorizationPending,
    /// The device code was polled too often.
    SlowDown,
    /// The user denied the consent.
    AccessDenied,
    /// The consent has expired.
    AuthorizationExpired,
    /// The provider rejected the grant.
    InvalidGrant,
}

/// One kind of error response.
#[derive(Debug)]
pub struct Row {
    /// The kind.
    pub kind: Kind,
    /// The name in Vercel's documentation, if it has one.
    pub documented: Option<&'static str>,
    /// The HTTP status.
    pub status: u16,
    /// `error.code`
    pub code: &'static str,
    /// `error.message`; `{}` is replaced by [`Refusal::about`]'s argument.
    pub message: &'static str,
    /// The cause, as the documentation states it.
    pub cause: &'static str,
}

const fn row(
    kind: Kind,
    documented: Option<&'static str>,
    (status, code): (u16, &'static str),
    message: &'static str,
    cause: &'static str,
) -> Row {
    Row { kind, documented, status, code, message, cause }
}

/// All error responses; those with a documented name first.
pub const TABLE: &[Row] = &[
    row(
        Kind::NotLinked,
        Some("ClientNotLinkedToProjectError"),
        (403, "forbidden"),
        "The Connector is not linked to this project.",
        "no link for the calling project",
    ),
    row(
        Kind::NotEnabled,
        Some("ClientNotEnabledForEnvironmentError"),
        (403, "forbidden"),
        "The Connector is not enabled for the {} environment.",
        "the link is not for the calling environment",
    ),
    row(
        Kind::InstallationRequired,
        Some("ConnectorInstallationRequiredError"),
        (422, "client_installation_required"),
        "The connector must be installed first.",
        "no installation, or not the requested one",
    ),
    row(
        Kind::UserAuthorizationRequired,
        Some("UserAuthorizationRequiredError"),
        (422, "user_authorization_required"),
        "The user has not authorized the connector.",
        "a `user` subject without a grant",
    ),
    row(
        Kind::ConnectorNotFound,
        Some("ConnectorNotFoundError"),
        (404, "not_found"),
        "Connector {} was not found.",
        "no connector of that uid or id in the team",
    ),
    row(
        Kind::NoToken,
        Some("NoValidTokenError"),
        (422, "no_token"),
        "There is no valid token for this subject.",
        "the provider has revoked the grant",
    ),
    row(
        Kind::UnresolvedToken,
        None,
        (422, "unresolved_token"),
        "The connector cannot serve this subject.",
        "a subject that the connector's type does not support",
    ),
    row(Kind::MissingToken, None, (403, "forbidden"), "Not authorized", "no bearer; `missingToken` is true"),
    row(Kind::InvalidToken, None, (403, "forbidden"), "Not authorized", "an unknown bearer; `invalidToken` is true"),
    row(
        Kind::ExpiredToken,
        None,
        (401, "unauthorized"),
        "The OIDC token has expired.",
        "an OIDC token outside its `nbf` and `exp`",
    ),
    row(
        Kind::OtherUser,
        None,
        (403, "forbidden"),
        "This credential stands for one user and can only request `app` or that user. Another user's token takes an OIDC \
         token, which stands for the project.",
        "another user's subject with an access token or a CLI session",
    ),
    row(
        Kind::NotPermitted,
        None,
        (403, "forbidden"),
        "You don't have permission to {} connectors on this team.",
        "a role without that permission",
    ),
    row(
        Kind::OtherTeam,
        None,
        (403, "forbidden"),
        "The credential is not for the team in `teamId` or `slug`; an access token needs one of them.",
        "another team, or an access token without a team",
    ),
    row(
        Kind::PersonRequired,
        None,
        (403, "forbidden"),
        "An OIDC token stands for a project and cannot do this; use an access token or a CLI session.",
        "an OIDC token on a management endpoint",
    ),
    row(
        Kind::ProvisioningNotAllowed,
        None,
        (403, "forbidden"),
        "Project OIDC connector provisioning is not allowed.",
        "an OIDC token on `connectors/managed/oauth`",
    ),
    row(Kind::NotOAuth, None, (409, "conflict"), "{} is not an OAuth connector.", "a uid of another type"),
    row(Kind::Conflict, None, (409, "conflict"), "A connector {} exists already.", "a uid that is taken"),
    row(Kind::BadRequest, None, (400, "bad_request"), "Invalid request: {}", "a malformed body or query"),
    row(Kind::NotFound, None, (404, "not_found"), "The requested resource was not found.", "an unknown path or id"),
    row(
        Kind::RateLimited,
        None,
        (429, "rate_limited"),
        "Too many requests: {} a minute are allowed.",
        "more than the limit within a minute",
    ),
    row(
        Kind::AuthorizationPending,
        None,
        (400, "authorization_pending"),
        "The user has not decided yet.",
        "a device code polled before the consent",
    ),
    row(Kind::SlowDown, None, (400, "slow_down"), "Poll less often.", "a device code polled too often"),
    row(
        Kind::AccessDenied,
        None,
        (403, "access_denied"),
        "The user has denied the request.",
        "a consent that was denied",
    ),
    row(
        Kind::AuthorizationExpired,
        None,
        (400, "expired_token"),
        "The request has expired.",
        "a consent that has expired",
    ),
    row(
        Kind::InvalidGrant,
        None,
        (400, "invalid_grant"),
        "The provider rejected the grant.",
        "an error of the provider",
    ),
];

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The reason.
    pub kind: Kind,
    /// What `{}` in the message stands for.
    about: String,
    /// `Retry-After`, in seconds.
    pub retry_after: Option<u64>,
}

impl Refusal {
    /// A refusal whose message has no variable part.
    pub fn new(kind: Kind) -> Self {
        Self::about(kind, "")
    }

    /// A refusal with the variable part of its message.
    pub fn about(kind: Kind, about: impl Into<String>) -> Self {
        Self { kind, about: about.into(), retry_after: None }
    }

    fn row(&self) -> &'static Row {
        // A test checks that every kind has a row.
        TABLE.iter().find(|row| row.kind == self.kind).unwrap_or(&TABLE[0])
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.row().status).unwrap_or(StatusCode::FORBIDDEN)
    }

    /// `error.code`
    pub fn code(&self) -> &'static str {
        self.row().code
    }

    /// `error.message`
    pub fn message(&self) -> String {
        self.row().message.replace("{}", &self.about)
    }

    /// The response body, in Vercel's format.
    pub fn body(&self) -> Value {
        let mut error = json!({"code": self.code(), "message": self.message()});
        match self.kind {
            Kind::MissingToken => error["missingToken"] = true.into(),
            Kind::InvalidToken => error["invalidToken"] = true.into(),
            _ => {}
        }
        json!({ "error": error })
    }
}

/// The table in Markdown: all rows, or only those with a documented name.
pub fn markdown(all: bool) -> String {
    let mut text = String::from(
        "| documented as | status | `error.code` | `error.message` | when |\n| --- | --- | --- | --- | --- |\n",
    );
    for row in TABLE.iter().filter(|row| all || row.documented.is_some()) {
        let name = row.documented.map_or(String::new(), |name| format!("`{name}`"));
        let message = row.message.replace("{}", "…");
        let _ = writeln!(text, "| {name} | {} | `{}` | {message} | {} |", row.status, row.code, row.cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_exactly_one_row() {
        // The number of variants, from the last one's discriminant.
        let kinds = Kind::InvalidGrant as usize + 1;
        assert_eq!(TABLE.len(), kinds);
        for (i, row) in TABLE.iter().enumerate() {
            assert!(TABLE[..i].iter().all(|other| other.kind != row.kind), "{:?} twice", row.kind);
            assert!((400..500).contains(&row.status), "{row:?}");
        }
    }

    #[test]
    fn documented_errors_have_the_wire_format_that_clients_expect() {
        for (kind, status, code) in [
            (Kind::NotLinked, 403, "forbidden"),
            (Kind::NotEnabled, 403, "forbidden"),
            (Kind::InstallationRequired, 422, "client_installation_required"),
            (Kind::UserAuthorizationRequired, 422, "user_authorization_required"),
            (Kind::ConnectorNotFound, 404, "not_found"),
        ] {
            let refusal = Refusal::about(kind, "production");
            assert_eq!((refusal.status().as_u16(), refusal.code()), (status, code), "{kind:?}");
        }
        let message = Refusal::new(Kind::NotLinked).message().to_lowercase();
        assert!(message.contains("connector is not linked to this project"), "what @vercel/connect looks for");
        assert!(Refusal::about(Kind::NotEnabled, "preview").message().contains("the preview environment"));
        let table = markdown(false);
        assert_eq!(table.lines().count(), 2 + 6, "{table}");
        assert!(table.contains("| `ClientNotLinkedToProjectError` | 403 | `forbidden` |"), "{table}");
    }
}
