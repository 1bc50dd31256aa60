/* The calls of CANN's runtime that need an answer; all others return 0 (stand_in_cann.py). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static __thread int32_t current = 0;
static char handle[64]; /* every stream, event, context and communicator is this one */

/* Device */
int aclrtGetDeviceCount(uint32_t *n) {
    const char *text = getenv("STAND_IN_NPUS");
    *n = text ? (uint32_t)atoi(text) : 1;
    return 0;
}
int aclrtSetDevice(int32_t device) { current = device; return 0; }
int aclrtGetDevice(int32_t *device) { *device = current; return 0; }
char *aclrtGetSocName(void) { return "Ascend910B1"; }
char *aclGetRecentErrMsg(void) { return "stand-in CANN"; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 20; return 0; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 0; return 0; }
int aclrtGetMemInfo(int what, size_t *unused, size_t *total) {
    *unused = *total = (size_t)8 << 30;
    return 0;
}
size_t aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char *value, size_t n) { strcpy(value, "0"); return 0; }

/* Handles */
int aclrtGetCurrentContext(void **context) { *context = handle; return 0; }
int aclrtCreateStream(void **stream) { *stream = malloc(64); return 0; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {
    *stream = malloc(64);
    return 0;
}
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { *event = malloc(64); return 0; }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = malloc(64); return 0; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return 0; }
int aclrtEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; return 0; }

/* Memory: the host's */
int aclrtMalloc(void **p, size_t n, int policy) {
    if (posix_memalign(p, 512, n)) return 1;
    memset(*p, 0, n);
    return 0;
}
int aclrtMallocAlign32(void **p, size_t n, int policy) { return aclrtMalloc(p, n, policy); }
int aclrtMallocHost(void **p, size_t n) { return aclrtMalloc(p, n, 0); }
int aclrtFree(void *p) { free(p); return 0; }
int aclrtFreeHost(void *p) { free(p); return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) {
    memmove(to, from, n);
    return 0;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    memmove(to, from, n);
    return 0;
}
int aclrtMemset(void *p, size_t room, int32_t value, size_t n) { memset(p, value, n); return 0; }
int aclrtMemsetAsync(void *p, size_t room, int32_t value, size_t n, void *stream) {
    memset(p, value, n);
    return 0;
}

/* Collectives of one rank */
static size_t width(int type) {
    static const size_t bytes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
    return type >= 0 && type < 12 ? bytes[type] : 1;
}
int HcclAllReduce(void *s, void *r, uint64_t n, int type, int op, void *c, void *stream) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclReduce(void *s, void *r, uint64_t n, int type, int op, uint32_t to, void *c, void *st) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclReduceScatter(void *s, void *r, uint64_t n, int type, int op, void *c, void *stream) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclAllGather(void *s, void *r, uint64_t n, int type, void *c, void *stream) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclScatter(void *s, void *r, uint64_t n, int type, uint32_t from, void *c, void *stream) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclAllGatherV(void *s, uint64_t n, void *r, void *counts, void *offsets, int type, void *c,
                   void *stream) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclReduceScatterV(void *s, void *counts, void *offsets, void *r, uint64_t n, int type, int op,
                       void *c, void *stream) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclAlltoAllV(void *s, uint64_t *n, void *from, int type, void *r, void *m, void *to, int rtype,
                  void *c, void *stream) {
    memmove(r, s, n[0] * width(type));
    return 0;
}
int HcclAlltoAll(void *s, uint64_t n, int type, void *r, uint64_t m, int rtype, void *c, void *st) {
    memmove(r, s, n * width(type));
    return 0;
}
int HcclGetRootInfo(void *info) { memset(info, 0, 4108); return 0; }
int HcclCommInitRootInfo(uint32_t n, const void *info, uint32_t rank, void **c) {
    *c = handle;
    return 0;
}
int HcclCommInitRootInfoConfig(uint32_t n, const void *i, uint32_t r, void **c, const void *k) {
    *c = handle;
    return 0;
}
int HcclGetCommAsyncError(void *c, int *error) { *error = 0; return 0; }
int HcclGetCommName(void *c, char *name) { strcpy(name, "one"); return 0; }
