// A CUDA runtime that hands every kernel launch to a callback. It is linked instead of libcudart with code
// that nvcc compiled with -cudart none, so the launchers compute grids, blocks and shared memory as on a GPU.

#include <stddef.h>
#include <string.h>

typedef struct {
    unsigned x, y, z;
} Dim3;

typedef struct {
    Dim3 grid, block;
    size_t shared;
    void* stream;
    const int* attributes;
    unsigned attribute_count;
} LaunchConfig;

typedef int (*Hook)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                    size_t shared);

enum { INVALID_VALUE = 1, INVALID_FUNCTION = 98, MAX_KERNELS = 4096, MAX_SHARED = 227 * 1024 };
enum { FUNCTION_MAX_DYNAMIC_SHARED = 8, LAUNCH_CLUSTER = 4 };
enum { DEVICE_MULTIPROCESSORS = 16, DEVICE_MAJOR = 75, DEVICE_MINOR = 76, DEVICE_MAX_SHARED = 97 };

static Hook hook;
static int capability = 80;
static Dim3 pushed_grid, pushed_block;
static size_t pushed_shared;
static void* pushed_stream;
static int last_error;
static int kernel_count;
static struct {
    const void* function;
    const char* name;
    size_t max_shared;
} kernels[MAX_KERNELS];

void fake_cuda_start(Hook new_hook, int new_capability) {
    hook = new_hook;
    capability = new_capability;
}

static int fail(int error) {
    if (error) last_error = error;
    return error;
}

static int find(const void* function) {
    for (int i = 0; i < kernel_count; i++)
        if (kernels[i].function == function) return i;
    return -1;
}

static int launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
    int i = find(function);
    unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    if (i < 0) return fail(INVALID_FUNCTION);
    if (shared > kernels[i].max_shared || (size_t)block.x * block.y * block.z > 1024)
        return fail(INVALID_VALUE);
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return fail(INVALID_VALUE);
    return fail(hook(kernels[i].name, g, b, arguments, shared));
}

// What the code that nvcc generates calls.

void** __cudaRegisterFatBinary(void* binary) {
    static void* handle;
    (void)binary;
    return &handle;
}
char __cudaInitModule(void** handle) {
    (void)handle;
    return 1;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external, size_t size,
                       int constant, int global) {
    (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant,
        (void)global;
}

void __cudaRegisterFunction(void** handle, const char* function, char* device, const char* name, int limit,
                            void* a, void* b, void* c, void* d, int* size) {
    (void)handle, (void)device, (void)limit, (void)a, (void)b, (void)c, (void)d, (void)size;
    if (kernel_count == MAX_KERNELS) return;
    kernels[kernel_count].function = function;
    kernels[kernel_count].name = name;
    kernels[kernel_count++].max_shared = 48 * 1024;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
    pushed_grid = grid, pushed_block = block, pushed_shared = shared, pushed_stream = stream;
    return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
    *grid = pushed_grid, *block = pushed_block, *shared = pushed_shared, *(void**)stream = pushed_stream;
    return 0;
}

int __cudaGetKernel(void** kernel, const void* function) {
    *kernel = (void*)function;
    return 0;
}

int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
    (void)stream;
    return launch(kernel, grid, block, arguments, shared);
}

// The functions of the runtime that launchers may call.

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                     void* stream) {
    (void)stream;
    return launch(function, grid, block, arguments, shared);
}

int cudaLaunchKernelExC(const LaunchConfig* config, const void* function, void** arguments) {
    const char* attribute = (const char*)config->attributes;
    for (unsigned i = 0; i < config->attribute_count; i++, attribute += 72)
        if (*(const int*)attribute == LAUNCH_CLUSTER) return fail(INVALID_VALUE);
    return launch(function, config->grid, config->block, arguments, config->shared);
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
    int i = find(function);
    if (i < 0) return fail(INVALID_FUNCTION);
    if (attribute == FUNCTION_MAX_DYNAMIC_SHARED) {
        if (value < 0 || value > MAX_SHARED) return fail(INVALID_VALUE);
        kernels[i].max_shared = value;
    }
    return 0;
}

int cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}
int cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorString(int error) {
    return error == 0 ? "no error" : error == INVALID_VALUE ? "invalid argument" : "launch failure";
}

int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int device) { return device ? fail(INVALID_VALUE) : 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case DEVICE_MULTIPROCESSORS:
            *value = capability >= 90 ? 132 : 108;
            return 0;
        case DEVICE_MAJOR:
            *value = capability / 10;
            return 0;
        case DEVICE_MINOR:
            *value = capability % 10;
            return 0;
        case DEVICE_MAX_SHARED:
            *value = capability >= 90 ? 227 * 1024 : 163 * 1024;
            return 0;
        default:
            return fail(INVALID_VALUE);
    }
}

int cudaMemsetAsync(void* data, int value, size_t size, void* stream) {
    (void)stream;
    memset(data, value, size);
    return 0;
}
int cudaStreamSynchronize(void* stream) {
    (void)stream;
    return 0;
}
