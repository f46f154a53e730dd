/* Stand-in for libopapi (aclnn kernels): logs each tensor as [shape:type:format], then the kernel's name. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void stub_log(const char *format, const char *what);

void *aclCreateTensor(const int64_t *shape, uint64_t dims, int type, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage, uint64_t storage_dims, void *data) {
    char text[256];
    int end = 0;
    for (uint64_t i = 0; i < dims && end < 200; i++)
        end += snprintf(text + end, sizeof text - end, i ? ",%ld" : "%ld", (long)shape[i]);
    snprintf(text + end, sizeof text - end, ":%d:%d", type, format);
    stub_log(" [%s]", text);
    return malloc(64);
}
