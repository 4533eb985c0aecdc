// External memory at addresses: the C library of xpm. See xpm(3). Made from libxpm/src by cbindgen.
//
// Functions that give an int give 0, or a negative errno; those that give a pointer give NULL and set errno.
// xpm_last_error() then says in one line what was wrong, and what to do instead. All functions may be called by
// any thread. Link with -lxpm.


#ifndef XPM_H
#define XPM_H

#include <stddef.h>
#include <stdint.h>

// For the member `threads` of the options: pages are brought by the threads that touch them.
#define XPM_IN_LINE UINT32_MAX

// Nothing is known of how it will be used.
#define XPM_NORMAL 0

// From the start to the end: it is fetched far ahead.
#define XPM_SEQUENTIAL 1

// Here and there: nothing is fetched ahead.
#define XPM_RANDOM 2

// Soon: it is brought, as far as there is room, without waiting for it.
#define XPM_WILLNEED 3

// Not soon: it leaves local memory; what was changed is written first. Blocks for that.
#define XPM_DONTNEED 4

// It stays in local memory, which it is brought into first; no more than half of the budget.
#define XPM_PIN 5

// It need not stay any more.
#define XPM_UNPIN 6

// Bytes at addresses, that are a part of a space.
struct xpm_mapping;

// An allocation at addresses of this process.
struct xpm_space;

// How an allocation is opened. Fill it with zeros first; what stays zero has the value that is said.
struct xpm_options {
  // sizeof(struct xpm_options), so that later versions can have more.
  size_t size;
  // URLs of the allocators, with commas between them. NULL: what the environment variable XPM_ALLOCATOR says, or else
  // `allocator` in ~/.config/xpm/xpm.toml or /etc/xpm/xpm.toml.
  const char *allocator;
  // File with the secret of the control plane. NULL: what the environment variable XPM_TOKEN_FILE says, or else `token-file` in
  // one of those files. Empty: none.
  const char *token_file;
  // Local memory in bytes to be used as cache, at least 256 KiB. 0: 64 MiB.
  uint64_t budget;
  // Bytes at the start of the allocation whose content stays, for xpm_map(), in 2 MiB; UINT64_MAX: all. 0: none.
  uint64_t kept;
  // Threads that bring pages; whatever touches memory may touch the mapping, write(2) and other system calls included. 0: one.
  // XPM_IN_LINE: none; the thread that touches a page brings it itself, in a handler of SIGBUS: quicker, but system calls that are given
  // absent pages fail with EFAULT.
  uint32_t threads;
  // Nonzero: takes the allocation from another owner, who is cut off.
  int force;
  // Identity of this client, 32 hexadecimal digits: after a crash it is let in again. NULL: a new one.
  const char *client;
  // Local memory in percent, 1 to 100, of the memory that is free on this machine and in this process's cgroups, in place of
  // `budget`: it follows that, and becomes less when memory is short. 0: `budget` says it.
  uint64_t budget_percent;
};

