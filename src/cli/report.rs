//! Formats a sidecar's status for people, as a page of text or one line. Pure.
//!
//! Names are foreign text, so all of them are escaped.

use std::fmt::Write;
use std::time::Duration;

use crate::instance::status::{OidcStatus, StatusReport, TokenStatus, UpstreamStatus, WarningStatus};
use crate::os::clock::{Timestamp, format_duration};
use crate::os::terminal::{Color, Palette, escaped};
use crate::remedy::Remedy;

impl StatusReport {
    /// One line for a prompt, without a line end: `web 11 h 59 min`, or what is wrong and the command that fixes it.
    pub(super) fn short(&self) -> String {
        let name = self.oidc.project.as_ref().unwrap_or(&self.project);
        let mut line = format!("{name} {}", self.oidc.short());
        let token_warning = self.warnings.iter().find(|warning| warning.code.starts_with("oidc_token_"));
        match token_warning.and_then(|warning| warning.remedy.as_ref()) {
            Some(Remedy { command: Some(command), .. }) => write!(line, ", run {command}"),
            Some(Remedy { hint, .. }) => write!(line, ", {hint}"),
            None => Ok(()),
        }
        // Writing to a string cannot fail.
        .unwrap_or_default();
        escaped(&line)
    }

    /// The whole status. `local_time` is used if the sidecar's time cannot be derived from the report.
    pub(super) fn long(&self, url: &str, palette: Palette, local_time: Timestamp) -> String {
        let Self { version, pid, project, oidc, cache, upstream, failures, warnings, .. } = self;
        let mut page = Page { palette, text: String::new() };
        let title = palette.paint(Color::Bold, &escaped(oidc.project.as_ref().unwrap_or(project)));
        let state = palette.paint(oidc.color(), &escaped(&oidc.long()));
        let _ = writeln!(page.text, "{title}  {state}\n");

        let claims = [("project", &oidc.project), ("team", &oidc.owner), ("environment", &oidc.environment)];
        let known = claims.iter().filter_map(|(name, value)| Some(format!("{name} {}", value.as_ref()?)));
        page.row("identity", &known.collect::<Vec<_>>().join(", "));
        let fingerprint = oidc.fingerprint.iter().map(|fingerprint| format!("fingerprint {fingerprint}"));
        let end = oidc.expires_at.iter().map(|end| format!("until {end}"));
        let token: Vec<_> = [oidc.source.clone()].into_iter().chain(fingerprint).chain(end).collect();
        page.row("token", &token.join(", "));
        page.row("sidecar", &format!("{url}, version {version}, process {pid}"));
        page.row("upstream", &format!("{}, {}", upstream.url, upstream.request_counts(failures.count > 0)));
        if failures.count > 0 {
            let last = failures.last_at.as_ref().map(|at| format!(", the last at {at}")).unwrap_or_default();
            let failed = palette.paint(Color::Yellow, &count(failures.count, "request"));
            page.colored_row("failed", &format!("{failed}{}, see `connect-sidecar logs`", escaped(&last)));
        }
        page.row(
            "cache",
            &format!(
                "{}; hits {}, misses {}, collapsed {}: {} saved",
                count(cache.entries as u64, "token"),
                cache.hits,
                cache.misses,
                cache.collapsed,
                count(cache.requests_saved, "request")
            ),
        );
        page.tokens(&self.tokens, oidc.now().unwrap_or(local_time));
        for WarningStatus { message, remedy, .. } in warnings {
            let _ = writeln!(page.text, "\n{} {}", palette.paint(Color::Yellow, "warning:"), escaped(message));
            if let Some(remedy) = remedy {
                let _ = writeln!(page.text, "         {}", escaped(&remedy.to_string()));
            }
        }
        page.text
    }
}

impl OidcStatus {
    fn left(&self) -> Option<Duration> {
        self.expires_in_seconds.map(Duration::from_secs).filter(|left| !left.is_zero())
    }

    fn short(&self) -> String {
        match self.state.as_str() {
            "valid" | "expiring" => self.left().map_or_else(|| self.state.clone(), format_duration),
            state => state.to_owned(),
        }
    }

