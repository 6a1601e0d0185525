//! Shows warnings as desktop notifications. There is one at a time; it is replaced by the next warning, or by the news
//! of a fresh token.
//!
//! A missing or unresponsive desktop costs only a bounded wait in a separate task and a debug line. Nothing of a token
//! is shown. The project's name is untrusted and therefore in the title, where no desktop interprets markup.

use std::time::Duration;

use notify_rust::{Notification, NotificationHandle};
use tracing::debug;

use crate::credential::warning::Warning as Expiry;
use crate::events::{Event, Events, Rotation, Subscription, Warning};
use crate::remedy::Remedy;

/// Time for the desktop to show a notification.
const SHOW_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest title, in characters. The project's name may be longer.
const MAX_TITLE_CHARS: usize = 120;

/// Turns events into notifications.
pub struct Notices {
    events: Subscription,
    expiring_within: Duration,
}

/// A notification.
#[derive(Debug, PartialEq, Eq)]
struct Notice {
    /// Plain text on every desktop.
    title: String,
    /// Interpreted as markup by some desktops.
    body: String,
    is_urgent: bool,
}

impl Notices {
    /// Subscribes to `events`. A fresh token that expires within `expiring_within` is not announced.
    pub fn new(events: &Events, expiring_within: Duration) -> Self {
        Self { events: events.subscribe_without_hits(), expiring_within }
    }

    /// Shows notifications until the events end.
    pub async fn run(mut self) {
        let mut shown: Option<NotificationHandle> = None;
        let mut is_warning = false;
        while let Some(event) = self.events.next().await {
            let notice = match &*event {
                Event::Warning(warning) => Notice::of_warning(warning),
                Event::Rotation(fresh) if is_warning && fresh.expires_at.since(fresh.at) > self.expiring_within => {
                    Notice::of_rotation(fresh)
                }
                Event::Rotation(_) | Event::Request(_) | Event::Refusal(_) => continue,
            };
            is_warning = matches!(*event, Event::Warning(_));
            match tokio::time::timeout(SHOW_TIMEOUT, show(&notice, shown.as_ref())).await {
                // Kept, since some desktops remove a notification when its handle is dropped.
                Ok(Ok(handle)) => shown = Some(handle),
                Ok(Err(error)) => debug!("could not show a desktop notification: {error}"),
                Err(_) => debug!("could not show a desktop notification within {} s", SHOW_TIMEOUT.as_secs()),
            }
        }
    }
}

impl Notice {
    fn of_warning(warning: &Warning) -> Self {
        Self {
            title: title(&warning.message),
            body: match &warning.remedy {
                Remedy { command: Some(command), .. } => format!("Run: {command}"),
                remedy => remedy.to_string(),
            },
            is_urgent: warning.code == Expiry::EXPIRED,
        }
    }

    fn of_rotation(fresh: &Rotation) -> Self {
        Self {
            title: title(&format!("The OIDC token of {} was refreshed", fresh.project)),
            body: format!("It {}.", fresh.expires_at.expiry(fresh.at)),
            is_urgent: false,
        }
    }
}

/// The text without control characters and a final full stop, cut to the longest title.
fn title(text: &str) -> String {
    text.trim_end_matches('.').chars().filter(|c| !c.is_control()).take(MAX_TITLE_CHARS).collect()
}

#[cfg(not(target_os = "macos"))]
async fn show(notice: &Notice, before: Option<&NotificationHandle>) -> notify_rust::error::Result<NotificationHandle> {
    use notify_rust::Urgency;
    let mut notification = Notification::new();
    notification
        .appname("connect-sidecar")
        .icon("dialog-warning")
        .summary(&notice.title)
        .body(&notice.body)
        .urgency(if notice.is_urgent { Urgency::Critical } else { Urgency::Normal });
    if let Some(before) = before {
        notification.id(before.id());
    }
    notification.show_async().await
}

/// On macOS a notification cannot be replaced, and showing one blocks.
#[cfg(target_os = "macos")]
async fn show(notice: &Notice, _before: Option<&NotificationHandle>) -> notify_rust::error::Result<NotificationHandle> {
    let mut notification = Notification::new();
    notification.appname("connect-sidecar").summary(&notice.title).body(&notice.body);
    let showing = tokio::task::spawn_blocking(move || notification.show());
    showing.await.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::clock::Timestamp;

    #[test]
    fn a_notice_has_the_message_and_the_command() {
        let warning = |code, project: &str| Warning {
            at: Timestamp::from_millis(0),
            level: "WARN",
            code,
            message: format!("The OIDC token of {project} expires in 15 min."),
            remedy: Remedy::run("vercel env pull"),
            project: project.into(),
        };
        let notice = Notice::of_warning(&warning("oidc_token_expiring", "acme/web"));
        let title = "The OIDC token of acme/web expires in 15 min".to_owned();
        assert_eq!(notice, Notice { title, body: "Run: vercel env pull".into(), is_urgent: false });
        assert!(Notice::of_warning(&warning("oidc_token_expired", "acme/web")).is_urgent);

        let notice_of =
            |warning: Expiry| Notice::of_warning(&warning.to_event(Timestamp::from_millis(0), "acme/web".into()));
        for (warning, title, body) in [
            (
                Expiry::refresh_unavailable(&"the Vercel CLI is not on PATH"),
                "The OIDC token cannot be refreshed: the Vercel CLI is not on PATH",
                "Run: npm install --global vercel",
            ),
            (
                Expiry::refresh_gave_up(3, &Remedy::run("vercel login")),
                "Gave up refreshing the OIDC token after 3 failures in a row: `vercel login` may help",
                "Run: connect-sidecar refresh",
            ),
        ] {
            assert_eq!(notice_of(warning), Notice { title: title.into(), body: body.into(), is_urgent: false });
        }

        let hostile = Notice::of_warning(&warning("oidc_token_expired", &format!("\0\x1b<b>{}", "x".repeat(20_000))));
        assert!(hostile.title.starts_with("The OIDC token of <b>xxx"), "{}", hostile.title);
        assert_eq!((hostile.title.chars().count(), hostile.body.as_str()), (MAX_TITLE_CHARS, "Run: vercel env pull"));
    }
}
