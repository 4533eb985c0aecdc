import ctypes
import sys

xpm = ctypes.CDLL("libxpm.so.0", use_errno=True)


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("allocator", ctypes.c_char_p),
        ("token_file", ctypes.c_char_p),
        ("budget", ctypes.c_uint64),
        ("kept", ctypes.c_uint64),
        ("threads", ctypes.c_uint32),
        ("force", ctypes.c_int),
        ("client", ctypes.c_char_p),
        ("budget_percent", ctypes.c_uint64),
    ]


def pointer(function, *kinds):
    function.restype, function.argtypes = ctypes.c_void_p, kinds
    return function


last_error = xpm.xpm_last_error
last_error.restype = ctypes.c_char_p
open_space = pointer(xpm.xpm_open, ctypes.c_char_p, ctypes.POINTER(Options))
carve = pointer(xpm.xpm_carve, ctypes.c_void_p, ctypes.c_uint64)
address = pointer(xpm.xpm_address, ctypes.c_void_p)
xpm.xpm_unmap.argtypes = xpm.xpm_close.argtypes = [ctypes.c_void_p]

# XPM_ALLOCATOR=http://HOST:7700 python3 external.py NAME, where NAME was made by: xpm alloc create NAME --size 64MiB
options = Options(size=ctypes.sizeof(Options), budget=4 << 20)
space = open_space(sys.argv[1].encode(), ctypes.byref(options))
mapping = carve(space, 16 << 20) if space else None
if not mapping:
    sys.exit(last_error().decode())
numbers = memoryview((ctypes.c_uint64 * (2 << 20)).from_address(address(mapping))).cast("B").cast("Q")
for start in range(0, 2 << 20, 1 << 16):
    numbers[start : start + (1 << 16)] = memoryview((ctypes.c_uint64 * (1 << 16))(*range(start, start + (1 << 16)))).cast("B").cast("Q")
print("the sum is", sum(numbers))
numbers.release()
xpm.xpm_unmap(mapping)
xpm.xpm_close(space)