    fn long(&self) -> String {
        let details = match (&self.reason, self.left()) {
            (Some(reason), _) => format!(": {reason}"),
            (None, Some(left)) => format!(", {} left", format_duration(left)),
            (None, None) => String::new(),
        };
        format!("{}{details}", self.state)
    }

    fn color(&self) -> Color {
        match self.state.as_str() {
            "valid" => Color::Green,
            "expiring" => Color::Yellow,
            _ => Color::Red,
        }
    }

    /// The time of the report by the sidecar's clock, which is corrected by upstream's.
    fn now(&self) -> Option<Timestamp> {
        Some(Timestamp::parse(self.expires_at.as_ref()?)?.minus(self.left()?))
    }
}

impl UpstreamStatus {
    fn request_counts(&self, has_failures: bool) -> String {
        match (self.requests, self.errors) {
            (0, 0) => "nothing sent yet".to_owned(),
            (requests, 0) if has_failures => count(requests, "request"),
            (requests, errors) => format!("{}, {}", count(requests, "request"), count(errors, "error")),
        }
    }
}

struct Page {
    palette: Palette,
    text: String,
}

impl Page {
    fn row(&mut self, name: &str, value: &str) {
        if !value.is_empty() {
            self.colored_row(name, &escaped(value));
        }
    }

    /// A row with a value that is already escaped.
    fn colored_row(&mut self, name: &str, value: &str) {
        let name = self.palette.paint(Color::Dim, &format!("{name:<10}"));
        let _ = writeln!(self.text, "  {name}{value}");
    }

    fn tokens(&mut self, tokens: &[TokenStatus], now: Timestamp) {
        let mut rows: Vec<_> = tokens
            .iter()
            .map(|TokenStatus { connector, subject, expires_at, hits, .. }| {
                let left = Timestamp::parse(expires_at)
                    .map_or_else(|| expires_at.clone(), |end| format_duration(end.since(now)));
                [escaped(connector), escaped(subject), escaped(&left), hits.to_string()]
            })
            .collect();
        if rows.is_empty() {
            return;
        }
        rows.sort();
        rows.insert(0, ["CONNECTOR", "SUBJECT", "LEFT", "HITS"].map(String::from));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let [connectors, subjects, lefts] = [width(0), width(1), width(2)];
        self.text.push('\n');
        for (i, [connector, subject, left, hits]) in rows.iter().enumerate() {
            let row = format!("{connector:connectors$}  {subject:subjects$}  {left:lefts$}  {hits}");
            let _ = writeln!(self.text, "  {}", if i == 0 { self.palette.paint(Color::Dim, &row) } else { row });
        }
    }
}

