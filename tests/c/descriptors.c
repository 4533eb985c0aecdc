// A program that closes and reuses descriptors which it did not open, by raw system calls of another thread, while its external
// memory is read and written.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define PAGES ((size_t)16384)
#define FILES 40

static atomic_int stop;
// How often the other thread has opened, replaced and closed descriptors.
static atomic_int passes;
static const char *dir;

static void check(int holds, const char *what, int line)
{
	if (!holds) {
		fprintf(stderr, "line %d: not so: %s\n", line, what);
		_exit(1);
	}
}

#define CHECK(what) check(!!(what), #what, __LINE__)

static void name_of(char *name, int number)
{
	snprintf(name, 512, "%s/file%d", dir, number);
}

static void close_all(void)
{
	CHECK(syscall(SYS_close_range, 3, ~0U, 0) == 0);
}

static void open_files(int *files)
{
	char name[512];

	for (int i = 0; i < FILES; i++) {
		name_of(name, i);
		files[i] = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CREAT, 0600);
		CHECK(files[i] >= 0);
	}
}

static void *disturb(void *unused)
{
	int files[FILES];

	(void)unused;
	while (!stop) {
		close_all();
		open_files(files);
		// Over whatever has these numbers.
		for (int number = 3; number < 64; number++)
			CHECK(syscall(SYS_dup3, files[number % FILES], number, 0) == number || files[number % FILES] == number);
		usleep(2000);
		for (int number = 3; number < 64; number++)
			syscall(SYS_close, number);
		passes++;
		usleep(1000);
	}
	return NULL;
}

static uint64_t word(size_t page, uint64_t round)
{
	return (page + 1) * 0x9e3779b97f4a7c15 + round;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	char name[512];
	struct stat status;

	CHECK(argc == 2);
	dir = argv[1];
	uint64_t *words = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(words != MAP_FAILED);
	// Some at first, so that all connections are there.
	for (size_t page = 0; page < PAGES; page++)
		words[page * 512] = word(page, 0);
	CHECK(pthread_create(&thread, NULL, disturb, NULL) == 0);
	for (uint64_t round = 0; round < 3; round++) {
		// A round of memory that is all local is over before the other thread has begun.
		while (passes <= (int)round)
			usleep(100);
		for (size_t page = 0; page < PAGES; page++) {
			CHECK(words[page * 512] == word(page, round));
			words[page * 512] = word(page, round + 1);
		}
		// Pieces come and go meanwhile.
		for (int i = 0; i < 20; i++) {
			char *piece = malloc(2 << 20);

			CHECK(piece);
			memset(piece, 7, 2 << 20);
			free(piece);
		}
	}
	stop = 1;
	CHECK(pthread_join(thread, NULL) == 0);
	close_all();
	for (size_t page = 0; page < PAGES; page++)
		CHECK(words[page * 512] == word(page, 3));
	// No file of the program contains bytes that the program did not write.
	for (int i = 0; i < FILES; i++) {
		name_of(name, i);
		CHECK(stat(name, &status) == 0);
		if (status.st_size) {
			char bytes[200];
			int file = open(name, O_RDONLY);
			ssize_t len = read(file, bytes, sizeof bytes);

			fprintf(stderr, "%s has %lld bytes: ", name, (long long)status.st_size);
			fwrite(bytes, 1, len > 0 ? len : 0, stderr);
			CHECK(0);
		}
	}
	printf("all is as it should be\n");
	return 0;
}
