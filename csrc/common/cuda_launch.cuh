// One launch of a kernel: grid, cluster, shared memory, and whether it may begin before the kernel before it
// on the stream has ended (compute capability 9.0; the kernel then calls wait_for_previous_kernel first).
#pragma once

#include <cuda_runtime.h>

namespace crossvit {

struct LaunchShape {
    dim3 grid;
    unsigned threads;
    size_t shared = 0;       // bytes of dynamic shared memory
    size_t most_shared = 0;  // that a block may have on this GPU
    unsigned cluster = 1;    // blocks along x; more than one needs compute capability 9.0
    bool overlaps = false;
};

template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), const LaunchShape& shape, cudaStream_t stream,
                   const Argument& argument) {
    // More than 48 KB have to be asked for: as much as there is, so that threads that launch one kernel with
    // different sizes do not take from each other.
    if (shape.shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shape.most_shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream;
    config.attrs = attributes;
    if (shape.cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = shape.cluster;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (shape.overlaps) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    void* arguments[] = {const_cast<Argument*>(&argument)};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace crossvit
