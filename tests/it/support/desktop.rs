//! A desktop: a session bus of its own, and somebody on it who shows notices.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::Arc;

use futures_util::StreamExt;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use zbus::OwnedVariant;
use zbus::message::Type;
use zbus::{Connection, MessageStream};

use super::soon;

/// A notice that was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub id: u32,
    /// The one in whose place it came, or 0.
    pub replaces: u32,
    pub title: String,
    pub body: String,
    /// 2 is critical.
    pub urgency: u8,
}

pub struct Desktop {
    /// What programs know as `DBUS_SESSION_BUS_ADDRESS`.
    pub address: String,
    notices: Arc<watch::Sender<Vec<Notice>>>,
    _bus: Child,
}

impl Desktop {
    pub async fn new() -> Self {
        let mut bus = Command::new("dbus-daemon");
        bus.args(["--session", "--nofork", "--nosyslog", "--print-address", "--address=unix:tmpdir=/tmp"]);
        bus.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut bus =
            bus.spawn().expect("this test wants `dbus-daemon` (Debian and Ubuntu: apt-get install dbus-daemon)");
        let mut lines = BufReader::new(bus.stdout.take().expect("stdout")).lines();
        let address = soon("a bus", lines.next_line()).await.expect("a line").expect("an address");
        let notices = Arc::new(watch::Sender::default());
        let builder = zbus::connection::Builder::address(address.as_str());
        let connection = soon("the bus", builder.build()).await.expect("a connection");
        let calls = MessageStream::from(&connection);
        connection.request_name("org.freedesktop.Notifications").await.expect("a name of its own");
        tokio::spawn(show(connection, calls, notices.clone()));
        Self { address, notices, _bus: bus }
    }

    /// Makes this the desktop of a command.
    pub fn of(&self, command: &mut Command) {
        command.env("DBUS_SESSION_BUS_ADDRESS", &self.address);
    }

    /// What was shown so far, in its order.
    pub fn shown(&self) -> Vec<Notice> {
        self.notices.borrow().clone()
    }

    /// The first notice that this is true of, once it is shown.
    pub async fn shows(&self, is_meant: impl Fn(&Notice) -> bool) -> Notice {
        let mut notices = self.notices.subscribe();
        let shown =
            soon("a notice", notices.wait_for(|notices| notices.iter().any(&is_meant))).await.expect("a desktop");
        shown.iter().find(|notice| is_meant(notice)).expect("just seen").clone()
    }
}

/// Shows what is sent to it, as the Desktop Notifications Specification has it.
async fn show(connection: Connection, mut calls: MessageStream, notices: Arc<watch::Sender<Vec<Notice>>>) {
    type Notify = (String, u32, String, String, String, Vec<String>, HashMap<String, OwnedVariant>, i32);
    while let Some(Ok(message)) = calls.next().await {
        let header = message.header();
        let is_notify = header.member().is_some_and(|member| member == "Notify");
        if header.message_type() != Type::MethodCall || !is_notify {
            continue;
        }
        let (app, replaces, _, title, body, _, hints, _): Notify = message.body().deserialize().expect("a notice");
        assert_eq!(app, "connect-sidecar");
        let urgency = hints.get("urgency").map(|urgency| u8::try_from(urgency).expect("a byte")).expect("an urgency");
        let mut id = replaces;
        notices.send_modify(|shown| {
            if id == 0 {
                id = 100 + u32::try_from(shown.len()).expect("a few");
            }
            shown.push(Notice { id, replaces, title, body, urgency });
        });
        let _ = connection.reply(&header, &id).await;
    }
}
