//! A scripted HTTP server, and the real binary run against it.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

/// A received request: its first line and headers, and its body.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// `GET /v1/status`.
    pub(crate) line: String,
    pub(crate) headers: String,
    pub(crate) body: String,
}

impl Request {
    /// Whether it is for this line; one without a query is for those with the id of a request, too.
    fn is(&self, line: &str) -> bool {
        self.line == line || self.line.strip_prefix(line).is_some_and(|rest| rest.starts_with("?request="))
    }
}

/// Answers each `METHOD /path` with a status and a body; anything else with 404.
#[derive(Clone, Default)]
pub(crate) struct Script {
    answers: Vec<(&'static str, u16, String)>,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Script {
    pub(crate) fn new() -> Script {
        Script::default()
    }

    pub(crate) fn on(mut self, line: &'static str, status: u16, body: &Value) -> Script {
        self.answers.push((line, status, body.to_string()));
        self
    }

    pub(crate) fn on_raw(mut self, line: &'static str, status: u16, body: &str) -> Script {
        self.answers.push((line, status, body.to_owned()));
        self
    }

    /// The requests that came, in order.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// The body of the only request with this line.
    pub(crate) fn body_of(&self, line: &str) -> Value {
        let seen = self.seen();
        let bodies: Vec<&Request> = seen.iter().filter(|request| request.is(line)).collect();
        assert_eq!(bodies.len(), 1, "{line} in {seen:?}");
        serde_json::from_str(&bodies[0].body).unwrap()
    }

    /// Serves on a free TCP port; the URL.
    pub(crate) fn serve_tcp(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let script = self.clone();
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| script.answer(stream)));
        url
    }

    /// Serves on this address, which is free.
    pub(crate) fn serve_at(&self, address: &str) {
        let listener = TcpListener::bind(address).unwrap();
        let script = self.clone();
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| script.answer(stream)));
    }

    /// Serves on a unix socket in `directory`; its path.
    pub(crate) fn serve_unix(&self, directory: &Path) -> PathBuf {
        let path = directory.join("blk.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let script = self.clone();
        thread::spawn(move || listener.incoming().flatten().for_each(|stream| script.answer(stream)));
        path
    }

    fn answer(&self, stream: impl Read + Write) {
        let mut stream = BufReader::new(stream);
        let Some(request) = read_request(&mut stream) else { return };
        let found = self.answers.iter().find(|(line, ..)| request.is(line));
        let (status, body) = found.map_or((404, "not here"), |(_, status, body)| (*status, body.as_str()));
        self.seen.lock().unwrap().push(request);
        let answer = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let _ = stream.get_mut().write_all(answer.as_bytes());
    }
}

fn read_request(stream: &mut BufReader<impl Read>) -> Option<Request> {
    let mut headers = String::new();
    let mut first = String::new();
    stream.read_line(&mut first).ok()?;
    while stream.read_line(&mut headers).ok()? > 2 {}
    let len = headers.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let mut body = vec![0; len.unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    let line = first.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    (!line.is_empty()).then(|| Request { line, headers, body: String::from_utf8_lossy(&body).into_owned() })
}

/// Where the daemons are that a run is pointed at; by default nowhere.
pub(crate) struct Host {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) allocator: String,
    pub(crate) blk: PathBuf,
}

/// The output of a run and its exit status.
pub(crate) struct Run {
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) code: i32,
}

impl Host {
    pub(crate) fn new() -> Host {
        let directory = tempfile::tempdir().unwrap();
        let blk = directory.path().join("none.sock");
        // A port that was free a moment ago: connections to it are refused.
        let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Host { directory, allocator: format!("http://{unused}"), blk }
    }

    pub(crate) fn with_allocator(script: &Script) -> Host {
        Host { allocator: script.serve_tcp(), ..Host::new() }
    }

    pub(crate) fn with_blk(mut self, script: &Script) -> Host {
        self.blk = script.serve_unix(self.directory.path());
        self
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xpm"));
        command.args(args).env("XPM_ALLOCATOR", &self.allocator).env("XPM_BLK", &self.blk);
        command.env_remove("XPM_TOKEN_FILE").env("XPM_CONFIG", "").env("XPM_PATIENCE", "0s");
        command
    }

    pub(crate) fn xpm(&self, args: &[&str]) -> Run {
        Run::from(self.command(args).output().unwrap())
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        Run {
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
            code: output.status.code().unwrap_or(-1),
        }
    }
}

impl Run {
    /// Asserts success; what it printed.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.out, self.err);
        self.out
    }

    /// Asserts success of a `--json` run; its value.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// Asserts a failure told in exactly one line of standard error, with all of these words.
    #[track_caller]
    pub(crate) fn fails_with(self, words: &[&str]) {
        assert_eq!(self.code, 1, "stdout: {}\nstderr: {}", self.out, self.err);
        assert!(self.err.starts_with("xpm: ") && self.err.trim_end().lines().count() == 1, "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "`{word}` is not in: {}", self.err);
        }
    }

    /// Asserts a failure of this kind told as JSON, with these words.
    #[track_caller]
    pub(crate) fn fails_json(self, kind: &str, words: &str) {
        let told: Value = serde_json::from_str(&self.err).unwrap_or_else(|_| panic!("{}", self.err));
        assert_eq!(told["error"]["kind"], kind, "{told}");
        assert!(told["error"]["message"].as_str().unwrap().contains(words), "{told}");
        assert_ne!(self.code, 0);
    }

    /// It failed, with these lines in this order.
    #[track_caller]
    pub(crate) fn fails_with_lines(self, lines: &[&str]) {
        assert_eq!(self.code, 1, "stdout: {}\nstderr: {}", self.out, self.err);
        let said: Vec<&str> = self.err.lines().collect();
        let same =
            said.len() == lines.len() && said.iter().zip(lines).all(|(said, line)| said.contains(line));
        assert!(same, "{}", self.err);
    }
}
