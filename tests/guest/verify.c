/* A guest that is nothing but a verifier of its memory, for tests of virtual machines whose RAM is external.
 *
 * It is a Multiboot kernel, so QEMU starts it by `-kernel` in some milliseconds, in 32-bit protected mode without paging:
 *   gcc -m32 -march=i686 -O2 -ffreestanding -fno-pic -fno-stack-protector -nostdlib -static -Wl,-Ttext=0x100000 verify.c
 *
 * It fills all memory from 4 MiB up to what the boot loader says there is, then verifies every word of it for ever and
 * rewrites each tenth page in each pass (with -DEACH=2 each second one), and says after each pass on the serial port:
 *   pass 17 pages 15360 bad 0
 *
 * A page's content follows from its number and from the pass that wrote it last, and that pass follows from the pass now.
 * So a page that is old, another one's, or lost is bad. The pass now is kept in a register, which moves with the state of
 * the processor: memory that is old as a whole is bad too.
 */

typedef unsigned int u32;

#ifndef EACH
#define EACH 10
#endif

enum { PAGE = 4096, WORDS = PAGE / 4, FIRST = 4 << 20, COM1 = 0x3f8, LINE_STATUS = COM1 + 5 };

/* Not in memory; see above. */
register u32 pass asm("ebx");

/* Multiboot, version 1: magic, flags (memory sizes are wanted), checksum. */
asm(".section .text.head, \"ax\"\n"
    ".align 4\n"
    ".long 0x1BADB002, 2, -(0x1BADB002 + 2)\n"
    ".globl _start\n"
    "_start:\n"
    "  mov $stack_end, %esp\n"
    "  mov 8(%ebx), %eax\n" /* KiB above 1 MiB */
    "  xor %ebx, %ebx\n"
    "  push %eax\n"
    "  push $0\n"
    "  jmp verify\n"
    ".text\n"
    ".bss\n"
    ".space 16384\n"
    "stack_end:\n"
    ".text\n");

static inline unsigned char in(unsigned short port) {
    unsigned char value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void out(unsigned short port, unsigned char value) {
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void put(char c) {
    while (!(in(LINE_STATUS) & 0x20)) {
    }
    out(COM1, (unsigned char)c);
}

static void text(const char *s) {
    while (*s) put(*s++);
}

static void number(u32 value) {
    char digits[10];
    int count = 0;
    do digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    while (count) put(digits[--count]);
}

/* The pass that wrote this page last, as of the end of `now` passes. Pass 0 wrote all pages. */
static u32 written(u32 page, u32 now) {
    u32 ago = (now + EACH - page % EACH) % EACH;
    return ago > now ? 0 : now - ago;
}

static u32 first_word(u32 page, u32 writer) {
    u32 x = page * 2654435761u ^ writer * 2246822519u;
    x ^= x >> 15;
    return x * 3266489917u | 1;
}

static void fill(u32 page, u32 writer) {
    volatile u32 *at = (volatile u32 *)(page * PAGE);
    u32 word = first_word(page, writer);
    for (int i = 0; i < WORDS; i++, word = word * 747796405u + 2891336453u) at[i] = word;
}

static int is_right(u32 page, u32 writer) {
    volatile u32 *at = (volatile u32 *)(page * PAGE);
    u32 word = first_word(page, writer);
    for (int i = 0; i < WORDS; i++, word = word * 747796405u + 2891336453u)
        if (at[i] != word) return 0;
    return 1;
}

__attribute__((noreturn, used)) void verify(u32 upper_kib) {
    u32 end = (1 << 20) / PAGE + upper_kib / 4;
    u32 bad = 0;
    for (u32 page = FIRST / PAGE; page < end; page++) fill(page, 0);
    for (;;) {
        for (u32 page = FIRST / PAGE; page < end; page++) {
            if (!is_right(page, written(page, pass))) {
                bad++;
                fill(page, written(page, pass));
            }
            if (written(page, pass + 1) == pass + 1) fill(page, pass + 1);
        }
        pass++;
        text("pass ");
        number(pass);
        text(" pages ");
        number(end - FIRST / PAGE);
        text(" bad ");
        number(bad);
        text("\n");
    }
}
