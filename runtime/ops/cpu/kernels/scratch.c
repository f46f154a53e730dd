#include "common.h"

void *scratch(int use, long bytes) {
    static _Thread_local struct { void *at; long bytes; } kept[USES];
    if (bytes > kept[use].bytes) {
        free(kept[use].at);
        kept[use].bytes = (2 * bytes + 63) / 64 * 64;
        if (!(kept[use].at = aligned_alloc(64, kept[use].bytes))) abort();
    }
    return kept[use].at;
}
