//! Drives Chromium through `browser.mjs`.

use std::process::Stdio;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};

use crate::support::process::isolated;
use crate::support::{npm, soon};

/// A browser with one page.
pub struct Browser {
    _dir: TempDir,
    _child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Browser {
    /// Starts the browser; `None` if it is not available.
    pub async fn start() -> Option<Self> {
        let (driver, axe, node) = (npm::browser().await?, npm::axe().await?, npm::node(npm::NODES[3]).await?);
        let dir = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(driver, dir.path().join("node_modules")).expect("a link");
        std::fs::write(dir.path().join("browser.mjs"), include_str!("browser.mjs")).expect("a file");
        let mut command = isolated(node.join("node").to_str().expect("a path"), dir.path());
        command.arg("browser.mjs").arg(axe).stdin(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("node");
        let stdin = child.stdin.take().expect("stdin");
        let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let mut browser = Self { _dir: dir, _child: child, stdin, lines };
        assert_eq!(browser.answer("its start").await, "ready");
        Some(browser)
    }

    /// Runs a command of `browser.mjs` and returns its result.
    pub async fn run(&mut self, command: Value) -> Value {
        self.stdin.write_all(format!("{command}\n").as_bytes()).await.expect("the browser listens");
        self.answer(&command.to_string()).await
    }

    async fn answer(&mut self, what: &str) -> Value {
        let line = soon(what, self.lines.next_line()).await.expect("stdout").unwrap_or_default();
        let mut answer: Value = serde_json::from_str(&line).expect("JSON");
        assert!(answer["error"].is_null(), "{what}: {}", answer["error"].as_str().unwrap_or_default());
        answer["value"].take()
    }

    /// Waits until a JavaScript expression is truthy.
    pub async fn until(&mut self, expression: &str) {
        self.run(json!(["until", expression])).await;
    }

    /// Waits until the element with this id contains the text.
    pub async fn says(&mut self, id: &str, text: &str) {
        self.until(&format!("document.getElementById({id:?}).innerText.includes({text:?})")).await;
    }

    pub async fn click(&mut self, selector: &str) {
        self.run(json!(["click", selector])).await;
    }

    pub async fn evaluate<T: DeserializeOwned>(&mut self, expression: &str) -> T {
        let value = self.run(json!(["evaluate", expression])).await;
        serde_json::from_value(value).unwrap_or_else(|e| panic!("{expression}: {e}"))
    }

    /// The visible text of an element.
    pub async fn text(&mut self, id: &str) -> String {
        self.evaluate(&format!("document.getElementById({id:?}).innerText")).await
    }

    /// Asserts that there were no errors, no CSP violations, and no requests to other origins.
    pub async fn assert_no_complaints(&mut self, origin: &str) {
        assert_eq!(self.run(json!(["complaints"])).await, json!([]));
        let mut origins: Vec<String> = serde_json::from_value(self.run(json!(["origins"])).await).expect("a list");
        origins.retain(|origin| origin != "null");
        assert_eq!(origins, [origin]);
    }
}