fn count(number: u64, noun: &str) -> String {
    match number {
        0 => format!("no {noun}s"),
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn state() -> Value {
        json!({
            "version": "0.1.0", "pid": 4711, "uptime_seconds": 12, "project": "folder",
            "oidc": {
                "state": "valid", "source": ".env.local", "expires_at": "2026-11-23T12:00:00Z",
                "expires_in_seconds": 43_199, "owner": "acme", "project": "web", "environment": "development",
                "fingerprint": "3f9a1c20",
            },
            "cache": {"entries": 2, "hits": 10, "misses": 3, "collapsed": 2, "requests_saved": 12},
            "upstream": {"url": "https://api.vercel.com", "requests": 3, "errors": 0},
            "tokens": [
                {"connector": "slack/acme-slack", "subject": "app", "expires_at": "2026-11-23T01:00:00Z", "hits": 4},
                {"connector": "a\u{1b}[2J", "subject": "user", "expires_at": "2026-11-23T00:00:31Z", "hits": 0},
            ],
            "warnings": [], "settings": {},
        })
    }

    fn report(change: impl FnOnce(&mut Value)) -> StatusReport {
        let mut state = state();
        change(&mut state);
        serde_json::from_value(state).expect("a state")
    }

    fn warn(state: &mut Value, of: &str, left: u64, hint: Option<&str>) {
        state["oidc"]["state"] = of.into();
        state["oidc"]["expires_in_seconds"] = left.into();
        state["warnings"] =
            json!([{"code": format!("oidc_token_{of}"), "message": "It is.", "hint": hint, "command": hint}]);
    }

    #[test]
    fn one_line_has_the_time_left_or_the_command_to_run() {
        let pull = Some("vercel env pull");
        for (line, report) in [
            ("web 11 h 59 min", report(|_| {})),
            ("web 14 min, run vercel env pull", report(|s| warn(s, "expiring", 899, pull))),
            ("web 14 min", report(|s| warn(s, "expiring", 899, None))),
            ("web expired, run vercel env pull", report(|s| warn(s, "expired", 0, pull))),
            ("web invalid, run vercel env pull", report(|s| warn(s, "invalid", 0, pull))),
            ("web 11 h 59 min", report(|s| s["warnings"] = json!([{"code": "x", "message": "x", "hint": "chmod"}]))),
            ("folder missing", report(|s| s["oidc"] = json!({"state": "missing", "source": ".env.local"}))),
            ("folder valid", report(|s| s["oidc"] = json!({"state": "valid", "source": "VERCEL_TOKEN"}))),
            (r"a\u{a}b 11 h 59 min", report(|s| s["oidc"]["project"] = "a\nb".into())),
        ] {
            assert_eq!(report.short(), line);
        }
    }

    #[test]
    fn the_page_is_aligned_and_uses_the_sidecars_clock() {
        let report = report(|state| warn(state, "expiring", 43_199, Some("vercel env pull")));
        assert_eq!(
            report.long("http://127.0.0.1:2774", Palette::new(false), Timestamp::from_millis(0)),
            "\
web  expiring, 11 h 59 min left

  identity  project web, team acme, environment development
  token     .env.local, fingerprint 3f9a1c20, until 2026-11-23T12:00:00Z
  sidecar   http://127.0.0.1:2774, version 0.1.0, process 4711
  upstream  https://api.vercel.com, 3 requests, no errors
  cache     2 tokens; hits 10, misses 3, collapsed 2: 12 requests saved

  CONNECTOR         SUBJECT  LEFT    HITS
  a\\u{1b}[2J        user     30 s    0
  slack/acme-slack  app      59 min  4

warning: It is.
         run `vercel env pull`
"
        );
    }

    #[test]
    fn a_status_without_a_token_says_why() {
        let report = report(|state| {
            state["oidc"] = json!({"state": "invalid", "reason": "it is \u{1b}[2J", "source": ".env.local"});
            state["tokens"] = json!([]);
        });
        let page = report.long("http://127.0.0.1:1", Palette::new(true), Timestamp::from_millis(0));
        assert!(page.starts_with("\x1b[1mfolder\x1b[0m  \x1b[31minvalid: it is \\u{1b}[2J\x1b[0m\n"), "{page}");
        assert!(!page.contains("identity") && !page.contains("CONNECTOR"), "{page}");
    }

    #[test]
    fn no_errors_is_shown_only_if_requests_were_sent_and_none_failed() {
        for (requests, errors, failures, upstream, failed) in [
            (0, 0, 0, "https://api.vercel.com, nothing sent yet\n", None),
            (3, 0, 0, "https://api.vercel.com, 3 requests, no errors\n", None),
            (3, 1, 2, "https://api.vercel.com, 3 requests, 1 error\n", Some("  failed    2 requests, the last at ")),
            (3, 0, 1, "https://api.vercel.com, 3 requests\n", Some("  failed    1 request, the last at ")),
            (0, 0, 1, "https://api.vercel.com, nothing sent yet\n", Some("  failed    1 request, the last at ")),
        ] {
            let report = report(|state| {
                state["upstream"]["requests"] = requests.into();
                state["upstream"]["errors"] = errors.into();
                state["failures"] = json!({"count": failures, "last_at": "2026-11-23T00:00:00Z"});
            });
            let page = report.long("u", Palette::new(false), Timestamp::from_millis(0));
            assert!(page.contains(upstream), "{page}");
            assert_eq!(page.contains("  failed "), failed.is_some(), "{page}");
            assert!(failed.is_none_or(|failed| page.contains(failed)), "{page}");
        }
    }
}
