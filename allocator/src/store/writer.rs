//! The thread that writes to the store: batches that arrive during one commit share the next one.
//!
//! If a commit fails with an error that may pass (a full disk, etcd out of reach), the same batches are tried again
//! until they are durable, and requesters are told meanwhile.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::{Batch, MetadataStore, StoreError};

/// Most batches of one commit, so that the first of them does not wait without limit.
const BATCHES_MAX: usize = 1024;

/// Pause before a commit is tried again.
const PAUSE: Duration = Duration::from_millis(300);
/// How long dropping a writer waits for pending batches.
const END_LIMIT: Duration = Duration::from_secs(4);

type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Called with the reason when nothing can be written now, and with none when writing works again.
pub type Tell = Box<dyn Fn(Option<String>) + Send>;

/// Queue to the thread that owns the store. Dropping it waits for all pending batches, but not for long: batches that
/// are pending after that are lost, as in a crash.
#[derive(Debug)]
pub struct Writer {
    queue: Option<Sender<(Batch, Done)>>,
    /// Dropped to make the thread give up retries.
    stop: Option<Sender<()>>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Writer {
    /// Starts the thread.
    pub fn start(store: impl MetadataStore, tell: Tell) -> io::Result<Writer> {
        let (queue, waiting) = channel();
        let (stop, stopped) = channel();
        let (running, ended) = channel();
        thread::Builder::new().name("metadata".to_owned()).spawn(move || {
            run(store, &waiting, &stopped, &tell);
            drop(running);
        })?;
        Ok(Writer { queue: Some(queue), stop: Some(stop), ended })
    }

    /// Queues a batch; does not block. `done` is called when the batch is durable, or with the error of the store,
    /// after which nothing more is written. Batches become durable in the order of these calls. After an error was
    /// reported once, `done` is dropped without being called.
    pub fn write(&self, batch: Batch, done: Box<dyn FnOnce(Result<(), StoreError>) + Send>) {
        if let Some(queue) = &self.queue {
            // The thread ends early only after an error, which it has reported.
            let _ = queue.send((batch, done));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        (self.queue, self.stop) = (None, None);
        // Not joined: a thread that waits for etcd, or for a disk that hangs, would keep the process from exiting.
        let _ = self.ended.recv_timeout(END_LIMIT);
    }
}

fn run(
    mut store: impl MetadataStore,
    waiting: &Receiver<(Batch, Done)>,
    stopped: &Receiver<()>,
    tell: &Tell,
) {
    while let Ok(first) = waiting.recv() {
        let (batches, dones): (Vec<Batch>, Vec<Done>) =
            std::iter::once(first).chain(waiting.try_iter().take(BATCHES_MAX - 1)).unzip();
        match commit(&mut store, &batches, stopped, tell) {
            Ok(()) => dones.into_iter().for_each(|done| done(Ok(()))),
            Err(error) => {
                // A single report is enough: the program exits after it.
                if let Some(done) = dones.into_iter().next() {
                    done(Err(error));
                }
                return;
            }
        }
    }
}

/// Commits, and retries as long as it may still succeed.
fn commit(
    store: &mut impl MetadataStore,
    batches: &[Batch],
    stopped: &Receiver<()>,
    tell: &Tell,
) -> Result<(), StoreError> {
    let mut told = None;
    let mut done = store.commit(batches);
    loop {
        let Err(error) = done else {
            if told.is_some() {
                tell(None);
            }
            return Ok(());
        };
        let Some(why) = error.passing() else { return Err(error) };
        if told.as_ref() != Some(&why) {
            tell(Some(why.clone()));
            told = Some(why);
        }
        if stopped.recv_timeout(PAUSE) == Err(RecvTimeoutError::Disconnected) {
            return Err(error);
        }
        done = store.reopen().and_then(|()| store.commit(batches));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use xpm_protocol::api::decision::Decision;

    use super::super::{Decisions, Loaded};
    use super::*;
    use crate::store::Change;
    use crate::testing::allocation;

    /// A store whose commits call this function.
    struct Fake<F>(F);

    impl<F: FnMut(&[Batch]) -> Result<(), StoreError> + Send + 'static> MetadataStore for Fake<F> {
        fn load(&mut self) -> Result<Loaded, StoreError> {
            Ok(Loaded::default())
        }

        fn all_decisions(&mut self) -> Result<Vec<(u64, Decision)>, StoreError> {
            Ok(Vec::new())
        }

        fn decisions(&self) -> Box<dyn Decisions> {
            panic!("no test of the writer reads decisions")
        }

        fn commit(&mut self, batches: &[Batch]) -> Result<(), StoreError> {
            (self.0)(batches)
        }
    }

    /// Reports the size of each commit, and waits for permission to go on.
    fn gated(commits: Sender<usize>, leave: Receiver<bool>) -> impl MetadataStore {
        Fake(move |batches: &[Batch]| {
            commits.send(batches.len()).unwrap();
            match leave.recv().unwrap() {
                true => Ok(()),
                false => Err(StoreError::Damaged { path: "x".into(), what: "a test says so".into() }),
            }
        })
    }

    /// Fails for lack of room the first times.
    fn full(mut times: u32) -> impl MetadataStore {
        Fake(move |_: &[Batch]| {
            times = times.saturating_sub(1);
            match times {
                0 => Ok(()),
                _ => Err(StoreError::Full { why: "full".into() }),
            }
        })
    }

    fn batch(number: u128) -> Batch {
        vec![Change::Allocation(Box::new(allocation(number, "a")))]
    }

    #[test]
    fn waiting_batches_share_a_commit() {
        let (commits, sizes) = mpsc::channel();
        let (permit, leave) = mpsc::channel();
        let (order, done) = mpsc::channel();
        let writer = Writer::start(gated(commits, leave), Box::new(|_| {})).unwrap();
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
        let writer = Writer::start(gated(commits, leave), Box::new(|_| {})).unwrap();
        permit.send(false).unwrap();
        writer.write(batch(1), Box::new(move |result| report.send(result.is_err()).unwrap()));
        assert!(reports.recv().unwrap());
        writer.write(batch(2), Box::new(|_| panic!("it is not called")));
        drop(writer);
        assert_eq!(sizes.iter().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn a_batch_without_room_is_written_when_there_is_room() {
        let (news, told) = mpsc::channel();
        let (order, done) = mpsc::channel();
        let writer = Writer::start(full(3), Box::new(move |why| news.send(why).unwrap())).unwrap();
        writer.write(batch(1), Box::new(move |result| order.send(result.is_ok()).unwrap()));
        assert_eq!(told.recv().unwrap().as_deref(), Some("full"));
        assert_eq!(told.recv().unwrap(), None);
        assert!(done.recv().unwrap());
        let writer = Writer::start(full(u32::MAX), Box::new(|_| {})).unwrap();
        writer.write(batch(1), Box::new(|_| {}));
        // The drop does not wait for ever.
        drop(writer);
    }
}
