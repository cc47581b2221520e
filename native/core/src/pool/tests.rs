//! The pool with objects that come, go and move.

use super::*;
use crate::metrics::{Counter, FULLNESS_GROUPS};
use crate::object::HEADER_SIZE;
use crate::pool::arena::RESERVE_HIGH;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;

fn pool(allocator: Allocator, regions: u32, limit_pages: u64) -> Pool {
    // Many slots: all classes.
    let state = State::create(1 << 18, regions * REGION_PAGES, 0, None).expect("state");
    let metrics = SharedMetrics::new(None).expect("metrics");
    Pool::new(Arc::new(state), allocator, limit_pages * PAGE_SIZE as u64, metrics).expect("pool")
}

/// The longest object: a page that does not get smaller.
const LONGEST: usize = PAGE_SIZE + HEADER_SIZE;

/// A limit that is never reached.
const NO_LIMIT: u64 = 1 << 40;

fn used_pages(pool: &Pool) -> u64 {
    pool.base.metrics.pool_bytes.get() / PAGE_SIZE as u64
}

mod hostile;

proptest! {
    /// Against a list of what every object was filled with: nothing overlaps, counts and pages are exact.
    #[test]
    fn objects_keep_their_bytes(
        allocator in prop::sample::select(&Allocator::ALL),
        steps in prop::collection::vec((0u8..3, 1..=LONGEST, any::<prop::sample::Index>()), 1..800),
        limit in 50u64..1500,
    ) {
        let pool = pool(allocator, 4, limit);
        let mut live: Vec<(Location, usize, u8)> = Vec::new();
        for (n, (step, length, which)) in steps.into_iter().enumerate() {
            let stamp = n as u8;
            if step > 0 {
                match pool.insert(length, |object| object.fill(stamp)) {
                    Ok(object) => live.push((object.location(), length, stamp)),
                    Err(error) => {
                        prop_assert!(matches!(error, Error::PoolFull));
                        prop_assert!(used_pages(&pool) + MAX_CHAIN as u64 > limit);
                    }
                }
            } else if !live.is_empty() {
                let (location, length, stamp) = live.swap_remove(which.index(live.len()));
                // SAFETY: one thread, and the object is live.
                let whole = unsafe { pool.with_object(location, |object| object.len() >= length && object.iter().all(|&b| b == stamp)) };
                prop_assert_eq!(whole, Some(true));
                pool.free(location);
            }
        }
        for &(location, _, stamp) in &live {
            // SAFETY: as above.
            prop_assert_eq!(unsafe { pool.with_object(location, |object| object.iter().all(|&b| b == stamp)) }, Some(true));
        }
        let classes = &pool.base.metrics.classes;
        prop_assert_eq!(classes.iter().map(|class| class.objects.get()).sum::<u64>(), live.len() as u64);
        let pages = classes.iter().map(|class| class.zspages.get() * class.pages_per_zspage.get());
        prop_assert_eq!(pages.sum::<u64>(), used_pages(&pool));
        for class in classes.iter().filter(|_| allocator == Allocator::Zsmalloc) {
            let groups: Vec<u64> = class.groups.iter().map(Counter::get).collect();
            prop_assert_eq!(groups.iter().sum::<u64>(), class.zspages.get());
            // A zspage of group n is filled to (n - 1) / 10 at least, and to less than n / 10.
            let tenths = class.objects_per_zspage.get() as f64 / 10.0;
            let least: f64 =
                groups[1..].iter().zip(0..).map(|(&zspages, n)| zspages as f64 * f64::from(n) * tenths).sum();
            let most = least + groups[1..FULLNESS_GROUPS - 1].iter().sum::<u64>() as f64 * tenths;
            let objects = class.objects.get() as f64;
            prop_assert!(least <= objects + 1e-6 && objects <= most, "{} objects in {:?}", objects, groups);
        }
        live.into_iter().for_each(|(location, _, _)| pool.free(location));
        prop_assert_eq!(used_pages(&pool), 0);
    }
}

#[test]
fn a_wrong_location_finds_nothing() {
    for pool in Allocator::ALL.map(|allocator| pool(allocator, 4, 100)) {
        let location = pool.insert(1000, |_| ()).expect("room").location();
        for wrong in [location.0 + 1, location.0 + 10_000, u64::MAX >> 27, u64::MAX] {
            assert!(pool.allocator.find(Location(wrong)).is_none());
            pool.free(Location(wrong));
        }
        pool.free(location);
        assert!(pool.allocator.find(location).is_none());
        assert_eq!(used_pages(&pool), 0);
    }
}

