//! What cannot be served as it is written: a line in the log, a count, and where objects come from
//! an API server an Event, which `kubectl describe` shows.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Notify;

use crate::{metrics::Metrics, object::Problem};

/// Problems that wait to be told to the API server; further ones are in the log only.
const WAITING: usize = 256;

/// A problem, and where it is one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Report {
    /// What.
    pub problem: Problem,
    /// On this node; others may do with the same object.
    pub here: bool,
}

#[derive(Debug, Default)]
struct Waiting {
    reports: Mutex<VecDeque<Report>>,
    bell: Notify,
}

/// Where problems go; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Reports {
    metrics: Metrics,
    waiting: Arc<Waiting>,
}

impl Reports {
    /// Counts in `metrics`.
    pub fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            waiting: Arc::default(),
        }
    }

    /// Where they are counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Something in an object, which every node finds.
    pub fn report(&self, problem: Problem) {
        self.add(Report {
            problem,
            here: false,
        });
    }

    /// Something that this node cannot do for an object.
    pub fn report_here(&self, problem: Problem) {
        self.add(Report {
            problem,
            here: true,
        });
    }

    /// Never waits.
    fn add(&self, report: Report) {
        tracing::warn!("{}", report.problem);
        self.metrics.problem(&report.problem.kind);
        let mut reports = self
            .waiting
            .reports
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if reports.len() < WAITING {
            reports.push_back(report);
            self.waiting.bell.notify_one();
        }
    }

    /// The oldest report that nobody has taken yet, once there is one. For one at a time.
    pub async fn next(&self) -> Report {
        loop {
            let first = self
                .waiting
                .reports
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            if let Some(report) = first {
                return report;
            }
            self.waiting.bell.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::ObjectName;

    /// Whoever reports is never held up, and memory is not either.
    #[tokio::test]
    async fn the_first_reports_wait_in_order() {
        let reports = Reports::default();
        for number in 0..WAITING + 10 {
            let name = ObjectName::new("shop", &format!("web-{number}"));
            reports.report(Problem::new("Service", &name, "spec", "is odd"));
        }
        for number in 0..WAITING {
            let name = reports.next().await.problem.name.unwrap();
            assert_eq!(*name.name, format!("web-{number}"));
        }
        let none = tokio::time::timeout(std::time::Duration::from_millis(20), reports.next());
        assert!(none.await.is_err());
    }
}
