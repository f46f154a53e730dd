/* Stand-in for libascendcl: one device in host memory. Allocation and copies are real; nothing computes.
   STUB_SOC names the chip, STUB_LOG the file that lists what would have been launched. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef long status;

void stub_log(const char *format, const char *what) {
    static FILE *file;
    if (!file) {
        const char *path = getenv("STUB_LOG");
        if (!path || !(file = fopen(path, "a"))) return;
        setvbuf(file, 0, _IOLBF, 0);
    }
    fprintf(file, format, what);
}

const char *aclrtGetSocName(void) { return getenv("STUB_SOC"); }
const char *aclGetRecentErrMsg(void) { return "stand-in"; }

status aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }
status aclrtGetDevice(int *device) { *device = 0; return 0; }
status aclrtSetDevice(int device) { return 0; }
status aclrtGetPrimaryCtxState(int device, unsigned *flags, int *active) { if (flags) *flags = 0; *active = 1; return 0; }
static char context;
status aclrtGetCurrentContext(void **out) { *out = &context; return 0; }

static status allocate(void **out, size_t size) { return posix_memalign(out, 512, size ? size : 512); }
status aclrtMalloc(void **out, size_t size, int policy) { return allocate(out, size); }
status aclrtMallocAlign32(void **out, size_t size, int policy) { return allocate(out, size); }
status aclrtMallocHost(void **out, size_t size) { return allocate(out, size); }
status aclrtMallocHostWithCfg(void **out, size_t size, void *config) { return allocate(out, size); }
status aclrtFree(void *memory) { free(memory); return 0; }
status aclrtFreeHost(void *memory) { free(memory); return 0; }
status aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
    *available = (size_t)60 << 30; *total = (size_t)64 << 30; return 0;
}
status aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
status aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size); return 0;
}
status aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size); return 0;
}
status aclrtMemset(void *to, size_t room, int value, size_t size) { memset(to, value, size); return 0; }
status aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream) { memset(to, value, size); return 0; }

static status handle(void **out) { *out = malloc(64); return 0; }
status aclrtCreateStream(void **out) { return handle(out); }
status aclrtCreateStreamWithConfig(void **out, unsigned priority, unsigned flags) { return handle(out); }
status aclrtCreateEventExWithFlag(void **out, unsigned flags) { return handle(out); }
status aclrtCreateEventWithFlag(void **out, unsigned flags) { return handle(out); }
status aclrtQueryEventStatus(void *event, int *done) { *done = 1; return 0; }
status aclQueryEventRecordedStatus(void *event, int *done) { *done = 1; return 0; }
status aclrtStreamQuery(void *stream, int *state) { *state = 0; return 0; }

size_t aclGetCompileoptSize(int option) { return 64; }
status aclGetCompileopt(int option, char *out, size_t size) { memset(out, 0, size); strcpy(out, "disable"); return 0; }
status aclopCompileAndExecute(const char *name, ...) { stub_log("aclop %s\n", name); return 0; }
status aclopCompileAndExecuteV2(const char *name, ...) { stub_log("aclop %s\n", name); return 0; }

/* Graphs: torch_npu asks whether it is capturing, and refuses by itself what cannot be captured. */
static uint64_t capturing;
status aclmdlRICaptureBegin(void *stream, int mode) { capturing = 1; return 0; }
status aclmdlRICaptureEnd(void *stream, void **model) { capturing = 0; *model = &capturing; return 0; }
status aclmdlRICaptureGetInfo(void *stream, int *state, void **model) {
    *state = capturing; if (model) *model = &capturing; return 0;
}
status aclmdlRIExecuteAsync(void *model, void *stream) { stub_log("graph %s\n", "replay"); return 0; }
