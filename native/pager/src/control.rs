//! The control socket: a connection carries one command and its reply, each a message (SOCK_SEQPACKET) of text.
//!
//! | command | reply |
//! | --- | --- |
//! | `status` | `ok pid=N keeper=N standby=N device=N opens=N protected=N forgets=N footprint=N takeovers=N resend=N program=N zswapd=N`: see `status` below |
//! | `counters` | `ok`, with the descriptor of the counters |
//! | `relay` | `ok`, with the descriptor that pyfuse3 is to serve; EBUSY while another one has it |
//! | `mem-limit BYTES` | `ok`; from a page to 1 TiB |
//! | `compression NAME LEVEL` | `ok`; the level is zstd's, 1 to 22 |
//! | `compact` | `ok`: it has begun |
//! | `reset` | `ok` when every page is dropped, or EBUSY while the swap file is open |
//! | `drain` | `ok objects=N pages=N writebacks=N cleanings=N`, or EBUSY while the swap file is open |
//! | `upgrade` | `ok` when a pager of the program's new version has all set to take over, which it then does; EINVAL with the reason if there is none, and all goes on |
//! | `stop` | as `drain`, with every page dropped; then the pager unmounts and ends |
//!
//! Of pages that nobody uses (`recompressor.rs`), one of these at a time, in the order in which they come:
//!
//! | command | reply |
//! | --- | --- |
//! | `tick` | `ok`: all pages are a tick older, but those that are used; they can be told up to 63 |
//! | `recompress TIER CODEC LEVEL AGE PAGES MICROSECONDS [share]` | `ok looked=N recompressed=N not_smaller=N shared=N saved=N microseconds=N end=...`: pages of the pool that are at least AGE ticks old were recompressed, with `lz4`, `zstd` or `dictionary`, until so many were tried, or so much processor time used. Those that were tried for this tier (1 to 3) or a higher one are left alone. The next call goes on where this one has ended; `done`: at the last page. `share`: those of them that are alike are stored once, where looking for them pays |
//! | `dictionary`, with the descriptor of a file | `ok serial=N`: its contents are the newest dictionary; EBUSY: pages need all four that there are |
//! | `sample-pool AGE PAGES` | `ok pages=N`, with the descriptor of a memory file that has the contents of so many such pages, or all |
//!
//! With a backing disk; without one these fail with ENODEV:
//!
//! | command | reply |
//! | --- | --- |
//! | `idle all` | `ok pages=N`: so many pages of the pool are marked as idle now |
//! | `idle SECONDS` | the same, after marking only those that nobody has used for so long |
//! | `writeback all`, `idle`, `unused SECONDS`, `huge`, `huge_idle`, `page N` | `ok pages=N bytes=N end=...`: so many pages were written back, and so much of the pool freed; EBUSY while another writeback or `shrink` is under way |
//! | `writeback resume` | the same, of no pages: a disk that had failed has taken a segment, and is written to again; EIO: it has not |
//! | `sample PAGES` | `ok pages=N`: so many of the pages on the disk, or all, were read and are good; EIO: one is not, or cannot be read |
//! | `shrink BYTES` | the same, of the coldest pages, until so much of the pool is free |
//! | `writeback-limit BYTES`, `none` | `ok`: so much may still be written to the disk |
//! | `writeback-limit +BYTES` | `ok`: so much more, from 0 if there was no limit |
//! | `accept-threshold PERCENT` | `ok`: of its limit, to which a full pool shrinks |
//! | `promote on`, `off` | `ok`: whether pages that are read from the disk may move to the pool, while it has room |
//!
//! `end` is `done`, or why it has ended early: `stopped` (paging ends), `full`, `budget`, `failed` (the disk).
//!
//! A failure is `error ERRNO TEXT`.
//!
//! `drain` is the end of paging: when it is answered no request is under way, nothing waits to be freed, and the swap
//! file cannot be opened any more (ENODEV) until the next `relay`. It tells what is left in the pool; what is left
//! after `stop` belongs to no slot: it leaked.
//!
//! No connection waits for another one: whoever says nothing is not waited for, and what takes long is done in steps.

