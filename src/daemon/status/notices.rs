//! Warnings as desktop notices, for whoever does not look at a log: one at a time, replaced by the next, and by the good
//! news of a fresh token.
//!
//! A desktop that is not there or does not answer is no trouble: it costs a bounded wait in a task of its own and a line
//! for whoever debugs. Never shown: anything of a token; a project's name is foreign text and stands where no desktop
//! reads markup.

use std::time::Duration;

use notify_rust::{Notification, NotificationHandle};
use tracing::debug;

use crate::credential::warning::Warning as Expiry;
use crate::events::{Event, Events, Rotation, Subscription, Warning};
use crate::os::clock::spoken;
use crate::remedy::Remedy;

/// A desktop that has not shown a notice by then will not.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest title, in characters: names are as long as somebody likes.
const LONGEST_TITLE: usize = 120;

/// What is told from its making on, as notices.
pub struct Notices {
    events: Subscription,
    about_to_end: Duration,
}

/// One notice.
#[derive(Debug, PartialEq, Eq)]
struct Notice {
    /// Plain text to every desktop.
    title: String,
    /// Markup to some.
    body: String,
    is_urgent: bool,
}

impl Notices {
    /// Shows what happens from now on. A token with no more life than `about_to_end` is no good news.
    pub fn of(events: &Events, about_to_end: Duration) -> Self {
        Self { events: events.subscribe_without_hits(), about_to_end }
    }

    /// Shows it, for as long as it is polled.
    pub async fn run(mut self) {
        let mut shown: Option<NotificationHandle> = None;
        let mut is_warning = false;
        while let Some(event) = self.events.next().await {
            let notice = match &*event {
                Event::Warning(warning) => Notice::of_warning(warning),
                Event::Rotation(fresh) if is_warning && fresh.expires_at.since(fresh.at) > self.about_to_end => {
                    Notice::of_rotation(fresh)
                }
                Event::Rotation(_) | Event::Request(_) | Event::Refusal(_) => continue,
            };
            is_warning = matches!(*event, Event::Warning(_));
            match tokio::time::timeout(PATIENCE, show(&notice, shown.as_ref())).await {
                // Kept: some desktops take a notice away once whoever sent it is gone.
                Ok(Ok(handle)) => shown = Some(handle),
                Ok(Err(error)) => debug!("could not show a desktop notice: {error}"),
                Err(_) => debug!("could not show a desktop notice within {} s", PATIENCE.as_secs()),
            }
        }
    }
}

impl Notice {
    fn of_warning(warning: &Warning) -> Self {
        Self {
            title: plain(&warning.message),
            body: match &warning.remedy {
                Remedy { command: Some(command), .. } => format!("Run: {command}"),
                remedy => remedy.to_string(),
            },
            is_urgent: warning.code == Expiry::EXPIRED,
        }
    }

    fn of_rotation(fresh: &Rotation) -> Self {
        Self {
            title: plain(&format!("The OIDC token of {} was refreshed", fresh.project)),
            body: format!("It expires in {}.", spoken(fresh.expires_at.since(fresh.at))),
            is_urgent: false,
        }
    }
}

/// What a bus takes and a bubble has room for.
fn plain(text: &str) -> String {
    text.trim_end_matches('.').chars().filter(|c| !c.is_control()).take(LONGEST_TITLE).collect()
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

/// There, a notice cannot be replaced, and to show one blocks.
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
    fn a_notice_says_what_and_for_how_long_of_which_project_and_the_command() {
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

        let told = |warning: Expiry| Notice::of_warning(&warning.told(Timestamp::from_millis(0), "acme/web".into()));
        for (warning, title, body) in [
            (
                Expiry::refresh_unavailable("the Vercel CLI is not on PATH"),
                "The OIDC token cannot be refreshed: the Vercel CLI is not on PATH",
                "Run: npm install --global vercel",
            ),
            (
                Expiry::refresh_gave_up(3, &Remedy::run("vercel login")),
                "Gave up refreshing the OIDC token after 3 failures in a row: `vercel login` may help",
                "Run: connect-sidecar refresh",
            ),
        ] {
            assert_eq!(told(warning), Notice { title: title.into(), body: body.into(), is_urgent: false });
        }

        let hostile = Notice::of_warning(&warning("oidc_token_expired", &format!("\0\x1b<b>{}", "x".repeat(20_000))));
        assert!(hostile.title.starts_with("The OIDC token of <b>xxx"), "{}", hostile.title);
        assert_eq!((hostile.title.chars().count(), hostile.body.as_str()), (LONGEST_TITLE, "Run: vercel env pull"));
    }
}