#[test]
fn the_arena_is_large_enough_for_noise() {
    for slots in [1, 1000, 1 << 18, 1 << 32] {
        let pages = Pool::arena_pages_for(slots);
        assert_eq!(pages % REGION_PAGES, 0);
        assert!(u64::from(pages) >= (slots * 2).min(MAX_ARENA_PAGES));
    }
}

/// Objects by name, as a slot table would have them: the first four bytes say which slot it is.
#[derive(Default)]
struct Named(RefCell<BTreeMap<u32, Location>>);

impl Named {
    fn fill(&self, pool: &Pool, objects: u32, length: impl Fn(u32) -> usize) {
        (0..objects).for_each(|name| self.insert(pool, name, length(name)));
    }

    fn insert(&self, pool: &Pool, name: u32, length: usize) {
        self.try_insert(pool, name, length).expect("room");
    }

    fn try_insert(&self, pool: &Pool, name: u32, length: usize) -> Result<()> {
        let object = pool.insert(length, |object| {
            object.fill(name as u8);
            object[..4].copy_from_slice(&name.to_le_bytes());
        })?;
        self.0.borrow_mut().insert(name, object.location());
        Ok(())
    }

    fn free_one(&self, pool: &Pool, name: Option<u32>) {
        if let Some(location) = name.and_then(|name| self.0.borrow_mut().remove(&name)) {
            pool.free(location);
        }
    }

    fn free(&self, pool: &Pool, which: impl Fn(u32) -> bool) {
        self.0.borrow_mut().retain(|&name, &mut location| {
            if which(name) {
                pool.free(location);
            }
            !which(name)
        });
    }

    fn commit(&self, copy: &[u8], from: Location, to: Location) -> bool {
        let name = u32::from_le_bytes(copy[..4].try_into().expect("four bytes"));
        let mut named = self.0.borrow_mut();
        let is_named = named.get(&name) == Some(&from);
        if is_named {
            named.insert(name, to);
        }
        is_named
    }

    fn verify(&self, pool: &Pool) {
        self.0.borrow().iter().for_each(|(&name, &location)| Self::verify_one(pool, name, location));
    }

    fn verify_one(pool: &Pool, name: u32, location: Location) {
        let object = pool.pin(location).expect("an object");
        // SAFETY: one thread, and the object is named.
        let bytes = unsafe { object.bytes() };
        assert_eq!(bytes[..4], name.to_le_bytes());
        assert!(bytes[4..].iter().all(|&byte| byte == name as u8));
    }
}

/// Each object fills all of its room, up to that of its neighbours, and is looked at before it is freed.
#[test]
fn a_long_life_keeps_every_object() {
    const STEPS: u32 = if cfg!(debug_assertions) { 50_000 } else { 2_500_000 };
    const NAMES: u32 = 20_000;
    for pool in Allocator::ALL.map(|allocator| pool(allocator, 64, NO_LIMIT)) {
        let named = Named::default();
        let (mut random, mut freed) = (1u64, 0);
        for step in 0..STEPS {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (name, length) = ((random >> 33) as u32 % NAMES, 1 + (random >> 20) as usize % LONGEST);
            let found = named.0.borrow_mut().remove(&name);
            match found {
                Some(location) => {
                    Named::verify_one(&pool, name, location);
                    pool.free(location);
                }
                None => named.insert(&pool, name, length),
            }
            if step % (STEPS / 50) == 0 {
                freed += pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to));
            }
        }
        assert!(freed > 0, "nothing was moved");
        named.verify(&pool);
        named.free(&pool, |_| true);
        assert_eq!(used_pages(&pool), 0);
    }
}

#[cfg(debug_assertions)]
#[test]
fn a_write_beyond_an_object_is_found_by_who_reads_moves_or_frees_it() {
    use std::panic::{catch_unwind, AssertUnwindSafe};
    let looks: [fn(&Pool, &Named); 3] = [
        |pool, named| named.verify(pool),
        |pool, named| _ = pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to)),
        |pool, named| named.free(pool, |_| true),
    ];
    for (allocator, (n, look)) in
        Allocator::ALL.into_iter().flat_map(|it| std::iter::repeat(it).zip(looks.iter().enumerate()))
    {
        let pool = pool(allocator, 4, NO_LIMIT);
        let named = Named::default();
        named.fill(&pool, 64, |_| 1000);
        named.free(&pool, |name| name % 4 != 0);
        for &location in named.0.borrow().values() {
            let object = pool.allocator.find(location).expect("an object");
            // SAFETY: behind the object's bytes are some that are nobody's, but here still in the arena.
            unsafe { *pool.base.state.bytes_mut(object.offset + object.size - guard::BYTES, 1).cast::<u8>() ^= 1 };
        }
        let looked = catch_unwind(AssertUnwindSafe(|| look(&pool, &named)));
        assert!(looked.is_err(), "{allocator:?}: nobody notices ({n})");
    }
}

