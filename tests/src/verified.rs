//! A load that verifies what it reads, on a device of form `nbd-socket`: each block holds its number and the count of
//! its writes, so a block that is stale, lost or another one's is told from a good one.
//!
//! It speaks NBD by itself (the baseline of the NBD protocol: `NBD_OPT_EXPORT_NAME`, simple replies), one request at
//! a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Length of a block, in bytes.
const BLOCK_LEN: usize = 4096;
const NBD_CMD_READ: u16 = 0;
const NBD_CMD_WRITE: u16 = 1;

/// A load that runs in a thread of its own.
pub struct Verified {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    acknowledged: Arc<[AtomicU64]>,
    thread: JoinHandle<Result<Outcome, String>>,
}

/// How a load went.
#[derive(Debug)]
pub struct Outcome {
    /// Reads and writes that ended well.
    pub operations: u64,
    /// The longest time that one of them took.
    pub longest: Duration,
}

impl Verified {
    /// Starts a load over the first `blocks` blocks of the device at this socket.
    pub fn start(socket: &Path, export: &str, blocks: u64) -> Verified {
        let (stop, operations) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let acknowledged: Arc<[AtomicU64]> = (0..blocks).map(|_| AtomicU64::new(0)).collect();
        let mut load = Load {
            acknowledged: Arc::clone(&acknowledged),
            socket: socket.to_owned(),
            export: export.to_owned(),
            versions: vec![0; blocks as usize],
            random: 0x9e37_79b9_7f4a_7c15,
            stop: Arc::clone(&stop),
            operations: Arc::clone(&operations),
        };
        Verified { stop, operations, acknowledged, thread: std::thread::spawn(move || load.run()) }
    }

    /// Reads and writes that have ended well so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// How often each block was written, by the writes that were acknowledged. One more may be in flight.
    pub fn acknowledged(&self) -> Vec<u64> {
        self.acknowledged.iter().map(|version| version.load(Ordering::Acquire)).collect()
    }

    /// Waits until the load has ended by itself.
    ///
    /// # Panics
    /// When it does not within [`LIMIT`](crate::LIMIT), or was well.
    pub fn fails(self, when: &str) -> String {
        crate::wait_until(&format!("the load ends {when}"), || self.thread.is_finished());
        match self.thread.join().expect("the load does not panic") {
            Ok(outcome) => panic!("the load is well {when}: {outcome:?}"),
            Err(why) => why,
        }
    }

    /// Waits until the load makes progress: some operations more end well.
    ///
    /// # Panics
    /// When none ends within [`LIMIT`](crate::LIMIT), or the load has ended by itself, which it does only at a fault.
    pub fn goes_on(&self, when: &str) {
        let before = self.operations();
        crate::wait_until(&format!("the load goes on {when}"), || {
            assert!(!self.thread.is_finished(), "the load has ended by itself {when}");
            self.operations() > before + 16
        });
    }

    /// Ends the load, which reads all blocks once more.
    ///
    /// # Panics
    /// With what was wrong: a bad block, or an operation that failed.
    pub fn finish(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join().expect("the load does not panic") {
            Ok(outcome) => outcome,
            Err(why) => panic!("verified load: {why}"),
        }
    }
}

struct Load {
    socket: PathBuf,
    export: String,
    /// How often each block was written.
    versions: Vec<u64>,
    random: u64,
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    acknowledged: Arc<[AtomicU64]>,
}

impl Load {
    fn run(&mut self) -> Result<Outcome, String> {
        let mut device = Device::connect(&self.socket, &self.export)?;
        let mut longest = Duration::ZERO;
        while !self.stop.load(Ordering::Relaxed) {
            let block = (self.next_random() % self.versions.len() as u64) as usize;
            let start = Instant::now();
            if self.next_random().is_multiple_of(2) {
                self.write(&mut device, block)?;
            } else {
                self.verify(&mut device, block)?;
            }
            longest = longest.max(start.elapsed());
        }
        for block in 0..self.versions.len() {
            self.verify(&mut device, block)?;
        }
        Ok(Outcome { operations: self.operations.load(Ordering::Relaxed), longest })
    }

