//! The control socket: a connection carries one command and its reply, each a message (SOCK_SEQPACKET) of text.
//!
//! | command | reply |
//! | --- | --- |
//! | `status` | `ok pid=N device=N opens=N protected=N forgets=N footprint=N`: see `status` below |
//! | `counters` | `ok`, with the descriptor of the counters |
//! | `relay` | `ok`, with the descriptor that pyfuse3 is to serve; EBUSY while another one has it |
//! | `mem-limit BYTES` | `ok`; from a page to 1 TiB |
//! | `compression NAME LEVEL` | `ok`; the level is zstd's, 1 to 22 |
//! | `compact` | `ok`: it has begun |
//! | `reset` | `ok` when every page is dropped, or EBUSY while the swap file is open |
//! | `drain` | `ok objects=N pages=N`, or EBUSY while the swap file is open |
//! | `stop` | as `drain`, with every page dropped; then the pager unmounts and ends |
//!
//! A failure is `error ERRNO TEXT`.
//!
//! `drain` is the end of paging: when it is answered no request is under way, nothing waits to be freed, and the swap
//! file cannot be opened any more (ENODEV) until the next `relay`. It tells what is left in the pool; what is left
//! after `stop` belongs to no slot: it leaked.
//!
//! No connection waits for another one: whoever says nothing is not waited for, and what takes long is done in steps.

use crate::socket::{Connection, Listener};
use crate::Shared;
use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;
use std::time::Duration;
use zswapd_core::codec::{Algorithm, Compression, ZSTD_LEVELS};
use zswapd_core::error::Error;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::state::MAX_ARENA_PAGES;
use zswapd_core::store::{Detached, Leaked};

/// Connections that have not said anything yet. The oldest one makes room for the next.
const SILENT: usize = 16;
/// Slots that are emptied in one step: about a millisecond.
const STEP: u64 = 8192;
/// For those who move objects when the pool ends: they need some microseconds, unless they do not run.
const PATIENCE: Duration = Duration::from_secs(1);
/// The largest arena: a pool can never use more.
const MAX_LIMIT_BYTES: u64 = MAX_ARENA_PAGES * PAGE_SIZE as u64;
/// Of leaked objects. There should be none, and never are there few.
const SHOWN: usize = 10;

/// What becomes of the connection, or the pager, after a command.
enum Reply {
    Text(String),
    Descriptor(OwnedFd),
    Later(Job),
    Stop(String),
}

/// A step of a command that takes long. None: there are more.
type Job = Box<dyn FnMut(&Shared) -> Result<Option<Reply>, Error>>;

fn later(job: impl FnMut(&Shared) -> Result<Option<Reply>, Error> + 'static) -> Result<Reply, Error> {
    Ok(Reply::Later(Box::new(job)))
}

/// Answers commands until one of them is `stop`, or until the listener is closed.
pub fn serve(listener: &Listener, shared: &Shared) {
    let mut silent = VecDeque::new();
    // One at a time, in the order in which they came.
    let mut jobs: VecDeque<(Connection, Job)> = VecDeque::new();
    loop {
        let (accept, speaking) = match listener.poll(&silent, jobs.is_empty()) {
            Ok(found) => found,
            Err(error) => {
                pause_after(&error);
                continue;
            }
        };
        // The last one first: taking one out moves those behind it.
        for at in (0..speaking.len()).rev().filter(|&at| speaking[at]) {
            let Some(connection) = silent.remove(at) else { continue };
            let Some(command) = connection.receive() else { continue };
            match command.and_then(|command| execute(&command.split_whitespace().collect::<Vec<_>>(), shared)) {
                Ok(Reply::Later(job)) => jobs.push_back((connection, job)),
                result if answer(&connection, &result) => return,
                _ => {}
            }
        }
        if accept {
            match listener.accept() {
                Ok(Some(connection)) => silent.push_back(connection),
                Ok(None) => return eprintln!("zswapd-pager: the file system is gone: unmounted, or aborted"),
                Err(error) => pause_after(&error),
            }
            if silent.len() > SILENT {
                silent.pop_front();
            }
        }
        if let Some((connection, mut job)) = jobs.pop_front() {
            match job(shared).transpose() {
                None => jobs.push_front((connection, job)),
                Some(result) if answer(&connection, &result) => return,
                Some(_) => {}
            }
        }
    }
}

/// The machine is short of something. No reason to end: the pages are here.
fn pause_after(error: &io::Error) {
    eprintln!("zswapd-pager: control socket: {error}");
    std::thread::sleep(Duration::from_secs(1));
}

/// Sends the reply to a command that is done. True if the pager is to stop. Who asked may be gone: what was done stays
/// done.
fn answer(connection: &Connection, result: &Result<Reply, Error>) -> bool {
    match result {
        Ok(Reply::Text(text) | Reply::Stop(text)) => connection.send(&format!("ok {text}"), None),
        Ok(Reply::Descriptor(descriptor)) => connection.send("ok", Some(descriptor)),
        Ok(Reply::Later(_)) => {}
        Err(error) => connection.send(&format!("error {} {error}", error.errno()), None),
    }
    matches!(result, Ok(Reply::Stop(_)))
}