#[test]
fn compaction_needs_no_more_pages_than_a_fresh_pool() {
    for allocator in Allocator::ALL {
        let (sparse, fresh) = (pool(allocator, 16, NO_LIMIT), pool(allocator, 16, NO_LIMIT));
        let (named, again) = (Named::default(), Named::default());
        let length = |name: u32| 100 + name as usize * 7 % 4000;
        named.fill(&sparse, 8000, length);
        named.free(&sparse, |name| name % 3 != 0);
        let before = used_pages(&sparse);
        let freed = sparse.compact(&|copy: &[u8], from, to| named.commit(copy, from, to));
        named.verify(&sparse);
        again.fill(&fresh, 8000 / 3, |name| length(name * 3));
        assert_eq!(before - used_pages(&sparse), freed);
        assert!(
            used_pages(&sparse) <= used_pages(&fresh) + 8,
            "{} against {}",
            used_pages(&sparse),
            used_pages(&fresh)
        );
        named.free(&sparse, |_| true);
        assert_eq!(used_pages(&sparse), 0);
    }
}

#[test]
fn sparse_regions_go_back_to_the_system() {
    for pool in Allocator::ALL.map(|allocator| pool(allocator, 64, NO_LIMIT)) {
        let named = Named::default();
        // One object a page: only whole pages become free, all over the arena.
        named.fill(&pool, 30_000, |_| 4000);
        named.free(&pool, |name| name % 4 != 0);
        let backed = || pool.base.metrics.backed_bytes.get() / PAGE_SIZE as u64;
        let in_reserve = RESERVE_HIGH * u64::from(REGION_PAGES);
        assert!(backed() >= used_pages(&pool) * 3 + in_reserve, "nothing is fragmented");
        pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to));
        named.verify(&pool);
        while pool.adjust().expect("memory given back") {}
        let needed = used_pages(&pool).next_multiple_of(u64::from(REGION_PAGES)) + in_reserve;
        assert!(backed() <= needed + u64::from(REGION_PAGES), "{} pages, {needed} needed", backed());
    }
}

#[test]
fn a_pinned_object_stays_and_so_does_one_that_no_slot_names() {
    for pool in Allocator::ALL.map(|allocator| pool(allocator, 4, NO_LIMIT)) {
        let named = Named::default();
        // Four objects a zspage; z3fold takes three of 1024 bytes to a page.
        named.fill(&pool, 64, |_| 1024);
        named.free(&pool, |name| name % 4 != 0);
        let all: Vec<Location> = named.0.borrow().values().copied().collect();
        let pins: Vec<_> =
            all.iter().map(|&location| pool.allocator.find(location).expect("an object").first).collect();
        pins.iter().for_each(|&first| pool.allocator.lock(first).read());
        assert_eq!(pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to)), 0);
        pins.iter().for_each(|&first| pool.allocator.lock(first).unlock_read());
        assert_eq!(pool.compact(&|_: &[u8], _, _| false), 0);
        named.verify(&pool);
        assert_eq!(pool.base.metrics.classes.iter().map(|class| class.objects.get()).sum::<u64>(), 16);
        assert!(pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to)) > 0);
        named.verify(&pool);
    }
}

#[test]
fn z3fold_pins_a_copy_until_a_slot_names_it() {
    let pool = pool(Allocator::Z3fold, 4, NO_LIMIT);
    let named = Named::default();
    named.fill(&pool, 64, |_| 1000);
    named.free(&pool, |name| name % 4 != 0);
    let freed = pool.compact(&|copy: &[u8], from, to| {
        let first = pool.allocator.find(to).expect("the copy").first;
        assert!(!pool.allocator.lock(first).try_move(), "another mover could move it on, half written");
        named.commit(copy, from, to)
    });
    assert!(freed > 0);
}

/// Moves what it may: all but these.
fn compact_but(pool: &Pool, named: &Named, immovable: impl Fn(u32) -> bool) -> u64 {
    pool.compact(&|copy: &[u8], from, to| {
        let name = u32::from_le_bytes(copy[..4].try_into().expect("four bytes"));
        !immovable(name) && named.commit(copy, from, to)
    })
}

