//! The keeper: keeps what must outlive a pager, and puts the next pager in the place of one that is gone.
//!
//! It has two pagers: the active one serves pages; the standby has everything set, and waits. When the active one is
//! gone, whatever has ended it, the standby is told to go on with the same descriptors, and a new standby is started
//! when it serves. Nobody else takes part in that: zswapd, systemd or the reader of the log may themselves be swapped
//! out to the device that waits meanwhile.
//!
//! One thread; once it has started, nothing is allocated, and all its memory is locked.

mod kept;
mod pager;
mod say;
mod state_file;
mod systemd;

use kept::Kept;
use pager::{Ended, Pager, Program};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use systemd::Systemd;
use zswapd_keeper::channel::{Kind, Message, ROOM};
use zswapd_keeper::process::{protect, HAND_OVER};

/// Pagers that end one after the other are started anew after a pause that doubles, from the first of these to the other.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(5)];

/// Who a pager is.
const ACTIVE: usize = 0;
const STANDBY: usize = 1;
/// Of the program's new version: takes the standby's place, and then the active one's.
const CANDIDATE: usize = 2;

struct Keeper {
    program: Program,
    pagers: [Option<Pager>; 3],
    /// A pager has served, so that there may be pages.
    has_served: bool,
    /// When the last active one was gone.
    gone_at: Option<Instant>,
    /// Pagers that have ended since all was well.
    failures: u32,
    next_try: Instant,
    systemd: Systemd,
    /// It has been told that we serve.
    is_told: bool,
    // In this order: pyfuse3 is hung up on when all else is taken back.
    kept: Kept,
    /// Our copy of the active pager's end of the pair to pyfuse3: it stays connected when the pager is gone.
    relay: Option<OwnedFd>,
}

fn main() -> ExitCode {
    match prepare() {
        Ok(mut keeper) => keeper.run(),
        Err(message) => {
            eprintln!("zswapd-keeper: {message}");
            ExitCode::FAILURE
        }
    }
}

/// All that allocates.
fn prepare() -> Result<Keeper, String> {
    let stored = systemd::stored();
    // Pages may be there from before.
    let has_served = stored.is_some();
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let value = |name: &str| {
        let at = words.chunks(2).position(|pair| pair[0] == name);
        at.and_then(|at| words.get(2 * at + 1)).cloned()
    };
    let required = |name: &str| value(name).ok_or_else(|| format!("{name} is missing: give it a path"));
    let (program, point, control) = (required("--pager")?, required("--mount-point")?, required("--control")?);
    let backing = value("--backing").map(PathBuf::from);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE] {
        // What ends keeper and pagers is the command `stop`, which nobody gives while pages are in use.
        // SAFETY: ignores a signal, here and in the pagers.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let kept = Kept::new(point.into(), control.into(), backing.as_deref(), stored)?;
    let at = words.iter().position(|word| word == "--pager").unwrap_or(0);
    words.drain(at..at + 2);
    words.insert(0, program);
    let program = Program::new(words, &kept).map_err(|error| format!("cannot prepare a pager: {error}"))?;
    let systemd = Systemd::new();
    // The pager says what is refused: it is the same.
    let _the_pager_says = protect();
    Ok(Keeper {
        program,
        pagers: [None, None, None],
        relay: None,
        has_served,
        gone_at: None,
        failures: 0,
        next_try: Instant::now(),
        systemd,
        is_told: false,
        kept,
    })
}

impl Keeper {
    /// Until the active pager ends as it was told to, or none ever serves.
    fn run(&mut self) -> ExitCode {
        let status = loop {
            let pause = self.start_and_let_go();
            self.wait(pause);
            for who in [ACTIVE, STANDBY, CANDIDATE] {
                self.listen_to(who);
            }
            // The candidate before the active one, which it may be about to follow.
            if let Some(status) = [CANDIDATE, STANDBY, ACTIVE].into_iter().find_map(|who| self.miss(who)) {
                break status;
            }
        };
        self.pagers.iter_mut().filter_map(Option::take).for_each(Pager::end);
        self.systemd.ended();
        ExitCode::from(status)
    }

    /// There is always to be an active pager and, when it serves, a standby. Returns after which pause to look again.
    fn start_and_let_go(&mut self) -> Option<Duration> {
        if let Some(left) = self.pause() {
            return Some(left);
        }
        match &self.pagers {
            [None, Some(standby), _] if standby.ready => self.let_go(),
            [None, None, _] => self.start(STANDBY),
            [Some(active), None, None] if active.serving => self.start(STANDBY),
            _ => {}
        }
        self.pause()
    }

