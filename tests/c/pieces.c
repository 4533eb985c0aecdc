// Operations of a program on large pieces of memory, by malloc and by mmap, under `xpm run`.

#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)4096)

static void check(int holds, const char *what, int line)
{
	if (!holds) {
		fprintf(stderr, "line %d: not so: %s\n", line, what);
		exit(1);
	}
}

#define CHECK(what) check(!!(what), #what, __LINE__)

static void fill(uint64_t *words, size_t bytes, uint64_t key)
{
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = i * key;
}

static int filled(const uint64_t *words, size_t bytes, uint64_t key)
{
	for (size_t i = 0; i < bytes / 8; i++)
		if (words[i] != i * key)
			return 0;
	return 1;
}

static int zeros(const char *bytes, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (bytes[i])
			return 0;
	return 1;
}

static void *map(size_t len)
{
	return mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void heap(void)
{
	uint64_t *one = malloc(5 * MIB);

	CHECK(malloc_usable_size(one) >= 5 * MIB);
	fill(one, 5 * MIB, 3);
	// Over the threshold and back.
	uint64_t *small = malloc(100000);
	fill(small, 100000, 5);
	small = realloc(small, 3 * MIB);
	CHECK(small && filled(small, 100000, 5));
	fill(small, 3 * MIB, 7);
	small = realloc(small, 20 * MIB);
	CHECK(small && filled(small, 3 * MIB, 7));
	small = realloc(small, 50000);
	CHECK(small && filled(small, 50000, 7));
	free(small);
	for (int i = 0; i < 20; i++) {
		char *clean = calloc(3, MIB);

		CHECK(zeros(clean, 3 * MIB));
		memset(clean, 1, 3 * MIB);
		free(clean);
	}
	void *aligned;
	CHECK(posix_memalign(&aligned, 4096, 2 * MIB) == 0 && (uintptr_t)aligned % 4096 == 0);
	memset(aligned, 2, 2 * MIB);
	free(aligned);
	CHECK(posix_memalign(&aligned, 1 << 16, 2 * MIB) == 0 && (uintptr_t)aligned % (1 << 16) == 0);
	free(aligned);
	volatile size_t half = SIZE_MAX / 2;
	CHECK(!calloc(half, 4) && !reallocarray(NULL, half, 4));
	CHECK(filled(one, 5 * MIB, 3));
	free(one);
	free(NULL);
}

static void maps(void)
{
	char *all = map(16 * MIB);

	CHECK(all != MAP_FAILED && zeros(all, 16 * MIB));
	fill((void *)all, 16 * MIB, 11);
	CHECK(madvise(all + 4 * MIB, MIB, MADV_DONTNEED) == 0);
	CHECK(zeros(all + 4 * MIB, MIB));
	CHECK(madvise(all, 16 * MIB, MADV_SEQUENTIAL) == 0 && madvise(all, MIB, MADV_WILLNEED) == 0);
	CHECK(madvise(all, MIB, MADV_HUGEPAGE) == 0 && madvise(all + 1, MIB, MADV_NORMAL) == -1);
	CHECK(filled((void *)all, 4 * MIB, 11));
	// The ends, then the middle.
	CHECK(munmap(all, MIB) == 0 && munmap(all + 15 * MIB, MIB) == 0);
	CHECK(((uint64_t *)all)[MIB / 8 + 5] == (MIB / 8 + 5) * 11);
	CHECK(munmap(all + MIB, 14 * MIB) == 0);
	CHECK(munmap(all + 1, MIB) == -1);

	char *grown = map(3 * MIB);
	fill((void *)grown, 3 * MIB, 13);
	CHECK(mremap(grown, 3 * MIB, 64 * MIB, 0) == MAP_FAILED);
	grown = mremap(grown, 3 * MIB, 9 * MIB, MREMAP_MAYMOVE);
	CHECK(grown != MAP_FAILED && filled((void *)grown, 3 * MIB, 13) && zeros(grown + 3 * MIB, 6 * MIB));
	grown = mremap(grown, 9 * MIB, 2 * MIB, MREMAP_MAYMOVE);
	CHECK(grown != MAP_FAILED && filled((void *)grown, 2 * MIB, 13));
	grown = mremap(grown, 2 * MIB, 4 * MIB, MREMAP_MAYMOVE);
	CHECK(grown != MAP_FAILED && zeros(grown + 2 * MIB, 2 * MIB));
	CHECK(mprotect(grown, PAGE, PROT_NONE) == 0 && munmap(grown, 4 * MIB) == 0);
	// The same slab may be next, and is as new.
	char *again = map(4 * MIB);
	CHECK(zeros(again, 4 * MIB));
	again[0] = 1;
	munmap(again, 4 * MIB);
	// Pieces that stay local.
	char *guard = mmap(NULL, 4 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(guard != MAP_FAILED && mprotect(guard, MIB, PROT_READ | PROT_WRITE) == 0);
	guard[0] = 1;
	CHECK(munmap(guard, 4 * MIB) == 0);
}

static void system_calls(void)
{
	char *one = malloc(4 * MIB), *other = calloc(1, 4 * MIB);
	FILE *file = tmpfile();

	fill((void *)one, 4 * MIB, 17);
	CHECK(madvise((void *)((uintptr_t)one & ~(PAGE - 1)), 4 * MIB, MADV_PAGEOUT) == 0);
	CHECK(file && fwrite(one, 1, 4 * MIB, file) == 4 * MIB);
	rewind(file);
	CHECK(read(fileno(file), other, 4 * MIB) == (ssize_t)(4 * MIB));
	CHECK(memcmp(one, other, 4 * MIB) == 0);
	fclose(file);
	free(one);
	free(other);
}

static void *thread(void *key)
{
	for (int round = 0; round < 10; round++) {
		uint64_t *piece = malloc(4 * MIB), *other = map(2 * MIB);

		fill(piece, 4 * MIB, (uintptr_t)key);
		fill(other, 2 * MIB, (uintptr_t)key + 1);
		CHECK(filled(piece, 4 * MIB, (uintptr_t)key) && filled(other, 2 * MIB, (uintptr_t)key + 1));
		free(piece);
		munmap(other, 2 * MIB);
	}
	return NULL;
}

static void threads(void)
{
	pthread_t all[4];

	for (uintptr_t i = 0; i < 4; i++)
		CHECK(pthread_create(&all[i], NULL, thread, (void *)(i * 2 + 3)) == 0);
	for (int i = 0; i < 4; i++)
		CHECK(pthread_join(all[i], NULL) == 0);
}

static void children(void)
{
	uint64_t *kept = malloc(2 * MIB);
	int status;

	fill(kept, 2 * MIB, 19);
	CHECK(system("true") == 0);
	// Memory that it allocates is local, and it frees nothing of its parent's memory.
	pid_t pid = fork();
	if (pid == 0) {
		uint64_t *own = malloc(2 * MIB);

		fill(own, 2 * MIB, 23);
		CHECK(filled(own, 2 * MIB, 23));
		free(own);
		free(kept);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	pid = fork();
	if (pid == 0)
		_exit((int)kept[1]);
	// It is little, of which the child has a copy.
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 19);
	CHECK(filled(kept, 2 * MIB, 19));
	free(kept);
}

int main(void)
{
	heap();
	maps();
	system_calls();
	threads();
	children();
	puts("all is as it should be");
	return 0;
}
