// Every function of the C library, and every mistake that it tells of.

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xpm.h>

#define MIB (1 << 20)

static void check(int holds, const char *what, int line)
{
	if (!holds) {
		fprintf(stderr, "line %d: not so: %s (%s)\n", line, what, xpm_last_error());
		exit(1);
	}
}

#define CHECK(what) check(!!(what), #what, __LINE__)
#define SAYS(text) CHECK(strstr(xpm_last_error(), text) != NULL)

static struct xpm_options usual(void)
{
	struct xpm_options options;

	memset(&options, 0, sizeof options);
	options.size = sizeof options;
	options.budget = 2 * MIB;
	options.kept = 16 * MIB;
	options.threads = 1;
	return options;
}

static void mistakes(const char *name)
{
	struct xpm_options options = usual();

	CHECK(!xpm_open(NULL, &options) && errno == EINVAL);
	CHECK(!xpm_open(name, NULL) && errno == EINVAL);
	options.size = 8;
	CHECK(!xpm_open(name, &options) && errno == EINVAL);
	SAYS("sizeof(struct xpm_options)");
	options = usual();
	CHECK(!xpm_open("no such name!", &options) && errno == EINVAL);
	options.allocator = "nonsense";
	CHECK(!xpm_open(name, &options) && errno == EINVAL);
	options = usual();
	options.client = "nobody";
	CHECK(!xpm_open(name, &options) && errno == EINVAL);
	options = usual();
	options.budget = 1;
	CHECK(!xpm_open(name, &options) && errno == EINVAL);
	SAYS("too small");
	options = usual();
	options.budget_percent = 10;
	CHECK(!xpm_open(name, &options) && errno == EINVAL);
	SAYS("not both");
	options.budget = 0;
	options.budget_percent = 101;
	CHECK(!xpm_open(name, &options) && errno == EINVAL);
	SAYS("1 to 100");
	CHECK(xpm_close(NULL) == -EINVAL);
	CHECK(!xpm_carve(NULL, 1) && errno == EINVAL);
	CHECK(xpm_flush(NULL) == -EINVAL);
	CHECK(!xpm_address(NULL) && xpm_length(NULL) == 0);
	xpm_unmap(NULL);
}

