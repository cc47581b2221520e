//! The numbers under which a pager finds what the keeper keeps: `--keeper fd=N,fuse=N,state=N,counters=N,control=N`.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptors {
    /// The pager's end of its channel to the keeper.
    pub channel: RawFd,
    /// /dev/fuse of the mount, never cloned.
    pub fuse: RawFd,
    /// The state file.
    pub state: RawFd,
    /// The block of shared counters: a successor goes on counting.
    pub counters: RawFd,
    /// The listening control socket: while nobody serves, connections wait there.
    pub control: RawFd,
    /// No descriptor: the mount's device number (st_dev).
    pub device: u64,
}

impl fmt::Display for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Descriptors { channel, fuse, state, counters, control, device } = self;
        write!(f, "fd={channel},fuse={fuse},state={state},counters={counters},control={control},device={device}")
    }
}

impl FromStr for Descriptors {
    type Err = ();
    fn from_str(text: &str) -> Result<Descriptors, ()> {
        let value = |name: &str| {
            text.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?.parse::<u64>().ok()
        };
        let descriptor = |name| value(name).and_then(|number| RawFd::try_from(number).ok()).ok_or(());
        Ok(Descriptors {
            channel: descriptor("fd")?,
            fuse: descriptor("fuse")?,
            state: descriptor("state")?,
            counters: descriptor("counters")?,
            control: descriptor("control")?,
            device: value("device").ok_or(())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let descriptors = Descriptors { channel: 3, fuse: 4, state: 5, counters: 6, control: 7, device: 1 << 40 };
        assert_eq!(descriptors.to_string().parse(), Ok(descriptors));
        assert_eq!("fd=3,fuse=4".parse::<Descriptors>(), Err(()));
        assert_eq!("fd=-1,fuse=4,state=5,counters=6,control=7,device=1".parse::<Descriptors>(), Err(()));
    }
}
