//! Something between sidecar and upstream that forgets its connections, as a network that was switched does: what is sent
//! on them is taken, and nothing ever comes back.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::tls::listen;

/// A running one.
pub struct Forwarder {
    pub addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    /// How often it forgot.
    forgot: watch::Sender<usize>,
}

impl Forwarder {
    pub async fn to(there: SocketAddr) -> Self {
        let connections = Arc::new(AtomicUsize::new(0));
        let forgot = watch::Sender::new(0);
        let (counting, forgetting) = (connections.clone(), forgot.clone());
        let addr = listen(Ipv4Addr::LOCALHOST.into(), move |mut near| {
            counting.fetch_add(1, Ordering::Relaxed);
            let mut forgot = forgetting.subscribe();
            async move {
                let Ok(mut far) = TcpStream::connect(there).await else { return };
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                    _ = forgot.changed() => {}
                }
                // Both stay open for as long as the test runs.
                std::future::pending::<()>().await;
            }
        })
        .await;
        Self { addr, connections, forgot }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// How many connections there ever were.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// From now on nothing goes over the connections that there are.
    pub fn forget(&self) {
        self.forgot.send_modify(|times| *times += 1);
    }
}