mod recompression;

use crate::keeper::hand_over;
use crate::recompressor::Order as Recompression;
use crate::shrinker::{End, Swept};
use crate::socket::{Connection, Listener};
use crate::Shared;
use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};
use zswapd_core::ages::MAX_AGE;
use zswapd_core::backing::Backing;
use zswapd_core::codec::{Algorithm, Compression, ZSTD_LEVELS};
use zswapd_core::error::Error;
use zswapd_core::page::PAGE_SIZE;
use zswapd_core::session::MAX_INIT;
use zswapd_core::state::MAX_ARENA_PAGES;
use zswapd_core::store::{Detached, InFlight, Leaked, What};
use zswapd_fuse::init::has_resend;

/// Connections that have not said anything yet. The oldest one makes room for the next.
const SILENT: usize = 16;
/// Slots that are emptied in one step: about a millisecond.
const STEP: u64 = 8192;
/// For those who are at work when the pager ends, at a time: shrinkers wait for the disk, who moves objects needs some
/// microseconds, unless it does not run.
const PATIENCE: Duration = Duration::from_millis(100);
/// For the keeper's answer to `upgrade`. It waits for two minutes at most.
const KEEPER_PATIENCE: Duration = Duration::from_secs(180);
/// The largest arena: a pool can never use more.
const MAX_LIMIT_BYTES: u64 = MAX_ARENA_PAGES * PAGE_SIZE as u64;
/// Of leaked objects. There should be none, and never are there few.
const SHOWN: usize = 10;
/// Pages that `sample` reads at most: seconds of a disk that turns.
const MAX_SAMPLE: u64 = 4096;
/// Pages that `sample-pool` shows at most: 32 MiB.
const MAX_COLD: u64 = 8192;
/// Between two looks at what others do.
const LOOK: Duration = Duration::from_millis(10);