int main(int argc, char **argv)
{
	struct xpm_options options = usual();
	struct xpm_statistics statistics;
	char text[16];

	CHECK(argc == 2);
	CHECK(strlen(xpm_version()) >= 5);
	mistakes(argv[1]);

	struct xpm_space *space = xpm_open(argv[1], &options);
	CHECK(space);
	CHECK(!xpm_open(argv[1], &options));
	SAYS("force");
	CHECK(xpm_free_bytes(space) > 0);
	struct xpm_mapping *kept = xpm_map(space, 0, 8 * MIB, 1);
	CHECK(kept && xpm_length(kept) == 8 * MIB);
	CHECK(!xpm_map(space, 0, 4096, 0) && errno == EBUSY);
	CHECK(!xpm_map(space, 1, 4096, 0) && errno == EINVAL);
	CHECK(!xpm_map(space, 64 * MIB, 4096, 0) && errno == EINVAL);
	CHECK(!xpm_carve(space, 1ull << 50) && errno == ENOMEM);

	char *bytes = xpm_address(kept);
	memset(bytes, 'a', 8 * MIB);
	CHECK(xpm_put(kept, 4095, "hello", 5) == 0);
	CHECK(xpm_get(kept, 4094, text, 7) == 0 && memcmp(text, "ahelloa", 7) == 0);
	CHECK(xpm_get(kept, 8 * MIB, text, 1) == -EINVAL);
	CHECK(xpm_get(kept, 0, NULL, 1) == -EINVAL && xpm_put(kept, 0, NULL, 1) == -EINVAL);
	for (int advice = XPM_NORMAL; advice <= XPM_UNPIN; advice++)
		CHECK(xpm_advise(kept, 0, 64 * 4096, advice) == 0);
	CHECK(xpm_advise(kept, 0, 4096, 99) == -EINVAL);
	char *buffer = xpm_buffer(space, MIB);
	CHECK(buffer && !xpm_buffer(space, 0) && errno == EINVAL);
	memset(buffer, 'b', MIB);
	CHECK(xpm_put(kept, 4 * MIB, buffer, MIB) == 0 && bytes[5 * MIB - 1] == 'b' && bytes[5 * MIB] == 'a');
	CHECK(xpm_get(kept, 5 * MIB, buffer, MIB) == 0 && buffer[0] == 'a' && buffer[MIB - 1] == 'a');
	CHECK(xpm_buffer_free(space, buffer + 1) == -EINVAL && xpm_buffer_free(space, buffer) == 0);
	CHECK(xpm_buffer(space, MIB) == buffer);
	CHECK(xpm_get(kept, 0, bytes, 4096) == -EINVAL && bytes[0] == 'a');
	SAYS("external memory itself");
	CHECK(xpm_flush(kept) == 0);

	struct xpm_mapping *copy = xpm_copy(kept);
	CHECK(copy);
	char *copied = xpm_address(copy);
	CHECK(memcmp(copied + 4095, "hello", 5) == 0);
	copied[4095] = 'j';
	CHECK(bytes[4095] == 'h');

	struct xpm_mapping *slab = xpm_carve(space, 4 * MIB);
	CHECK(slab && *(char *)xpm_address(slab) == 0);
	memset(xpm_address(slab), 's', 4 * MIB);
	CHECK(xpm_flush_range(slab, MIB, MIB) == 0 && xpm_flush_range(slab, 4 * MIB, 1) == -EINVAL);
	CHECK(xpm_clear(slab, MIB, 4096) == 0 && xpm_clear(kept, 0, 4096) == -EINVAL);
	CHECK(((char *)xpm_address(slab))[MIB] == 0 && ((char *)xpm_address(slab))[MIB + 4096] == 's');
	CHECK(xpm_resize(slab, 2 * MIB) == 0 && xpm_length(slab) == 2 * MIB);
	CHECK(xpm_resize(slab, 4 * MIB) == 0 && ((char *)xpm_address(slab))[3 * MIB] == 0);
	CHECK(((char *)xpm_address(slab))[2 * MIB - 1] == 's');
	CHECK(xpm_resize(slab, 1ull << 50) == -ENOMEM && xpm_length(slab) == 4 * MIB);
	CHECK(xpm_resize(kept, MIB) == -EINVAL && xpm_resize(NULL, MIB) == -EINVAL);
	CHECK(xpm_close(space) == -EBUSY);
	CHECK(xpm_set_budget(space, 4 * MIB) == 0 && xpm_set_budget(space, 0) == -EINVAL);
	CHECK(xpm_stats(space, &statistics) == 0 && statistics.budget == 4 * MIB && statistics.written > 0);
	CHECK(xpm_stats(space, NULL) == -EINVAL);
	CHECK(xpm_space_error(space) == 0 && xpm_space_error(NULL) == -EINVAL);
	struct xpm_mapping *named = xpm_slab_create(space, "words", 3 * MIB);
	CHECK(named && xpm_length(named) == 4 * MIB);
	CHECK(!xpm_slab_create(space, "words", 1) && errno == EEXIST);
	CHECK(!xpm_slab_create(space, "no name!", 1) && errno == EINVAL);
	CHECK(!xpm_slab_create(space, NULL, 1) && errno == EINVAL);
	CHECK(!xpm_slab_open(space, "other", 0) && errno == ENOENT);
	CHECK(xpm_slab_remove(space, "words") == -EBUSY);
	strcpy(xpm_address(named), "stays");
	xpm_unmap(named);
	xpm_unmap(slab);
	xpm_unmap(copy);
	xpm_unmap(kept);
	CHECK(xpm_close(space) == 0);

	// What stays is there again.
	space = xpm_open(argv[1], &options);
	CHECK(space);
	named = xpm_slab_open(space, "words", 0);
	CHECK(named && strcmp(xpm_address(named), "stays") == 0);
	xpm_unmap(named);
	CHECK(xpm_slab_remove(space, "words") == 0 && xpm_slab_remove(space, "words") == -ENOENT);
	CHECK(xpm_close(space) == 0);
	options.kept = UINT64_MAX;
	options.threads = 0;
	space = xpm_open(argv[1], &options);
	CHECK(space);
	kept = xpm_map(space, 0, 8 * MIB, 0);
	CHECK(kept && memcmp((char *)xpm_address(kept) + 4094, "ahelloa", 7) == 0);
	CHECK(xpm_put(kept, 0, "x", 1) == -EINVAL);
	SAYS("read-only");
	xpm_unmap(kept);
	CHECK(xpm_close(space) == 0);

	// A share; and the options of a program that was compiled when there were none.
	options = usual();
	options.budget = 0;
	options.budget_percent = 100;
	space = xpm_open(argv[1], &options);
	CHECK(space && xpm_stats(space, &statistics) == 0 && statistics.budget >= 16 * MIB);
	CHECK(xpm_close(space) == 0);
	options.size = offsetof(struct xpm_options, budget_percent);
	options.budget = 2 * MIB;
	space = xpm_open(argv[1], &options);
	CHECK(space && xpm_stats(space, &statistics) == 0 && statistics.budget == 2 * MIB);
	CHECK(xpm_close(space) == 0);
	return 0;
}
