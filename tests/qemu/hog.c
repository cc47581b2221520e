/* hog MEBIBYTES: fills that much memory with pages that are known, all different and easy to compress, then twice
 * reads, checks and rewrites all of them. Reports each round; exit status 1 if a page was wrong. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { WORDS = 4096 / sizeof(uint64_t), REPEATED = WORDS / 4, ROUNDS = 3 };

/* Word `index` of page `page` as round `round` writes it: a quarter of noise (splitmix64), repeated. */
static uint64_t word(uint64_t page, uint64_t round, uint64_t index)
{
	uint64_t x = ((page * ROUNDS + round) * REPEATED + index % REPEATED + 1) * 0x9e3779b97f4a7c15;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static int is_wrong(const uint64_t *words, uint64_t page, uint64_t round)
{
	for (uint64_t i = 0; i < WORDS; i++)
		if (words[i] != word(page, round, i))
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	const uint64_t pages = argc == 2 ? strtoull(argv[1], NULL, 10) << 8 : 0;
	uint64_t *memory = mmap(NULL, pages * WORDS * sizeof(*memory), PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t all_wrong = 0;

	if (memory == MAP_FAILED) {
		perror("hog: mmap");
		return 2;
	}
	for (uint64_t round = 0; round < ROUNDS; round++) {
		const time_t start = time(NULL);
		uint64_t wrong = 0;

		for (uint64_t page = 0; page < pages; page++) {
			uint64_t *words = memory + page * WORDS;

			if (round > 0)
				wrong += is_wrong(words, page, round - 1);
			for (uint64_t i = 0; i < WORDS; i++)
				words[i] = word(page, round, i);
		}
		printf("hog: round %d: %d pages, %d wrong, %d s\n", (int)round, (int)pages, (int)wrong,
		       (int)(time(NULL) - start));
		fflush(stdout);
		all_wrong += wrong;
	}
	return all_wrong > 0;
}