#[test]
fn what_cannot_be_moved_does_not_keep_the_rest_of_its_class() {
    for allocator in Allocator::ALL {
        for pinned in [false, true] {
            let pool = pool(allocator, 16, NO_LIMIT);
            let named = Named::default();
            named.fill(&pool, 6000, |_| 1000);
            named.free(&pool, |name| name % 4 != 0);
            // The emptiest zspage, and a few others: of each only one object stays where it is.
            named.free(&pool, |name| (3000..3200).contains(&name) && name != 3100);
            let immovable = [4, 1000, 3100, 5000];
            let find = |name: &u32| pool.allocator.find(named.0.borrow()[name]).expect("an object").first;
            let locked: Vec<u32> = immovable.iter().map(find).collect();
            let before = used_pages(&pool);
            if pinned {
                locked.iter().for_each(|&first| pool.allocator.lock(first).read());
                compact_but(&pool, &named, |_| false);
                locked.iter().for_each(|&first| pool.allocator.lock(first).unlock_read());
            } else {
                compact_but(&pool, &named, |name| immovable.contains(&name));
            }
            named.verify(&pool);
            let few = before / 4 + 4 * MAX_CHAIN as u64;
            assert!(used_pages(&pool) < few, "{allocator:?}, {pinned}: {} of {before}", used_pages(&pool));
        }
    }
}

#[test]
fn what_cannot_be_moved_does_not_keep_the_rest_of_its_zspage() {
    let pool = pool(Allocator::Zsmalloc, 4, NO_LIMIT);
    let named = Named::default();
    named.fill(&pool, 1, |_| 40);
    let classes = &pool.base.metrics.classes;
    let objects =
        classes.iter().find(|class| class.objects.get() > 0).expect("a class").objects_per_zspage.get() as u32;
    // Two zspages, of half of whose objects the first ones stay: more than one step looks at.
    (1..2 * objects).for_each(|name| named.insert(&pool, name, 40));
    named.free(&pool, |name| name % 2 == 1);
    let stay = objects / 2;
    assert!(stay > 16, "a step looks at half of it");
    compact_but(&pool, &named, |name| name % objects < stay);
    named.verify(&pool);
    let mut in_use = BTreeMap::<u32, u32>::new();
    for &location in named.0.borrow().values() {
        *in_use.entry(pool.allocator.find(location).expect("an object").first).or_default() += 1;
    }
    let (fewest, most) = (in_use.values().min(), in_use.values().max());
    assert_eq!(
        (fewest, most),
        (Some(&stay.div_ceil(2)), Some(&(objects - stay.div_ceil(2)))),
        "{stay} of {objects} stay"
    );
}

#[test]
fn what_cannot_be_moved_does_not_keep_other_regions() {
    for pool in Allocator::ALL.map(|allocator| pool(allocator, 64, NO_LIMIT)) {
        let named = Named::default();
        named.fill(&pool, 30_000, |_| 4000);
        named.free(&pool, |name| name % 4 != 0);
        // The sparsest region has but one object left, which stays.
        let lonely = 16_000;
        let region = |name: &u32| pool.allocator.find(named.0.borrow()[name]).expect("an object").first / REGION_PAGES;
        let with_it = region(&lonely);
        let neighbours: Vec<u32> = named.0.borrow().keys().copied().collect();
        let neighbours: Vec<u32> =
            neighbours.into_iter().filter(|name| *name != lonely && region(name) == with_it).collect();
        named.free(&pool, |name| neighbours.contains(&name));
        compact_but(&pool, &named, |name| name == lonely);
        named.verify(&pool);
        while pool.adjust().expect("memory given back") {}
        let backed = pool.base.metrics.backed_bytes.get() / PAGE_SIZE as u64;
        let regions = used_pages(&pool).div_ceil(u64::from(REGION_PAGES)) + 2 + RESERVE_HIGH;
        assert!(backed <= regions * u64::from(REGION_PAGES), "{backed} pages, {} in use", used_pages(&pool));
    }
}

#[test]
fn the_end_says_for_how_many_it_waits() {
    let pool = pool(Allocator::Zsmalloc, 1, NO_LIMIT);
    let awaited = || pool.base.metrics.movers_awaited.get();
    let mover = pool.base.movers.enter().expect("open");
    assert_eq!((pool.destroy(Duration::ZERO, |_, _| ()), awaited()), (1, 1));
    std::thread::scope(|scope| {
        let end = scope.spawn(|| pool.destroy(Duration::from_secs(60), |_, _| ()));
        assert_eq!(awaited(), 1);
        drop(mover);
        assert_eq!((end.join().expect("no panic"), awaited()), (0, 0));
    });
}
