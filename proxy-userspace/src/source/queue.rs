//! The way from a source to the agent.

use tokio::sync::mpsc;

use crate::{health::Health, object::Event, report::Reports};

/// Batches of events that wait to be brought into the maps; notes since when they do.
#[derive(Clone, Debug)]
pub struct Queue {
    sender: mpsc::Sender<Vec<Event>>,
    health: Health,
    reports: Reports,
}

impl Queue {
    /// Sends to the channel's receiver, which says [`Health::programmed`] and
    /// [`Metrics::programmed`](crate::metrics::Metrics::programmed) after every batch.
    pub fn new(sender: mpsc::Sender<Vec<Event>>, health: Health, reports: Reports) -> Self {
        Self {
            sender,
            health,
            reports,
        }
    }

    /// Where problems go.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Queues a batch as soon as there is room; says whether anybody will take it out.
    pub async fn send(&self, events: Vec<Event>) -> bool {
        self.health.queued();
        self.reports.metrics().queued(&events);
        self.sender.send(events).await.is_ok()
    }

    /// Waits until nobody takes anything out any more.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl From<mpsc::Sender<Vec<Event>>> for Queue {
    /// For those who do not ask how long a batch has waited.
    fn from(sender: mpsc::Sender<Vec<Event>>) -> Self {
        Self::new(sender, Health::default(), Reports::default())
    }
}
