//! The log of the thread a test runs on. Tests run on one thread each, and so do the sidecars in them.

use std::fmt::Debug;
use std::fmt::Write as _;
use std::sync::Arc;

use tokio::sync::watch;
use tracing::field::{Field, Visit};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::{Layer, Registry};

use super::soon;

/// What was logged since the capture began.
pub struct Logs {
    lines: Arc<watch::Sender<Vec<String>>>,
    _capture: DefaultGuard,
}

impl Logs {
    pub fn capture() -> Self {
        let lines = Arc::new(watch::Sender::new(Vec::new()));
        let subscriber = Registry::default().with(Collector(lines.clone()));
        Self { _capture: tracing::subscriber::set_default(subscriber), lines }
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.borrow().clone()
    }

    pub fn count(&self, text: &str) -> usize {
        self.lines.borrow().iter().filter(|line| line.contains(text)).count()
    }

    /// How many lines there are for whoever does not look for any.
    pub fn warnings(&self) -> usize {
        self.lines.borrow().iter().filter(|line| line.starts_with("WARN") || line.starts_with("ERROR")).count()
    }

    /// Returns once a line contains the text.
    pub async fn wait_for(&self, text: &str) {
        self.wait_for_count(text, 1).await;
    }

    /// Returns once so many lines contain the text.
    pub async fn wait_for_count(&self, text: &str, count: usize) {
        let mut lines = self.lines.subscribe();
        let are_there = |lines: &Vec<String>| lines.iter().filter(|line| line.contains(text)).count() >= count;
        soon(text, lines.wait_for(are_there)).await.expect("a log");
    }
}

struct Collector(Arc<watch::Sender<Vec<String>>>);

impl<S: Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if !event.metadata().target().starts_with("connect_sidecar") {
            return;
        }
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        self.0.send_modify(|lines| lines.push(line.0));
    }
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => write!(self.0, " {value:?}").expect("a string"),
            name => write!(self.0, " {name}={value:?}").expect("a string"),
        }
    }
}