    fn write(&mut self, device: &mut Device, block: usize) -> Result<(), String> {
        self.versions[block] += 1;
        device.request(NBD_CMD_WRITE, block, &mut content(block, self.versions[block]))?;
        self.acknowledged[block].store(self.versions[block], Ordering::Release);
        self.operations.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn verify(&self, device: &mut Device, block: usize) -> Result<(), String> {
        let mut found = vec![0; BLOCK_LEN];
        device.request(NBD_CMD_READ, block, &mut found)?;
        let version = self.versions[block];
        let wanted = if version == 0 { vec![0; BLOCK_LEN] } else { content(block, version) };
        if found != wanted {
            let word = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
            return Err(format!(
                "block {block} must hold write {version}, and holds write {} of block {}",
                word(8),
                word(0)
            ));
        }
        self.operations.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The generator xorshift64.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// The content of a block after so many writes.
fn content(block: usize, version: u64) -> Vec<u8> {
    let words = [block as u64, version].map(u64::to_le_bytes).concat();
    words.iter().copied().cycle().take(BLOCK_LEN).collect()
}

/// A connection to a device.
pub struct Device(UnixStream);

impl Device {
    /// Connects to the export of this name at a socket.
    ///
    /// # Errors
    /// Why it cannot, in one line.
    pub fn connect(socket: &Path, export: &str) -> Result<Device, String> {
        let connect = || -> std::io::Result<UnixStream> {
            let mut stream = UnixStream::connect(socket)?;
            let mut greeting = [0; 18];
            stream.read_exact(&mut greeting)?;
            // NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES, then NBD_OPT_EXPORT_NAME.
            let mut words = 3_u32.to_be_bytes().to_vec();
            words.extend(*b"IHAVEOPT");
            words.extend(1_u32.to_be_bytes());
            words.extend((export.len() as u32).to_be_bytes());
            words.extend(export.bytes());
            stream.write_all(&words)?;
            // The size of the export, and its flags.
            stream.read_exact(&mut [0; 10])?;
            Ok(stream)
        };
        connect().map(Device).map_err(|error| format!("cannot open {}: {error}", socket.display()))
    }

    /// Writes what a load writes to a block the first, second, ... time.
    ///
    /// # Errors
    /// How the request ended instead.
    pub fn write_version(&mut self, block: usize, version: u64) -> Result<(), String> {
        self.request(NBD_CMD_WRITE, block, &mut content(block, version))
    }

    /// The version that a block holds; 0 where it was never written.
    ///
    /// # Errors
    /// How the request ended instead, or that it holds anything else.
    pub fn read_version(&mut self, block: usize) -> Result<u64, String> {
        let mut found = vec![0; BLOCK_LEN];
        self.request(NBD_CMD_READ, block, &mut found)?;
        let version = u64::from_le_bytes(found[8..16].try_into().expect("eight bytes"));
        match found == content(block, version) || found.iter().all(|byte| *byte == 0) {
            true => Ok(version),
            false => Err(format!("block {block} holds something else than a version of it")),
        }
    }

    /// One request; `data` is what is written, or where what is read goes.
    fn request(&mut self, command: u16, block: usize, data: &mut [u8]) -> Result<(), String> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(7_u64.to_be_bytes());
        request.extend((block as u64 * BLOCK_LEN as u64).to_be_bytes());
        request.extend((data.len() as u32).to_be_bytes());
        if command == NBD_CMD_WRITE {
            request.extend_from_slice(data);
        }
        let mut exchange = || -> std::io::Result<u32> {
            self.0.write_all(&request)?;
            let mut reply = [0; 16];
            self.0.read_exact(&mut reply)?;
            let error = u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"));
            if error == 0 && command == NBD_CMD_READ {
                self.0.read_exact(data)?;
            }
            Ok(error)
        };
        match exchange() {
            Ok(0) => Ok(()),
            Ok(error) => Err(format!("block {block}: command {command} ended with error {error}")),
            Err(error) => Err(format!("block {block}: the device is gone: {error}")),
        }
    }
}
