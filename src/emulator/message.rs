//! Requests and responses as the emulator's handlers see them.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use http::{Method, StatusCode};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::errors::{Kind, Refusal};

/// A request with its body.
#[derive(Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The request target as sent: path and query.
    pub target: String,
    /// The headers.
    pub headers: HeaderMap,
    /// The body as sent.
    pub body: Bytes,
    /// The path's segments, percent-decoded.
    segments: Vec<String>,
    /// The query's pairs, decoded, in order.
    query: Vec<(String, String)>,
}

impl Request {
    /// Parses path and query out of `target`.
    pub fn new(method: Method, target: &str, headers: HeaderMap, body: Bytes) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let decoded = |segment: &str| percent_decode_str(segment).decode_utf8_lossy().into_owned();
        let segments = path.trim_start_matches('/').split('/').map(decoded).collect();
        let query = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        Self { method, target: target.into(), headers, body, segments, query }
    }

    /// Method and decoded path segments, for matching.
    pub fn route(&self) -> (&str, Vec<&str>) {
        (self.method.as_str(), self.segments.iter().map(String::as_str).collect())
    }

    /// The first query parameter of this name.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All query parameters, in order.
    pub fn query_pairs(&self) -> &[(String, String)] {
        &self.query
    }

    /// The body deserialized from JSON. An empty body counts as `{}`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        let body = if self.body.is_empty() { b"{}" } else { self.body.as_ref() };
        serde_json::from_slice(body).map_err(|e| Refusal::about(Kind::BadRequest, e.to_string()))
    }

    /// The bearer token, if there is exactly one `Authorization` header and it carries one.
    pub fn bearer(&self) -> Option<&str> {
        let values: Vec<_> = self.headers.get_all(http::header::AUTHORIZATION).iter().collect();
        match values.as_slice() {
            [one] => one.to_str().ok()?.strip_prefix("Bearer "),
            _ => None,
        }
    }
}

/// A response.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// The status.
    pub status: StatusCode,
    /// Headers besides those that the server adds.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body, if there is one.
    pub body: Option<Bytes>,
}

impl Response {
    /// 200 with a JSON body.
    pub fn ok(body: &Value) -> Self {
        Self::json(StatusCode::OK, body)
    }

    /// A JSON body.
    pub fn json(status: StatusCode, body: &Value) -> Self {
        Self::new(status, "application/json; charset=utf-8", body.to_string())
    }

    /// A plain text body.
    pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::new(status, "text/plain; charset=utf-8", body)
    }

    /// A body of any content type.
    pub fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        let headers = vec![(CONTENT_TYPE, HeaderValue::from_static(content_type))];
        Self { status, headers, body: Some(body.into()) }
    }

    /// 204.
    pub fn no_content() -> Self {
        Self { status: StatusCode::NO_CONTENT, headers: Vec::new(), body: None }
    }

    /// 303 to a URL. `Location` is left out if a header cannot hold the URL.
    pub fn see_other(to: &str) -> Self {
        let location = HeaderValue::try_from(to).map(|to| (LOCATION, to));
        Self { status: StatusCode::SEE_OTHER, headers: location.into_iter().collect(), body: None }
    }

    /// The same as hyper sends it, with the body that `wrap` makes.
    pub(super) fn into_http<B>(self, wrap: impl FnOnce(Option<Bytes>) -> B) -> http::Response<B> {
        let mut response = http::Response::new(wrap(self.body));
        *response.status_mut() = self.status;
        response.headers_mut().extend(self.headers);
        response
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        let mut response = Self::json(refusal.status(), &refusal.body());
        response.headers.extend(refusal.retry_after.map(|seconds| (RETRY_AFTER, seconds.into())));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoded_slash_does_not_split_a_path_segment() {
        let request = |target| Request::new(Method::GET, target, HeaderMap::new(), Bytes::new());
        for (target, connector) in [
            ("/v1/connect/connectors/slack%2Facme-slack", "slack/acme-slack"),
            ("/v1/connect/connectors/slack%2facme-slack?teamId=team_acme", "slack/acme-slack"),
            ("/v1/connect/connectors/a%252Fb", "a%2Fb"),
            ("/v1/connect/connectors/", ""),
        ] {
            assert_eq!(request(target).route().1, ["v1", "connect", "connectors", connector], "{target}");
        }
        assert_eq!(request("/x?a=1+2&a=3&b=%2F").query("a"), Some("1 2"));
    }
}
