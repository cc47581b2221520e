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
mod patience;
mod say;
mod state_file;
mod systemd;

use kept::Kept;
use pager::{Ended, Pager, Program};
use patience::{Patience, LOOK};
use std::ffi::OsString;
use std::fmt::Arguments;
use std::io::{Cursor, Write};
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
/// Of the program's new version: takes the standby's place, and then the active one's. Or one that is being ended.
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
    /// At those who are waited for.
    next_look: Instant,
    /// Candidates so far.
    candidates: u64,
    /// There is to be a candidate as soon as the last one has ended.
    upgrade_asked: bool,
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
    let (stored, file) = systemd::stored();
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
    let program = Program::new(words, &kept, file).map_err(|error| format!("cannot prepare a pager: {error}"))?;
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
        next_look: Instant::now(),
        candidates: 0,
        upgrade_asked: false,
        systemd,
        is_told: false,
        kept,
    })
}

impl Keeper {
    /// Until the active pager ends as it was told to, or none ever serves.
    fn run(&mut self) -> ExitCode {
        let status = loop {
            let again = self.start_and_let_go();
            self.wait(again);
            for who in [ACTIVE, STANDBY, CANDIDATE] {
                self.listen_to(who);
            }
            // The candidate before the active one, which it may be about to follow.
            if let Some(status) = [CANDIDATE, STANDBY, ACTIVE].into_iter().find_map(|who| self.miss(who)) {
                break status;
            }
            self.look();
        };
        self.pagers.iter_mut().filter_map(Option::take).for_each(Pager::end);
        self.systemd.ended();
        ExitCode::from(status)
    }

    /// There is always to be an active pager and, when it serves, a standby. Returns when to try again, if not before
    /// something happens.
    fn start_and_let_go(&mut self) -> Option<Instant> {
        if self.upgrade_asked && self.pagers[CANDIDATE].is_none() {
            self.upgrade_asked = false;
            self.start_candidate();
        }
        // Looked at once: a pause that ended between two looks would be waited for without end.
        let now = Instant::now();
        if self.next_try <= now {
            match &self.pagers {
                [None, Some(standby), _] if standby.ready => self.let_go(),
                [None, None, _] => self.start_standby(),
                [Some(active), None, _] if active.serving => self.start_standby(),
                _ => {}
            }
        }
        Some(self.next_try).filter(|next| *next > now)
    }

    fn let_go(&mut self) {
        self.pagers.swap(ACTIVE, STANDBY);
        let Some(pager) = &mut self.pagers[ACTIVE] else { return };
        pager.patience = Patience::default();
        let since = self.gone_at.map_or(0, |gone| gone.elapsed().as_nanos() as u64 + 1);
        let relay = self.relay.as_ref().map(AsFd::as_fd);
        if let Some(channel) = &pager.channel {
            // One that does not take it is about to be missed.
            let _ = channel.send(Kind::Program, pager.number, "", None);
            let _ = channel.send(Kind::Go, since, "", relay);
        }
        // Somebody may have stopped it while nobody needed it.
        pager.signal(libc::SIGCONT);
    }

    fn start_standby(&mut self) {
        match self.program.start() {
            Ok(pager) => self.pagers[STANDBY] = Some(pager),
            Err(error) => {
                say!("cannot start a pager: {error}");
                self.failures += 1;
                self.failed();
            }
        }
    }

