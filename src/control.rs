//! The `control` crossing: what back tells every worker.
//!
//! In: orders, from back. Out: the same, to each worker in order. Never: blocks back; a worker whose queue of
//! [`ORDERS_MAX`] is full has stopped, misses the order, and shows so by its heartbeat.

use tokio::sync::mpsc;

/// Orders that may wait for one worker.
pub const ORDERS_MAX: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Time has passed: milliseconds since the start. Sweep, hand over figures, show that you live.
    Tick { ms: u64 },
    /// Accept no more, answer with `Connection: close`, end what is idle. The end of the crossing means: stop.
    Drain,
}

/// Back's end of the crossing to all workers.
#[derive(Clone, Debug, Default)]
pub struct Control(Vec<mpsc::Sender<Order>>);

impl Control {
    pub fn add_worker(&mut self) -> mpsc::Receiver<Order> {
        let (sender, receiver) = mpsc::channel(ORDERS_MAX);
        self.0.push(sender);
        receiver
    }

    pub fn tell(&self, order: Order) {
        for worker in &self.0 {
            // Full: the worker hangs, and the watchdog sees that. Closed: it has ended.
            let _ = worker.try_send(order);
        }
    }

    /// Whether every worker has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.iter().all(mpsc::Sender::is_closed)
    }
}
