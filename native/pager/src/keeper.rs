//! The keeper as its pager sees it: it has started us, has told us when to go, and keeps what we serve with.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zswapd_keeper::channel::{Channel, Kind, Message, ROOM};
use zswapd_keeper::process::HAND_OVER;

pub struct Keeper {
    channel: Channel,
    /// 0: it is gone.
    pid: AtomicU32,
    /// 0: there is none.
    standby: AtomicU32,
    upgrade: Mutex<Upgrade>,
}

#[derive(Debug, PartialEq, Eq)]
enum Upgrade {
    None,
    Asked,
    Granted,
    Refused(String),
}

/// The order to serve.
pub struct Go {
    pub relay: Option<OwnedFd>,
    /// When the last pager was gone; None for the first.
    pub gone: Option<Instant>,
    /// Which program this is, as the keeper counts those that have taken over in an upgrade.
    pub program: u64,
}

/// Takes over a descriptor that the keeper has opened for us.
///
/// Errors: it is not open.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: sets a flag; a number that is no descriptor is refused.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and named once, by who has opened it for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

impl Keeper {
    pub fn new(channel: OwnedFd) -> Keeper {
        let channel = Channel::new(channel);
        let pid = AtomicU32::new(channel.peer());
        Keeper { channel, pid, standby: AtomicU32::new(0), upgrade: Mutex::new(Upgrade::None) }
    }

    /// Says that all is set, and waits to be told to serve. None: the keeper is gone, and nobody will say so.
    pub fn wait_for_go(&self) -> Option<Go> {
        self.tell(Kind::Ready, 0, "", None);
        let (mut room, mut program) = ([0; ROOM], 0);
        while let Ok(Some(Message { kind, number, descriptor: relay, .. })) = self.channel.receive(&mut room) {
            match kind {
                Kind::Program => program = number,
                Kind::Go => {
                    let ago = Some(Duration::from_nanos(number)).filter(|ago| !ago.is_zero());
                    let gone = ago.and_then(|ago| Instant::now().checked_sub(ago));
                    return Some(Go { relay, gone, program });
                }
                _ => {}
            }
        }
        None
    }

    /// Says that we serve.
    pub fn serving(&self) {
        self.tell(Kind::Serving, 0, "", None);
    }

    /// Says why we cannot.
    pub fn failed(&self, why: &str) {
        self.tell(Kind::Failed, 0, why, None);
    }

    /// Has our end of the pair to pyfuse3 kept for the next pager; None: there is no pyfuse3.
    pub fn keep_relay(&self, relay: Option<BorrowedFd<'_>>) {
        self.tell(Kind::Relay, 0, "", relay);
    }

    /// Its pid; 0 when it is gone.
    pub fn pid(&self) -> u32 {
        self.pid.load(Relaxed)
    }

    /// The pid of the standby; 0: there is none.
    pub fn standby(&self) -> u32 {
        self.standby.load(Relaxed)
    }

    /// Asks for an upgrade: [`Keeper::upgraded`] tells what becomes of it.
    ///
    /// Errors: EBUSY while one is under way; EPIPE when the keeper is gone; EAGAIN while it does not listen.
    pub fn upgrade(&self) -> io::Result<()> {
        let mut upgrade = self.lock();
        match (&*upgrade, self.pid()) {
            (_, 0) => Err(io::Error::from_raw_os_error(libc::EPIPE)),
            (Upgrade::Asked, _) => Err(io::Error::from_raw_os_error(libc::EBUSY)),
            // To somebody who did not wait for it.
            (Upgrade::Granted, _) => Ok(()),
            _ => {
                self.channel.send(Kind::Upgrade, 0, "", None)?;
                *upgrade = Upgrade::Asked;
                Ok(())
            }
        }
    }

    /// Whether the successor waits; None: not yet. Errors: why there is none.
    pub fn upgraded(&self) -> Result<Option<()>, String> {
        match &*self.lock() {
            Upgrade::Granted => Ok(Some(())),
            Upgrade::Refused(why) => Err(why.clone()),
            _ => Ok(None),
        }
    }

    /// Does not wait for it any more: it may be asked for again.
    pub fn forget_upgrade(&self) {
        let mut upgrade = self.lock();
        if *upgrade == Upgrade::Asked {
            *upgrade = Upgrade::None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Upgrade> {
        self.upgrade.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens to the keeper until it is gone.
    pub fn listen(&self) {
        let mut room = [0; ROOM];
        while let Ok(Some(message)) = self.channel.receive(&mut room) {
            match message.kind {
                Kind::Standby => self.standby.store(message.number as u32, Relaxed),
                Kind::HandOver => *self.lock() = Upgrade::Granted,
                Kind::Refused => {
                    let mut upgrade = self.lock();
                    // The first reason is the one that says most.
                    if *upgrade == Upgrade::Asked {
                        *upgrade = Upgrade::Refused(message.text.to_owned());
                    }
                }
                _ => {}
            }
        }
        self.pid.store(0, Relaxed);
        self.standby.store(0, Relaxed);
        *self.lock() = Upgrade::Refused("the keeper is gone".into());
        eprintln!("zswapd-pager: the keeper is gone: pages are served, but if this pager ends too they are lost");
    }

    /// A keeper that is gone does not listen.
    fn tell(&self, kind: Kind, number: u64, text: &str, descriptor: Option<BorrowedFd<'_>>) {
        let _ = self.channel.send(kind, number, text, descriptor);
    }
}

/// Ends this process for its successor: at once, with everything left as it is.
pub fn hand_over() -> ! {
    // SAFETY: never returns.
    unsafe { libc::_exit(HAND_OVER.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zswapd_keeper::socket;

    #[test]
    fn an_upgrade_that_could_not_be_asked_for_is_not_under_way() {
        let (ours, theirs) = socket::pair().expect("sockets");
        let (keeper, other) = (Keeper::new(ours), Channel::new(theirs));
        // It does not listen.
        while keeper.channel.send(Kind::Serving, 0, "", None).is_ok() {}
        let errno = |result: io::Result<()>| result.err().and_then(|error| error.raw_os_error());
        assert_eq!(errno(keeper.upgrade()), Some(libc::EAGAIN));
        let mut room = [0; ROOM];
        other.receive(&mut room).expect("received").expect("a message");
        assert_eq!(errno(keeper.upgrade()), None);
        assert_eq!(errno(keeper.upgrade()), Some(libc::EBUSY));
    }
}
