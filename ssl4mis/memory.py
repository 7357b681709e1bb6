"""Process memory settings."""
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_pages() -> bool:
    """Let glibc keep freed pages instead of returning them at every step (results unchanged); False without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    return all([libc.mallopt(name, value) for name, value in settings])