// What happened in a space, and what it has. Counts begin when it is opened.
struct xpm_statistics {
  // Local memory that may be used, in bytes.
  uint64_t budget;
  // Local memory that is used, in bytes.
  uint64_t resident;
  // Pages that were touched and were not in local memory.
  uint64_t faults;
  // Pages fetched from external memory.
  uint64_t fetched;
  // Those of them that were fetched ahead.
  uint64_t prefetched;
  // Pages that left local memory unchanged.
  uint64_t dropped;
  // Pages that were written to external memory.
  uint64_t written;
  // Operations on external memory that failed.
  uint64_t errors;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// What the last call of this thread that failed had to say, in one line. Valid until the next such call of this thread;
// never NULL.
const char *xpm_last_error(void);

// Version of the library, as "0.1.0".
const char *xpm_version(void);

// Becomes the owner of an allocation and shows it at addresses. Blocks until its appliances are connected. The
// allocation has to exist (xpm alloc create).
//
// # Safety
// `name` is a string, `options` a structure as described.
struct xpm_space *xpm_open(const char *name,
                           const struct xpm_options *options);

// Ends a space and its buffers, and gives the allocation back. -EBUSY while it has mappings: nothing happened then. After any
// other error the space is gone, and the allocation may still be this client's.
//
// # Safety
// `space` is one of xpm_open() that was not closed, or NULL, and nobody uses it.
int xpm_close(struct xpm_space *space);

// Carves a slab of at least `len` bytes out of the allocation: zeros, with no message to anyone. What it holds is
// forgotten when it is unmapped.
//
// # Safety
// `space` is one of xpm_open() that was not closed.
struct xpm_mapping *xpm_carve(struct xpm_space *space,
                              uint64_t len);

// Shows `len` bytes at `offset` of the allocation, in whole pages, within what is kept: with what they hold, which
// stays. `writable`: 0 for read-only.
//
// # Safety
// As of xpm_carve().
struct xpm_mapping *xpm_map(struct xpm_space *space,
                            uint64_t offset,
                            uint64_t len,
                            int writable);

// Makes a slab with a name, of at least `len` bytes, rounded up to a power of two and to 2 MiB: zeros. What is written to
// it stays when the program ends, and belongs to whoever owns the allocation then. Blocks until the allocator has written it
// down. While another slab has the name, EEXIST.
//
// # Safety
// As of xpm_carve(); `name` is a string.
struct xpm_mapping *xpm_slab_create(struct xpm_space *space,
                                    const char *name,
                                    uint64_t len);

// Shows a slab with a name, with what it holds; writing to it is a SIGSEGV unless `writable`. While there is none, ENOENT.
//
// # Safety
// As of xpm_slab_create().
struct xpm_mapping *xpm_slab_open(struct xpm_space *space,
                                  const char *name,
                                  int writable);

// Removes a slab with a name, which must not be mapped (EBUSY); what it held is forgotten.
//
// # Safety
// As of xpm_slab_create().
int xpm_slab_remove(struct xpm_space *space, const char *name);

// Memory of `len` bytes for xpm_get() and xpm_put() that transports use as it is: over RDMA nothing is copied then. It is local
// memory besides the budget.
//
// # Safety
// As of xpm_carve().
void *xpm_buffer(struct xpm_space *space,
                 size_t len);

// Gives memory of xpm_buffer() back; it is used again for the next one of that length.
//
// # Safety
// As of xpm_carve(); nobody uses the memory any more.
int xpm_buffer_free(struct xpm_space *space, void *buffer);

// Changes how many bytes of local memory may be used.
//
// # Safety
// As of xpm_carve().
int xpm_set_budget(struct xpm_space *space, uint64_t bytes);

// Bytes of the allocation that are in no slab, and are not kept. 0 for NULL.
//
// # Safety
// As of xpm_carve().
uint64_t xpm_free_bytes(const struct xpm_space *space);

// Says why a page of the space could last not be used, and so why an access was a SIGBUS: -EIO, and xpm_last_error() has the line;
// 0 when all pages could be used. Not for a handler of that signal: call it outside of one, or read the line on standard error.
//
// # Safety
// As of xpm_carve().
int xpm_space_error(const struct xpm_space *space);

// Writes what happened so far, and what is there, to `statistics`.
//
// # Safety
// As of xpm_carve(); `statistics` can be written to.
int xpm_stats(const struct xpm_space *space, struct xpm_statistics *statistics);

// A slab with what another mapping of the same space holds now: writes go to the slab only. The other one must not be
// written to while this one is there.
//
// # Safety
// `mapping` was not unmapped.
struct xpm_mapping *xpm_copy(const struct xpm_mapping *mapping);

// Ends a mapping. What was changed of a range that stays is written first; a slab is forgotten. NULL: nothing happens.
//
// # Safety
// `mapping` was not unmapped, and nobody uses its addresses any more.
void xpm_unmap(struct xpm_mapping *mapping);

// Its first byte, at the start of a page. NULL for NULL.
//
// # Safety
// `mapping` was not unmapped.
void *xpm_address(const struct xpm_mapping *mapping);

// Its length in bytes; of a slab what was asked for, rounded up to a power of two. 0 for NULL.
//
// # Safety
// `mapping` was not unmapped.
size_t xpm_length(const struct xpm_mapping *mapping);

// Writes what was changed of it to external memory, and waits until it is there.
//
// # Safety
// `mapping` was not unmapped.
int xpm_flush(const struct xpm_mapping *mapping);

// Writes what was changed of the pages of `len` bytes at `offset` of it, and waits until it is there.
//
// # Safety
// `mapping` was not unmapped.
int xpm_flush_range(const struct xpm_mapping *mapping, size_t offset, size_t len);

// Makes a slab at least `len` bytes long, rounded up to a power of two, or shorter, where it is: its address stays, and so does
// what it holds; what is new holds zeros, what is cut off is forgotten. -ENOMEM where it cannot grow there: it is as before then.
//
// # Safety
// `mapping` was not unmapped, and no other call uses it meanwhile; nobody uses addresses that are cut off.
int xpm_resize(struct xpm_mapping *mapping,
               uint64_t len);

// Makes the pages of `len` bytes at `offset` of a slab zeros again; local and external memory that they had is free then.
//
// # Safety
// `mapping` was not unmapped.
int xpm_clear(const struct xpm_mapping *mapping,
              size_t offset,
              size_t len);

// Says how `len` bytes at `offset` of it will be used: XPM_NORMAL and so on. Whole pages, those at the edges included.
//
// # Safety
// `mapping` was not unmapped.
int xpm_advise(const struct xpm_mapping *mapping,
               size_t offset,
               size_t len,
               int advice);

// Copies `len` bytes at `offset` of it to `to`, without a fault, and without taking room in local memory.
//
// # Safety
// `mapping` was not unmapped; `len` bytes at `to` can be written to, and are not external memory.
int xpm_get(const struct xpm_mapping *mapping, size_t offset, void *to, size_t len);

// Copies `len` bytes at `from` to `offset` of it, without a fault, and without taking room in local memory.
//
// # Safety
// `mapping` was not unmapped; `len` bytes at `from` can be read, and are not external memory.
int xpm_put(const struct xpm_mapping *mapping, size_t offset, const void *from, size_t len);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* XPM_H */
