// A program that locks all of its memory, as memcached -k and databases do; by the C library's call and by a raw one.

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define WORDS (24 * MIB / 8)

static void check(int holds, const char *what, int line)
{
	if (!holds) {
		fprintf(stderr, "line %d: not so: %s\n", line, what);
		exit(1);
	}
}

#define CHECK(what) check(!!(what), #what, __LINE__)

static uint64_t *filled(uint64_t key)
{
	uint64_t *words = malloc(WORDS * 8);

	CHECK(words);
	for (size_t i = 0; i < WORDS; i += 64)
		words[i] = i * key;
	return words;
}

static void verify(const uint64_t *words, uint64_t key)
{
	for (size_t i = 0; i < WORDS; i += 64)
		CHECK(words[i] == i * key);
}

int main(int argc, char **argv)
{
	(void)argv;
	// Before there is any external memory.
	CHECK(mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
	uint64_t *one = filled(3);

	CHECK(mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
	uint64_t *other = filled(5);

	verify(one, 3);
	CHECK(munlockall() == 0);
	CHECK(mlockall(MCL_CURRENT) == 0);
	verify(other, 5);
	if (argc > 1) {
		CHECK(syscall(SYS_mlockall, MCL_CURRENT) == 0);
		verify(one, 3);
		verify(other, 5);
		CHECK(syscall(SYS_mlockall, MCL_CURRENT | MCL_FUTURE) == 0);
		verify(one, 3);
	}
	uint64_t *last = filled(7);

	verify(one, 3);
	verify(other, 5);
	verify(last, 7);
	printf("all is as it should be\n");
	return 0;
}
