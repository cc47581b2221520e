//! The thread that makes pages smaller that nobody uses, and has to do with dictionaries, as it is told.
//!
//! What it may take memory for (what it works with, a dictionary, a file for a sample), it takes while it holds nothing
//! that a page could wait for; while it recompresses it allocates nothing.

use crate::process::{spawn as spawn_thread, Start};
use crate::{no_alloc, Shared};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use zswapd_core::codec::dictionary::MAX_BYTES;
use zswapd_core::error::Error;
use zswapd_core::memory::memory_file;
use zswapd_core::store;

type Answer<T> = Sender<Result<T, Error>>;

pub enum Order {
    Tick(Answer<()>),
    /// Whether pages that are alike are to be found, too.
    Recompress(store::Order, bool, Answer<store::Recompressed>),
    /// The file has the dictionary.
    Install(OwnedFd, Answer<u64>),
    /// Answered with how many pages there are, and the file that has them.
    Sample {
        age: u8,
        pages: u64,
        answer: Answer<(u64, OwnedFd)>,
    },
}

/// Orders for the recompressor.
pub struct Recompressor(Sender<Order>);

/// Where it finds them.
pub struct Orders(Receiver<Order>);

impl Recompressor {
    pub fn new() -> (Recompressor, Orders) {
        let (orders, received) = mpsc::channel();
        (Recompressor(orders), Orders(received))
    }

    /// Has something done. What becomes of it is received when it is done.
    pub fn order<T>(&self, order: impl FnOnce(Answer<T>) -> Order) -> Receiver<Result<T, Error>> {
        let (answer, received) = mpsc::channel();
        // Without the thread the answer is dropped here, as the receiver finds.
        let _ = self.0.send(order(answer));
        received
    }
}

/// Makes the thread. Errors: there is no memory, or it cannot be started.
pub fn spawn(start: &Arc<Start>, orders: Orders) -> io::Result<()> {
    // Made when it is needed: most standbys never do.
    let mut tools = None;
    spawn_thread("recompressor", start, move |shared| {
        // Until nobody can order anything. Who has asked may be gone.
        for order in orders.0 {
            let store = shared.engine.store();
            match order {
                Order::Tick(answer) => {
                    no_alloc::forbidden(|| store.tick());
                    drop(answer.send(Ok(())));
                }
                Order::Recompress(order, duplicates, answer) => {
                    drop(answer.send(made(&mut tools).and_then(|tools| recompress(&shared, tools, &order, duplicates))))
                }
                Order::Install(file, answer) => drop(answer.send(install(&shared, file))),
                Order::Sample { age, pages, answer } => {
                    drop(answer.send(made(&mut tools).and_then(|tools| sample(&shared, tools, age, pages))));
                }
            }
        }
    })
}

fn made(tools: &mut Option<store::Recompressor>) -> Result<&mut store::Recompressor, Error> {
    match tools {
        Some(tools) => Ok(tools),
        None => Ok(tools.insert(store::Recompressor::new()?)),
    }
}

fn recompress(
    shared: &Shared,
    tools: &mut store::Recompressor,
    order: &store::Order,
    duplicates: bool,
) -> Result<store::Recompressed, Error> {
    let store = shared.engine.store();
    store.prepare(tools, order.tier)?;
    store.prepare_duplicates(tools, duplicates);
    Ok(no_alloc::forbidden(|| store.recompress(tools, order)))
}

fn install(shared: &Shared, file: OwnedFd) -> Result<u64, Error> {
    let failed = |source| Error::System { what: "cannot read the dictionary", source };
    let file = File::from(file);
    let length = file.metadata().map_err(failed)?.len();
    // Of what is no regular file, 0.
    let mut bytes = vec![0; length.min(MAX_BYTES as u64 + 1) as usize];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    shared.engine.store().install_dictionary(&bytes)
}

fn sample(shared: &Shared, tools: &mut store::Recompressor, age: u8, pages: u64) -> Result<(u64, OwnedFd), Error> {
    let mut file = File::from(memory_file(c"zswapd-sample", 0)?);
    // Others than the last time.
    let start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::from(time.subsec_nanos()));
    let mut failed = None;
    let store = shared.engine.store();
    let pages = store.sample_cold(tools, age, pages, start, |page| {
        failed = file.write_all(page).err();
        failed.is_none()
    });
    match failed {
        None => Ok((pages, file.into())),
        Some(source) => Err(Error::System { what: "cannot write the sample", source }),
    }
}