fn execute(words: &[&str], shared: &Shared) -> Result<Reply, Error> {
    let done = || Ok(Reply::Text(String::new()));
    let system = |what| move |source| Error::System { what, source };
    match words {
        ["status"] => {
            shared.engine.store().refresh_gauges();
            Ok(Reply::Text(status(shared)))
        }
        ["counters"] => {
            // A description of its own, that cannot write.
            let path = format!("/proc/self/fd/{}", shared.counters.as_raw_fd());
            let file = OpenOptions::new().read(true).open(path).map_err(system("cannot open the counters"))?;
            Ok(Reply::Descriptor(file.into()))
        }
        ["relay"] => {
            let descriptor = shared.relay.connect().map_err(system("another zswapd is connected"))?;
            // The last one may have been killed between `drain` and `stop`.
            shared.gate.open();
            Ok(Reply::Descriptor(descriptor))
        }
        ["compact"] => {
            shared.engine.store().pool().ask_for_compaction();
            done()
        }
        ["mem-limit", bytes] => {
            let what = "size in bytes";
            shared.engine.store().pool().set_limit_bytes(number(bytes, what, PAGE_SIZE as u64..=MAX_LIMIT_BYTES)?);
            done()
        }
        ["compression", name, level] => {
            let algorithm: Algorithm = name.parse()?;
            let level = number(level, "zstd level", ZSTD_LEVELS)?;
            shared.engine.set_compression(Compression::new(algorithm, level)?);
            done()
        }
        ["reset"] => {
            let (mut empty, mut was_closed) = (emptying(), None);
            later(move |shared| {
                let was_closed = *was_closed.get_or_insert_with(|| shared.gate.is_closed());
                let done = empty(shared)?;
                if done && !was_closed {
                    shared.gate.open();
                }
                Ok(done.then(|| Reply::Text(String::new())))
            })
        }
        ["drain"] => later(|shared| Ok(shared.gate.close()?.then(|| Reply::Text(left(shared))))),
        ["stop"] => {
            let (mut empty, mut emptied) = (emptying(), false);
            later(move |shared| {
                emptied = emptied || empty(shared)?;
                Ok((emptied && destroyed(shared)?).then(|| Reply::Stop(left(shared))))
            })
        }
        _ => Err(Error::Invalid(format!("unknown command: {}", words.join(" ")))),
    }
}

/// A number from outside, decimal.
fn number<T: FromStr + PartialOrd + Display>(word: &str, what: &str, range: RangeInclusive<T>) -> Result<T, Error> {
    let inside = word.parse().ok().filter(|number| range.contains(number));
    inside.ok_or_else(|| {
        Error::Invalid(format!("{word:?} is no {what}: use a number from {} to {}", range.start(), range.end()))
    })
}

/// Closes the gate and drops every page, a step at a time. True when all is done.
///
/// Errors: EBUSY while the swap file is open; the gate is open then.
fn emptying() -> impl FnMut(&Shared) -> Result<bool, Error> {
    let mut next = 0;
    move |shared| {
        if !shared.gate.close()? {
            return Ok(false);
        }
        let store = shared.engine.store();
        let end = store.slots().min(next + STEP);
        store.discard(next..end, &mut Detached::with_capacity(0));
        next = end;
        Ok(next == store.slots())
    }
}

/// Ends the pool, whose objects are all freed. False if somebody is still moving some: ask again.
fn destroyed(shared: &Shared) -> Result<bool, Error> {
    let leaked = match shared.engine.store().destroy(PATIENCE) {
        Err(Error::Busy { movers, .. }) => {
            eprintln!("zswapd-pager: waiting for {movers} who move objects of the pool");
            return Ok(false);
        }
        leaked => leaked?,
    };
    for Leaked { size, slot } in leaked.iter().take(SHOWN) {
        let slot = slot.map_or("none".into(), |slot| slot.to_string());
        eprintln!("zswapd-pager: leaked: an object of {size} bytes, of slot {slot} as it says");
    }
    Ok(true)
}

/// What is in the pool.
fn left(shared: &Shared) -> String {
    let metrics = shared.engine.store().metrics();
    let objects: u64 = metrics.classes.iter().map(|class| class.objects.get()).sum();
    format!("objects={objects} pages={}", metrics.pool_bytes.get() / PAGE_SIZE as u64)
}

/// The mount's device number; how often the swap file is open; whether this process is protected (see `process::protect`); whether it forgets
/// what is written (`--store none`); bytes of its memory beside pool, slot words and descriptors.
fn status(shared: &Shared) -> String {
    let metrics = shared.engine.store().metrics();
    let fields = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |name: &str| -> u64 {
        let field = fields.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        field.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    // Descriptors are anonymous memory; slot words are in the state file, like the pool.
    let tables = metrics.metadata_bytes.get() + metrics.arena_metadata_bytes.get();
    let descriptors = tables.saturating_sub(shared.engine.size() / PAGE_SIZE as u64 * 8);
    let footprint = (bytes("RssAnon:") + bytes("RssFile:")).saturating_sub(descriptors);
    let (pid, opens, protected) = (std::process::id(), shared.gate.opens(), u8::from(shared.protected));
    let forgets = u8::from(shared.stored < shared.engine.size());
    let device = shared.device_number;
    format!("pid={pid} device={device} opens={opens} protected={protected} forgets={forgets} footprint={footprint}")
}

#[cfg(test)]
mod tests;
