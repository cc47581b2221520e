/* hog MEBIBYTES [NOISE_PERCENT [SECRET]]: that much memory, of pages that are known and all different. So much of each
 * does not compress (25), and each begins with SECRET (none).
 *
 * A line on stdin says what to do with all of them; one on stdout then says how it went:
 *   write   read and check what was written last, and write something else
 *   check   read and check
 *
 * A page that the kernel cannot read back (SIGBUS) is counted as lost, and is so until it is written again. At the end
 * of stdin: exit status 1 if a page was ever wrong or lost. */

#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t) };

static uint64_t noise_words = WORDS / 4, secret_words;
static uint64_t secret[WORDS];
static sigjmp_buf unreadable;

/* Word `index` of page `page` as round `round` writes it: the secret, then noise (splitmix64), repeated. */
static uint64_t word(uint64_t page, uint64_t round, uint64_t index)
{
	uint64_t x = ((round << 32 | page) * WORDS + index % noise_words + 1) * 0x9e3779b97f4a7c15;

	if (index < secret_words)
		return secret[index];
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

static void on_sigbus(int number)
{
	(void)number;
	siglongjmp(unreadable, 1);
}

/* Checks all pages against `round`, if it is not 0, and with `writes` writes the next one's. */
static void go_through(uint64_t *memory, uint64_t pages, uint64_t round, int writes, uint64_t *wrong, uint64_t *lost)
{
	for (volatile uint64_t page = 0; page < pages; page++) {
		uint64_t *words = memory + page * WORDS;

		if (sigsetjmp(unreadable, 1)) {
			++*lost;
			if (!writes)
				continue;
			madvise(words, PAGE, MADV_DONTNEED);
		} else if (round > 0) {
			*wrong += is_wrong(words, page, round);
		}
		if (writes)
			for (uint64_t i = 0; i < WORDS; i++)
				words[i] = word(page, round + 1, i);
	}
}

int main(int argc, char **argv)
{
	const uint64_t pages = argc > 1 ? strtoull(argv[1], NULL, 10) << 8 : 0;
	uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t round = 0, all_bad = 0;
	char what[16];

	if (memory == MAP_FAILED) {
		perror("hog: mmap");
		return 2;
	}
	if (argc > 2)
		noise_words = strtoull(argv[2], NULL, 10) * WORDS / 100;
	if (argc > 3) {
		secret_words = strlen(argv[3]) / sizeof(uint64_t);
		memcpy(secret, argv[3], secret_words * sizeof(uint64_t));
	}
	signal(SIGBUS, on_sigbus);
	while (fgets(what, sizeof(what), stdin)) {
		const time_t start = time(NULL);
		uint64_t wrong = 0, lost = 0;

		what[strcspn(what, "\n")] = 0;
		go_through(memory, pages, round, what[0] == 'w', &wrong, &lost);
		round += what[0] == 'w';
		all_bad += wrong + lost;
		printf("hog: %s: %d pages, %d wrong, %d lost, %d s\n", what, (int)pages, (int)wrong, (int)lost,
		       (int)(time(NULL) - start));
		fflush(stdout);
	}
	return all_bad > 0;
}
