//! A request as the emulator's parts read it, and an answer as they give it. Decides nothing.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use http::{Method, StatusCode};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::errors::{Kind, Refusal};

/// A request.
#[derive(Debug)]
pub struct Asked {
    /// Method.
    pub method: Method,
    /// The raw request target.
    pub target: String,
    /// Headers.
    pub headers: HeaderMap,
    /// Raw body.
    pub body: Bytes,
    /// The path's segments, decoded.
    segments: Vec<String>,
    /// The query's pairs, decoded.
    query: Vec<(String, String)>,
}

impl Asked {
    /// Reads path and query of a target.
    pub fn new(method: Method, target: &str, headers: HeaderMap, body: Bytes) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let decoded = |segment: &str| percent_decode_str(segment).decode_utf8_lossy().into_owned();
        let segments = path.trim_start_matches('/').split('/').map(decoded).collect();
        let query = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        Self { method, target: target.into(), headers, body, segments, query }
    }

    /// Method and path for matching.
    pub fn route(&self) -> (&str, Vec<&str>) {
        (self.method.as_str(), self.segments.iter().map(String::as_str).collect())
    }

    /// A parameter of the query; the first of its name.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All parameters of the query, in their order.
    pub fn query_pairs(&self) -> &[(String, String)] {
        &self.query
    }

    /// The body as JSON of a shape; nothing is as good as `{}`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        let body = if self.body.is_empty() { b"{}" } else { self.body.as_ref() };
        serde_json::from_slice(body).map_err(|e| Refusal::about(Kind::BadRequest, e.to_string()))
    }

    /// The bearer, if there is exactly one `Authorization` and it holds one.
    pub fn bearer(&self) -> Option<&str> {
        let values: Vec<_> = self.headers.get_all(http::header::AUTHORIZATION).iter().collect();
        match values.as_slice() {
            [one] => one.to_str().ok()?.strip_prefix("Bearer "),
            _ => None,
        }
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Given {
    /// The status.
    pub status: StatusCode,
    /// Headers of its own.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body; `None` for none at all.
    pub body: Option<Bytes>,
}

impl Given {
    /// JSON with 200.
    pub fn ok(body: &Value) -> Self {
        Self::json(StatusCode::OK, body)
    }

    /// JSON.
    pub fn json(status: StatusCode, body: &Value) -> Self {
        Self::of(status, "application/json; charset=utf-8", body.to_string())
    }

    /// A text of some type.
    pub fn of(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        let headers = vec![(CONTENT_TYPE, HeaderValue::from_static(content_type))];
        Self { status, headers, body: Some(body.into()) }
    }

    /// 204.
    pub fn no_content() -> Self {
        Self { status: StatusCode::NO_CONTENT, headers: Vec::new(), body: None }
    }

    /// 303 to there; a target that no header can hold is left out.
    pub fn see_other(to: &str) -> Self {
        let location = HeaderValue::try_from(to).map(|to| (LOCATION, to));
        Self { status: StatusCode::SEE_OTHER, headers: location.into_iter().collect(), body: None }
    }
}

impl From<Refusal> for Given {
    fn from(refusal: Refusal) -> Self {
        let mut given = Self::json(refusal.status(), &refusal.body());
        given.headers.extend(refusal.retry_after.map(|seconds| (RETRY_AFTER, seconds.into())));
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connector_is_one_segment_however_it_is_written() {
        let asked = |target| Asked::new(Method::GET, target, HeaderMap::new(), Bytes::new());
        for (target, connector) in [
            ("/v1/connect/connectors/slack%2Facme-slack", "slack/acme-slack"),
            ("/v1/connect/connectors/slack%2facme-slack?teamId=team_acme", "slack/acme-slack"),
            ("/v1/connect/connectors/a%252Fb", "a%2Fb"),
            ("/v1/connect/connectors/", ""),
        ] {
            assert_eq!(asked(target).route().1, ["v1", "connect", "connectors", connector], "{target}");
        }
        assert_eq!(asked("/x?a=1+2&a=3&b=%2F").query("a"), Some("1 2"));
    }
}