/// What becomes of the connection, or the pager, after a command.
enum Reply {
    Text(String),
    Descriptor(OwnedFd),
    TextAndDescriptor(String, OwnedFd),
    Later(Job),
    /// As `Later`, but others do the work: it is only looked at, and keeps no other command waiting.
    Meanwhile(Job),
    Stop(String),
    HandOver,
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
    let mut meanwhile: Vec<(Connection, Job)> = Vec::new();
    loop {
        let wait = match (jobs.is_empty(), meanwhile.is_empty()) {
            (false, _) => Some(Duration::ZERO),
            (true, false) => Some(LOOK),
            (true, true) => None,
        };
        let (accept, speaking) = match listener.poll(&silent, wait) {
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
            let result = command.and_then(|(command, descriptor)| {
                execute(&command.split_whitespace().collect::<Vec<_>>(), descriptor, shared)
            });
            match result {
                Ok(Reply::Later(job)) => jobs.push_back((connection, job)),
                Ok(Reply::Meanwhile(job)) => meanwhile.push((connection, job)),
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
        meanwhile.retain_mut(|(connection, job)| match job(shared).transpose() {
            None => true,
            Some(result) => answer(connection, &result),
        });
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
        Ok(Reply::TextAndDescriptor(text, descriptor)) => connection.send(&format!("ok {text}"), Some(descriptor)),
        Ok(Reply::Later(_) | Reply::Meanwhile(_)) => {}
        Ok(Reply::HandOver) => {
            connection.send("ok", None);
            hand_over();
        }
        Err(error) => connection.send(&format!("error {} {error}", error.errno()), None),
    }
    matches!(result, Ok(Reply::Stop(_)))
}

fn execute(words: &[&str], descriptor: Option<OwnedFd>, shared: &Shared) -> Result<Reply, Error> {
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
            let descriptor = shared.relay.connect(shared.session()).map_err(system("another zswapd is connected"))?;
            // The last one may have been killed between `drain` and `stop`.
            shared.gate().open();
            // Or in the middle of a detach, as may be a zswapctl.
            shared.engine.store().set_promoting(true);
            Ok(Reply::Descriptor(descriptor))
        }
        ["compact"] => {
            shared.engine.store().pool().ask_for_compaction();
            done()
        }
        ["mem-limit", bytes] => {
            let (store, what) = (shared.engine.store(), "size in bytes");
            store.pool().set_limit_bytes(number(bytes, what, PAGE_SIZE as u64..=MAX_LIMIT_BYTES)?);
            store.ask_for_shrinking();
            done()
        }
        ["compression", name, level] => {
            let algorithm: Algorithm = name.parse()?;
            let level = number(level, "zstd level", ZSTD_LEVELS)?;
            shared.engine.set_compression(Compression::new(algorithm, level)?);
            done()
        }
        ["tick"] => Ok(ordered(shared.recompressor.order(Recompression::Tick), |()| Reply::Text(String::new()))),
        ["recompress", tier, codec, level, age, pages, time, rest @ ..] if matches!(rest, [] | ["share"]) => {
            let (order, share) = (recompression::parse([tier, codec, level, age, pages, time])?, !rest.is_empty());
            let order = |answer| Recompression::Recompress(order, share, answer);
            Ok(ordered(shared.recompressor.order(order), |done| Reply::Text(recompression::text(&done))))
        }
        ["dictionary"] => {
            let none = || Error::Invalid("the descriptor of a file has to come with the command".into());
            let file = descriptor.ok_or_else(none)?;
            Ok(ordered(shared.recompressor.order(|answer| Recompression::Install(file, answer)), |serial| {
                Reply::Text(format!("serial={serial}"))
            }))
        }
        ["sample-pool", age, pages] => {
            let (age, pages) =
                (number(age, "age in ticks", 0..=MAX_AGE)?, number(pages, "number of pages", 1..=MAX_COLD)?);
            let order = |answer| Recompression::Sample { age, pages, answer };
            Ok(ordered(shared.recompressor.order(order), |(pages, file)| {
                Reply::TextAndDescriptor(format!("pages={pages}"), file)
            }))
        }
        ["idle", age] => {
            let age = if *age == "all" { 0 } else { number(age, "age in seconds", 0..=u64::from(u32::MAX))? };
            backing(shared)?;
            let pages = shared.engine.store().mark_idle(Duration::from_secs(age));
            Ok(Reply::Text(format!("pages={pages}")))
        }
        ["writeback", "all"] => sweep(shared, What::All),
        ["writeback", "idle"] => sweep(shared, What::Idle),
        ["writeback", "unused", age] => {
            sweep(shared, What::Unused { seconds: number(age, "age in seconds", 0..=u32::MAX)? })
        }
        ["writeback", "huge"] => sweep(shared, What::Huge),
        ["writeback", "huge_idle"] => sweep(shared, What::HugeIdle),
        ["writeback", "page", page] => {
            let last = shared.engine.store().slots() - 1;
            sweep(shared, What::Page(number(page, "page", 0..=last as u32)?))
        }
        ["writeback", "resume"] => {
            backing(shared)?;
            Ok(received(shared.sweeper.resume(), |()| "pages=0 bytes=0 end=done".into()))
        }
        ["sample", pages] => {
            backing(shared)?;
            let sampled = shared.sweeper.sample(number(pages, "number of pages", 1..=MAX_SAMPLE)?);
            Ok(received(sampled, |pages| format!("pages={pages}")))
        }
        ["shrink", bytes] => sweep(shared, What::Coldest { bytes: number(bytes, "size in bytes", 0..=u64::MAX)? }),
        ["writeback-limit", "none"] => {
            backing(shared)?.set_budget(None);
            done()
        }
        ["writeback-limit", bytes] => {
            let more = bytes.strip_prefix('+');
            let bytes = number(more.unwrap_or(bytes), "size in bytes", 0..=u64::MAX - 1)?;
            match more {
                Some(_) => backing(shared)?.add_to_budget(bytes),
                None => backing(shared)?.set_budget(Some(bytes)),
            }
            done()
        }
        ["accept-threshold", percent] => {
            let percent = number(percent, "percentage", 1..=100)?;
            backing(shared)?;
            shared.engine.store().set_accept_threshold(percent);
            done()
        }
        ["promote", on @ ("on" | "off")] => {
            backing(shared)?;
            shared.engine.store().set_promoting(*on == "on");
            done()
        }
        ["reset"] => {
            let (mut empty, mut was_closed) = (emptying(), None);
            later(move |shared| {
                let was_closed = *was_closed.get_or_insert_with(|| shared.gate().is_closed());
                let done = empty(shared)?;
                if done && !was_closed {
                    shared.gate().open();
                }
                Ok(done.then(|| Reply::Text(String::new())))
            })
        }
        ["upgrade"] => {
            shared.keeper.upgrade().map_err(system("the keeper cannot be asked"))?;
            let asked = Instant::now();
            Ok(Reply::Meanwhile(Box::new(move |shared| match shared.keeper.upgraded().map_err(Error::Invalid)? {
                Some(()) => Ok(Some(Reply::HandOver)),
                None if asked.elapsed() < KEEPER_PATIENCE => Ok(None),
                None => {
                    shared.keeper.forget_upgrade();
                    Err(Error::Invalid("the keeper does not answer: is it stopped?".into()))
                }
            })))
        }
        ["drain"] => later(|shared| Ok(shared.gate().close()?.then(|| Reply::Text(left(shared))))),
        ["stop"] => {
            let mut stop = stopping();
            later(move |shared| Ok(stop(shared)?.then(|| Reply::Stop(left(shared)))))
        }
        _ => Err(Error::Invalid(format!("unknown command: {}", words.join(" ")))),
    }
}

