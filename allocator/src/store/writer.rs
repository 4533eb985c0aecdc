//! The thread that writes: batches that wait while one commit is on its way to the disk share the
//! next one.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use super::{Batch, MetadataStore, StoreError};

/// Most batches of one commit, so that the first of them does not wait without limit.
const BATCHES_MAX: usize = 1024;

type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Hands batches to the thread that owns the store. Dropping it waits for all that were handed
/// over.
#[derive(Debug)]
pub struct Writer {
    queue: Option<Sender<(Batch, Done)>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn start(store: impl MetadataStore) -> io::Result<Writer> {
        let (queue, waiting) = channel();
        let thread =
            thread::Builder::new().name("metadata".to_owned()).spawn(move || run(store, &waiting))?;
        Ok(Writer { queue: Some(queue), thread: Some(thread) })
    }

    /// Queues a batch; does not block. `done` is called when it is durable, or with the error of
    /// the store, after which nothing more is written.
    /// Batches become durable in the order of these calls. After an error was reported once,
    /// `done` is dropped without being called.
    pub fn write(&self, batch: Batch, done: Box<dyn FnOnce(Result<(), StoreError>) + Send>) {
        if let Some(queue) = &self.queue {
            // The thread ends early only after an error, which was reported then.
            let _ = queue.send((batch, done));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed already.
            let _ = thread.join();
        }
    }
}

fn run(mut store: impl MetadataStore, waiting: &Receiver<(Batch, Done)>) {
    while let Ok(first) = waiting.recv() {
        let (batches, dones): (Vec<Batch>, Vec<Done>) =
            std::iter::once(first).chain(waiting.try_iter().take(BATCHES_MAX - 1)).unzip();
        match store.commit(&batches) {
            Ok(()) => dones.into_iter().for_each(|done| done(Ok(()))),
            Err(error) => {
                // One report is enough: whoever gets it ends the program.
                if let Some(done) = dones.into_iter().next() {
                    done(Err(error));
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::{Decisions, Loaded};
    use super::*;
    use crate::store::Change;
    use crate::testing::allocation;

    /// Reports the size of each commit, and waits for leave to go on.
    struct Gated {
        commits: Sender<usize>,
        leave: Receiver<bool>,
    }

    impl MetadataStore for Gated {
        fn load(&mut self) -> Result<Loaded, StoreError> {
            Ok(Loaded::default())
        }

        fn decisions(&self) -> Box<dyn Decisions> {
            panic!("no test of the writer reads decisions")
        }

        fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
            self.commits.send(batches.len()).unwrap();
            match self.leave.recv().unwrap() {
                true => Ok(()),
                false => Err(StoreError::Damaged { path: "x".into(), what: "a test says so".into() }),
            }
        }
    }

    fn batch(number: u128) -> Batch {
        vec![Change::Allocation(Box::new(allocation(number, "a")))]
    }

    #[test]
    fn those_that_wait_share_a_commit() {
        let (commits, sizes) = mpsc::channel();
        let (permit, leave) = mpsc::channel();
        let (order, done) = mpsc::channel();
        let writer = Writer::start(Gated { commits, leave }).unwrap();
        for number in 0..10 {
            let order = order.clone();
            writer
                .write(batch(number), Box::new(move |result| order.send((number, result.is_ok())).unwrap()));
            if number == 0 {
                assert_eq!(sizes.recv().unwrap(), 1);
            }
        }
        permit.send(true).unwrap();
        assert_eq!(sizes.recv().unwrap(), 9);
        permit.send(true).unwrap();
        let order: Vec<_> = done.iter().take(10).collect();
        assert_eq!(order, (0..10).map(|number| (number, true)).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_written_after_an_error() {
        let (commits, sizes) = mpsc::channel();
        let (permit, leave) = mpsc::channel();
        let (report, reports) = mpsc::channel();
        let writer = Writer::start(Gated { commits, leave }).unwrap();
        permit.send(false).unwrap();
        writer.write(batch(1), Box::new(move |result| report.send(result.is_err()).unwrap()));
        assert!(reports.recv().unwrap());
        writer.write(batch(2), Box::new(|_| panic!("it is not called")));
        drop(writer);
        assert_eq!(sizes.iter().collect::<Vec<_>>(), [1]);
    }
}