    /// What is left of it.
    fn pause(&self) -> Option<Duration> {
        Some(self.next_try.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    fn let_go(&mut self) {
        self.pagers.swap(ACTIVE, STANDBY);
        let now = Instant::now();
        let since = self.gone_at.map_or(0, |gone| (now - gone).as_nanos() as u64 + 1);
        let relay = self.relay.as_ref().map(AsFd::as_fd);
        if let Some(channel) = self.pagers[ACTIVE].as_ref().and_then(|pager| pager.channel.as_ref()) {
            // One that does not take it is about to be missed.
            let _ = channel.send(Kind::Go, since, "", relay);
        }
    }

    fn start(&mut self, who: usize) {
        match self.program.start() {
            Ok(pager) => self.pagers[who] = Some(pager),
            Err(error) => {
                say!("cannot start a pager: {error}");
                self.failures += 1;
                self.failed();
            }
        }
    }

    /// A pager is missed: unless it is the first, the next one is started after a pause.
    fn failed(&mut self) {
        self.failures += 1;
        let pause = match self.failures {
            0 | 1 => Duration::ZERO,
            more => (PAUSES[0] * (1 << (more - 2).min(9))).min(PAUSES[1]),
        };
        self.next_try = Instant::now() + pause;
    }

    /// Waits until a pager says something or ends, or the pause is over.
    fn wait(&self, pause: Option<Duration>) {
        let mut fds = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; 6];
        for (pager, fds) in self.pagers.iter().zip(fds.chunks_exact_mut(2)) {
            if let Some(pager) = pager {
                fds[0].fd = pager.process.as_raw_fd();
                fds[1].fd = pager.channel.as_ref().map_or(-1, AsRawFd::as_raw_fd);
            }
        }
        let milliseconds = pause.map_or(-1, |left| left.as_millis() as libc::c_int + 1);
        // SAFETY: six valid pollfds. Whatever it returns, who is there is looked at.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) };
    }

    fn listen_to(&mut self, who: usize) {
        let mut room = [0; ROOM];
        while let Some(channel) = self.pagers[who].as_ref().and_then(|pager| pager.channel.as_ref()) {
            match channel.receive(&mut room) {
                Ok(Some(message)) => self.heard(who, message),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                _ => {
                    // It dies, and will be missed.
                    self.pagers[who].iter_mut().for_each(|pager| pager.channel = None);
                }
            }
        }
    }

    fn heard(&mut self, who: usize, message: Message<'_>) {
        let Some(pager) = &mut self.pagers[who] else { return };
        match (who, message.kind) {
            (_, Kind::Ready) => {
                pager.ready = true;
                match who {
                    STANDBY => self.tell_standby(),
                    _ => self.tell(Kind::HandOver, 0, ""),
                }
            }
            (ACTIVE, Kind::Serving) => {
                pager.serving = true;
                let pid = pager.pid;
                self.serves(pid);
            }
            (ACTIVE, Kind::Relay) => self.relay = message.descriptor,
            (ACTIVE, Kind::Upgrade) => self.upgrade(),
            (CANDIDATE, Kind::Failed) => {
                pager.said_why = true;
                self.tell(Kind::Refused, 0, message.text);
            }
            _ => {}
        }
    }

    fn serves(&mut self, pid: libc::pid_t) {
        if let Some(gone) = self.gone_at.take() {
            say!("pager {pid} serves, {} ms after the last one was gone", gone.elapsed().as_millis());
        }
        self.has_served = true;
        if !std::mem::replace(&mut self.is_told, true) {
            self.systemd.serving(self.kept.to_store());
        }
        self.tell_standby();
    }

    /// All is well again when there is a standby for a pager that serves.
    fn tell_standby(&mut self) {
        let pid = self.pagers[STANDBY].as_ref().filter(|standby| standby.ready).map_or(0, |standby| standby.pid);
        if pid != 0 && self.pagers[ACTIVE].as_ref().is_some_and(|active| active.serving) {
            self.failures = 0;
        }
        self.tell(Kind::Standby, pid as u64, "");
    }

    /// Tells the active pager something.
    fn tell(&self, kind: Kind, number: u64, text: &str) {
        if let Some(channel) = self.pagers[ACTIVE].as_ref().and_then(|pager| pager.channel.as_ref()) {
            let _one_that_dies = channel.send(kind, number, text, None);
        }
    }

    fn upgrade(&mut self) {
        if let Some(earlier) = self.pagers[CANDIDATE].take() {
            earlier.end();
        }
        self.start(CANDIDATE);
        if self.pagers[CANDIDATE].is_none() {
            self.tell(Kind::Refused, 0, "the new version cannot be started: see the log");
        }
    }

    /// Looks whether a pager has ended. Returns with which status the keeper is to end then, if it is.
    fn miss(&mut self, who: usize) -> Option<u8> {
        let ended = self.pagers[who].as_ref()?.reap()?;
        // What it has said before.
        self.listen_to(who);
        let pager = self.pagers[who].take()?;
        match (who, ended) {
            (ACTIVE, Ended::Exited(0)) => return Some(0),
            // It has said why, or the kernel has.
            (_, Ended::Exited(status)) if !self.has_served => return Some(status.max(1)),
            (_, Ended::Signalled(_)) if !self.has_served => return Some(1),
            (CANDIDATE, _) => {
                say!("the new version is gone before it was ready ({ended}): the old one goes on");
                if !pager.said_why {
                    self.tell(Kind::Refused, 0, "the new version has ended before it was ready: see the log");
                }
            }
            (STANDBY, _) => {
                say!("the standby, {}, is gone ({ended})", pager.pid);
                self.failed();
                self.tell_standby();
            }
            _ => self.take_over(pager.pid, ended),
        }
        None
    }

    fn take_over(&mut self, pid: libc::pid_t, ended: Ended) {
        self.gone_at = self.gone_at.or(Some(Instant::now()));
        let mut other = None;
        if let Some(candidate) = self.pagers[CANDIDATE].take() {
            // It takes over from one that has handed over to it, and not otherwise.
            let next;
            (next, other) = match ended == Ended::Exited(HAND_OVER) && candidate.ready {
                true => (Some(candidate), self.pagers[STANDBY].take()),
                false => (self.pagers[STANDBY].take(), Some(candidate)),
            };
            self.pagers[STANDBY] = next;
        }
        self.failed();
        self.start_and_let_go();
        // Not before: it may hang, and so would all pages.
        other.into_iter().for_each(Pager::end);
        say!("pager {pid} is gone ({ended}): the standby takes over");
    }
}
