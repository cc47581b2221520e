//! Whoever wants the pool to take more memory than it may, or to find no room where there is some.

use super::*;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32 % bound
    }
}

fn backed_pages(pool: &Pool) -> u64 {
    pool.base.metrics.backed_bytes.get() / PAGE_SIZE as u64
}

fn compact(pool: &Pool, named: &Named) {
    pool.compact(&|copy: &[u8], from, to| named.commit(copy, from, to));
    while pool.adjust().expect("memory") {}
}

#[test]
fn a_limit_of_one_page_holds_what_fits_into_it() {
    for allocator in Allocator::ALL {
        let pool = pool(allocator, 4, 1);
        let mut fitted = 0;
        for length in 1..=LONGEST {
            let named = Named::default();
            while named.try_insert(&pool, fitted, length.max(4)).is_ok() {
                fitted += 1;
                assert_eq!(used_pages(&pool), 1);
            }
            compact(&pool, &named);
            named.verify(&pool);
            named.free(&pool, |_| true);
            assert_eq!(used_pages(&pool), 0);
        }
        assert!(fitted > 1000, "{fitted} objects");
        pool.set_limit_bytes(0);
        assert!(matches!(pool.insert(100, |_| ()), Err(Error::PoolFull)));
    }
}

/// A full pool, and pages of other lengths than those that it holds: they are refused for as long as those that were
/// freed have left no whole zspage, and no longer.
#[test]
fn a_full_pool_is_compacted_for_what_finds_no_room() {
    const LIMIT: u64 = 8192;
    for allocator in Allocator::ALL {
        let (pool, named) = (pool(allocator, 64, LIMIT), Named::default());
        let (mut random, mut next) = (Random(7), 0);
        for (from, to) in [(60, 400), (3900, 4100), (60, 4100), (1300, 1400), (2100, 2200), (60, 70), (4090, 4106)] {
            let (mut refused, mut stored) = (0, 0);
            while refused < 3000 {
                let length = (from + random.below(to - from)) as usize;
                if named.try_insert(&pool, next, length).is_ok() {
                    (next, stored) = (next + 1, stored + 1);
                    continue;
                }
                refused += 1;
                pool.was_full();
                if pool.wants_compaction() {
                    compact(&pool, &named);
                }
                let from = random.below(next);
                let victim = named.0.borrow().range(from..).next().map(|(&name, _)| name);
                named.free_one(&pool, victim);
            }
            assert!(stored > 50, "{allocator:?}: {stored} objects of {from} to {to} bytes for 3000");
            assert!(used_pages(&pool) <= LIMIT);
            assert!(backed_pages(&pool) <= LIMIT * 5 / 4, "{allocator:?}: {} pages", backed_pages(&pool));
        }
        named.verify(&pool);
    }
}

/// Pages become free one by one, all over the arena, and are no use for what needs neighbours: that goes to other
/// regions. The pool is full again then, and has to give regions back all the same.
#[test]
fn regions_are_emptied_though_the_pool_is_full() {
    const LIMIT: u64 = 8192;
    for allocator in Allocator::ALL {
        for limit_then in [LIMIT, LIMIT / 2] {
            let (pool, named) = (pool(allocator, 64, LIMIT), Named::default());
            let mut next = 0;
            let mut fill = |length| {
                while named.try_insert(&pool, next, length).is_ok() {
                    next += 1;
                }
            };
            let pages_of = |length: usize| {
                let location = pool.insert(length, |_| ()).expect("room").location();
                let pages = used_pages(&pool);
                pool.free(location);
                pages
            };
            let single =
                (1..=PAGE_SIZE - guard::BYTES).rev().find(|&length| pages_of(length) == 1).expect("such a class");
            assert!(pages_of(LONGEST) > 1);
            fill(single);
            let location = |name: &u32| named.0.borrow()[name].offset().expect("in the arena");
            let every_other: Vec<u32> =
                named.0.borrow().keys().copied().filter(|name| location(name) / PAGE_SIZE % 2 == 0).collect();
            every_other.into_iter().for_each(|name| named.free_one(&pool, Some(name)));
            fill(LONGEST);
            assert!(backed_pages(&pool) > LIMIT * 4 / 3, "there is nothing to empty");
            pool.set_limit_bytes(limit_then * PAGE_SIZE as u64);
            compact(&pool, &named);
            named.verify(&pool);
            assert!(used_pages(&pool) <= LIMIT);
            let most = LIMIT + (RESERVE_HIGH + 2) * u64::from(REGION_PAGES);
            assert!(backed_pages(&pool) <= most, "{allocator:?}: {} pages", backed_pages(&pool));
        }
    }
}