/// A number from outside, decimal.
fn number<T: FromStr + PartialOrd + Display>(word: &str, what: &str, range: RangeInclusive<T>) -> Result<T, Error> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    let inside = word.parse().ok().filter(|number| digits && range.contains(number));
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
        if !shared.gate().close()? {
            return Ok(false);
        }
        let store = shared.engine.store();
        let end = store.slots().min(next + STEP);
        store.discard(next..end, &mut Detached::with_capacity(0));
        next = end;
        Ok(next == store.slots())
    }
}

/// Ends the store, a step at a time: closes the gate, then waits for who writes to the backing disk, drops every page,
/// and ends the pool. True when all is done. Each step that is done is said, and whom the next one waits for.
///
/// Errors: EBUSY while the swap file is open; all goes on then.
fn stopping() -> impl FnMut(&Shared) -> Result<bool, Error> {
    let mut say = {
        let mut last = String::new();
        move |what: String| {
            if what != last {
                eprintln!("zswapd-pager: {what}");
                last = what;
            }
        }
    };
    let (mut empty, mut emptied) = (emptying(), false);
    move |shared| {
        let store = shared.engine.store();
        if !emptied {
            if !shared.gate().close()? {
                say(format!("stopping: waiting for {} page operations", shared.gate().under_way()));
                return Ok(false);
            }
            let InFlight { writebacks, cleanings, recompressions, .. } = store.stop_writeback(PATIENCE);
            if writebacks + cleanings + recompressions > 0 {
                say(format!(
                    "stopping: waiting for {writebacks} writebacks, {cleanings} cleanings and {recompressions} \
                     recompressions"
                ));
                return Ok(false);
            }
            say("stopping: no page operation, writeback, cleaning or recompression is under way".into());
            emptied = empty(shared)?;
            return Ok(false);
        }
        let leaked = match store.destroy(PATIENCE) {
            Err(Error::Busy { movers, .. }) => {
                say(format!("stopping: waiting for {movers} who move objects of the pool"));
                return Ok(false);
            }
            leaked => leaked?,
        };
        let wiped = store.backing().map_or("", |_| "; the key of the backing disk is wiped");
        say(format!("stopping: nothing is moved any more, and every page is dropped{wiped}"));
        for Leaked { size, slot } in leaked.iter().take(SHOWN) {
            let slot = slot.map_or("none".into(), |slot| slot.to_string());
            eprintln!("zswapd-pager: leaked: an object of {size} bytes, of slot {slot} as it says");
        }
        Ok(true)
    }
}