    fn start_candidate(&mut self) {
        self.candidates += 1;
        match self.program.start_new(self.candidates + 1) {
            Ok(pager) => self.pagers[CANDIDATE] = Some(pager),
            Err(error) => self.refuse(format_args!("it cannot be started: {error}")),
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

    /// Waits until a pager says something or ends, or it is time to try again, or to look at those who are waited for.
    fn wait(&self, again: Option<Instant>) {
        let mut fds = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; 6];
        for (pager, fds) in self.pagers.iter().zip(fds.chunks_exact_mut(2)) {
            if let Some(pager) = pager {
                fds[0].fd = pager.process.as_raw_fd();
                fds[1].fd = pager.channel.as_ref().map_or(-1, AsRawFd::as_raw_fd);
            }
        }
        let look = (0..self.pagers.len()).any(|who| self.is_waited_for(who)).then_some(self.next_look);
        let left = again.into_iter().chain(look).min().map(|at| at.saturating_duration_since(Instant::now()));
        let milliseconds = left.map_or(-1, |left| left.as_millis() as libc::c_int + 1);
        // SAFETY: six valid pollfds. Whatever it returns, who is there is looked at.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) };
    }

    /// Whether a pager is to do something before long: get ready, take over, or end. The first one's start is watched by
    /// who has started us.
    fn is_waited_for(&self, who: usize) -> bool {
        let Some(pager) = self.pagers[who].as_ref().filter(|_| self.has_served) else { return false };
        pager.dismissed || if who == ACTIVE { !pager.serving } else { !pager.ready }
    }

    /// Kills those that do not get on with it: the next one may.
    fn look(&mut self) {
        if Instant::now() < self.next_look {
            return;
        }
        self.next_look = Instant::now() + LOOK;
        for who in [ACTIVE, STANDBY, CANDIDATE] {
            if !self.is_waited_for(who) {
                continue;
            }
            let Some(pager) = &mut self.pagers[who] else { continue };
            if !pager.patience.is_over(pager.ran(), who == ACTIVE) {
                continue;
            }
            pager.signal(libc::SIGKILL);
            let pid = pager.pid;
            match who {
                ACTIVE => say!("pager {pid} does not get on with taking over: it is killed"),
                STANDBY => say!("pager {pid} does not get ready: it is killed"),
                _ if !std::mem::replace(&mut pager.dismissed, true) => {
                    self.refuse(format_args!("pager {pid} did not get ready, and was killed"));
                }
                _ => {
                    say!("pager {pid} does not end, though it was killed");
                    if std::mem::take(&mut self.upgrade_asked) {
                        self.refuse(format_args!("pager {pid}, which was refused before, does not end"));
                    }
                }
            }
        }
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
                    CANDIDATE if !pager.dismissed => self.tell(Kind::HandOver, 0, ""),
                    _ => {}
                }
            }
            (ACTIVE, Kind::Serving) => {
                pager.serving = true;
                let pid = pager.pid;
                // From now on: one that never serves is not followed by more of its kind.
                let new = pager.file.take().map(|file| (file, pager.number));
                self.serves(pid, new);
            }
            (ACTIVE, Kind::Relay) => self.relay = message.descriptor,
            (ACTIVE, Kind::Upgrade) => {
                self.upgrade_asked = true;
                self.dismiss_candidate();
            }
            (CANDIDATE, Kind::Program) => pager.file = message.descriptor,
            (CANDIDATE, Kind::Failed) if !std::mem::replace(&mut pager.dismissed, true) => {
                self.refuse(format_args!("{}", message.text));
            }
            _ => {}
        }
    }

    /// `new`: the program that it runs, if it is not what served before.
    fn serves(&mut self, pid: libc::pid_t, new: Option<(OwnedFd, u64)>) {
        if let Some(gone) = self.gone_at.take() {
            say!("pager {pid} serves, {} ms after the last one was gone", gone.elapsed().as_millis());
        }
        self.has_served = true;
        let is_new = new.is_some();
        if let Some((file, number)) = new {
            (self.program.file, self.program.number) = (file, number);
        }
        if !std::mem::replace(&mut self.is_told, true) {
            self.systemd.serving(self.kept.to_store(), self.program.file.as_fd());
        } else if is_new {
            self.systemd.upgraded(self.program.file.as_fd());
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

    /// Tells who has asked for an upgrade that there is none.
    fn refuse(&self, why: Arguments<'_>) {
        say!("no upgrade to the new version: {why}");
        let mut room = [0; ROOM];
        let mut text = Cursor::new(&mut room[..]);
        let _cut_off = text.write_fmt(why);
        let length = text.position() as usize;
        self.tell(Kind::Refused, 0, std::str::from_utf8(&room[..length]).unwrap_or("see the log"));
    }

    /// Ends the candidate, if there is one; does not wait for that, since it may hang.
    fn dismiss_candidate(&mut self) {
        if let Some(candidate) = &mut self.pagers[CANDIDATE] {
            candidate.dismissed = true;
            candidate.signal(libc::SIGKILL);
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
            (CANDIDATE, _) if pager.dismissed => {}
            (CANDIDATE, _) => self.refuse(format_args!("it has ended before it was ready ({ended})")),
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
        // Who has asked for one is gone.
        self.upgrade_asked = false;
        // The candidate takes over from one that has handed over to it, and not otherwise.
        let is_next = |candidate: &Pager| ended == Ended::Exited(HAND_OVER) && candidate.ready && !candidate.dismissed;
        if self.pagers[CANDIDATE].as_ref().is_some_and(is_next) {
            self.pagers.swap(STANDBY, CANDIDATE);
        }
        self.failed();
        self.start_and_let_go();
        self.dismiss_candidate();
        say!("pager {pid} is gone ({ended}): the standby takes over");
    }
}
