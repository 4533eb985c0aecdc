//! Measures the floor, the least time that a fault can take: a fault of userfaultfd, on memory of the kind that the
//! library has behind its window, which needs only one read of the transport and one copy.

use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Instant;

use xpm_client_core::{Channel, Volume};
use xpm_mapping::Faults;
use xpm_transport::IoBuf;
use xpm_transport::io::Completion;

use super::{Dice, LEN, Outcome, PAGE, TOUCHES, is_shared, read, say_times};

/// See `src/page/uffd.rs`.
const FEATURE_SIGBUS: u64 = 1 << 7;
const FEATURES_SHARED: u64 = 1 << 5 | 1 << 10;
const FEATURES_PRIVATE: u64 = 1 | 1 << 16;
const MODE_SHARED: u64 = 1 | 4;
const MODE_PRIVATE: u64 = 1 | 2;
const USER_MODE_ONLY: i32 = 1;

#[repr(C)]
struct Api(u64, u64, u64);
#[repr(C)]
struct Register(u64, u64, u64, u64);
#[repr(C)]
struct Copy(u64, u64, u64, u64, i64);

/// State of the SIGBUS handler for a fault in line. Only one thread at a time makes faults.
static BRINGER: AtomicPtr<Bringer> = AtomicPtr::new(null_mut());

/// Measures the floor. Each page of the volume begins with its number plus one.
pub(super) fn run(volume: &Volume, faults: Faults) -> Outcome<()> {
    let mut bringer = Bringer::new(volume, faults == Faults::Inline)?;
    match faults {
        Faults::Inline => inline(&mut bringer),
        Faults::Handled(_) => handled(&mut bringer),
    }
}

/// A window, and the channel that fetches its pages.
struct Bringer {
    uffd: i32,
    window: usize,
    channel: Channel,
    ended: Vec<Completion>,
    page: IoBuf,
}

impl Bringer {
    fn new(volume: &Volume, inline: bool) -> Outcome<Bringer> {
        let mut channel = volume.channel()?;
        let memory = vec![0_u8; 2 * PAGE].leak();
        let start = memory.as_ptr().align_offset(PAGE);
        let address = NonNull::new(memory[start..].as_mut_ptr()).ok_or("no memory")?;
        // SAFETY: the memory is leaked, so it lives for ever, and nothing else uses it.
        let page = unsafe { IoBuf::new(address, PAGE) };
        channel.register(page);
        let (uffd, window) = window(inline)?;
        Ok(Bringer { uffd, window, channel, ended: Vec::with_capacity(4), page })
    }

    fn bring(&mut self, address: usize) {
        let at = address & !(PAGE - 1);
        read(&mut self.channel, (at - self.window) as u64, self.page, &mut self.ended)
            .expect("the page can be read");
        let mut copy = Copy(at as u64, self.page.as_ptr() as u64, PAGE as u64, 0, 0);
        // SAFETY: fills a missing page of the window.
        let copied = unsafe { libc::ioctl(self.uffd, 0xc028_aa03, &raw mut copy) };
        assert_eq!(copied, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Bringer {
    fn drop(&mut self) {
        // SAFETY: this program made both, and nothing uses them any more.
        unsafe {
            libc::close(self.uffd);
            libc::munmap(self.window as *mut libc::c_void, LEN as usize);
        }
    }
}

/// A registered mapping, and its descriptor.
fn window(inline: bool) -> Outcome<(i32, usize)> {
    let (len, prot) = (LEN as usize, libc::PROT_READ | libc::PROT_WRITE);
    let (features, mode) =
        if is_shared()? { (FEATURES_SHARED, MODE_SHARED) } else { (FEATURES_PRIVATE, MODE_PRIVATE) };
    let mut api = Api(0xaa, features | if inline { FEATURE_SIGBUS } else { 0 }, 0);
    // SAFETY: system calls on memory and descriptors of this function's own making.
    unsafe {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if inline { USER_MODE_ONLY } else { 0 };
        let uffd = libc::syscall(libc::SYS_userfaultfd, flags) as i32;
        let address = if mode == MODE_SHARED {
            let file = libc::memfd_create(c"floor".as_ptr(), 0);
            libc::ftruncate(file, len as i64);
            libc::mmap(null_mut(), len, prot, libc::MAP_SHARED | libc::MAP_NORESERVE, file, 0)
        } else {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(null_mut(), len, prot, flags, -1, 0)
        };
        libc::madvise(address, len, libc::MADV_NOHUGEPAGE);
        let mut register = Register(address as u64, len as u64, mode, 0);
        if uffd < 0
            || libc::ioctl(uffd, 0xc018_aa3f, &raw mut api) < 0
            || libc::ioctl(uffd, 0xc020_aa00, &raw mut register) < 0
        {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok((uffd, address as usize))
    }
}

fn touches(window: usize) {
    let pages = LEN as usize / PAGE;
    let (mut dice, mut times, mut seen) = (Dice(3), Vec::with_capacity(TOUCHES), vec![false; pages]);
    while times.len() < TOUCHES {
        let page = dice.below(pages);
        if !std::mem::replace(&mut seen[page], true) {
            let began = Instant::now();
            // SAFETY: within the window.
            let word = unsafe { ((window + page * PAGE) as *const u64).read_volatile() };
            times.push(began.elapsed());
            assert_eq!(word, page as u64 + 1, "page {page}");
        }
    }
    say_times("floor", times);
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: set before the handler was installed, and used by the one thread that touches the window; the kernel
    // gives an address for SIGBUS.
    unsafe { (*BRINGER.load(Ordering::Relaxed)).bring((*info).si_addr() as usize) };
}

fn inline(bringer: &mut Bringer) -> Outcome<()> {
    let window = bringer.window;
    BRINGER.store(bringer, Ordering::SeqCst);
    // SAFETY: it handles this thread's own faults. It replaces the library's handler while no other thread touches a
    // window.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut before: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        touches(window);
        libc::sigaction(libc::SIGBUS, &raw const before, null_mut());
    }
    Ok(())
}

fn handled(bringer: &mut Bringer) -> Outcome<()> {
    let window = bringer.window;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut message = [0_u64; 4];
                // SAFETY: one message, of 32 bytes.
                let len = unsafe { libc::read(bringer.uffd, message.as_mut_ptr().cast(), 32) };
                match len {
                    32 => bringer.bring(message[2] as usize),
                    _ => std::thread::yield_now(),
                }
            }
        });
        touches(window);
        stop.store(true, Ordering::Relaxed);
    });
    Ok(())
}
