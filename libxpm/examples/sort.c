// Sorts more numbers than local memory may hold: the array is a slab of external memory.
//
//     cc sort.c -o sort $(pkg-config --cflags --libs libxpm)
//     XPM_ALLOCATOR=http://allocator:7700 ./sort NAME MIB
//
// NAME is an allocation (xpm alloc create) of more than MIB MiB, a power of two. A quarter of them is used as cache.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xpm.h>

static void sort(uint64_t *first, uint64_t *last)
{
	while (first < last) {
		uint64_t pivot = first[(last - first) / 2], *i = first, *j = last;

		while (i <= j) {
			while (*i < pivot)
				i++;
			while (*j > pivot)
				j--;
			if (i <= j) {
				uint64_t other = *i;

				*i++ = *j;
				*j-- = other;
			}
		}
		if (j - first < last - i) {
			sort(first, j);
			first = i;
		} else {
			sort(i, last);
			last = j;
		}
	}
}

static int failed(const char *what)
{
	fprintf(stderr, "sort: %s: %s\n", what, xpm_last_error());
	return 1;
}

int main(int argc, char **argv)
{
	struct xpm_options options;
	struct xpm_statistics statistics;
	uint64_t len = argc == 3 ? strtoull(argv[2], NULL, 10) << 20 : 0;

	if (len == 0) {
		fprintf(stderr, "usage: sort NAME MIB\n");
		return 2;
	}
	memset(&options, 0, sizeof options);
	options.size = sizeof options;
	options.budget = len / 4;

	struct xpm_space *space = xpm_open(argv[1], &options);
	if (!space)
		return failed("open");
	struct xpm_mapping *mapping = xpm_carve(space, len);
	if (!mapping)
		return failed("carve");

	uint64_t *numbers = xpm_address(mapping), count = len / sizeof *numbers, sum = 0, state = 1;
	for (uint64_t i = 0; i < count; i++) {
		state = state * 6364136223846793005u + 1442695040888963407u;
		numbers[i] = state;
		sum += state;
	}
	sort(numbers, numbers + count - 1);
	for (uint64_t i = 0; i < count; i++) {
		sum -= numbers[i];
		if (i > 0 && numbers[i - 1] > numbers[i]) {
			fprintf(stderr, "sort: number %llu is not in order\n", (unsigned long long)i);
			return 1;
		}
	}
	if (sum != 0) {
		fprintf(stderr, "sort: they are not the numbers that they were\n");
		return 1;
	}
	if (xpm_stats(space, &statistics))
		return failed("statistics");
	printf("%llu numbers sorted, %llu pages written, %llu fetched\n", (unsigned long long)count,
	       (unsigned long long)statistics.written, (unsigned long long)statistics.fetched);
	xpm_unmap(mapping);
	return xpm_close(space) ? failed("close") : 0;
}
