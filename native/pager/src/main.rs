//! The pager: serves the swap file's pages from locked memory, with nothing to wait for but the next request.
//!
//! The keeper starts it, and keeps what it serves with for the next one; zswapd tells it what to do over the control
//! socket. Its threads:
//!
//! | thread | does | may wait for memory |
//! | --- | --- | --- |
//! | workers | one leads: reads requests from /dev/fuse, answers those on the swap file; others wait for the disk | never, but for the disk (a file: in the kernel) |
//! | relay-out, relay-in | carry all other requests to pyfuse3, and its replies back | in the kernel's socket code |
//! | refill | keeps the pool's reserve of memory filled | yes |
//! | ballast | gives memory back when the machine's reclaim is stuck | yes, to take it anew |
//! | compactor | moves objects together when the pool is fragmented; says what workers have to say | in the log |
//! | shrinkers, sweeper | write pages to the backing disk: when the pool is full, and when somebody asks | in the block layer |
//! | recompressor | makes pages smaller that nobody uses; dictionaries | for a dictionary, a sample |
//! | cleaner | moves what lives in sparse segments of the disk together | in the block layer |
//! | keeper | listens to the keeper | yes |
//! | main | answers commands on the control socket | yes |

mod args;
mod backing;
mod ballast;
mod channel;
mod compactor;
mod control;
mod crew;
mod gate;
mod idle;
mod inbox;
mod keeper;
mod no_alloc;
mod process;
mod recompressor;
mod refill;
mod relay;
mod shrinker;
mod socket;
#[cfg(test)]
mod testing;
mod trouble;
mod watermark;

use args::Args;
use ballast::Ballast;
use gate::Gate;
use keeper::Keeper;
use process::Start;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use watermark::Watermark;
use zswapd_core::codec::Compression;
use zswapd_core::engine::Engine;
use zswapd_core::error;
use zswapd_core::memory;
use zswapd_core::metrics::{Metrics, SharedMetrics};
use zswapd_core::session::Session;
use zswapd_core::state::State;
use zswapd_core::store::{DiskOptions, Files};
use zswapd_fuse::{mount, reply};
use zswapd_keeper::descriptors::Descriptors;
use zswapd_keeper::process::protect;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("zswapd-pager: {message}");
            ExitCode::FAILURE
        }
    }
}

/// What the threads share.
pub struct Shared {
    pub engine: Engine,
    pub relay: relay::Relay,
    pub keeper: Arc<Keeper>,
    /// /dev/fuse of the mount.
    pub device: Arc<File>,
    pub counters: File,
    /// Of the page channel, and of the backing disk.
    pub trouble: trouble::Trouble,
    pub disk_trouble: trouble::Trouble,
    pub sweeper: shrinker::Sweeper,
    pub recompressor: recompressor::Recompressor,
    /// Ends the pager when the file system is gone.
    pub closer: socket::Closer,
    /// Of the mount.
    pub device_number: u64,
    /// The kernel has granted all that [`protect`] asks for.
    pub protected: bool,
    /// Writes beyond are answered, and forgotten.
    pub stored: u64,
    /// Which program this is: see [`keeper::Go`].
    pub program: u64,
    /// What was taken over is to be looked at.
    pub verify: bool,
}

impl Shared {
    /// What was agreed on with the kernel.
    pub fn session(&self) -> &Session {
        self.engine.store().session()
    }

    pub fn gate(&self) -> Gate<'_> {
        Gate::new(self.session(), self.engine.store().metrics().page_operations.atomic())
    }
}

fn run() -> Result<(), String> {
    // Before Linux 6.14 a program that is run by its descriptor has that one's number for a name.
    process::set_name(c"zswapd-pager");
    let args = args::parse(std::env::args().skip(1))?;
    let Descriptors { channel, .. } = args.keeper;
    let keeper = keeper::take(channel).map_err(|error| format!("--keeper fd={channel}: {error}"))?;
    let keeper = Arc::new(Keeper::new(keeper));
    serve(&args, &keeper).inspect_err(|why| keeper.failed(why))
}

