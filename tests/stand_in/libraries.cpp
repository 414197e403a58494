// Stand-ins for what candle opens besides the driver: cuBLAS and cuRAND that start, take their settings, and compute
// nothing.
#include <cstddef>

#define CALL extern "C" __attribute__((visibility("default"))) int

static char handle;

CALL cublasCreate_v2(void** to) { return *to = &handle, 0; }
CALL cublasDestroy_v2(void*) { return 0; }
CALL cublasSetStream_v2(void*, void*) { return 0; }
CALL cublasSetWorkspace_v2(void*, void* at, size_t bytes) { return at && bytes ? 0 : 7; }
CALL curandCreateGenerator(void** to, int) { return *to = &handle, 0; }
CALL curandDestroyGenerator(void*) { return 0; }
CALL curandSetStream(void*, void*) { return 0; }
CALL curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }
CALL curandSetGeneratorOffset(void*, unsigned long long) { return 0; }
