// A program that has more memory pinned by io_uring than may be local.

#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define LEN (24 * MIB)
#define WORDS (LEN / 8)
#define OTHER (4 * MIB)

static void check(int holds, const char *what, int line)
{
	if (!holds) {
		fprintf(stderr, "line %d: not so: %s (%s)\n", line, what, strerror(errno));
		exit(1);
	}
}

#define CHECK(what) check(!!(what), #what, __LINE__)

int main(void)
{
	struct io_uring_params params = { 0 };
	uint64_t *words = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iovec buffer = { words, LEN };
	int ring = (int)syscall(SYS_io_uring_setup, 1, &params);

	if (ring < 0) {
		printf("no io_uring\n");
		return 0;
	}
	CHECK(words != MAP_FAILED);
	for (size_t i = 0; i < WORDS; i += 64)
		words[i] = i * 3;
	CHECK(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) == 0);
	for (size_t i = 0; i < WORDS; i += 64)
		CHECK(words[i] == i * 3);
	// Its other pages are fetched and evicted meanwhile.
	uint64_t *other = malloc(OTHER);

	CHECK(other);
	for (size_t i = 0; i < OTHER / 8; i += 64)
		other[i] = i * 5;
	for (size_t i = 0; i < OTHER / 8; i += 64)
		CHECK(other[i] == i * 5 && words[i] == i * 3);
	CHECK(syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
	for (size_t i = 0; i < WORDS; i += 64)
		CHECK(words[i] == i * 3 && other[i % (OTHER / 8)] == i % (OTHER / 8) * 5);
	printf("all is as it should be\n");
	return 0;
}
