//! The pager: serves the swap file's pages from locked memory, with nothing to wait for but the next request.
//!
//! zswapd starts it and tells it what to do over the control socket; it outlives zswapd. Its threads:
//!
//! | thread | does | may wait for memory |
//! | --- | --- | --- |
//! | workers | one leads: reads requests from /dev/fuse, answers those on the swap file; others wait for the disk | never, but for the disk (a file: in the kernel) |
//! | relay-out, relay-in | carry all other requests to pyfuse3, and its replies back | in the kernel's socket code |
//! | refill | keeps the pool's reserve of memory filled | yes |
//! | ballast | gives memory back when the machine's reclaim is stuck | yes, to take it anew |
//! | compactor | moves objects together when the pool is fragmented; says what workers have to say | in the log |
//! | shrinkers, sweeper | write pages to the backing disk: when the pool is full, and when somebody asks | in the block layer |
//! | cleaner | moves what lives in sparse segments of the disk together | in the block layer |
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
mod no_alloc;
mod process;
mod refill;
mod relay;
mod shrinker;
mod socket;
mod state_file;
#[cfg(test)]
mod testing;
mod trouble;
mod watermark;

use ballast::Ballast;
use std::process::ExitCode;
use std::sync::Arc;
use watermark::Watermark;
use zswapd_core::codec::Compression;
use zswapd_core::engine::Engine;
use zswapd_core::metrics::SharedMetrics;
use zswapd_core::store::Files;
use zswapd_fuse::mount;

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
    pub counters: std::fs::File,
    pub gate: gate::Gate,
    /// Of the page channel, and of the backing disk.
    pub trouble: trouble::Trouble,
    pub disk_trouble: trouble::Trouble,
    pub sweeper: shrinker::Sweeper,
    /// Ends the pager when the file system is gone.
    pub closer: socket::Closer,
    /// Of the mount.
    pub device_number: u64,
    /// The kernel has granted all that [`process::protect`] asks for.
    pub protected: bool,
    /// Writes beyond are answered, and forgotten.
    pub stored: u64,
}

fn run() -> Result<(), String> {
    let args = args::parse(std::env::args().skip(1))?;
    let protected = process::protect();
    let failed = |what: &'static str| move |error: &dyn std::fmt::Display| format!("{what}: {error}");
    let listener = socket::Listener::bind(&args.control).map_err(|error| failed("control socket")(&error))?;

    let counters = SharedMetrics::file().map_err(|error| error.to_string())?;
    let files = Files {
        state: Some(state_file::create().map_err(|error| failed("state file")(&error))?),
        counters: Some(counters.try_clone().map_err(|error| failed("counters")(&error))?),
    };
    let compression = Compression::new(args.algorithm, args.zstd_level).map_err(|error| error.to_string())?;
    let mut engine = Engine::new(args.size, args.allocator, args.mem_limit, compression, files)
        .map_err(|error| error.to_string())?;
    if let Some(backing) = &args.backing {
        engine = engine.with_disk(backing::open(backing)?).map_err(|error| error.to_string())?;
        engine.store().set_accept_threshold(backing.accept_threshold_percent);
    }
    engine.store().populate_slots().map_err(|error| error.to_string())?;
    // The first write finds a reserve: it may come before the refill thread runs.
    while engine.store().pool().adjust().map_err(|error| error.to_string())? {}

    let watermark = Watermark::read().map_err(|error| failed("/proc/zoneinfo")(&error))?;
    let mut ballast = Ballast::new().map_err(|error| error.to_string())?;

    let device = mount::mount(&args.mount_point).map_err(|error| failed("cannot mount")(&error))?;
    let device_number = mount::device_number(&args.mount_point).map_err(|error| failed("cannot mount")(&error))?;
    let device = Arc::new(device);
    let (sweeper, orders) = shrinker::Sweeper::new();
    let shared = Arc::new(Shared {
        engine,
        relay: relay::Relay::new(device.clone()),
        counters: counters.into(),
        gate: gate::Gate::default(),
        trouble: trouble::Trouble::new("cannot read from /dev/fuse"),
        disk_trouble: trouble::Trouble::new(
            "cannot write to the backing disk, and keep in memory what was to go there",
        ),
        sweeper,
        closer: listener.closer().map_err(|error| failed("control socket")(&error))?,
        device_number,
        protected,
        stored: args.stored,
    });

    let spawned = process::spawn("refill", {
        let shared = shared.clone();
        move || refill::run(shared.engine.store().pool(), watermark)
    })
    .and_then(|()| {
        let shared = shared.clone();
        process::spawn("ballast", move || ballast.run(shared.engine.store().metrics(), &watermark))
    })
    .and_then(|()| {
        let shared = shared.clone();
        process::spawn("compactor", move || compactor::run(&shared))
    })
    .and_then(|()| args.backing.as_ref().map_or(Ok(()), |backing| shrinker::spawn(&shared, orders, backing)))
    .and_then(|()| relay::spawn(&shared))
    .and_then(|()| channel::spawn(&shared, &device, &args));
    let result =
        spawned.map_err(|error| failed("cannot start a thread")(&error)).map(|()| control::serve(&listener, &shared));
    // Nobody has the swap file open when we come here; a failed start is not attached yet. Somebody else may have
    // unmounted it, and mounted something else there.
    if mount::device_number(&args.mount_point).is_ok_and(|now| now == device_number) {
        let _gone_already = mount::unmount(&args.mount_point);
    }
    result
}