/// Sets all up, waits to be told to go, and serves until that ends.
fn serve(args: &Args, keeper: &Arc<Keeper>) -> Result<(), String> {
    let refused = protect().err();
    let failed = |what: &'static str| move |error: &dyn std::fmt::Display| format!("{what}: {error}");
    let Descriptors { fuse, state, counters, control, device: device_number, .. } = args.keeper;
    let take = |number| keeper::take(number).map_err(|error| failed("--keeper")(&error));
    let device = Arc::new(File::from(take(fuse)?));
    let (state, counters, listener) =
        (take(state)?, File::from(take(counters)?), socket::Listener::new(take(control)?));
    let closer = listener.closer().map_err(|error| failed("control socket")(&error))?;
    let relay = relay::Relay::new(device.clone(), keeper.clone());
    let disk = args.backing.as_ref().map(backing::open).transpose()?;
    if !is_new(&state, &counters)? {
        // Looked at, and left as it is: who cannot go on with it does not say that all is set.
        let copy = state.try_clone().map_err(|error| failed("state file")(&error))?;
        State::open(copy, |slots| args.allocator.geometry(slots)).map_err(|error| error.to_string())?;
        SharedMetrics::open(counters.as_fd()).map_err(|error| error.to_string())?;
    }
    let watermark = Watermark::read().map_err(|error| failed("/proc/zoneinfo")(&error))?;
    let (sweeper, orders) = shrinker::Sweeper::new();
    let (recompressor, recompressions) = recompressor::Recompressor::new();
    let start = Arc::new(Start::default());
    recompressor::spawn(&start, recompressions).map_err(|error| failed("cannot start a thread")(&error))?;
    spawn(args, &start, orders, watermark).map_err(|error| failed("cannot start a thread")(&error))?;

    let Some(go) = keeper.wait_for_go() else { return Ok(()) };
    if go.gone.is_none() {
        refused.iter().flat_map(|text| text.lines()).for_each(|line| eprintln!("zswapd-pager: {line}"));
    }
    let is_new = is_new(&state, &counters)?;
    let files = files(state, &counters)?;
    let engine = match is_new {
        true => new_engine(args, files, disk),
        false => Engine::recover(args.allocator, files, disk),
    }
    .and_then(prepared)
    .map_err(|error| error.to_string())?;
    if !is_new {
        relay.go_on(engine.store().session(), go.relay);
    }
    ask_again(args, &device);
    if let Some(gone) = go.gone {
        let metrics = engine.store().metrics();
        metrics.takeovers.add(1);
        metrics.takeover_ns.set(gone.elapsed().as_nanos() as u64);
    }
    let shared = Arc::new(Shared {
        engine,
        relay,
        keeper: keeper.clone(),
        device,
        counters,
        trouble: trouble::Trouble::new("cannot read from /dev/fuse, trying again"),
        disk_trouble: trouble::Trouble::new(
            "cannot write to the backing disk, and keep in memory what was to go there",
        ),
        sweeper,
        recompressor,
        closer,
        device_number,
        protected: refused.is_none(),
        stored: args.stored,
        program: go.program,
        verify: !is_new,
    });
    start.begin(shared.clone());
    keeper.serving();
    control::serve(&listener, &shared);
    if keeper.pid() == 0 {
        take_back(args, device_number);
    }
    Ok(())
}

/// What the keeper would do, which is gone.
fn take_back(args: &Args, device_number: u64) {
    // Somebody else may have unmounted it, and mounted something else there.
    if mount::device_number(&args.mount_point).is_ok_and(|now| now == device_number) {
        let _gone_already = mount::unmount(&args.mount_point);
    }
    let _gone_already = std::fs::remove_file(&args.control);
}

/// Makes all threads. They begin at the start.
fn spawn(args: &Args, start: &Arc<Start>, orders: shrinker::Orders, watermark: Watermark) -> io::Result<()> {
    let mut ballast = Ballast::new().map_err(io::Error::other)?;
    process::spawn("refill", start, move |shared| refill::run(shared.engine.store().pool(), watermark))?;
    process::spawn("ballast", start, move |shared| ballast.run(shared.engine.store().metrics(), &watermark))?;
    process::spawn("compactor", start, |shared| compactor::run(&shared))?;
    process::spawn("keeper", start, |shared| shared.keeper.listen())?;
    if let Some(backing) = &args.backing {
        shrinker::spawn(start, orders, backing)?;
    }
    relay::spawn(start)?;
    channel::spawn(start, args)
}

/// Has the kernel send again what the last pager has not answered. Before anybody reads.
///
/// A kernel that cannot (before 6.9) would leave those who asked waiting for ever. There each pager reads from a channel
/// of its own, with which the kernel ends its requests: they fail, for each process that waits, and nothing hangs.
fn ask_again(args: &Args, device: &File) {
    if !args.resend || reply::resend(device.as_fd()).is_err() {
        if let Err(error) = mount::separate(device) {
            eprintln!("zswapd-pager: whoever waits for this pager when it is killed will wait for ever: {error}");
        }
    }
}

/// Whether no pager has served with these files yet.
///
/// Errors: one has, but there is no state: who took it for a new one would answer zeros for every page.
fn is_new(state: &OwnedFd, counters: &File) -> Result<bool, String> {
    let is_empty = |file| memory::length_of(file).map(|length| length == 0).map_err(|error| error.to_string());
    match (is_empty(state.as_fd())?, is_empty(counters.as_fd())?) {
        (true, false) => Err("the state file cannot be recovered: it is empty, and has been used".into()),
        (state, _) => Ok(state),
    }
}

fn files(state: OwnedFd, counters: &File) -> Result<Files, String> {
    let counters = counters.try_clone().map_err(|error| format!("counters: {error}"))?;
    Ok(Files { state: Some(state), counters: Some(counters.into()) })
}

/// A new engine, in files that are empty.
fn new_engine(args: &Args, files: Files, disk: Option<DiskOptions>) -> error::Result<Engine> {
    let counters = files.counters.as_ref().map(AsFd::as_fd);
    counters.map_or(Ok(()), |counters| memory::set_length(counters, size_of::<Metrics>() as u64))?;
    let compression = Compression::new(args.algorithm, args.zstd_level)?;
    let mut engine = Engine::new(args.size, args.allocator, args.mem_limit, compression, files)?;
    if let Some(disk) = disk {
        engine = engine.with_disk(disk)?;
    }
    if let Some(backing) = &args.backing {
        engine.store().set_accept_threshold(backing.accept_threshold_percent);
    }
    // The first write finds a reserve: it may come before the refill thread runs.
    while engine.store().pool().adjust()? {}
    Ok(engine)
}

/// With all that a worker touches in memory. Of a successor most of it is there; a reserve it does not wait for, since the
/// machine may have no memory before it serves.
fn prepared(engine: Engine) -> error::Result<Engine> {
    engine.store().populate_slots()?;
    Ok(engine)
}