fn backing(shared: &Shared) -> Result<&Backing, Error> {
    shared.engine.store().backing().ok_or(Error::NoWriteback)
}

/// Has the sweeper write pages back; the reply says what it has done.
fn sweep(shared: &Shared, what: What) -> Result<Reply, Error> {
    backing(shared)?;
    let busy =
        || Error::System { what: "another writeback is under way", source: io::Error::from_raw_os_error(libc::EBUSY) };
    let swept = shared.sweeper.sweep(what).ok_or_else(busy)?;
    Ok(received(swept, |Swept { job, end }| {
        let end = match end {
            End::Done => "done",
            End::Stopped => "stopped",
            End::Full => "full",
            End::Budget => "budget",
            End::Failed => "failed",
        };
        format!("pages={} bytes={} end={end}", job.pages, job.bytes)
    }))
}

/// What the sweeper says when it has done something.
fn received<T: 'static>(from: Receiver<Result<T, Error>>, text: impl Fn(T) -> String + 'static) -> Reply {
    ordered(from, move |done| Reply::Text(text(done)))
}

/// What a thread says when it has done what it was told.
fn ordered<T: 'static>(from: Receiver<Result<T, Error>>, reply: impl Fn(T) -> Reply + 'static) -> Reply {
    Reply::Meanwhile(Box::new(move |_| match from.try_recv() {
        Ok(result) => result.map(|done| Some(reply(done))),
        Err(TryRecvError::Empty) => Ok(None),
        Err(TryRecvError::Disconnected) => Err(Error::NoWriteback),
    }))
}

/// What is in the pool, and who still writes to the backing disk.
fn left(shared: &Shared) -> String {
    let metrics = shared.engine.store().metrics();
    let objects: u64 = metrics.classes.iter().map(|class| class.objects.get()).sum();
    let pages = metrics.pool_bytes.get() / PAGE_SIZE as u64;
    let InFlight { writebacks, cleanings, .. } = shared.engine.store().in_flight();
    format!("objects={objects} pages={pages} writebacks={writebacks} cleanings={cleanings}")
}

/// The pids of this process, its keeper (0: gone) and its standby (0: none); the mount's device number; how often the
/// swap file is open; whether this process is protected (see `protect`); whether it forgets what is written
/// (`--store none`); bytes of its memory beside pool, slot words and descriptors; how often a pager has taken over;
/// whether the kernel sends again what it has sent to one that is gone; which program this is, as the keeper counts them;
/// whether a zswapd is connected.
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
    let (pid, opens, protected) = (std::process::id(), shared.gate().opens(), u8::from(shared.protected));
    let forgets = u8::from(shared.stored < shared.engine.size());
    let device = shared.device_number;
    let (keeper, standby) = (shared.keeper.pid(), shared.keeper.standby());
    let zswapd = u8::from(shared.relay.is_connected());
    let resend = shared.session().init(&mut [0; MAX_INIT]).map_or(0, |request| u8::from(has_resend(request)));
    format!(
        "pid={pid} keeper={keeper} standby={standby} device={device} opens={opens} protected={protected} \
         forgets={forgets} footprint={footprint} takeovers={} resend={resend} program={} zswapd={zswapd}",
        metrics.takeovers.get(),
        shared.program,
    )
}

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod tests;
