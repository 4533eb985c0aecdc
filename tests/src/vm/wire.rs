//! A network between two hosts that breaks where a test wants it to.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use crate::LIMIT;
use crate::netns::Namespace;

/// Where a [`Wire`] breaks: at a message that contains a text.
#[derive(Debug, Clone, Copy)]
pub struct Break {
    /// The message.
    pub at: &'static str,
    /// Whether it arrives before the test does something. One that does not arrives afterwards where nothing is cut,
    /// and else never.
    pub passes: bool,
    /// Whether what stands is cut then. Else it only stands still while the test does something.
    pub cuts: bool,
    /// Whether new connections can be made afterwards.
    pub heals: bool,
}

impl Break {
    /// The network stands still before the message arrives, and goes on with it.
    pub fn pause(at: &'static str) -> Break {
        Break { at, passes: false, cuts: false, heals: true }
    }
}

/// A network between two hosts. It carries what is sent until a message comes at which it breaks, and tells the test.
pub struct Wire {
    port: u16,
    broken: Receiver<()>,
    go_on: Sender<()>,
}

struct Broken {
    rules: Vec<Break>,
    /// The number of rules that have come about. Only the next one is looked for.
    done: AtomicUsize,
    /// Told when it breaks, and waited for before anything else happens.
    tell: Sender<()>,
    go_on: Mutex<Receiver<()>>,
    streams: Mutex<Vec<TcpStream>>,
}

impl Broken {
    /// The rule that comes about by these bytes.
    fn broken_by(&self, came: &[u8]) -> Option<Break> {
        let done = self.done.load(Ordering::SeqCst);
        let rule = *self.rules.get(done)?;
        let breaks = String::from_utf8_lossy(came).contains(rule.at);
        let first = || self.done.compare_exchange(done, done + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        (breaks && first()).then_some(rule)
    }

    /// Whether it was cut, and new connections are not carried.
    fn is_dead(&self) -> (bool, bool) {
        let done = self.done.load(Ordering::SeqCst);
        let cut = self.rules[..done].iter().find(|rule| rule.cuts);
        (cut.is_some(), cut.is_some_and(|rule| !rule.heals))
    }
}

impl Wire {
    /// A network to the port `to` of this host that breaks as `rule` says. What comes of the message at which it breaks
    /// waits for [`Wire::broke`]'s end.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn to(to: u16, rule: Break) -> Wire {
        Wire::from(None, SocketAddr::from(([127, 0, 0, 1], to)), vec![rule])
    }

    /// The same to any address, from a port of loopback in a namespace; it breaks by these rules, one after the other.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn from(namespace: Option<&Namespace>, to: SocketAddr, rules: Vec<Break>) -> Wire {
        let ((tell, broken), (go_on, wait)) = (channel(), channel());
        let (say_port, port) = channel();
        let state = Arc::new(Broken {
            rules,
            done: AtomicUsize::new(0),
            tell,
            go_on: Mutex::new(wait),
            streams: Mutex::default(),
        });
        let enter = namespace.map(Namespace::entrance);
        std::thread::spawn(move || {
            // Sockets belong to the namespace of the thread that makes them.
            if let Some(enter) = enter {
                enter();
            }
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let _ = say_port.send(listener.local_addr().expect("an address").port());
            for from in listener.incoming().flatten() {
                let (is_cut, is_dead) = state.is_dead();
                let Ok(other) = TcpStream::connect(to) else { continue };
                if is_dead {
                    continue;
                }
                let both = [(&from, &other), (&other, &from)];
                for (from, to) in both.map(|(from, to)| (from.try_clone(), to.try_clone())) {
                    let (Ok(from), Ok(to)) = (from, to) else { continue };
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || carry(from, to, &state));
                }
                if !is_cut {
                    state.streams.lock().expect("no panic").extend([from, other]);
                }
            }
        });
        Wire { port: port.recv().expect("it listens"), broken, go_on }
    }

    /// Where it is reached.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits until it breaks; does `meanwhile` before either side can see that.
    ///
    /// # Panics
    /// When it does not break.
    pub fn broke<T>(&self, meanwhile: impl FnOnce() -> T) -> T {
        self.broken.recv_timeout(LIMIT).expect("the message comes");
        let done = meanwhile();
        let _ = self.go_on.send(());
        done
    }
}

/// Carries what comes until a rule says otherwise.
fn carry(mut from: TcpStream, mut to: TcpStream, state: &Broken) {
    let mut buffer = vec![0; 64 << 10];
    // A message is short and sent as a whole, so it comes as a whole.
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let came = &buffer[..count];
        if let Some(rule) = state.broken_by(came) {
            if rule.passes {
                let _ = to.write_all(came);
            }
            let _ = state.tell.send(());
            let _ = state.go_on.lock().expect("no panic").recv_timeout(LIMIT);
            if !rule.cuts {
                if !rule.passes && to.write_all(came).is_err() {
                    break;
                }
                continue;
            }
            for stream in state.streams.lock().expect("no panic").drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
            return;
        }
        if to.write_all(came).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
