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
    const struct Attribute* attributes;
    unsigned attribute_count;
} LaunchConfig;

typedef struct Attribute {
    int id;
    union {
        unsigned cluster[3];
        int allowed;
        char size[64];
    } __attribute__((aligned(8))) value;
} Attribute;

// cudaFuncAttributes
typedef struct {
    size_t shared, constants, local;
    int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared, rest[24];
} FunctionAttributes;

// `dependent`: the launch may begin before the one before it has ended.
typedef int (*Hook)(const char* kernel, const unsigned* grid, const unsigned* block, const unsigned* cluster,
                    int dependent, void** arguments, size_t shared);

enum { INVALID_VALUE = 1, INVALID_FUNCTION = 98, LAUNCH_FAILURE = 719, NOT_SUPPORTED = 801 };
enum { MAX_KERNELS = 4096, MAX_CLUSTER = 8, WITHOUT_ASKING = 48 * 1024 };
enum { FUNCTION_MAX_DYNAMIC_SHARED = 8 };
enum {
    LAUNCH_IGNORED = 0,
    LAUNCH_CLUSTER = 4,
    LAUNCH_CLUSTER_POLICY = 5,
    LAUNCH_DEPENDENT = 6,
    LAUNCH_PRIORITY = 8
};

static Hook hook;
static int capability, multiprocessors, code_version;
static size_t max_shared;
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

// shared: the most bytes of shared memory that a block may ask for
void fake_cuda_start(Hook new_hook, int new_capability, size_t shared, int processors, int code) {
    hook = new_hook;
    code_version = code;
    capability = new_capability;
    max_shared = shared;
    multiprocessors = processors;
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

static int launch(const LaunchConfig* config, const void* function, void** arguments) {
    int i = find(function), dependent = 0;
    Dim3 grid = config->grid, block = config->block;
    unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    const unsigned* cluster = NULL;
    if (i < 0) return fail(INVALID_FUNCTION);
    if (config->shared > kernels[i].max_shared || config->shared > max_shared) return fail(INVALID_VALUE);
    if ((size_t)block.x * block.y * block.z > 1024 || block.z > 64) return fail(INVALID_VALUE);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        return fail(INVALID_VALUE);
    for (unsigned k = 0; k < config->attribute_count; k++) {
        const Attribute* attribute = &config->attributes[k];
        switch (attribute->id) {
            case LAUNCH_IGNORED:
            case LAUNCH_CLUSTER_POLICY:
            case LAUNCH_PRIORITY:
                break;
            case LAUNCH_CLUSTER:
                cluster = attribute->value.cluster;
                break;
            case LAUNCH_DEPENDENT:
                dependent = attribute->value.allowed;
                break;
            default:
                return fail(NOT_SUPPORTED);
        }
    }
    if ((cluster || dependent) && capability < 90) return fail(INVALID_VALUE);
    if (cluster) {
        size_t blocks = 1;
        for (int k = 0; k < 3; k++) {
            blocks *= cluster[k];
            if (!cluster[k] || cluster[k] > MAX_CLUSTER || g[k] % cluster[k]) return fail(INVALID_VALUE);
        }
        if (blocks > MAX_CLUSTER) return fail(INVALID_VALUE);
    }
    return fail(hook(kernels[i].name, g, b, cluster, dependent, arguments, config->shared));
}

static int launch_plainly(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
    LaunchConfig config = {grid, block, shared, NULL, NULL, 0};
    return launch(&config, function, arguments);
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
    kernels[kernel_count++].max_shared = WITHOUT_ASKING;
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
    return launch_plainly(kernel, grid, block, arguments, shared);
}

// The functions of the runtime that launchers may call.

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                     void* stream) {
    (void)stream;
    return launch_plainly(function, grid, block, arguments, shared);
}

int cudaLaunchKernelExC(const LaunchConfig* config, const void* function, void** arguments) {
    return launch(config, function, arguments);
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
    int i = find(function);
    if (i < 0) return fail(INVALID_FUNCTION);
    if (attribute == FUNCTION_MAX_DYNAMIC_SHARED) {
        if (value < 0 || (size_t)value > max_shared) return fail(INVALID_VALUE);
        kernels[i].max_shared = value;
    }
    return 0;
}

int cudaFuncGetAttributes(FunctionAttributes* attributes, const void* function) {
    int i = find(function);
    if (i < 0) return fail(INVALID_FUNCTION);
    memset(attributes, 0, sizeof *attributes);
    attributes->max_threads = 1024;
    attributes->ptx_version = code_version;
    attributes->max_dynamic_shared = (int)kernels[i].max_shared;
    return 0;
}

int cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}
int cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorName(int error) {
    switch (error) {
        case 0:
            return "cudaSuccess";
        case INVALID_VALUE:
            return "cudaErrorInvalidValue";
        case INVALID_FUNCTION:
            return "cudaErrorInvalidDeviceFunction";
        case LAUNCH_FAILURE:
            return "cudaErrorLaunchFailure";
        case NOT_SUPPORTED:
            return "cudaErrorNotSupported";
        default:
            return "unrecognized error code";
    }
}
const char* cudaGetErrorString(int error) {
    switch (error) {
        case 0:
            return "no error";
        case INVALID_VALUE:
            return "invalid argument";
        case INVALID_FUNCTION:
            return "invalid device function";
        case LAUNCH_FAILURE:
            return "unspecified launch failure";
        case NOT_SUPPORTED:
            return "operation not supported";
        default:
            return "unrecognized error code";
    }
}

int cudaGetDevice(int* device) { return *device = 0; }
int cudaGetDeviceCount(int* count) {
    *count = 1;
    return 0;
}
int cudaSetDevice(int device) { return device ? fail(INVALID_VALUE) : 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    if (device) return fail(INVALID_VALUE);
    switch (attribute) {
        case 1:  // threads of a block
            *value = 1024;
            return 0;
        case 8:  // shared memory of a block that does not ask
            *value = WITHOUT_ASKING;
            return 0;
        case 10:  // threads of a warp
            *value = 32;
            return 0;
        case 16:
            *value = multiprocessors;
            return 0;
        case 75:
            *value = capability / 10;
            return 0;
        case 76:
            *value = capability % 10;
            return 0;
        case 97:  // shared memory of a block that asks
            *value = (int)max_shared;
            return 0;
        case 120:  // clusters
            *value = capability >= 90;
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
