#include <stdint.h>
#include <stdio.h>
#include <xpm.h>

// XPM_ALLOCATOR=http://HOST:7700 ./external NAME, where NAME was made by: xpm alloc create NAME --size 64MiB
int main(int argc, char **argv)
{
	struct xpm_options options = { .size = sizeof options, .budget = 4 << 20 };
	struct xpm_space *space = argc == 2 ? xpm_open(argv[1], &options) : NULL;
	struct xpm_mapping *mapping = space ? xpm_carve(space, 16 << 20) : NULL;

	if (!mapping) {
		fprintf(stderr, "%s\n", argc == 2 ? xpm_last_error() : "usage: external NAME");
		return 1;
	}
	uint64_t *numbers = xpm_address(mapping), sum = 0;
	for (uint64_t i = 0; i < 2 << 20; i++)
		numbers[i] = i;
	for (uint64_t i = 0; i < 2 << 20; i++)
		sum += numbers[i];
	// System calls may be given external memory.
	fprintf(stderr, "%zu numbers\n", fwrite(numbers, sizeof *numbers, 1 << 20, fopen("/dev/null", "w")));
	printf("the sum is %llu\n", (unsigned long long)sum);
	xpm_unmap(mapping);
	return xpm_close(space) ? 1 : 0;
}
